"""Experts on sorted rows, as if nothing had been sorted.

Many models sort the (token, choice) pairs by expert, cut the sorted rows into one slice per expert, run each expert on
its slice, concatenate, and undo the sort, or add each row up at its token; or they give the sorted rows, and where each
expert's end, to a grouped GEMM, and then add them up.  All of that only moves rows.  In the normal
form a pair stays where it is: pair ``j`` of token ``t`` is row ``t k + j``, and ``pair_linear`` multiplies each row by
the matrix of its own expert.  What is computed row by row commutes with the order of rows, so

    y[order] for what is computed from rows[order]  =  what is computed from rows, in the order of ``order``

and undoing the sort gives the right hand side without it.  The equation needs that the slices are those of the experts,
one after the other: their lengths count the very ids that were sorted, all of which are positions among the E scores of
a top-k (``counts.choices``), and each begins where the one before ends.  That is shown here for every slice; where it
cannot be, the graph stays as it is, and why is noted.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import fx

from moe_inductor._compat import OpOverload
from moe_inductor.reasons import Code, Refusal
from moe_inductor.region.counts import SORTS, Form, choices, counted, fill_of, plus, root_of, single
from moe_inductor.region.nodes import (
    has_unbacked,
    is_random,
    is_tensor,
    location,
    name_of,
    node_arg,
    origin_of,
    storages,
    unbacked,
    uncast,
    value,
    written,
)

if TYPE_CHECKING:
    from moe_inductor.region.normalise import Emitter

aten = torch.ops.aten

_LIBRARY = torch.library.Library("moe_inductor_region", "DEF")
_LIBRARY.define("pair_linear(Tensor rows, Tensor expert_ids, Tensor weight) -> Tensor")
PAIR_LINEAR = torch.ops.moe_inductor_region.pair_linear.default


@torch.library.register_fake("moe_inductor_region::pair_linear", lib=_LIBRARY)
def _fake(rows: torch.Tensor, expert_ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return rows.new_empty((rows.shape[0], weight.shape[2]))


@torch.library.impl("moe_inductor_region::pair_linear", "CompositeExplicitAutograd", lib=_LIBRARY)
def _run(rows: torch.Tensor, expert_ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """rows [S, in], expert_ids [S], weight [E, in, out] -> [S, out]"""
    return torch.bmm(rows.unsqueeze(1), weight[expert_ids]).squeeze(1)


_LIBRARY.define("all_rows(Tensor rows, SymInt count) -> Tensor")
ALL_ROWS = torch.ops.moe_inductor_region.all_rows.default


@torch.library.register_fake("moe_inductor_region::all_rows", lib=_LIBRARY)
def _fake_all(rows: torch.Tensor, count: int) -> torch.Tensor:
    return rows.new_empty((count, *rows.shape[1:]))


@torch.library.impl("moe_inductor_region::all_rows", "CompositeExplicitAutograd", lib=_LIBRARY)
def _run_all(rows: torch.Tensor, count: int) -> torch.Tensor:
    raise AssertionError("moe_inductor: a graph on an unproved number of rows was run")


# How parts are put together again.
_JOINS = frozenset({"cat", "concat", "concatenate", "vstack", "row_stack"})


def restated(node: fx.Node, made: Any) -> Any:
    """``made``, the value of a Dynamo node that puts parts of data-dependent lengths together, of which it is claimed
    that they are parts of one tensor and together as long as that.  Torch only knows a sum, and shapes that are
    inferred from a sum are of no use.

    The claim is an operator in the graph.  It goes when the rows are unsorted, which shows it, and is in the way of
    every match until then.
    """
    if name_of(node) not in _JOINS or not isinstance(made, torch.Tensor) or not made.dim():
        return made
    if not unbacked(made.shape[0]):
        return made
    todo, seen = list(node.all_input_nodes), set()
    while todo:
        part = todo.pop(0)
        if part in seen or not has_unbacked(part):
            continue
        seen.add(part)
        for whole in part.all_input_nodes:
            if is_tensor(whole) and not has_unbacked(whole) and storages(whole) & storages(part):
                return ALL_ROWS(made, value(whole).shape[0])
        todo += part.all_input_nodes
    return made


@dataclasses.dataclass(frozen=True, eq=False)
class Order:
    """``order``: positions of the pairs, sorted by expert.  ids [.., k], all in ``[0, E)``."""

    order: fx.Node
    ids: fx.Node
    num_experts: int

    @property
    def top_k(self) -> Any:
        return value(self.ids).shape[-1]

    @property
    def pairs(self) -> Any:
        return value(self.order).shape[0]

    @property
    def tokens(self) -> Any:
        return value(self.ids).numel() // self.top_k


def unsorted(out: Emitter, node: fx.Node) -> fx.Node | None:
    """What ``node`` is worth, made without a sort, if it undoes one; None if it does not, or not that we can show."""
    if node.target is aten.view.default:
        return _of_tokens(out, node)
    if node.target is aten.bmm.default:
        return _combined(out, node)
    if node.target is aten.index_add.default and _part_of_tokens(out, node.args[2]) is not None:
        return _added_part_by_part(out, node)
    found = _undoes(node)
    if found is None:
        return None
    order, rows, base = found
    # The inverse permutation behind a grouped GEMM is a spelling of its own (hf_grouped_mm).
    if not _has_parts(rows, grouped=node.target is not aten.index.Tensor):
        return None
    try:
        made = Unsorting(out, order).rows(rows)
    except Refusal as refusal:
        out.refused.append(refusal)
        return None
    out.pairs[made] = order
    if made.target is aten._to_copy.default:  # casts are made behind views
        out.pairs[node_arg(made, 0)] = order
    return made if base is None else _summed(out, made, order, base, node)


def _summed(out: Emitter, made: fx.Node, order: Order, base: fx.Node, node: fx.Node) -> fx.Node:
    """The pairs ``made`` of each token, added up and then to ``base``."""
    per_token = _per_token(out, made, order)
    summed = out.apply(aten.sum.dim_IntList, (per_token, [1]), {}, value(node), origin_of(node))
    if fill_of(base) == 0:
        return summed
    return out.apply(aten.add.Tensor, (base, summed), {}, value(node), origin_of(node))


def _added_part_by_part(out: Emitter, node: fx.Node) -> fx.Node | None:
    """index_add(index_add(b, 0, tok[:i], y_0), 0, tok[i:j], y_1) .. = index_add(b, 0, tok, cat([y_0, y_1, ..])), where
    tok are the tokens of the sorted pairs, and the parts are those of all experts, each once"""
    parts: list[tuple[Part, fx.Node, fx.Node]] = []
    base = node
    while base.target is aten.index_add.default and len(base.args) == 4 and base.args[1] == 0:
        part = _part_of_tokens(out, base.args[2])
        if part is None:
            break
        parts.append((part, node_arg(base, 3), base))
        base = node_arg(base, 0)
    order = _tokens(parts[0][0].whole) if parts else None
    if order is None or len(parts) < order.num_experts:
        return None
    unsorting = Unsorting(out, order)
    try:
        rows = unsorting.added(parts)
    except Refusal as refusal:
        out.refused.append(refusal)
        return None
    fits = written(value(base).shape[0]) == written(order.tokens)
    same_width = str(value(base).shape[1:]) == str(value(rows).shape[1:])
    if not fits or not same_width or value(base).dtype != value(rows).dtype:
        return None
    out.pairs[rows] = order
    return _summed(out, rows, order, base, node)


def is_of_one_expert(out: Emitter, rows: Any) -> bool:
    """Are these the tokens of the sorted pairs of one expert?  Among them no token occurs twice."""
    part = _part_of_tokens(out, rows)
    order = _tokens(part.whole) if part is not None else None
    if part is None or order is None:
        return False
    try:
        Unsorting(out, order).expert_of(rows, part)
    except Refusal:
        return False
    return True


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """``whole[start:end]``"""

    whole: fx.Node
    start: Form
    end: Form


def part_of(out: Emitter, node: Any) -> Part | None:
    """x[i:j], or a part of x[index] or of x // k, written as x[index[i:j]] and x[i:j] // k"""
    if not isinstance(node, fx.Node):
        return None
    bounds = out.numbers.bounds(node)
    if node.target is aten.slice.Tensor and bounds is not None:
        return Part(node_arg(node, 0), *bounds)
    pack = node.args[0] if node.target is operator.getitem else None
    if isinstance(pack, fx.Node) and pack.target is aten.split_with_sizes.default:
        base, _, *dim = pack.args
        position = node.args[1]
        if any(dim) or not isinstance(base, fx.Node) or not isinstance(position, int):
            return None
        start: Form = {}
        for part in value(pack)[:position]:
            start = plus(start, out.numbers.form(part.shape[0]))
        length = out.numbers.form(value(pack)[position].shape[0])
        return Part(base, start, plus(start, length))
    args: tuple
    if node.target is aten.index.Tensor and len(node.args[1]) == 1:  # type: ignore[arg-type]
        inner = part_of(out, node.args[1][0])  # type: ignore[index]
        args = () if inner is None else (node.args[0], [inner.whole])
    elif _quotient(node) is not None:
        inner = part_of(out, node.args[0])
        args = () if inner is None else (inner.whole, *node.args[1:])
    else:
        return None
    if inner is None:
        return None
    found = value(node)
    made = found.new_empty((value(inner.whole).shape[0], *found.shape[1:]))
    whole = out.apply(node.target, args, dict(node.kwargs), made, origin_of(node))
    return dataclasses.replace(inner, whole=whole)


def _part_of_tokens(out: Emitter, rows: Any) -> Part | None:
    """Of the tokens of sorted pairs."""
    part = part_of(out, rows) if isinstance(rows, fx.Node) and value(rows).dim() == 1 else None
    return part if part is not None and _tokens(part.whole) is not None else None


def _undoes(node: fx.Node) -> tuple[Order, fx.Node, fx.Node | None] | None:
    """The order, the sorted rows, and what they are added to at their tokens, if they are added up."""
    target, args = node.target, node.args
    if target is aten.index.Tensor and len(args[1]) == 1:  # type: ignore[arg-type]
        order = _inverted(args[1][0])  # type: ignore[index]
        return order and (order, node_arg(node, 0), None)
    if target is aten.index_put.default and len(args[1]) == 1:  # type: ignore[arg-type]
        base, (index,), rows = args[:3]  # type: ignore[misc]
        is_summed = len(args) == 4 and args[3] is True
    elif target in (aten.index_copy.default, aten.index_add.default) and len(args) == 4:
        base, dim, index, rows = args
        is_summed = target is aten.index_add.default
        if dim != 0:
            return None
    else:
        return None
    if not isinstance(base, fx.Node) or not isinstance(rows, fx.Node):
        return None
    if is_summed:
        order = _tokens(index)
        fits = order is not None and value(base).dim() == 2
        if order is not None and fits:
            fits = written(value(base).shape[0]) == written(order.tokens)
    else:
        order = order_of(index)
        fits = order is not None and written(value(base).shape[0]) == written(order.pairs)
    if not fits or order is None or value(base).dtype != value(rows).dtype:
        return None
    widths = [str(value(n).shape[1:]) for n in (base, rows)]
    return (order, rows, base if is_summed else None) if widths[0] == widths[1] else None


def order_of(index: Any) -> Order | None:
    """``argsort(ids)``, ascending."""
    index = _integers(index)
    if index is None or index.target is not operator.getitem or index.args[1] != 1:
        return None
    pack = node_arg(index, 0)
    if pack.target not in SORTS or any(pack.args[2:]) or "descending" in pack.kwargs:
        return None
    ids = root_of(node_arg(pack, 0))
    experts = choices(ids)
    if experts is None or value(index).dim() != 1 or _reordered(node_arg(pack, 0), ids):
        return None
    return Order(index, ids, experts)


def _reordered(flat: fx.Node, ids: fx.Node) -> bool:
    """``flat`` holds the ids in another order than their own."""
    while flat is not ids:
        if flat.target not in (aten.view.default, aten._to_copy.default):
            return True
        flat = node_arg(flat, 0)
    return False


def _inverted(index: Any) -> Order | None:
    """``argsort(order)``, or ``inverse[order] = arange``"""
    index = _integers(index)
    if index is None:
        return None
    if index.target is operator.getitem and index.args[1] == 1:
        pack = node_arg(index, 0)
        if pack.target in SORTS and not any(pack.args[2:]) and "descending" not in pack.kwargs:
            return order_of(pack.args[0])
    if index.target is aten.index_put.default and len(index.args) == 3:
        _, where, numbers = index.args
        order = order_of(where[0]) if len(where) == 1 else None  # type: ignore[index, arg-type]
        if order is not None and _counts_up(numbers, order.pairs):
            return order
    return None


def _tokens(index: Any) -> Order | None:
    """``order // k``, or ``token_of_pair[order]``: the token of each sorted row."""
    index = _integers(index)
    if index is None:
        return None
    divided = _quotient(index)
    if divided is not None:
        order = order_of(divided[0])
        return order if order is not None and divided[1] == order.top_k else None
    if index.target is aten.index.Tensor and len(index.args[1]) == 1:  # type: ignore[arg-type]
        order = order_of(index.args[1][0])  # type: ignore[index]
        if order is not None and _tokens_of_pairs(index.args[0], order):
            return order
    order = order_of(index)
    return order if order is not None and order.top_k == 1 else None


def _quotient(node: fx.Node) -> tuple[Any, Any] | None:
    """``n // k`` of numbers that are not negative"""
    if node.target is aten.floor_divide.default and len(node.args) == 2:
        return node.args  # type: ignore[return-value]
    is_division = node.target in (aten.div.Tensor_mode, aten.div.Scalar_mode)
    if is_division and len(node.args) == 2 and node.kwargs["rounding_mode"] in ("floor", "trunc"):
        return node.args  # type: ignore[return-value]
    return None


def _tokens_of_pairs(node: Any, order: Order) -> bool:
    """0, .., 0, 1, .., 1, .., each k times"""
    node = _integers(node)
    if node is None:
        return False
    divided = _quotient(node)
    if divided is not None:
        return divided[1] == order.top_k and _counts_up(divided[0], order.pairs)
    if node.target is aten.view.default:
        node = node_arg(node, 0)
    shape = [written(size) for size in value(node).shape]
    if node.target is not aten.expand.default or shape != [
        written(order.tokens),
        written(order.top_k),
    ]:
        return False
    column = node_arg(node, 0)
    if column.target is not aten.view.default or value(column).shape[-1] != 1:
        return False
    return _counts_up(node_arg(column, 0), order.tokens)


def _counts_up(node: Any, size: Any) -> bool:
    """arange(size)"""
    node = _integers(node)
    if node is None or node.target is not aten.arange.default or len(node.args) != 1:
        return False
    return written(value(node).shape[0]) == written(size)


def _integers(node: Any) -> fx.Node | None:
    """Without casts between types of integers that hold any position."""
    while isinstance(node, fx.Node) and node.target is aten._to_copy.default:
        inner = node_arg(node, 0)
        if {value(n).dtype for n in (node, inner)} - {torch.int32, torch.int64}:
            break
        node = inner
    return node if isinstance(node, fx.Node) else None


def _has_parts(rows: fx.Node, grouped: bool) -> bool:
    """Is anything in here put together from parts whose lengths depend on the data?  Then it is ours to explain.

    grouped: or made of such parts by a grouped GEMM.
    """
    todo, seen = [rows], {rows}
    while todo:
        node = todo.pop()
        if node.target is aten.slice_scatter.default:
            return True
        if grouped and node.target is aten._grouped_mm.default:
            return True
        if node.target is aten.cat.default and any(
            unbacked(value(part)) for part in node.all_input_nodes
        ):
            return True
        for arg in node.all_input_nodes:
            if arg not in seen:
                seen.add(arg)
                todo.append(arg)
    return False


def _of_tokens(out: Emitter, node: fx.Node) -> fx.Node | None:
    """[T k, ..] seen as [T, k, ..]: products and casts are made there."""
    order = out.pairs.get(node_arg(node, 0))
    if order is None:
        return None
    leading = [written(size) for size in value(node).shape[:2]]
    if leading != [written(order.tokens), written(order.top_k)] or value(node).dim() != 3:
        return None
    return _per_token(out, node_arg(node, 0), order)


def _combined(out: Emitter, node: fx.Node) -> fx.Node | None:
    """bmm(w [T, 1, k], y [T, k, H]) = view(sum(y * view(w, [T, k, 1]), 1), [T, 1, H]) for what the experts of a token
    give, y"""
    weights, given = node_arg(node, 0), node_arg(node, 1)
    inner = uncast(given)
    base = node_arg(inner, 0) if inner.target is aten.view.default else inner
    order = out.pairs.get(base)
    if order is None or not _is_one(value(weights).shape[1]):
        return None
    shape = value(given).shape
    if [written(size) for size in shape[:2]] != [written(order.tokens), written(order.top_k)]:
        return None
    column = value(weights).reshape(*shape[:2], 1)
    origin, made = origin_of(node), value(node)
    scaled = out.apply(
        aten.mul.Tensor,
        (given, out.view(weights, column, origin)),
        {},
        value(given).new_empty(shape),
        origin,
    )
    summed = out.apply(
        aten.sum.dim_IntList,
        (scaled, [1]),
        {},
        made.new_empty((made.shape[0], made.shape[2])),
        origin,
    )
    return out.view(summed, made, origin)


def _per_token(out: Emitter, rows: fx.Node, order: Order) -> fx.Node:
    """view(a * b, [T, k, ..]) = view(a, ..) * view(b, ..), and so for casts, of what the experts give"""
    found = value(rows)
    shape = (order.tokens, order.top_k, *found.shape[1:])
    made, origin = found.new_empty(shape), origin_of(rows)
    cast = rows if rows.target is aten._to_copy.default else None
    of_view = cast is not None and node_arg(cast, 0).target is aten.view.default
    if not _is_of_experts(rows) and not of_view:
        return out.view(rows, made, origin)
    if rows.target is aten.mul.Tensor and all(
        isinstance(a, fx.Node) and value(a).dim() == found.dim() for a in rows.args
    ):
        parts = tuple(_per_token(out, a, order) for a in rows.args)  # type: ignore[arg-type]
        return out.apply(aten.mul.Tensor, parts, {}, made, origin)
    if rows.target is aten._to_copy.default:
        inner = _per_token(out, node_arg(rows, 0), order)
        return out.apply(aten._to_copy.default, (inner,), dict(rows.kwargs), made, origin)
    return out.view(rows, made, origin)


def _is_of_experts(node: fx.Node) -> bool:
    steps = (aten.mul.Tensor, aten.add.Tensor, aten._to_copy.default)
    return node.target is PAIR_LINEAR or (
        node.target in steps and any(map(_is_of_experts, node.all_input_nodes))
    )


def is_pointwise(target: Any) -> bool:
    """Does each element of the result depend on the elements at its own place alone?"""
    is_tagged = isinstance(target, OpOverload) and torch.Tag.pointwise in target.tags
    return is_tagged and not is_random(target)


class Unsorting:
    """Expressions on sorted rows, turned into expressions on pairs.  Raises Refusal where that is not possible."""

    def __init__(self, out: Emitter, order: Order) -> None:
        self.out, self.order = out, order
        self.flat_ids = out.view(
            order.ids, value(order.ids).new_empty((order.pairs,)), origin_of(order.ids)
        )
        self._depends: dict[fx.Node, bool] = {order.order: True}
        self._made: dict[Any, fx.Node] = {}
        self._below = 0  # projections between here and the end

    # -- all rows ------------------------------------------------------------------------------------------------------
    def rows(self, node: fx.Node) -> fx.Node:
        """``p [S, ..]`` such that ``node`` is ``p[order]``."""
        if node not in self._made:
            self._made[node] = self._rows(node)
        return self._made[node]

    def _rows(self, node: fx.Node) -> fx.Node:
        target, args = node.target, node.args
        if target is aten.index.Tensor and len(args[1]) == 1:  # type: ignore[arg-type]
            return self._gathered(node, args[1][0])  # type: ignore[index]
        if target is aten.cat.default and (args[1:] or (0,))[0] == 0:
            return self._concatenated(node)
        if target is aten.slice_scatter.default:
            return self._written(node)
        if target is aten._grouped_mm.default:
            return self._grouped(node)
        if target is ALL_ROWS:
            if written(value(node).shape[0]) != written(self.order.pairs):
                self._refuse(Code.SPELLING, "not as many rows as were sorted", node)
            return self.rows(node_arg(node, 0))
        return self._row_by_row([node], self.rows)

    def _gathered(self, node: fx.Node, index: Any) -> fx.Node:
        base = node_arg(node, 0)
        if _tokens(index) is not None and self._is_same(_tokens(index)):
            return self._of_each_pair(base, node)
        if not self._is_same(order_of(index)) or self._depends_on_order(base):
            self._refuse(Code.SPELLING, "rows are not gathered in the order of the sort", node)
        positions: Any = base.args[1] if base.target is aten.index.Tensor else ()
        if len(positions) == 1 and _tokens_of_pairs(positions[0], self.order):
            return self._of_each_pair(node_arg(base, 0), node)
        if written(value(base).shape[0]) != written(self.order.pairs):
            self._refuse(Code.SPELLING, "rows are not gathered from one for each pair", node)
        return base

    def _of_each_pair(self, tokens: fx.Node, node: fx.Node) -> fx.Node:
        """The row of its token, for each pair."""
        found, (T, k) = value(tokens), (self.order.tokens, self.order.top_k)
        if written(found.shape[0]) != written(T) or self._depends_on_order(tokens):
            self._refuse(Code.SPELLING, "rows are not gathered from one for each token", node)
        rest, origin = found.shape[1:], origin_of(node)
        column = self.out.view(tokens, found.new_empty((T, 1, *rest)), origin)
        made = found.new_empty((T, k, *rest))
        wide = self.out.apply(aten.expand.default, (column, self.out.sizes(made)), {}, made, origin)
        return self.out.view(wide, found.new_empty((self.order.pairs, *rest)), origin)

    def _concatenated(self, node: fx.Node) -> fx.Node:
        parts = _flattened(node)
        lengths = [self.out.numbers.form(value(p).shape[0]) for p in parts]
        experts = self.order.num_experts
        if len(parts) == experts + 1 and fill_of(parts[-1]) is not None:
            rest = self.out.numbers.form(self.order.pairs)
            for length in lengths[:-1]:
                rest = plus(rest, length, -1)
            if lengths[-1] == rest:  # of which there are none
                parts.pop()
        if len(parts) < experts:
            words = f"{experts} experts are chosen from, {len(parts)} are visited"
            self._refuse(Code.EXPERT_MISSING, words, node)
        if len(parts) > experts:
            words = f"{experts} experts are chosen from, {len(parts)} are visited"
            self._refuse(Code.EXPERT_TWICE, words, node)
        return self.parallel(parts)

    def _written(self, node: fx.Node) -> fx.Node:
        """out[start_e:end_e] = part_e, for every e"""
        parts: dict[int, fx.Node] = {}
        at: Any = node
        while at.target is aten.slice_scatter.default:
            bounds = self.out.numbers.bounds(at)
            before, part, *rest = at.args
            if bounds is None or not isinstance(part, fx.Node) or (rest[:1] or [0])[0] != 0:
                self._refuse(Code.SPELLING, "experts write to something else than their rows", at)
            e = self.expert_of(at, Part(at, *bounds))
            if e in parts:
                self._refuse(Code.EXPERT_TWICE, f"rows of expert {e} are written twice", at)
            parts[e] = _uncopied(part, at)
            at = before
        missing = sorted(set(range(self.order.num_experts)) - set(parts))
        if missing:
            self._refuse(Code.EXPERT_MISSING, f"experts {missing[:4]} are never visited", node)
        return self.parallel([parts[e] for e in range(self.order.num_experts)])

    def added(self, parts: Sequence[tuple[Part, fx.Node, fx.Node]]) -> fx.Node:
        """The rows that each expert adds to its part of the tokens, and where, as pairs."""
        rows: dict[int, fx.Node] = {}
        for part, given, where in parts:
            if not self._is_same(_tokens(part.whole)):
                self._refuse(
                    Code.SPELLING, "experts add to tokens in the order of two sorts", where
                )
            e = self.expert_of(where, part)
            if e in rows:
                self._refuse(Code.EXPERT_TWICE, f"rows of expert {e} are added twice", where)
            rows[e] = given
        return self.parallel([rows[e] for e in range(self.order.num_experts)])

    def _grouped(self, node: fx.Node) -> fx.Node:
        """grouped_mm(rows, matrices [E, ..], the number of rows up to each expert's last) = pair_linear(..)"""
        rows, matrices, ends, *others = node.args
        if others or node.kwargs or not isinstance(rows, fx.Node) or not isinstance(ends, fx.Node):
            self._refuse(Code.SPELLING, "a grouped GEMM of another kind", node)
        if (
            not isinstance(matrices, fx.Node)
            or value(rows).dim() != 2
            or value(matrices).dim() != 3
        ):
            self._refuse(Code.SPELLING, "a grouped GEMM of another kind", node)
        dtype = ends.kwargs.get("dtype", value(ends).dtype)
        counts = node_arg(ends, 0) if ends.target is aten.cumsum.default else None
        if counts is None or ends.args[1] != 0 or dtype not in (torch.int32, torch.int64):
            self._refuse(Code.PROOF, "where the experts' rows end is not a sum of counts", node)
        if not self._counts(counts):
            words = "the lengths of the groups are not known to be how often each expert was chosen"
            self._refuse(Code.PROOF, words, node)
        if value(matrices).shape[0] != self.order.num_experts:
            words = f"{self.order.num_experts} experts are chosen from, {value(matrices).shape[0]} are there"
            self._refuse(Code.EXPERT_MISSING, words, node)
        if self._depends_on_order(matrices):
            self._refuse(self._code(), "the weights of an expert depend on its rows", node)
        self._below += 1
        made = (self.rows(rows), self.flat_ids, matrices)
        self._below -= 1
        return self.out.apply(PAIR_LINEAR, made, {}, self._sized(node), origin_of(node))

    # -- the rows of one expert after the other ------------------------------------------------------------------------
    def parallel(self, nodes: Sequence[fx.Node]) -> fx.Node:
        """``p [S, ..]`` such that ``nodes[e]`` are the rows of ``p`` whose expert is ``e``, as the sort has them."""
        key = tuple(nodes)
        if key not in self._made:
            self._made[key] = self._parallel(key)
        return self._made[key]

    def _parallel(self, nodes: tuple[fx.Node, ...]) -> fx.Node:
        slices = [part_of(self.out, node) for node in nodes]
        if any(s is not None for s in slices):
            return self.rows(self._cut(nodes, slices))
        first = nodes[0]
        if first.target is aten.mm.default and all(n.target is first.target for n in nodes):
            return self._projection(nodes)
        return self._row_by_row(nodes, self.parallel)

    def _cut(self, nodes: Sequence[fx.Node], slices: Sequence[Part | None]) -> fx.Node:
        bases = {s.whole if s is not None else None for s in slices}
        if len(bases) > 1:
            self._refuse(Code.INPUTS_DIFFER, "experts read different inputs", nodes[0])
        for e, (node, part) in enumerate(zip(nodes, slices, strict=True)):
            assert part is not None
            read = self.expert_of(node, part)
            if read != e:
                self._refuse(
                    Code.EXPERT_WEIGHTS, f"expert {e} is given the rows of expert {read}", node
                )
        base = bases.pop()
        assert isinstance(base, fx.Node)
        return self._whole(base)

    def _whole(self, base: fx.Node) -> fx.Node:
        """x[:n] = x where n is the number of all rows"""
        bounds = self.out.numbers.bounds(base)
        if base.target is not aten.slice.Tensor or bounds is None:
            return base
        start, end = bounds
        counts = {atom[0] for atom in end if atom is not None}
        every = {(c, e): 1 for c in counts for e in range(self.order.num_experts)}
        if start or end != every or not all(map(self._counts, counts)):
            self._refuse(Code.PROOF, "some of the sorted rows are left out", base)
        return node_arg(base, 0)

    def expert_of(self, node: fx.Node, part: Part) -> int:
        """The expert to whom the rows ``node``, which are ``part`` of all, belong."""
        start, end = part.start, part.end
        atom = single(plus(end, start, -1))
        if atom is None or atom[1] is None or not self._counts(atom[0]):
            words = "the lengths of the slices are not known to be how often each expert was chosen"
            self._refuse(Code.PROOF, words, node)
        counts, e = atom[0], int(atom[1])
        if start != {(counts, i): 1 for i in range(e)}:
            words = f"the rows of expert {e} do not start where those of the expert before end"
            self._refuse(Code.PROOF, words, node)
        return e

    def _counts(self, counts: Any) -> bool:
        found = counted(counts) if isinstance(counts, fx.Node) else None
        return found == (self.order.ids, self.order.num_experts)

    # -- steps ---------------------------------------------------------------------------------------------------------
    def _projection(self, nodes: Sequence[fx.Node]) -> fx.Node:
        """mm(rows of e, matrix of e) for each e = pair_linear(rows, ids, matrices)"""
        first = nodes[0]
        self._below += 1
        rows = self.parallel([node_arg(n, 0) for n in nodes])
        self._below -= 1
        weights = [node_arg(n, 1) for n in nodes]
        if all(w.target is aten.permute.default for w in weights):
            stack = self._stacked([node_arg(w, 0) for w in weights], first)
            made = value(stack).transpose(1, 2)
            stack = self.out.permute(stack, [0, 2, 1], made, origin_of(first))
        else:
            stack = self._stacked(weights, first)
        made = self._sized(first)
        args = (rows, self.flat_ids, stack)
        return self.out.apply(PAIR_LINEAR, args, {}, made, origin_of(first))

    def _stacked(self, tensors: Sequence[fx.Node], where: fx.Node) -> fx.Node:
        """One tensor of every expert, stacked: ``select(w, 0, e)`` for each e = w"""
        first = tensors[0]
        if all(t.target is aten.select.int and t.args[1] == 0 for t in tensors):
            stacks = {node_arg(t, 0) for t in tensors}
            if len(stacks) > 1:
                self._refuse(Code.LAYOUT, "experts come from several stacks", where)
            for e, tensor in enumerate(tensors):
                if tensor.args[2] != e:
                    words = f"weights of expert {tensor.args[2]} are used for expert {e}"
                    self._refuse(Code.EXPERT_WEIGHTS, words, where)
            stack = stacks.pop()
            if value(stack).shape[0] != len(tensors):
                self._refuse(
                    Code.EXPERT_MISSING, "there are experts beyond those chosen from", where
                )
            return stack
        if all(t.target is aten._to_copy.default and t.kwargs == first.kwargs for t in tensors):
            inner = self._stacked([node_arg(t, 0) for t in tensors], where)
            made = value(first).new_empty(value(inner).shape)
            copied = dict(first.kwargs)
            return self.out.apply(aten._to_copy.default, (inner,), copied, made, origin_of(where))
        if any(t.target is aten.select.int for t in tensors):
            self._refuse(Code.LAYOUT, "stacked and separate weights are mixed", where)
        if any(map(self._depends_on_order, tensors)):
            self._refuse(self._code(), "the weights of an expert depend on its rows", where)
        if len({(str(value(t).shape), value(t).dtype) for t in tensors}) > 1:
            self._refuse(Code.EXPERT_SHAPES, "experts differ in shape or dtype", where)
        made = value(first).new_empty((len(tensors), *value(first).shape))
        return self.out.emit(aten.stack.default, (list(tensors),), {}, made, origin_of(where))

    def _row_by_row(self, nodes: Sequence[fx.Node], inner: Any) -> fx.Node:
        """One operator that treats each row by itself, on all rows (one node) or on the rows of each expert."""
        first = nodes[0]
        for node in nodes:
            if node.target is not first.target or len(node.args) != len(first.args):
                words = f"one expert computes `{name_of(first)}`, another `{name_of(node)}`"
                self._refuse(self._code(), words, node)
        if not self._keeps_rows(first):
            self._refuse(self._code(), f"`{name_of(first)}` is not known to keep rows apart", first)
        made = self._sized(first)
        rank = made.dim()
        args = []
        for column in zip(*(n.args for n in nodes), strict=True):
            one = column[0]
            if isinstance(one, fx.Node):
                args.append(self._operand(column, inner, rank, first))
            elif first.target in (aten.view.default, aten.expand.default):
                args.append(self.out.sizes(made))
            elif any(repr(other) != repr(one) for other in column):
                self._refuse(self._code(), "experts differ in a constant", first)
            else:
                args.append(one)
        if any(n.kwargs != first.kwargs for n in nodes):
            self._refuse(self._code(), "experts differ in a constant", first)
        if first.target is aten.view.default:
            return self.out.view(args[0], made, origin_of(first))
        return self.out.apply(first.target, tuple(args), dict(first.kwargs), made, origin_of(first))

    def _operand(self, column: tuple[Any, ...], inner: Any, rank: int, where: fx.Node) -> fx.Node:
        one, *_ = column
        if not all(isinstance(n, fx.Node) for n in column):
            self._refuse(self._code(), "experts differ in what they compute", where)
        if any(map(self._depends_on_order, column)):
            if any(value(n).dim() != rank for n in column) and not self._reshapes(where):
                self._refuse(self._code(), "rows are combined with each other", where)
            return inner(list(column)) if len(column) > 1 else inner(one)
        found = value(one)
        if found.dim() == rank and not _is_one(found.shape[0]):
            self._refuse(Code.SPELLING, "sorted rows are combined with rows that are not", where)
        same = all(n is one for n in column)
        is_of_one = one.target is aten.select.int and len(column) > 1
        if found.dim() == rank - 1 and (not same or is_of_one):
            stack = self._stacked(column, where)
            made = found.new_empty((self.order.pairs, *found.shape))
            args = (stack, [self.flat_ids])
            return self.out.apply(aten.index.Tensor, args, {}, made, origin_of(where))
        if not same:
            self._refuse(self._code(), "experts differ in a constant", where)
        return one

    def _keeps_rows(self, node: fx.Node) -> bool:
        """Row r of the result depends on row r of the operands alone."""
        found = value(node)
        if is_pointwise(node.target) or node.target is aten._to_copy.default:
            return True
        if self._reshapes(node):
            base = value(node_arg(node, 0))
            rows = self.out.same_sizes(found.shape[:1], base.shape[:1])
            same_rank = bool(base.dim() == found.dim())
            return rows and (same_rank or node.target is not aten.expand.default)
        if node.target is aten.slice.Tensor:
            return bool(node.args[1] != 0)
        return False

    def _reshapes(self, node: fx.Node) -> bool:
        return node.target in (aten.view.default, aten.expand.default)

    # -- odds and ends -------------------------------------------------------------------------------------------------
    def _sized(self, node: fx.Node) -> torch.Tensor:
        """The value of ``node`` for all pairs."""
        found = value(node)
        return found.new_empty((self.order.pairs, *found.shape[1:]))

    def _is_same(self, other: Order | None) -> bool:
        return other is not None and other.order is self.order.order

    def _depends_on_order(self, node: fx.Node) -> bool:
        todo = [node]
        while todo:
            at = todo[-1]
            waiting = [a for a in at.all_input_nodes if a not in self._depends]
            if at in self._depends or not waiting:
                todo.pop()
                if at not in self._depends:
                    self._depends[at] = any(self._depends[a] for a in at.all_input_nodes)
            else:
                todo += waiting
        return self._depends[node]

    def _code(self) -> Code:
        """Between the two projections it is the activation that is not as it should be."""
        return Code.ACTIVATION if self._below == 1 else Code.SPELLING

    def _refuse(self, code: Code, words: str, node: fx.Node) -> NoReturn:
        raise Refusal(code, words, location(node))


def _flattened(node: fx.Node) -> list[fx.Node]:
    """cat([cat(a, b), c]) = cat([a, b, c]) along the rows"""
    if node.target is ALL_ROWS:
        node = node_arg(node, 0)
    if node.target is not aten.cat.default or (node.args[1:] or (0,))[0] != 0:
        return [node]
    return list(itertools.chain.from_iterable(map(_flattened, node.args[0])))  # type: ignore[arg-type]


def _uncopied(part: fx.Node, where: fx.Node) -> fx.Node:
    """copy(rows, expand(x, shape of rows)) = x, which has as many rows: both are shown to be those of one expert"""
    if part.target is aten.copy.default and value(part).dtype == value(node_arg(part, 1)).dtype:
        part = node_arg(part, 1)
    if part.target is aten.expand.default:
        inner = node_arg(part, 0)
        shapes = [str(value(n).shape[1:]) for n in (part, inner)]
        if shapes[0] == shapes[1] and not _is_one(value(inner).shape[0]):
            part = inner
    return part


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1
