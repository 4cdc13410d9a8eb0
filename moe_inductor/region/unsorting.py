"""Sorted rows, put back in the order of the pairs: what is computed from them, computed from rows that nobody sorted
(``pairs.py`` has the equation).

All rows are followed back to where they were gathered.  Where each expert has its slice, the slices of all experts are
followed together, and become one again where they were cut.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import fx

from moe_inductor.reasons import Code, Refusal
from moe_inductor.region.counts import counted, fill_of, plus, single
from moe_inductor.region.nodes import (
    is_one,
    is_pointwise,
    location,
    name_of,
    node_arg,
    origin_of,
    value,
    written,
)
from moe_inductor.region.orders import Order, are_tokens_of_pairs, order_of, tokens_of
from moe_inductor.region.parts import Part, part_of, part_of_tokens
from moe_inductor.region.row_ops import ALL_ROWS, PAIR_LINEAR

if TYPE_CHECKING:
    from moe_inductor.region.normalise import Emitter

aten = torch.ops.aten


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
        if tokens_of(index) is not None and self._is_same(tokens_of(index)):
            return self._of_each_pair(base, node)
        if not self._is_same(order_of(index)) or self._depends_on_order(base):
            self._refuse(Code.SPELLING, "rows are not gathered in the order of the sort", node)
        positions: Any = base.args[1] if base.target is aten.index.Tensor else ()
        if len(positions) == 1 and are_tokens_of_pairs(positions[0], self.order):
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
            if not self._is_same(tokens_of(part.whole)):
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
        # Without a minlength there may be less groups than matrices.
        if not self._counts(counts) or value(counts).shape[0] != self.order.num_experts:
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
        if not all(isinstance(value(n), torch.Tensor) for n in column):
            words = "rows are combined with a number that depends on the data"
            self._refuse(self._code(), words, where)
        if any(map(self._depends_on_order, column)):
            if any(value(n).dim() != rank for n in column) and not self._reshapes(where):
                self._refuse(self._code(), "rows are combined with each other", where)
            return inner(list(column)) if len(column) > 1 else inner(one)
        found = value(one)
        if found.dim() == rank and not is_one(found.shape[0]):
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
        if shapes[0] == shapes[1] and not is_one(value(inner).shape[0]):
            part = inner
    return part


def is_of_one_expert(out: Emitter, rows: Any) -> bool:
    """Are these the tokens of the sorted pairs of one expert?  Among them no token occurs twice."""
    part = part_of_tokens(out, rows)
    order = tokens_of(part.whole) if part is not None else None
    if part is None or order is None:
        return False
    try:
        Unsorting(out, order).expert_of(rows, part)
    except Refusal:
        return False
    return True
