"""An unrolled loop over experts, folded: passes that are the same code for another expert need not be traced again.

Two passes are kept.  Where they differ is where the loop's code has a hole: for the expert's number, and for its own
tensors.  Every other pass must be the same code with *its* number and *its* tensors in the very same holes.  What the
matcher and the proof find out about the two kept passes then holds for all: a constant of the reference that depends on
the expert differs between the two, so it stands in a hole, and one that does not stands outside of all holes.

Where the code changes in the middle of the loop, as it does for the experts of LongCat-Flash that give their input as
it is, each run of passes that are the same code is folded by itself.

Compared are Dynamo nodes, argument by argument, which takes milliseconds where tracing takes seconds.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from moe_inductor.capture.assumptions import Pass
from moe_inductor.region.find import Region
from moe_inductor.region.nodes import has_unbacked, is_tensor, mutated, name_of, node_arg, value

# The statements that add one expert's rows to the sum.
_STEPS = frozenset({"index_add_", "index_add", "setitem", "index_put_", "index_put"})
_CUTS = frozenset({"split", "split_with_sizes", "tensor_split"})
# With fewer passes there is nothing to gain.
_FEWEST = 4
KEPT = 2  # of a run

_SUM, _OWN, _NODE, _CONSTANT = range(4)
Token = tuple[int, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Fold:
    """nodes: the members to trace.
    runs: the expert of each pass, in order of the passes, and by the code of the pass; the first two of a run are kept.
    weights: for a tensor that a kept pass reads, those in its place in the passes of the run, by expert.
    last: the sum after the last pass, and after the last kept one, where these are values of their own.
    """

    nodes: list[fx.Node]
    runs: tuple[tuple[int, ...], ...]
    weights: dict[fx.Node, dict[int, fx.Node]]
    last: tuple[fx.Node, fx.Node] | None


def fold(region: Region, guards: Mapping[fx.Node, Sequence[fx.Node]]) -> Fold | None:
    """None if the region is no loop, or if a pass is not provably like the others.

    guards: tensors that decide whether an addition is made, and that belong to its pass as well.
    """
    steps = sum_steps(region)
    if len(steps) < _FEWEST or not _one_sum(steps) or any(map(_is_part, steps)):
        return None
    members = set(region.nodes)
    passes = _passes(steps, guards, members)
    if passes is None or any(_is_cut_off(n) for one in passes for n in one):
        return None
    templates = [
        list(_tokens(one, step, guards.get(step, ())))
        for one, step in zip(passes, steps, strict=True)
    ]
    runs: list[tuple[int, ...]] = []
    weights: dict[fx.Node, dict[int, fx.Node]] = {}
    dropped: set[fx.Node] = set()
    start = 0
    for _, alike in itertools.groupby(templates, _code):
        run = list(alike)
        holes = _Holes()
        if not all(map(holes.fit, zip(*run, strict=True))) or holes.ids is None:
            return None
        if weights.keys() & holes.weights.keys():
            return None  # in the place of what, depends on the run
        runs.append(holes.ids)
        for node, places in holes.weights.items():
            weights[node] = dict(zip(holes.ids, places, strict=True))
        dropped.update(n for one in passes[start + KEPT : start + len(run)] for n in one)
        start += len(run)
    chained = steps[1].args[0] is steps[0]
    if chained and len(runs) > 1:
        return None
    nodes = _without(region, dropped, steps)
    if nodes is None:
        return None
    last = (steps[-1], steps[KEPT - 1]) if chained else None
    return Fold(nodes, tuple(runs), weights, last)


def fold_rolled(
    region: Region, passes: Sequence[Pass], experts: Sequence[Sequence[fx.Node]]
) -> Fold:
    """The first of the traced passes stands for all: capture has already seen that.

    experts: the inputs of each expert, in the order in which the first pass has them.
    """
    again = {n for one in passes[1:] for n in one.nodes}
    columns = list(zip(*experts, strict=True))
    region.read_by_others = [n for column in columns for n in column]
    region.refresh()
    nodes = []
    for node in region.nodes:
        if node in again or any(a in again for a in node.all_input_nodes):
            again.add(node)
        else:
            nodes.append(node)
    weights = {column[0]: dict(enumerate(column)) for column in columns}
    return Fold(nodes, (tuple(range(len(experts))),), weights, last=None)


def sum_steps(region: Region) -> list[fx.Node]:
    """The statements of the region that could be a loop's additions, in the order in which they run."""
    return [n for n in region.nodes if name_of(n) in _STEPS and n.args]


def _one_sum(steps: list[fx.Node]) -> bool:
    """All steps add to one tensor, in place or from value to value."""
    same = all(s.args[0] is steps[0].args[0] for s in steps)
    chain = all(b.args[0] is a for a, b in itertools.pairwise(steps))
    return same or chain


def _is_part(step: fx.Node) -> bool:
    """Is it an expert's own part of a tensor that is written, ``xs[e, token] = y``?  All parts have to be seen."""
    index = step.args[1] if name_of(step) == "setitem" else None
    return isinstance(index, (tuple, list)) and any(type(i) is int for i in index)


def _is_cut_off(node: fx.Node) -> bool:
    """An expert's part of sorted rows: what the experts do is only seen when all parts are put together again."""
    if name_of(node) not in ("getitem", "setitem"):
        return False
    pack = node.all_input_nodes[0]
    place = node.args[1]
    first = place[0] if isinstance(place, tuple) and place else place
    bounds = (first.start, first.stop) if isinstance(first, slice) else ()
    by_data = (b for b in bounds if isinstance(b, fx.Node) and (is_tensor(b) or has_unbacked(b)))
    return any(by_data) or (name_of(pack) in _CUTS and has_unbacked(pack))


def _passes(
    steps: list[fx.Node], guards: Mapping[fx.Node, Sequence[fx.Node]], members: set[fx.Node]
) -> list[list[fx.Node]] | None:
    """What each step and its guards need and no other step does, in graph order."""
    order = {n: i for i, n in enumerate(steps[0].graph.nodes)}
    sums: set[Any] = set(steps) | {node_arg(steps[0], 0)}
    needed = []
    for step in steps:
        found: set[fx.Node] = set()
        todo = [a for a in step.all_input_nodes if a is not step.args[0]]
        todo += guards.get(step, ())
        while todo:
            node = todo.pop()
            if node in sums:
                return None  # an expert reads the sum
            if node in members and node not in found:
                found.add(node)
                todo += node.all_input_nodes
        needed.append(found)
    count = Counter(n for found in needed for n in found)
    return [
        [*sorted((n for n in found if count[n] == 1), key=order.__getitem__), step]
        for found, step in zip(needed, steps, strict=True)
    ]


def _tokens(nodes: list[fx.Node], step: fx.Node, guards: Sequence[fx.Node]) -> Iterator[Token]:
    """The code of one pass as a flat list; nodes of the pass are numbered, the sum has no name."""
    number = {n: i for i, n in enumerate(nodes)}

    def flat(item: Any) -> Iterator[Token]:
        if isinstance(item, fx.Node):
            yield (_OWN, number[item]) if item in number else (_NODE, item)
        elif isinstance(item, (tuple, list)):
            yield _CONSTANT, ("sequence", len(item))
            for part in item:
                yield from flat(part)
        elif isinstance(item, dict):
            yield _CONSTANT, tuple(item)
            for part in item.values():
                yield from flat(part)
        elif isinstance(item, slice):
            yield _CONSTANT, "slice"
            yield from flat((item.start, item.stop, item.step))
        else:
            yield _CONSTANT, item

    for node in nodes:
        yield _CONSTANT, (node.op, node.target)
        args = node.args
        if node is step:
            yield _SUM, None
            args = args[1:]
        yield from flat(args)
        yield from flat(node.kwargs)
    yield from flat(guards)


def _code(tokens: Iterable[Token]) -> list[Any]:
    """A pass without what may differ between passes of the same code."""
    return [
        (kind, item if kind == _CONSTANT and type(item) is not int else type(item))
        for kind, item in tokens
    ]


class _Holes:
    """The places where passes differ, and what fills them.

    ids: the number of each pass, as the first hole that holds numbers has it.
    """

    def __init__(self) -> None:
        self.ids: tuple[int, ...] | None = None
        self.weights: dict[fx.Node, tuple[fx.Node, ...]] = {}

    def fit(self, tokens: tuple[Token, ...]) -> bool:
        """One place of all passes: the same everywhere, or a hole that is filled as it must be."""
        kinds = {kind for kind, _ in tokens}
        if len(kinds) > 1:
            return False
        items = [item for _, item in tokens]
        if all(_same(item, items[0]) for item in items):
            return True
        if kinds == {_NODE}:
            return self._fit_weights(tuple(items))
        return kinds == {_CONSTANT} and self._fit_numbers(items)

    def _fit_numbers(self, items: list[Any]) -> bool:
        if any(type(item) is not int for item in items) or items[0] == items[1]:
            return False
        if self.ids is None:
            self.ids = tuple(items)
        # ``e`` itself, or ``e + 1`` as in a slice of one row.
        return len({item - e for item, e in zip(items, self.ids, strict=True)}) == 1

    def _fit_weights(self, items: tuple[fx.Node, ...]) -> bool:
        first = items[0]
        if items[0] is items[1]:
            return False
        if not all(n.op in ("placeholder", "get_attr") and _alike(n, first) for n in items):
            return False
        known = [self.weights.setdefault(n, items) for n in items[:KEPT]]
        return all(k == items for k in known)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, fx.Node) or isinstance(b, fx.Node):
        return a is b
    return type(a) is type(b) and a == b


def _alike(a: fx.Node, b: fx.Node) -> bool:
    """Tensors that one code treats alike."""
    x, y = value(a), value(b)
    if not (isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor)):
        return False
    return (
        type(x) is type(y)
        and x.shape == y.shape
        and x.stride() == y.stride()
        and x.dtype == y.dtype
        and x.device == y.device
        and x.requires_grad == y.requires_grad
    )


def _without(region: Region, dropped: set[fx.Node], steps: list[fx.Node]) -> list[fx.Node] | None:
    """The members that are left when passes are dropped; None if somebody else reads or changes what is dropped."""
    members = set(region.nodes)
    last = steps[-1]
    gone = set(dropped)
    for (
        node
    ) in region.nodes:  # what depends on a dropped pass, sizes and asserts mostly, goes along
        if node not in gone and any(a in gone and a is not last for a in node.all_input_nodes):
            if mutated(node):
                return None
            gone.add(node)
    for node in gone - {last}:
        if any(user not in members for user in node.users):
            return None
    return [n for n in region.nodes if n not in gone]
