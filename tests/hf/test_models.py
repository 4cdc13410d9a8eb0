"""Whole causal LMs of transformers 5.x: one graph, every MoE block fused, outputs and gradients right."""

from __future__ import annotations

import pytest
import torch

from moe_inductor.backend import moe_inductor as backend
from tests.hf.compare import (
    Compiled,
    assert_all_within_fp64_rule,
    check_inference,
    check_training,
    chosen_experts,
    experts_modules,
    find_case,
    randomise,
    require_transformers,
    train,
)

require_transformers(5)

VOCAB = 64
LAYERS = 2
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "pad_token_id": None,
}
MODELS = {
    "mixtral": {"intermediate_size": 24, "num_local_experts": 4},
    "qwen3_moe": {
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "num_experts": 6,
        "head_dim": 16,
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
    },
    "deepseek_v3": {
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
    },
}
# Only looked at with their eager loops.
LOOP_MODELS = {
    "olmoe": {"intermediate_size": 24, "num_experts": 6},
    "gpt_oss": {"intermediate_size": 24, "num_local_experts": 4, "head_dim": 16},
}
MOE_BLOCKS = {"mixtral": 2, "qwen3_moe": 2, "deepseek_v3": 1, "olmoe": 2, "gpt_oss": 2}
DTYPES = [torch.float32, torch.bfloat16]


def build(family: str, dtype: torch.dtype, **kwargs) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    implementation = kwargs.pop("experts_implementation", "grouped_mm")
    config = AutoConfig.for_model(family, **(COMMON | (MODELS | LOOP_MODELS)[family] | kwargs))
    config._experts_implementation = implementation
    model = randomise(AutoModelForCausalLM.from_config(config)).to(dtype)
    for each in experts_modules(model):
        assert each.config._experts_implementation == implementation
    return model


def tokens(length: int, batch: int = 2):
    def draw(generator: torch.Generator) -> torch.Tensor:
        return torch.randint(0, VOCAB, (batch, length), generator=generator)

    return draw


# Every two of family, dtype and dynamic, but not all three.
EVERY_TWO = [
    (family, dtype, True if (i + j) % 2 else None)
    for i, family in enumerate(MODELS)
    for j, dtype in enumerate(DTYPES)
]


@pytest.mark.parametrize(("family", "dtype", "dynamic"), EVERY_TWO, ids=str)
def test_forward(family, dtype, dynamic):
    model = build(family, dtype).eval()
    compiled = Compiled(model, dynamic=dynamic)
    check_inference(compiled, find_case(model, tokens(5)))
    compiled.assert_fused(MOE_BLOCKS[family])
    if dynamic:
        check_inference(compiled, find_case(model, tokens(7, batch=3)))
        compiled.assert_fused(MOE_BLOCKS[family], graphs=1)


@pytest.mark.parametrize(("family", "dtype", "dynamic"), EVERY_TWO, ids=str)
def test_training_step(family, dtype, dynamic):
    model = build(family, dtype).train()
    compiled = Compiled(model, dynamic=dynamic)
    check_training(compiled, find_case(model, tokens(5), count=4))
    compiled.assert_fused(MOE_BLOCKS[family])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_router_logits_and_auxiliary_loss(dtype):
    """The block's own router logits are read outside of it."""
    model = build("mixtral", dtype, output_router_logits=True, router_aux_loss_coef=0.5).train()
    compiled = Compiled(model)
    case = find_case(model, tokens(5), count=12)
    check_training(compiled, case)
    compiled.assert_fused(2)
    (ids, *_) = case.inputs
    result = model(ids, labels=ids)
    assert result.aux_loss > 0.1
    assert len(result.router_logits) == LAYERS


@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_checkpointing(dtype, reentrant):
    """The blocks lie in the bodies of higher-order ops; backward runs them again."""
    # With a cache, transformers breaks the graph by itself to log that there will be none.
    model = build("mixtral", dtype, use_cache=False).train()
    case = find_case(model, tokens(5), count=4)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    compiled = Compiled(model, inner="aot_eager")
    check_training(compiled, case)
    compiled.assert_fused(2)
    assert any("checkpoint" in op for op in compiled.backend.ops)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_autocast(implementation):
    """The weights are fp32; under autocast, batched_mm computes in bf16, and grouped_mm, which autocast does not know,
    in the dtype of the weights."""
    model = build("mixtral", torch.float32, experts_implementation=implementation)

    def chosen(module, x):
        with torch.autocast("cpu", torch.bfloat16, enabled=module is model):
            return chosen_experts(module, x)

    case = find_case(model, tokens(5), chosen, count=2)
    compiled = Compiled(model)
    for x in case.inputs:
        with torch.autocast("cpu", torch.bfloat16):
            ours, eager = train(compiled, model, x), train(model, model, x)
        exact = train(case.exact, case.exact, x)
        assert_all_within_fp64_rule(ours, eager, exact)
    compiled.assert_fused(2)
    computed = torch.float32 if implementation == "grouped_mm" else torch.bfloat16
    assert {b.moe.experts.compute_dtype for b in compiled.blocks} == {computed}


LOOPS = ["mixtral", "qwen3_moe", "deepseek_v3", "olmoe", "gpt_oss"]


# Every two of family, dtype and whether it is trained.
@pytest.mark.parametrize(
    ("family", "dtype", "trained"),
    [(f, d, (i + j) % 2 == 1) for i, f in enumerate(LOOPS) for j, d in enumerate(DTYPES)],
    ids=str,
)
def test_eager_loop(family, dtype, trained):
    """``experts_implementation="eager"``: a loop over the experts that were hit, in one graph without any flag."""
    # A second layer of gpt_oss in bf16 chooses by differences as small as the first layer's rounding.
    few = {"num_hidden_layers": 1} if (family, dtype) == ("gpt_oss", torch.bfloat16) else {}
    model = build(family, dtype, experts_implementation="eager", **few)
    # The gradient of gpt_oss's sinks has two numbers for each input.
    case = find_case(model.eval(), tokens(5), count=12 if few else 3)
    model.train(trained)
    compiled = Compiled(model)
    (check_training if trained else check_inference)(compiled, case)
    compiled.assert_fused(1 if few else MOE_BLOCKS[family])


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no_cache"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_eager_loop_generates_the_same_tokens(family, use_cache, monkeypatch):
    model = build(family, torch.float32, experts_implementation="eager").eval()
    model.generation_config.eos_token_id = None
    ids = tokens(5)(torch.Generator().manual_seed(0))

    def generate():
        return model.generate(
            ids, max_new_tokens=8, do_sample=False, use_cache=use_cache, pad_token_id=0
        )

    expected = generate()
    compiled = Compiled(model.forward)
    monkeypatch.setattr(model, "forward", compiled.run)
    assert torch.equal(generate(), expected)
    assert expected.shape[1] == 13
    assert compiled.blocks
    assert all(block.fused for block in compiled.blocks), [str(r) for r in compiled.reports]


def test_inductor_by_name():
    """The one line of the README, through real Inductor."""
    model = build("mixtral", torch.float32, num_hidden_layers=1).eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="moe_inductor")
    for length in (5, 8, 11):
        case = find_case(model, tokens(length))
        check_inference(compiled, case)
    assert 1 <= len(backend.reports) <= 2  # the second length makes the graph dynamic
    for report in backend.reports:
        assert report.summary().startswith("fused 1/1 MoE block ")


def test_generate():
    # Random tokens must not end the text.
    model = build("mixtral", torch.float32, num_hidden_layers=1, eos_token_id=None).eval()
    ids = tokens(4, batch=1)(torch.Generator().manual_seed(0))

    def generate() -> torch.Tensor:
        mask = torch.ones_like(ids)
        return model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)

    eager = generate()
    compiled = Compiled(model.forward)
    model.forward = compiled
    ours = generate()
    assert ours.shape == (1, 8)
    assert torch.equal(ours, eager)
    assert compiled.blocks
    assert all(block.fused for block in compiled.blocks)
