"""Experts that are looked up by token id are those of their own layer: token ids lead to every layer of a model
(DeepSeek-V4, whose first layers look them up)."""

from __future__ import annotations

import copy

import torch
from moe_inductor.patterns._blocks import HIDDEN
from moe_inductor.patterns.hit_list import HitLoop

from tests.oracle import assert_within_fp64_rule
from tests.patterns.conftest import rewritten  # noqa: F401  (a fixture)
from tests.region.test_equal_sizes import VOCABULARY, hashed


class Model(torch.nn.Module):
    """A hash layer before and one behind a layer whose router chooses."""

    hashed = (True, False, True)

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = torch.nn.ModuleList(
            hashed(HitLoop) if kind else HitLoop() for kind in self.hashed
        )

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer, kind in zip(self.layers, self.hashed, strict=True):
            x = x + (layer(x, tokens) if kind else layer(x))
        return x


def test_each_layer_is_fused_by_itself(rewritten):  # noqa: F811
    torch.manual_seed(0)
    model = Model()
    exact = copy.deepcopy(model).double()
    compiled = rewritten(model, fullgraph=True)
    tokens = torch.randint(VOCABULARY, (9,))
    with torch.no_grad():
        triple = compiled(tokens), model(tokens), exact(tokens)
    assert [b.fused for b in compiled.blocks] == [True] * 3, [b.reason for b in compiled.blocks]
    assert_within_fp64_rule(*triple, what="output")
