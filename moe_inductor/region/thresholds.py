"""Choices of experts that are not k per token, named so that a refusal can say so.

scores.masked_fill(scores < topk(scores).values[..., -1:], -inf)     where scores tie, more than k experts are kept
topk(scores.T, capacity)                                             experts choose tokens: a token may have none
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

from torch import fx

from moe_inductor.reasons import Code, Refusal
from moe_inductor.region.find import viewed
from moe_inductor.region.nodes import (
    BATCHED_PRODUCTS,
    is_integral,
    is_tensor,
    location,
    name_of,
    value,
)

_COMPARISONS = frozenset({"lt", "le", "gt", "ge", "less", "greater", "less_equal", "greater_equal"})
# From the k largest scores to the smallest of them.
_PICKS = frozenset(
    {
        "getitem",
        "select",
        "slice",
        "narrow",
        "view",
        "unsqueeze",
        "min",
        "amin",
        "expand",
        "expand_as",
    }
)
_TURNS = frozenset({"t", "T", "mT", "numpy_T", "transpose", "permute", "movedim", "swapaxes"})
_SAME = frozenset({"contiguous", "clone", "float", "to", "type", "softmax", "sigmoid"})
_GATHERS = frozenset({"getitem", "index_select", "gather", "embedding"})


def kept_by_threshold(nodes: Iterable[fx.Node]) -> Refusal | None:
    """Scores that are compared with the k-th largest of them; ``nodes`` are of a block: samplers do that as well."""
    for node in nodes:
        if name_of(node) not in _COMPARISONS or len(node.all_input_nodes) != 2:
            continue
        for scores, least in (node.all_input_nodes, node.all_input_nodes[::-1]):
            chosen = _topk_of(least)
            if chosen is not None and chosen.all_input_nodes[0] is scores:
                words = (
                    "experts are chosen by comparing scores with the k-th largest: "
                    "where scores tie, a token has more than k experts"
                )
                return Refusal(Code.SPELLING, words, location(node))
    return None


def _topk_of(node: fx.Node) -> fx.Node | None:
    """The top-k of whose values ``node`` is one."""
    while name_of(node) in _PICKS and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node if name_of(node) in ("topk", "kthvalue") else None


def chosen_by_experts(graph: fx.Graph, roots: Collection[fx.Node] = ()) -> Refusal | None:
    """A top-k of the tokens for each of E experts, in a graph where each reads the tokens that it has chosen.

    roots: choices that belong to a block.
    """
    for node in graph.nodes:
        if name_of(node) != "topk" or not node.all_input_nodes or node in roots:
            continue
        experts = choosers(node)
        reads = sum(1 for _ in _read_by(node)) if experts is not None else 0
        if reads and (reads == experts or any(_stacks(n, experts) for n in graph.nodes)):
            words = "experts choose their tokens (a top-k over tokens): a token may have any number of experts, or none"
            return Refusal(Code.SPELLING, words, location(node))
    return None


def _stacks(node: fx.Node, experts: int | None) -> bool:
    """A product with the matrices of all experts."""
    return name_of(node) in BATCHED_PRODUCTS and any(
        is_tensor(a)
        and value(a).dim() == 3
        and viewed(a).op in ("placeholder", "get_attr")
        and value(viewed(a)).shape[0] == experts
        for a in node.all_input_nodes
    )


def choosers(topk: fx.Node) -> int | None:
    """E where ``topk`` chooses along the tokens of scores that were made as [T, E]."""
    scores = topk.all_input_nodes[0]
    if not is_tensor(scores) or value(scores).dim() != 2:
        return None
    dim: Any = topk.kwargs.get("dim", topk.args[2] if len(topk.args) > 2 else -1)
    along = int(dim) % 2
    turned = False
    while (_turns(scores) or name_of(scores) in _SAME) and scores.all_input_nodes:
        turned ^= _turns(scores)
        scores = scores.all_input_nodes[0]
    experts = value(topk.all_input_nodes[0]).shape[1 - along]
    over_tokens = along == (1 if turned else 0)
    return experts if over_tokens and isinstance(experts, int) else None


def _turns(node: fx.Node) -> bool:
    return name_of(node) in _TURNS or (
        name_of(node) == "getattr" and node.args[1:] in (("T",), ("mT",))
    )


def _read_by(topk: fx.Node) -> Iterator[fx.Node]:
    """Reads of rows, or masks of them, at what was chosen."""
    todo, seen = list(topk.users), set()
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if name_of(node) == "one_hot" or (
            name_of(node) in _GATHERS
            and not is_integral(node)
            and any(a in seen and is_integral(a) for a in node.all_input_nodes[1:])
        ):
            yield node
        elif is_integral(node) or not is_tensor(node):
            todo += node.users
