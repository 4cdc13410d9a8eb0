"""Find blocks that compute every expert for every token, and weight the results by scores that are mostly zero.

There the experts do not depend on the choice.  What gives such a block away is where the two meet: scores that come
from a top-k over E experts, with no matrix product in between, are multiplied with what experts made, which are two
products deep: batched ones with a stack ``[E, ..]`` of weights, or one pair for each expert.  Or the scores are in the
rows that such a batched product reads.  Or a token's experts are picked from what all of them made, by their ids.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import sympy
from torch import fx

from moe_inductor.region.nodes import (
    BATCHED_PRODUCTS,
    is_floating,
    is_tensor,
    mutated,
    name_of,
    storages,
    tensors,
    value,
)

_GEMMS = BATCHED_PRODUCTS | {"linear", "mm", "addmm"}
_MEETING = BATCHED_PRODUCTS | {"mul", "mul_", "__mul__", "imul", "multiply"}
_PICKING = frozenset({"getitem", "gather", "take_along_dim"})
# Between two products of an MLP there is a handful of nodes, and that for each expert.
_LIMIT = 64


@dataclasses.dataclass(frozen=True, eq=False)
class Dense:
    """root: the choice.  anchors: where scores and experts meet.  experts: what the experts compute before that."""

    root: fx.Node
    anchors: list[fx.Node]
    experts: set[fx.Node]


def find_dense(graph: fx.Graph, known: set[fx.Node]) -> list[Dense]:
    """Every such block, in the order of its choice; in a graph without a top-k or an argmax nothing is looked at.

    known: choices that belong to other blocks.
    """
    roots = [node for node in graph.nodes if node not in known]
    return [dense for root in roots if (dense := _from(graph, root, known)) is not None]


def _from(graph: fx.Graph, root: fx.Node, known: set[fx.Node]) -> Dense | None:
    if name_of(root) not in ("topk", "argmax", "max") or not root.all_input_nodes:
        return None
    scores = root.all_input_nodes[0]
    if not is_tensor(scores) or value(scores).dim() < 2 or not is_floating(scores):
        return None
    classes = value(scores).shape[-1]
    if not isinstance(classes, int) or classes < 2:
        return None
    if not known.isdisjoint(_follows(graph, root)):
        return None  # a step towards another choice: that of groups
    routed, ids = _routed(graph, root, scores), _ids(graph, root)
    stacked, single, experts = [], [], set()
    for node in graph.nodes:
        if node in routed or not is_tensor(node):
            continue
        if name_of(node) in _PICKING:
            nodes = _picked_from(node, routed, ids, classes)
            if nodes:
                stacked.append(node)
                experts |= nodes
        if name_of(node) not in _MEETING:
            continue
        if name_of(node) in BATCHED_PRODUCTS and _stacks(node, classes):
            behind = _behind(node, routed)
            if behind.reaches or any(product in stacked for product in behind.products):
                stacked.append(node)
                experts |= _before(node, routed, classes)
            continue
        if not any(a in routed for a in node.all_input_nodes):
            continue
        for other in node.all_input_nodes:
            made = _experts(other, routed, classes) if other not in routed else None
            if made is not None:
                nodes, is_stacked = made
                (stacked if is_stacked else single).append(node)
                experts |= nodes
    if len(single) == 1:  # one product with scores, of one expert, is a gate
        single = []
    anchors = [*stacked, *single]
    return Dense(root, anchors, experts) if anchors else None


def _picked_from(
    node: fx.Node, routed: set[fx.Node], ids: set[fx.Node], classes: int
) -> set[fx.Node]:
    """What all experts compute for ``node`` to pick from by ids."""
    source, *at = node.all_input_nodes
    if source in routed or not any(a in ids for a in at):
        return set()
    nodes, of_all = _experts(source, routed, classes, several=True) or (set(), False)
    return nodes if of_all else set()


def _ids(graph: fx.Graph, root: fx.Node) -> set[fx.Node]:
    """All integers that are made of the choice, and several of them at a time (chunk)."""
    found = {root}
    for node in graph.nodes:
        made = tensors(node)
        integers = bool(made) and not any(t.is_floating_point() for t in made)
        if integers and any(a in found for a in node.all_input_nodes):
            found.add(node)
    return found


def _routed(graph: fx.Graph, root: fx.Node, scores: fx.Node) -> set[fx.Node]:
    """What is made of the choice and is not larger than ``one_hot(topk_ids) [T, k, E]``."""
    largest = max([_ratio(t.shape[-1], 1) or 1 for t in tensors(root) if t.dim() > 1] or [1])

    def is_small(node: fx.Node) -> bool:
        ratios = [_ratio(t.numel(), value(scores).numel()) for t in tensors(node)]
        return all(ratio is not None and ratio <= largest for ratio in ratios)

    return _follows(graph, root, is_small)


def _follows(
    graph: fx.Graph, root: fx.Node, admits: Callable[[fx.Node], bool] = lambda node: True
) -> set[fx.Node]:
    """What is made of ``root``, also by writing in place, with no product in between."""
    found, written = {root}, set[int]()
    for node in graph.nodes:
        if node.op == "output" or name_of(node) in _GEMMS:
            continue
        if not any(a in found or not written.isdisjoint(storages(a)) for a in node.all_input_nodes):
            continue
        if admits(node):
            found.add(node)
            written.update(s for target in mutated(node) for s in storages(target))
    return found


def _ratio(a: Any, b: Any) -> sympy.Expr | None:
    """a / b where it is a known number."""
    exprs = [getattr(getattr(size, "node", None), "expr", size) for size in (a, b)]
    if exprs[1] == 0:
        return None
    over, under = (sympy.Integer(e) if isinstance(e, int) else e for e in exprs)
    ratio = over / under
    return ratio if ratio.is_number else None


def _stacks(node: fx.Node, classes: int) -> list[fx.Node]:
    """Operands that are a stack of one matrix per expert."""
    return [
        a
        for a in node.all_input_nodes
        if is_tensor(a) and value(a).dim() == 3 and value(a).shape[0] == classes and _is_input(a)
    ]


def _is_input(node: fx.Node) -> bool:
    while node.op.startswith("call") and len(node.all_input_nodes) == 1:
        (node,) = node.all_input_nodes
    return node.op in ("placeholder", "get_attr")


@dataclasses.dataclass(frozen=True, eq=False)
class _Behind:
    """nodes: what leads to a node from the last products.  products: these.  reaches: does it read the choice?"""

    nodes: set[fx.Node]
    products: list[fx.Node]
    reaches: bool


def _behind(node: fx.Node, routed: set[fx.Node]) -> _Behind:
    nodes: set[fx.Node] = set()
    products: dict[fx.Node, None] = {}
    reaches = False
    todo = list(node.all_input_nodes)
    while todo and len(nodes) <= _LIMIT * 16:
        found = todo.pop()
        if found in routed:
            reaches = True
        elif name_of(found) in _GEMMS and found.op.startswith("call"):
            products.setdefault(found)
        elif found not in nodes and found.op.startswith("call"):
            nodes.add(found)
            todo += found.all_input_nodes
    return _Behind(nodes, list(products), reaches)


def _before(node: fx.Node, routed: set[fx.Node], classes: int) -> set[fx.Node]:
    """What experts compute before a product that reads the choice as well: the scores are in the same einsum, or on
    the hidden states."""
    found: set[fx.Node] = set()
    for made in node.all_input_nodes:
        if made in routed or not made.op.startswith("call") or name_of(made) in _GEMMS:
            continue
        first = _behind(made, routed)
        if first.products and all(_stacks(p, classes) for p in first.products):
            found |= {made, *first.nodes, *first.products}
    return found


def _experts(
    made: fx.Node, routed: set[fx.Node], classes: int, several: bool = False
) -> tuple[set[fx.Node], bool] | None:
    """What experts compute to give ``made``, and whether all are in it; None if ``made`` is no expert's result.

    several: also of more experts or fewer than ``classes``, if ``made`` has a dimension for them."""
    own = {made} if made.op.startswith("call") else set()
    if name_of(made) in _GEMMS:
        last, own = [made], set()
    else:
        behind = _behind(made, routed)
        if behind.reaches:
            return None
        last, own = behind.products, own | behind.nodes
    is_stacked = bool(last) and all(_stacks(n, classes) for n in last)
    of_all = is_stacked or len(last) == classes
    if several and is_tensor(made) and value(made).dim() > 2:
        of_all |= len(last) > 1 and len(last) in value(made).shape
    if not of_all and len(last) != 1:
        return None
    nodes = own | set(last)
    for product in last:
        first = _behind(product, routed)
        if not first.products or len(first.nodes) > _LIMIT:
            return None
        nodes |= first.nodes | set(first.products)
    return nodes, of_all
