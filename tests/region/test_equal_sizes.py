"""Two inputs with a symbol each for the number of tokens: fused where the frame guards on their being equal
(DeepSeek-V4's hash layers, whose experts are looked up by token id)."""

from __future__ import annotations

import copy

import torch
from moe_inductor.patterns._blocks import HIDDEN, NUM_EXPERTS
from moe_inductor.patterns.expert_loop import Loop
from moe_inductor.patterns.hf_batched_mm import Batched

from tests.oracle import assert_within_fp64_rule
from tests.patterns.conftest import rewritten  # noqa: F401  (a fixture)

VOCABULARY = 50


def hashed(base):
    class Hashed(base):
        def __init__(self):
            super().__init__()
            table = torch.rand(VOCABULARY, NUM_EXPERTS).topk(self.k).indices
            self.register_buffer("table", table)

        def forward(self, x, tokens):
            flat = x.reshape(-1, HIDDEN)
            ids = self.table[tokens.reshape(-1)]
            weights = self.gate(flat).softmax(-1).gather(1, ids)
            return self.experts(flat, ids, weights)

    return Hashed()


def dynamic(batch, sequence, ids=None):
    """Of one dimension each, ShapeEnv itself would make one symbol of equal ones."""
    x = torch.randn(batch, sequence, HIDDEN)
    tokens = torch.randint(VOCABULARY, (batch, ids or sequence))
    for tensor in (x, tokens):
        torch._dynamo.mark_dynamic(tensor, (0, 1))
    return x, tokens


def test_a_view_says_that_two_numbers_of_tokens_are_equal(rewritten):  # noqa: F811
    torch.manual_seed(0)
    module = hashed(Batched)
    compiled = rewritten(module)
    exact = copy.deepcopy(module).double()
    with torch.no_grad():
        for size in ((2, 3), (4, 5)):
            x, tokens = dynamic(*size)
            triple = compiled(x, tokens), module(x, tokens), exact(x.double(), tokens)
            assert_within_fp64_rule(*triple, what=str(size))
    assert [b.fused for b in compiled.blocks] == [True], [b.reason for b in compiled.blocks]


def test_nothing_says_that_two_numbers_of_tokens_are_equal(rewritten):  # noqa: F811
    """The loop runs with fewer ids than rows, too: the rows after the last id are then zero."""
    torch.manual_seed(0)
    module = hashed(Loop)
    compiled = rewritten(module)
    with torch.no_grad():
        for ids in (4, 3, 2):
            x, tokens = dynamic(2, 4, ids)
            torch.testing.assert_close(compiled(x, tokens), module(x, tokens))
    # Later ones may be: of a part that stock capture left, whose shapes are known.
    assert not compiled.blocks[0].fused
    assert "number of tokens" in str(compiled.blocks[0].reason)
