"""Blocks under ``torch.autocast``: fused, with the casts that autocast makes, and never less precise than eager."""

from __future__ import annotations

import copy

import pytest
import torch
from moe_inductor.patterns import _blocks
from moe_inductor.patterns._own_scores import OwnStacked
from moe_inductor.patterns.expert_loop import InModules, Loop, SumInFloat, TokensFirst
from moe_inductor.patterns.hf_batched_mm import Batched

from tests.oracle import assert_within_fp64_rule
from tests.patterns.samples import T, floats, step


class Around(torch.nn.Module):
    """Autocast inside of what is compiled."""

    def __init__(self, block: torch.nn.Module, enabled: bool = True) -> None:
        super().__init__()
        self.block, self.enabled = block, enabled

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16, enabled=self.enabled):
            return self.block(x)


class OwnScores(OwnStacked):
    """Each expert looks its scores up itself; the sum is in fp32, the experts' results are not."""

    def experts(self, x, topk_ids, topk_weights):
        out = torch.zeros_like(x)
        for e in range(_blocks.NUM_EXPERTS):
            token = self.tokens(topk_ids, e)
            weight = self.weight(topk_weights, topk_ids, token, e)
            out.index_add_(0, token, (self.expert(e, x[token]) * weight).to(out.dtype))
        return out


class RouterInFloat(Batched):
    """ernie4_5_moe, DeepSeek: the router alone runs without autocast."""

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            topk_weights, topk_ids = self.route(torch.nn.functional.linear(x, self.gate.weight))
        return self.experts(x, topk_ids, topk_weights)


class ExpertsInFloat(Batched):
    """The second projection alone runs without autocast."""

    def linear(self, operand, weight, expert_ids, bias=None):
        if weight is self.gate_up_proj:
            return super().linear(operand, weight, expert_ids, bias)
        with torch.autocast("cpu", enabled=False):
            return super().linear(operand.float(), weight, expert_ids, bias)


class BiasedLoop(Loop):
    biased = True


class PlainBatched(Batched):
    gated = False
    act = _blocks.VARIANTS["plain_relu_squared"]["act"]


class PowInFloat(Batched):
    """As under CUDA's autocast, which computes ``pow`` in fp32: the second GEMM casts what it reads, after a view."""

    gated = False

    def act(self, x):
        h = torch.relu(x)
        return (h if h.dtype == torch.float64 else h.float()) ** 2


def _blocks_and_inputs(build, dtype=torch.float32):
    """As in test_patterns: tokens for which rounding does not decide the routing."""
    for seed in range(20):
        torch.manual_seed(seed)
        block = build().to(dtype)
        exact = copy.deepcopy(block).double()
        x = torch.randn(T, 32, dtype=dtype)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            mine = block.route(block.gate(x))[1]
        with torch.no_grad():
            truth = exact.route(exact.gate(x.double()))[1]
        if torch.equal(mine.sort(-1).values, truth.sort(-1).values):
            return block, exact, x
    raise AssertionError("no tokens without ties found")


def _check(build, rewritten, around, dtype=torch.float32):
    block, exact, x = _blocks_and_inputs(build, dtype)
    module = Around(block) if around else block
    compiled = rewritten(module)
    with torch.autocast("cpu", torch.bfloat16, enabled=not around):
        eager = step(module, module, x)
        ours = step(compiled, module, x)
    truth = step(exact, exact, x.double())
    (report,) = compiled.blocks
    assert report.fused, report.why_not()
    for i, triple in enumerate(zip(ours, eager, truth, strict=True)):
        assert triple[0].dtype == triple[1].dtype
        assert_within_fp64_rule(*triple, what=f"tensor {i}")
    return report


@pytest.mark.parametrize("around", [False, True], ids=["ambient", "inside"])
@pytest.mark.parametrize(
    "build",
    [
        Loop,
        InModules,
        TokensFirst,
        SumInFloat,
        BiasedLoop,
        Batched,
        PlainBatched,
        PowInFloat,
        OwnScores,
    ],
)
def test_fused_under_autocast(build, around, rewritten):
    experts = _check(build, rewritten, around).moe.experts
    assert experts.weight_dtype == torch.float32
    assert experts.compute_dtype == torch.bfloat16


def test_model_in_bf16_under_autocast(rewritten):
    experts = _check(Loop, rewritten, False, torch.bfloat16).moe.experts
    assert experts.weight_dtype == experts.compute_dtype == torch.bfloat16


def test_autocast_that_is_off(rewritten):
    block, _, x = _blocks_and_inputs(Loop)
    compiled = rewritten(Around(block, enabled=False))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours, eager = compiled(x), Around(block, enabled=False)(x)
    (report,) = compiled.blocks
    assert report.fused
    assert report.moe.experts.compute_dtype == torch.float32
    torch.testing.assert_close(ours, eager)


def test_router_without_autocast(rewritten):
    report = _check(RouterInFloat, rewritten, False)
    assert report.router_fused, report.router_reason


def test_experts_that_mix_autocast_are_refused(rewritten):
    block, _, x = _blocks_and_inputs(ExpertsInFloat)
    compiled = rewritten(block)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        ours, eager = floats(compiled(x)), floats(block(x))
    (report,) = compiled.blocks
    assert not report.fused
    assert report.reason.code.name in ("SPELLING", "DTYPE"), report.reason
    assert all(torch.equal(a, b) for a, b in zip(ours, eager, strict=True))


def test_autocast_does_not_leak(rewritten):
    """What is compiled without autocast is not what is compiled under it."""
    block, _, x = _blocks_and_inputs(Batched)
    compiled = rewritten(block)
    with torch.no_grad():
        plain = compiled(x)
        with torch.autocast("cpu", torch.bfloat16):
            compiled(x)
        assert torch.equal(compiled(x), plain)
    dtypes = [b.moe.experts.compute_dtype for b in compiled.blocks]
    assert dtypes == [torch.float32, torch.bfloat16]
