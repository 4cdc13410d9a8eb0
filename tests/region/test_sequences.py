"""Blocks that keep hidden states in sequences, [B, S, H], all the way: as fused as those that flatten them."""

from __future__ import annotations

import copy

import pytest
import torch
from moe_inductor.patterns._blocks import HIDDEN, MLP, NUM_EXPERTS, TOP_K
from torch import nn

from tests.oracle import assert_within_fp64_rule
from tests.patterns.conftest import rewritten  # noqa: F401  (a fixture)


class Sequences(nn.Module):
    """Every method is one place to go wrong."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(HIDDEN, NUM_EXPERTS, bias=False)
        self.mlps = nn.ModuleList(MLP() for _ in range(NUM_EXPERTS))

    def scored(self, logits):
        return logits.softmax(dim=-1)

    def forward(self, x):
        topk_weights, topk_ids = self.scored(self.gate(x)).topk(TOP_K, dim=-1)
        topk_weights = topk_weights / topk_weights.sum(dim=-1, keepdim=True)
        return self.experts(x, topk_ids, topk_weights)

    def scores(self, x, topk_ids, topk_weights):
        zeros = torch.zeros(*x.shape[:-1], NUM_EXPERTS, dtype=topk_weights.dtype, device=x.device)
        return zeros.scatter(-1, topk_ids, topk_weights)


class DenseLoop(Sequences):
    def experts(self, x, topk_ids, topk_weights):
        out, scores = torch.zeros_like(x), self.scores(x, topk_ids, topk_weights)
        for e, expert in enumerate(self.mlps):
            out = out + expert(x) * scores[..., e : e + 1]
        return out


class Compared(Sequences):
    def experts(self, x, topk_ids, topk_weights):
        return sum(
            expert(x) * (topk_weights * (topk_ids == e)).sum(dim=-1, keepdim=True)
            for e, expert in enumerate(self.mlps)
        )


class Stacked(Sequences):
    def experts(self, x, topk_ids, topk_weights):
        scores = self.scores(x, topk_ids, topk_weights)
        y = torch.stack([expert(x) for expert in self.mlps], dim=-2)
        return (y * scores.unsqueeze(-1)).sum(dim=-2)


class Picked(Sequences):
    def experts(self, x, topk_ids, topk_weights):
        y = torch.stack([expert(x) for expert in self.mlps], dim=2)
        index = topk_ids[..., None].expand(-1, -1, -1, HIDDEN)
        return (y.gather(2, index) * topk_weights[..., None]).sum(dim=2)


class Masks(Sequences):
    def weight(self, topk_weights, hit, mask):
        return (topk_weights * hit).sum(dim=-1)[mask]

    def experts(self, x, topk_ids, topk_weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.mlps):
            hit = topk_ids == e
            mask = hit.any(dim=-1)
            if mask.any():
                out[mask] += expert(x[mask]) * self.weight(topk_weights, hit, mask)[:, None]
        return out


class Places(Sequences):
    """The sequence and the place in it of each token."""

    def where(self, hit):
        return torch.where(hit)

    def experts(self, x, topk_ids, topk_weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.mlps):
            sequence, place, slot = self.where(topk_ids == e)
            y = expert(x[sequence, place]) * topk_weights[sequence, place, slot, None]
            out[sequence, place] += y
        return out


class OverSequence(DenseLoop):
    """Each token's scores are divided by those of its sequence."""

    def scores(self, x, topk_ids, topk_weights):
        scores = super().scores(x, topk_ids, topk_weights)
        return scores / scores.sum(dim=1, keepdim=True).clamp(min=1e-3)


class OfOtherSequence(Masks):
    def weight(self, topk_weights, hit, mask):
        return (topk_weights * hit).sum(dim=-1).flip(0)[mask]


class Turned(Places):
    """Sequence and place are mixed up; there are as many of both."""

    def where(self, hit):
        place, sequence, slot = torch.where(hit)
        return sequence, place, slot


class NextTokens(Masks):
    def experts(self, x, topk_ids, topk_weights):
        return super().experts(x, topk_ids.roll(1, dims=1), topk_weights)


def _run(module, x, training):
    with torch.set_grad_enabled(training):
        made = module(x)
    if not training:
        return [made]
    module.zero_grad()
    made.float().square().sum().backward() if made.dtype != torch.float64 else made.square().sum().backward()
    return [made.detach(), *(p.grad.clone() for p in module.parameters())]


@pytest.mark.parametrize(
    ("dtype", "training", "dynamic"),
    [
        (torch.float32, False, False),
        (torch.float32, False, True),
        (torch.float32, True, False),
        (torch.bfloat16, True, False),
    ],
)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("block", [DenseLoop, Compared, Stacked, Picked, Masks, Places])
def test_fused(block, batch, dtype, training, dynamic, rewritten):  # noqa: F811
    torch.manual_seed(0)
    module = block().to(dtype)
    x = torch.randn(batch, 7, HIDDEN, dtype=dtype)
    exact = copy.deepcopy(module).double()
    compiled = rewritten(module, dynamic=dynamic)
    eager, truth = _run(module, x, training), _run(exact, x.double(), training)
    module.zero_grad()
    with torch.set_grad_enabled(training):
        mine = [compiled(x)]
    (report,) = compiled.blocks
    assert report.fused, report.why_not()
    assert report.router_fused, report.router_reason
    if training:
        mine[0].float().square().sum().backward()
        mine = [mine[0].detach(), *(p.grad for p in module.parameters())]
    for i, (ours, theirs, true) in enumerate(zip(mine, eager, truth, strict=True)):
        assert_within_fp64_rule(ours, theirs, true, what=f"tensor {i}")


@pytest.mark.parametrize("block", [OverSequence, OfOtherSequence, Turned, NextTokens])
def test_not_token_by_token(block, rewritten):  # noqa: F811
    torch.manual_seed(0)
    module, x = block(), torch.randn(7, 7, HIDDEN)
    compiled = rewritten(module)
    with torch.no_grad():
        mine, eager = compiled(x), module(x)
    assert not any(report.fused for report in compiled.blocks)
    torch.testing.assert_close(mine, eager, rtol=0, atol=0)
