"""What is tried on a block, and how often."""

from __future__ import annotations

import torch
from moe_inductor.patterns import unique_ids

from moe_inductor.rewrite import pipeline


def test_facts_that_write_the_same_are_tried_once(rewritten, monkeypatch):
    """In one dtype it does not matter in which the sum is; what is assumed of the loop is refused for all alike."""
    tried = []
    prove = pipeline.prove_experts

    def note(canonical, bound):
        facts = {name: fact for name, fact in bound.facts.items() if name != "sum_in"}
        tried.append((id(canonical), bound.spelling.name, *facts.items()))
        prove(canonical, bound)

    monkeypatch.setattr(pipeline, "prove_experts", note)
    rewritten(unique_ids.FirstChoices())(torch.randn(2, 32))
    assert tried
    assert len(set(tried)) == len(tried)
