"""Real transformers models on a GPU, through Inductor: forward with and without CUDA graphs, and one training step."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.oracle import assert_within_fp64_rule

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

transformers = pytest.importorskip("transformers", minversion="5.0")

BASE = {
    "vocab_size": 128,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
}


def mixtral():
    config = transformers.MixtralConfig(
        **BASE, intermediate_size=96, num_local_experts=4, num_experts_per_tok=2
    )
    return transformers.MixtralForCausalLM(config)


def qwen3():
    config = transformers.Qwen3MoeConfig(
        **BASE,
        intermediate_size=96,
        moe_intermediate_size=64,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        head_dim=32,
        decoder_sparse_step=1,
    )
    return transformers.Qwen3MoeForCausalLM(config)


def dsv3():
    config = transformers.DeepseekV3Config(
        **BASE,
        intermediate_size=96,
        moe_intermediate_size=64,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        first_k_dense_replace=1,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        qk_nope_head_dim=16,
    )
    return transformers.DeepseekV3ForCausalLM(config)


def _chosen(model: torch.nn.Module, ids: torch.Tensor) -> list[torch.Tensor]:
    """The expert ids that every MoE layer is called with, sorted per token."""
    seen: list[torch.Tensor] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, args: seen.append(args[1].sort(-1).values))
        for name, module in model.named_modules()
        if name.endswith(".experts")
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return seen


def _noisy(model: torch.nn.Module, scale: float) -> torch.nn.Module:
    noisy = copy.deepcopy(model)
    with torch.no_grad():
        for p in noisy.parameters():
            p.mul_(1 + scale * torch.randn_like(p))
    return noisy


def _make(build, dtype):
    """Model in ``dtype``, the same in fp64, and a prompt far from ties.

    Routing is discrete: where two experts score alike, any rounding, Inductor's included, may choose the other one.
    So the prompt is one for which fp64 models with noise of the size of the dtype's rounding all choose alike.
    """
    scale = 2.0**-6 if dtype == torch.bfloat16 else 2.0**-18
    for seed in range(200):
        torch.manual_seed(seed)
        model = build().cuda()
        for p in model.parameters():
            if p.dim() > 1:
                torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5)
        model = model.to(dtype).eval()
        exact = copy.deepcopy(model).double()
        exact.set_experts_implementation("eager")  # grouped_mm has no fp64
        ids = torch.randint(0, 128, (1, 5), device="cuda")
        wanted = _chosen(exact, ids)
        others = (model, *(_noisy(exact, scale) for _ in range(4)))
        if all(all(map(torch.equal, _chosen(m, ids), wanted)) for m in others):
            return model, exact, ids
    raise AssertionError("no prompt without near ties found")


@pytest.mark.parametrize("build", [mixtral, qwen3, dsv3], ids=lambda b: b.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_forward(build, dtype, mode):
    torch._dynamo.reset()
    model, exact, ids = _make(build, dtype)
    options = {"moe_inductor.strict": True}
    if mode == "reduce-overhead":
        options["triton.cudagraphs"] = True
    compiled = torch.compile(model, backend="moe_inductor", options=options)
    with torch.no_grad():
        eager, truth = model(ids).logits, exact(ids).logits
        for _ in range(3):  # CUDA graphs: warm-up, record, replay
            ours = compiled(ids).logits.clone()
    assert_within_fp64_rule(ours, eager, truth, what="logits")


@pytest.mark.parametrize("build", [mixtral, qwen3, dsv3], ids=lambda b: b.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_training_step(build, dtype):
    torch._dynamo.reset()
    model, exact, ids = _make(build, dtype)
    compiled = torch.compile(model, backend="moe_inductor", options={"moe_inductor.strict": True})

    def step(run, module):
        module.zero_grad()
        out = run(ids, labels=ids)
        out.loss.backward()
        # Logits, not the loss: by how much one number is off says nothing about rounding.
        return [out.logits.detach(), *(p.grad for p in module.parameters())]

    eager = [t.clone() for t in step(model, model)]
    truth = step(exact, exact)
    ours = step(compiled, model)
    names = ["logits", *(name for name, _ in model.named_parameters())]
    for name, mine, theirs, wanted in zip(names, ours, eager, truth, strict=True):
        assert torch.isfinite(mine).all(), name
        error = (mine.double() - wanted).square().mean().sqrt()
        bound = 2 * (theirs.double() - wanted).square().mean().sqrt() + 1e-5
        assert error <= bound, f"{name}: {error:.3e} > {bound:.3e}"
