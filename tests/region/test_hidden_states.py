"""Hidden states [B, S, H], as a model hands them on: they are rows of tokens, and no stack of matrices."""

from __future__ import annotations

import copy

import pytest
import torch
from moe_inductor.patterns import _picked, dense_experts, dense_loop
from moe_inductor.patterns._blocks import HIDDEN

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
