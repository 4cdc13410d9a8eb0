"""Hidden states [B, S, H], as a model hands them on: they are rows of tokens, and no stack of matrices."""

from __future__ import annotations

import copy

import pytest
import torch
from moe_inductor.patterns import _picked, dense_experts, dense_loop
from moe_inductor.patterns._blocks import HIDDEN, NUM_EXPERTS

from tests.oracle import assert_within_fp64_rule
from tests.patterns.conftest import rewritten  # noqa: F401  (a fixture)


def flattened(block):
    """``block`` on the tokens of all sequences."""

    def forward(self, x):
        return block.forward(self, x.view(-1, HIDDEN)).view(x.shape)

    return type(block.__name__, (block,), {"forward": forward})


BLOCKS = [
    flattened(block)
    for block in (
        dense_loop.DenseLoop,
        dense_loop.InPlace,
        dense_loop.Stacked,
        dense_experts.Einsums,
        _picked.Gathered,
        _picked.StackedIndexed,
    )
]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("batch", [2, 4])  # 4: as many as there are experts
@pytest.mark.parametrize("block", BLOCKS)
def test_dense_experts_of_sequences(block, batch, dynamic, rewritten):  # noqa: F811
    torch.manual_seed(0)
    module, x = block(), torch.randn(batch, 7, HIDDEN)
    compiled = rewritten(module, dynamic=dynamic)
    with torch.no_grad():
        mine, eager, exact = compiled(x), module(x), copy.deepcopy(module).double()(x.double())
    (report,) = compiled.blocks
    assert report.fused, report.why_not()
    assert_within_fp64_rule(mine, eager, exact, what="hidden states")


class Scored(dense_experts.Dense):
    """qwen3_vl_moe of transformers 4.57: hidden states [B, S, H], and scores as wide as the router's logits."""

    transposed = True

    def forward(self, x):
        batch, states = x.shape[0], x.reshape(-1, HIDDEN)
        logits = self.gate(states)
        topk_weights, topk_ids = self.route(logits)
        scores = torch.zeros_like(logits).scatter_(1, topk_ids, topk_weights)
        rows = states.repeat(NUM_EXPERTS, 1).view(NUM_EXPERTS, -1, HIDDEN)
        y = torch.bmm(self.act(torch.bmm(rows, self.gate_up_proj)), self.down_proj)
        y = y.reshape(NUM_EXPERTS, batch, -1, HIDDEN)
        y = y * scores.transpose(0, 1).view(NUM_EXPERTS, batch, -1)[..., None]
        return y.sum(dim=0)


def test_scores_of_one_token(rewritten):  # noqa: F811
    """On their way to the experts its scores are seen as [E], which is no matrix of tokens and experts any more."""
    torch.manual_seed(0)
    module, x = Scored(), torch.randn(1, 1, HIDDEN)
    compiled = rewritten(module)
    with torch.no_grad():
        mine, eager = compiled(x), module(x)
    (report,) = compiled.blocks
    assert report.fused, report.why_not()
    torch.testing.assert_close(mine, eager)
