"""Inputs of a block that the model changes once the block has read them: a bias moved by how often experts were chosen
(aux-loss-free balancing).  What is fused must not read them later than the model did."""

from __future__ import annotations

import copy

import pytest
import torch
from moe_inductor.patterns.expert_loop import Loop, StartsFromShared
from torch.nn import functional as F

from moe_inductor.reasons import Code
from tests.oracle import assert_within_fp64_rule
from tests.patterns.conftest import rewritten  # noqa: F401  (a fixture)


class MovedBias(Loop):
    """The bias is for the choice alone, and is moved against the experts that were chosen often."""

    def __init__(self):
        super().__init__()
        self.register_buffer("bias", torch.tensor([0.3, -0.4, 0.1, -0.2]))

    def move(self, counts):
        with torch.no_grad():
            self.bias += 0.5 * torch.sign(counts.float().mean() - counts)

    def choose(self, scores):
        topk_ids = torch.topk(scores + self.bias, self.k, dim=-1)[1]
        self.move(torch.bincount(topk_ids.flatten(), minlength=4))
        return topk_ids

    def route(self, logits):
        scores = logits.sigmoid()
        topk_ids = self.choose(scores)
        topk_weights = scores.gather(1, topk_ids)
        return topk_weights / topk_weights.sum(dim=-1, keepdim=True), topk_ids


class MovedBeforeChoice(MovedBias):
    """The choice is made of the bias that was, after it has been moved."""

    def choose(self, scores):
        choice = scores + self.bias
        self.move((choice > 0.5).sum(0))
        return torch.topk(choice, self.k, dim=-1)[1]


class ReadAgain(MovedBias):
    """The weights are made of the bias that is."""

    def route(self, logits):
        topk_weights, topk_ids = super().route(logits)
        return topk_weights * (1.0 + self.bias[topk_ids]), topk_ids


class FadesAndReadAgain(ReadAgain):
    """As above, where how the bias changes has nothing to do with the choice."""

    def move(self, counts):
        with torch.no_grad():
            self.bias.mul_(0.5)


class MovedExperts(Loop):
    """Each expert's weight is changed once the expert is done."""

    def experts(self, x, topk_ids, topk_weights):
        out = torch.zeros_like(x)
        for e in range(4):
            token, slot = torch.where(topk_ids == e)
            gate, up = F.linear(x[token], self.gate_up_proj[e]).chunk(2, dim=-1)
            y = F.linear(F.silu(gate) * up, self.down_proj[e]) * topk_weights[token, slot, None]
            out = out.index_add(0, token, y)
            self.down_proj[e].mul_(0.5)
        return out


class CopiedFirst(StartsFromShared):
    """The sum starts from a fresh tensor that is written to between the router and the experts."""

    def start(self, x):
        out = torch.empty_like(x)
        out.copy_(self.shared(x))
        return out


def _step(run, module, x, training):
    module.zero_grad()
    x = x.clone().requires_grad_(training)
    with torch.set_grad_enabled(training):
        out = run(x)
    if not training:
        return [out, *module.buffers(), *module.parameters()]
    out.square().sum().backward()
    return [out.detach(), x.grad, *module.buffers(), *(p.grad for p in module.parameters())]


def _compare(module, rewritten, training):  # noqa: F811
    """The blocks that were found in ``module``, which is run twice: the second run sees what the first has changed."""
    exact, mine = copy.deepcopy(module).double(), copy.deepcopy(module)
    compiled = rewritten(mine)
    for x in torch.randn(2, 29, 32):
        eager, truth = (
            _step(m, m, data, training) for m, data in ((module, x), (exact, x.double()))
        )
        ours = _step(compiled, mine, x, training)
        for i, triple in enumerate(zip(ours, eager, truth, strict=True)):
            assert_within_fp64_rule(*(t.detach() for t in triple), what=f"tensor {i}")
    return compiled.blocks


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_bias_that_is_moved_after_the_choice(training, rewritten):  # noqa: F811
    torch.manual_seed(0)
    (block,) = _compare(MovedBias(), rewritten, training)
    assert block.fused, block.why_not()
    assert block.router_fused, block.router_reason


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_router_that_would_read_a_bias_too_late_stays(training, rewritten):  # noqa: F811
    torch.manual_seed(0)
    (block,) = _compare(MovedBeforeChoice(), rewritten, training)
    assert block.fused, block.why_not()
    assert not block.router_fused
    assert block.router_reason.code is Code.MUTATION


@pytest.mark.parametrize("block", [ReadAgain, FadesAndReadAgain])
def test_bias_that_is_read_again(block, rewritten):  # noqa: F811
    torch.manual_seed(0)
    first, *cut = _compare(block(), rewritten, False)
    assert first.reason.code is Code.MUTATION
    assert not any(block.router_fused for block in cut)


def test_experts_that_are_changed_before_the_last_is_done(rewritten):  # noqa: F811
    torch.manual_seed(0)
    blocks = _compare(MovedExperts(), rewritten, False)
    assert blocks
    assert all(not b.fused and b.reason.code is Code.MUTATION for b in blocks)


def test_sum_that_starts_from_what_others_write_to(rewritten):  # noqa: F811
    torch.manual_seed(0)
    first, cut = _compare(CopiedFirst(), rewritten, True)
    assert first.reason.code is Code.ACCUMULATOR
    assert cut.fused, "stock capture cuts the graph behind what is written"
