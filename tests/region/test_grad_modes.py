"""Blocks that compute a part of themselves under ``torch.no_grad()``: fused or not, gradients are eager's."""

from __future__ import annotations

import copy

import pytest
import torch
from moe_inductor.patterns.hf_batched_mm import Batched
from torch.nn import functional as F

from moe_inductor.reasons import Code
from tests.oracle import assert_within_fp64_rule
from tests.patterns.conftest import rewritten  # noqa: F401  (a fixture)


class OneByOne(Batched):
    """Phi-MoE: the second expert is chosen under no_grad, and scored with gradients after that."""

    def route(self, logits):
        first = logits.argmax(-1, keepdim=True)
        left = logits.scatter(-1, first, float("-inf"))
        with torch.no_grad():
            best, second = left.max(-1, keepdim=True)
            far = (best - logits) / logits.abs().clamp(min=best.abs()) > 0.5
        scores = [logits.softmax(-1).gather(-1, first)]
        scores.append(left.masked_fill(far, float("-inf")).softmax(-1).gather(-1, second))
        return torch.cat(scores, -1), torch.cat([first, second], -1)


class WeightsWithout(Batched):
    """The routing weights have no gradient; a copy of them with one is read outside."""

    def route(self, logits):
        with torch.no_grad():
            scores = logits.softmax(-1)
            weights, ids = scores.topk(2, -1)
            weights = weights / weights.sum(-1, keepdim=True)
        self.loss = logits.softmax(-1).square().mean()
        return weights, ids

    def forward(self, x):
        return super().forward(x), self.loss


class GatheredWithGradient(WeightsWithout):
    """Ids chosen from scores without gradients, weights gathered from the same scores with them."""

    def route(self, logits):
        with torch.no_grad():
            ids = logits.softmax(-1).topk(2, -1)[1]
        self.loss = logits.square().mean()
        return logits.softmax(-1).gather(-1, ids), ids


class WithoutInside(Batched):
    def act(self, gate_up):
        gate, up = gate_up.chunk(2, -1)
        with torch.no_grad():
            gate = F.silu(gate)
        return gate * up


class InPlace(Batched):
    """Changed in place under no_grad: the value is another one, the gradient is not."""

    def act(self, gate_up):
        hidden = super().act(gate_up)
        with torch.no_grad():
            hidden.mul_(2)
        return hidden


def _step(run, module, x):
    module.zero_grad()
    x = x.clone().requires_grad_()
    outputs = run(x)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.stack([o.square().sum() for o in outputs]).sum().backward()
    return [o.detach() for o in outputs] + [p.grad for p in (x, *module.parameters())]


@pytest.mark.parametrize("build", [OneByOne, WeightsWithout, GatheredWithGradient])
def test_router_with_both_modes(build, rewritten):  # noqa: F811
    torch.manual_seed(0)
    module, x = build(), torch.randn(11, 32)
    exact = copy.deepcopy(module).double()
    compiled = rewritten(module)
    ours, eager = _step(compiled, module, x), _step(module, module, x)
    truth = _step(exact, exact, x.double())
    (block,) = compiled.blocks
    assert block.fused, block.why_not()
    for i, triple in enumerate(zip(ours, eager, truth, strict=True)):
        assert_within_fp64_rule(*triple, what=f"tensor {i}")


@pytest.mark.parametrize("build", [WithoutInside, InPlace])
def test_experts_with_both_modes_are_refused(build, rewritten):  # noqa: F811
    torch.manual_seed(0)
    module, x = build(), torch.randn(11, 32)
    compiled = rewritten(module)
    ours, eager = _step(compiled, module, x), _step(module, module, x)
    (block,) = compiled.blocks
    assert not block.fused
    assert block.reason.code is Code.GRAD_STATE, block.reason
    for mine, theirs in zip(ours, eager, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
