"""Soft MoE (Puigcerver et al., 2023), named so that a refusal can say so: nothing is chosen, so nothing can be skipped.

dispatch, combine = logits.softmax(tokens), logits.softmax(slots)
y = combine @ experts(dispatch.T @ x)
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from moe_inductor.reasons import Code, Refusal
from moe_inductor.region.find import viewed
from moe_inductor.region.nodes import BATCHED_PRODUCTS, location, name_of

_PRODUCTS = BATCHED_PRODUCTS | {"linear", "mm", "addmm"}


def soft_moe(nodes: Iterable[fx.Node]) -> Refusal | None:
    """Two ways to normalise the same scores, with an MLP between the products that they are read by: without one it is
    attention in two directions."""
    nodes = list(nodes)
    by_scores: dict[fx.Node, list[fx.Node]] = {}
    for node in nodes:
        if name_of(node) == "softmax" and node.all_input_nodes:
            by_scores.setdefault(viewed(node.all_input_nodes[0]), []).append(node)
    for pair in (found for found in by_scores.values() if len(found) > 1):
        readers = {
            softmax: [n for n in nodes if _reads(n, softmax) and name_of(n) in BATCHED_PRODUCTS]
            for softmax in pair
        }
        for dispatch in pair:
            deep = _products_since(nodes, readers[dispatch])
            for combine in (c for c in pair if c is not dispatch):
                if any(deep.get(reader, 0) > 2 for reader in readers[combine]):
                    words = "soft MoE: each expert reads mixtures of all tokens, so that none can be skipped"
                    return Refusal(Code.SPELLING, words, location(dispatch))
    return None


def _reads(node: fx.Node, softmax: fx.Node) -> bool:
    return any(viewed(a) is softmax for a in node.all_input_nodes)


def _products_since(nodes: list[fx.Node], starts: list[fx.Node]) -> dict[fx.Node, int]:
    """How many products there are from the ``starts``, which do not count, to each node, with that node."""
    deep = dict.fromkeys(starts, 0)
    for node in nodes:
        before = [deep[a] for a in node.all_input_nodes if a in deep]
        if before and node not in starts:
            deep[node] = max(before) + (name_of(node) in _PRODUCTS)
    return deep
