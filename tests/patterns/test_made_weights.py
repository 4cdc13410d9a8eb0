"""Routers whose weights for the chosen experts the model never computes: it has those of all experts, mostly zeros, or
reads each expert's column of them.

The rewrite of the experts makes them, and the router, with what was made, is then fused like any other.
"""

import pytest
import torch

from moe_inductor.match.api import discover

BLOCKS = [
    ("dense_experts", "llama4", "sigmoid"),
    ("dense_experts", "nanomoe", "softmax_of_chosen"),
    ("expert_loop", "make_moe", "softmax_of_chosen"),
    ("expert_loop", "own_score", "softmax"),
    ("expert_loop", "own_renormalised", "softmax"),
    ("expert_loop", "own_renormalised_in_float", "softmax"),
    ("expert_loop", "own_sigmoid", "sigmoid"),
    ("expert_loop", "own_of_batch", "softmax"),
    ("expert_loop", "weight_by_mask", "softmax"),
]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("spelling", "name", "weight"), BLOCKS)
def test_router_is_fused(spelling, name, weight, dynamic, rewritten):
    (found,) = (s for s in discover() if s.name == spelling)
    (sample,) = (s for s in found.samples if s.name == name)
    module = sample.build()
    compiled = rewritten(module, dynamic=dynamic)
    with torch.no_grad():
        compiled(torch.randn(35, 32))
    (block,) = compiled.blocks
    assert block.fused, block.why_not()
    assert block.router_fused, block.router_reason
    assert block.moe.router.weight == weight
    # Nothing of the scores of all experts is left, nor of what was made of them.
    left = {
        op for op in compiled.backend.ops if "softmax" in op or "sigmoid" in op or "scatter" in op
    }
    assert left == set()
