"""transformers 4.x: OLMoE loops over ``range(E)`` and calls one module per expert, with ``torch.where`` in the loop."""

from __future__ import annotations

import pytest
import torch

from moe_inductor.backend import moe_inductor as backend
from tests.hf.compare import (
    Compiled,
    check_inference,
    check_training,
    find_case,
    randomise,
    require_transformers,
)

require_transformers(4)

HIDDEN, EXPERTS, K = 32, 5, 2
DTYPES = [torch.float32, torch.bfloat16]


def build(dtype: torch.dtype, renormalise: bool) -> torch.nn.Module:
    from transformers.models.olmoe.configuration_olmoe import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

    config = OlmoeConfig(
        hidden_size=HIDDEN,
        intermediate_size=24,
        num_experts=EXPERTS,
        num_experts_per_tok=K,
        norm_topk_prob=renormalise,
    )
    return randomise(OlmoeSparseMoeBlock(config)).to(dtype)


def chosen(block: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        return [block.gate(x).float().topk(K).indices.sort(-1).values]


def states(*shape: int, dtype: torch.dtype):
    def draw(generator: torch.Generator) -> torch.Tensor:
        return torch.randn(*shape, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)

    return draw


@pytest.mark.parametrize("renormalise", [False, True], ids=["plain", "renormalised"])
@pytest.mark.parametrize("shape", [(1, 1), (2, 5)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_block(dtype, shape, renormalise):
    block = build(dtype, renormalise)
    compiled = Compiled(block)
    case = find_case(block, states(*shape, dtype=dtype), chosen, count=6 if shape == (2, 5) else 24)
    check_training(compiled, case)
    compiled.assert_fused(1)
    check_inference(compiled, case)
    compiled.assert_fused(1, graphs=2)
    for report in compiled.blocks:
        assert report.router_fused, str(report.router_reason)
        assert report.moe.experts.storage == "per_expert"
        assert report.location.startswith("modeling_olmoe.py:")


def test_many_token_counts_on_one_module():
    block = build(torch.float32, renormalise=True)
    compiled = Compiled(block)
    for count in (8, 9, 16, 33, 1):
        check_inference(compiled, find_case(block, states(1, count, dtype=torch.float32), chosen))
    assert len(compiled.reports) <= 3
    compiled.assert_fused(1, graphs=len(compiled.reports))


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inductor_by_name_without_flags(dtype, training):
    """Through real Inductor.  Nothing is set: the capture of ``torch.where`` is the backend's business."""
    assert not torch._dynamo.config.capture_dynamic_output_shape_ops
    block = build(dtype, renormalise=False)
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="moe_inductor")
    check = check_training if training else check_inference
    check(compiled, find_case(block, states(2, 5, dtype=dtype), chosen, count=6))
    (report,) = backend.reports
    assert report.summary().startswith("fused 1/1 MoE block ")
    assert not torch._dynamo.config.capture_dynamic_output_shape_ops
