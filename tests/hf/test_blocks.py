"""MoE blocks of transformers 5.x alone: families, experts implementations, token counts."""

from __future__ import annotations

import dataclasses
import importlib

import pytest
import torch

from tests.hf.compare import (
    Compiled,
    assert_all_within_fp64_rule,
    check_inference,
    check_training,
    cotangent,
    experts_modules,
    find_case,
    randomise,
    require_transformers,
)

require_transformers(5)

HIDDEN, WIDTH, EXPERTS, K = 32, 24, 6, 2


@dataclasses.dataclass(frozen=True)
class Family:
    """block, config: class name and arguments; score: what its router chooses by."""

    block: str
    config: dict
    score: str

    def build(self, family: str, implementation: str, dtype: torch.dtype) -> torch.nn.Module:
        from transformers import AutoConfig

        sizes = {"hidden_size": HIDDEN, "num_experts_per_tok": K, "num_attention_heads": 2}
        config = AutoConfig.for_model(family, **(sizes | self.config))
        config._experts_implementation = implementation
        modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        block = randomise(getattr(modeling, self.block)(config)).to(dtype)
        (experts,) = experts_modules(block)
        assert experts.config._experts_implementation == implementation
        assert experts.gate_up_proj.shape == (EXPERTS, 2 * WIDTH, HIDDEN)
        return block


ONE_WIDTH = {"intermediate_size": WIDTH}
TWO_WIDTHS = {"intermediate_size": 40, "moe_intermediate_size": WIDTH}
GROUPS = {"n_routed_experts": EXPERTS, "n_group": 2, "topk_group": 1, "norm_topk_prob": True}
FAMILIES = {
    "mixtral": Family(
        "MixtralSparseMoeBlock", ONE_WIDTH | {"num_local_experts": EXPERTS}, score="softmax"
    ),
    "qwen3_moe": Family(
        "Qwen3MoeSparseMoeBlock",
        TWO_WIDTHS | {"num_experts": EXPERTS, "norm_topk_prob": True},
        score="softmax",
    ),
    "olmoe": Family(
        "OlmoeSparseMoeBlock",
        ONE_WIDTH | {"num_experts": EXPERTS, "norm_topk_prob": False},
        score="softmax",
    ),
    "qwen2_moe": Family(
        "Qwen2MoeSparseMoeBlock",
        TWO_WIDTHS | {"num_experts": EXPERTS, "shared_expert_intermediate_size": WIDTH},
        score="softmax",
    ),
    "jamba": Family("JambaSparseMoeBlock", ONE_WIDTH | {"num_experts": EXPERTS}, score="softmax"),
    "hunyuan_v1_moe": Family(
        "HunYuanMoEV1Moe", ONE_WIDTH | {"num_experts": EXPERTS, "moe_topk": K}, score="softmax"
    ),
    "deepseek_v3": Family("DeepseekV3MoE", TWO_WIDTHS | GROUPS, score="sigmoid"),
    "dots1": Family("Dots1MoE", TWO_WIDTHS | GROUPS | {"n_shared_experts": 1}, score="sigmoid"),
    "glm4_moe": Family(
        "Glm4MoeMoE", TWO_WIDTHS | GROUPS | {"n_shared_experts": 1}, score="sigmoid"
    ),
}
DTYPES = [torch.float32, torch.bfloat16]


def build(family: str, implementation: str, dtype: torch.dtype) -> torch.nn.Module:
    return FAMILIES[family].build(family, implementation, dtype)


def states(*shape: int, dtype: torch.dtype):
    def draw(generator: torch.Generator) -> torch.Tensor:
        return torch.randn(*shape, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)

    return draw


# One token: one family of each kind.
SHAPES = [(family, (2, 5)) for family in FAMILIES] + [
    (family, (1, 1)) for family in ("mixtral", "qwen2_moe", "deepseek_v3")
]


# Every two of block, implementation and dtype.
BLOCKS = [
    (family, shape, implementation, DTYPES[(i + j) % 2])
    for i, (family, shape) in enumerate(SHAPES)
    for j, implementation in enumerate(("grouped_mm", "batched_mm"))
]


@pytest.mark.parametrize(("family", "shape", "implementation", "dtype"), BLOCKS, ids=str)
def test_block(family, shape, implementation, dtype):
    block = build(family, implementation, dtype)
    compiled = Compiled(block)
    case = find_case(block, states(*shape, dtype=dtype), count=6 if shape == (2, 5) else 24)
    check_training(compiled, case)
    compiled.assert_fused(1)
    check_inference(compiled, case)
    compiled.assert_fused(1, graphs=2)  # without gradients it is another graph
    for report in compiled.blocks:
        assert report.location.startswith(("moe.py:", f"modeling_{family}.py:"))
        assert report.router_fused, str(report.router_reason)
        router = report.moe.router
        assert router.score == FAMILIES[family].score
        assert (router.groups is not None) == router.bias == (router.score == "sigmoid")


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_many_token_counts_on_one_module(family, implementation):
    """Dynamo makes the token count dynamic when it changes, and 1 is always a graph of its own."""
    block = build(family, implementation, torch.float32)
    compiled = Compiled(block)
    for count in (8, 9, 16, 33, 1):
        check_inference(compiled, find_case(block, states(1, count, dtype=torch.float32)))
    assert len(compiled.reports) <= 3, [str(r) for r in compiled.reports]
    compiled.assert_fused(1, graphs=len(compiled.reports))


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_no_tokens(implementation, dynamic):
    """Whatever eager does with nothing, and the other way round: nothing first, then something."""
    block = build("mixtral", implementation, torch.float32)
    nothing = torch.empty(1, 0, HIDDEN)
    compiled = Compiled(block, dynamic=dynamic)
    with torch.no_grad():
        torch.testing.assert_close(compiled(nothing), block(nothing), rtol=0.0, atol=0.0)
    check_inference(compiled, find_case(block, states(1, 7, dtype=torch.float32)))
    with torch.no_grad():
        torch.testing.assert_close(compiled(nothing), block(nothing), rtol=0.0, atol=0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_experts_alone(family, implementation, dtype):
    """Ids and weights are inputs of the graph; nothing in it says where they come from."""
    block = build(family, implementation, dtype)
    case = find_case(block, states(9, 1, dtype=dtype))
    router = block.gate
    with torch.no_grad():
        x = case.inputs[0].reshape(-1, HIDDEN)
        _, weights, ids = router(x)
    compiled = Compiled(block.experts)

    def step(run, experts, dtype):
        inputs = [t.to(dtype, copy=True).requires_grad_() for t in (x, weights)]
        experts.zero_grad()
        output = run(inputs[0], ids, inputs[1])
        (output * cotangent(output)).sum().backward()
        gradients = {n: p.grad for n, p in experts.named_parameters()}
        return {
            "output": output.detach(),
            "x": inputs[0].grad,
            "weights": inputs[1].grad,
        } | gradients

    exact = step(case.exact.experts, case.exact.experts, torch.float64)
    eager = {n: t.clone() for n, t in step(block.experts, block.experts, dtype).items()}
    assert_all_within_fp64_rule(step(compiled, block.experts, dtype), eager, exact)
    compiled.assert_fused(1)
    (report,) = compiled.blocks
    assert not report.router_fused
