"""Choices of experts that are not k per token, named so that a refusal can say so.

scores.masked_fill(scores < topk(scores).values[..., -1:], -inf)     where scores tie, more than k experts are kept
topk(scores.T, capacity)                                             experts choose tokens: a token may have none
for e in range(E): x[torch.where(scores[:, e] > 0.5)]                any number of experts, or none
sort(scores).values.cumsum(-1) < 0.9                                 the same, by their sum (top-p)
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

from torch import fx

from moe_inductor.reasons import Code, Refusal
from moe_inductor.region.find import chosen_rows, multiplies_some_rows, viewed
from moe_inductor.region.nodes import (
    BATCHED_PRODUCTS,
    is_floating,
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
_PRODUCTS = BATCHED_PRODUCTS | {"linear", "mm", "addmm"}
_GATHERS = frozenset({"getitem", "index_select", "gather", "embedding"})


# What makes k experts of scores.
_CHOOSES = frozenset({"topk", "argmax", "argsort", "kthvalue", "one_hot", "max", "multinomial"})
# Scores are this many operators at most from where they are compared.
_LIMIT = 64


def beyond_threshold(nodes: Iterable[fx.Node]) -> Refusal | None:
    """Rows that several products read, each where scores are beyond what they are compared with."""
    reads: dict[fx.Node, set[fx.Node]] = {}
    for node in nodes:
        if not multiplies_some_rows(node):
            continue
        rows = node.all_input_nodes[0]
        while not chosen_rows(rows) and name_of(rows) in _SAME and rows.all_input_nodes:
            rows = rows.all_input_nodes[0]
        for index in chosen_rows(rows):
            for compared in _comparisons(index):
                reads.setdefault(compared, set()).add(index)
    by_scores: dict[fx.Node, set[fx.Node]] = {}
    for compared, indices in reads.items():
        scores = next(a for a in compared.all_input_nodes if is_floating(a))
        by_scores.setdefault(viewed(scores), set()).update(indices)
        if len(by_scores[viewed(scores)]) < 2:
            continue
        names = [name_of(n) for n in _made_of(scores)]
        if "cumsum" in names and "sort" in names:
            words = "experts are chosen until their scores add up to a threshold (top-p)"
        elif _CHOOSES.isdisjoint(names):
            words = "experts are chosen by comparing scores with a threshold"
        else:
            continue
        words += ": a token may have any number of experts"
        return Refusal(Code.SPELLING, words, location(compared))
    return None


def _comparisons(index: fx.Node) -> list[fx.Node]:
    """Of scores, among what the mask is made of at which ``index`` is."""
    found: list[fx.Node] = []
    seen = {index}
    todo = [index]
    while todo:
        node = todo.pop()
        if name_of(node) in _COMPARISONS and any(map(is_floating, node.all_input_nodes)):
            found.append(node)
            continue
        inputs = [a for a in node.all_input_nodes if a not in seen and not is_floating(a)]
        seen.update(inputs)
        todo += inputs
    return found


def _made_of(scores: fx.Node) -> list[fx.Node]:
    """What leads from the last product to ``scores``."""
    found: list[fx.Node] = []
    todo = [scores]
    while todo and len(found) < _LIMIT:
        node = todo.pop()
        if node in found or not node.op.startswith("call") or name_of(node) in _PRODUCTS:
            continue
        found.append(node)
        todo += node.all_input_nodes
    return found


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
        reads = list(_read_by(node)) if experts is not None else []
        if reads and (
            len(reads) == experts
            or any(map(_sends, reads))
            or any(_stacks(n, experts) for n in graph.nodes)
        ):
            words = "experts choose their tokens (a top-k over tokens): a token may have any number of experts, or none"
            return Refusal(Code.SPELLING, words, location(node))
    return None


def _sends(mask: fx.Node) -> bool:
    """A one-hot mask that is multiplied with the tokens."""
    if name_of(mask) != "one_hot":
        return False
    return any(
        name_of(user) in BATCHED_PRODUCTS or (name_of(user) in _SAME and _multiplied(user))
        for user in mask.users
    )


def _multiplied(node: fx.Node) -> bool:
    return any(name_of(user) in BATCHED_PRODUCTS for user in node.users)


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
