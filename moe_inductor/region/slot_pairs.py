"""Experts on slots, as if each pair had a row of its own: which is the same if no two share a slot (``slot_proof.py``).

A pair that is dropped has the id -1.  What is computed from the rows of slots has to be computed row by row; it is
written for all experts at once, or for one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from moe_inductor.reasons import Code, Refusal
from moe_inductor.region.axes import Axes, laid_out
from moe_inductor.region.masks import Reader
from moe_inductor.region.nodes import (
    is_one,
    is_pointwise,
    location,
    name_of,
    node_arg,
    origin_of,
    same_sizes,
    value,
)
from moe_inductor.region.normalise import Emitter, arithmetic, cast, rule
from moe_inductor.region.orders import Order
from moe_inductor.region.row_ops import PAIR_LINEAR
from moe_inductor.region.slot_proof import capacity_below, prove_apart
from moe_inductor.region.slots import Block, Sent, block_of, may_be_slots
from moe_inductor.region.sums import Factor
from moe_inductor.region.unsorting import Unsorting

aten = torch.ops.aten


@rule(aten.bmm.default, aten.mm.default, first=True)
def _combined(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """bmm(combine [.., T, E C], experts(bmm(dispatch, x)) [.., E C, H]) = bmm(w [T, 1, k], y [T, k, H])
    where y is what the experts of each pair give"""
    if not any(map(may_be_slots, args)):
        return None
    try:
        block = block_of(Reader(), *args)
        if block is None:
            return None
        return _Operands(out, prove_apart(block), origin_of(node)).combined()
    except Refusal as refusal:
        out.refused.append(refusal)
        return None


class _Operands:
    """What a block is made of, in terms of pairs.  Raises Refusal where something is no number of each pair.

    ids [T, k]: of each pair, -1 where it is dropped.  weights [T, k].  rows [T k, H]: that of its token for each pair.
    """

    def __init__(self, out: Emitter, block: Block, origin: str | None) -> None:
        self.out, self.block, self.origin = out, block, origin
        own = [self._laid(one.ids, one) for one in block.terms]
        parts = zip(block.terms, own, strict=True)
        self.weights = self._joined([self._weight(one, ids) for one, ids in parts])
        parts = zip(block.terms, own, strict=True)
        self.ids = self._joined([self._kept(one, ids) for one, ids in parts])
        self.rows = self._of_tokens()

    def combined(self) -> fx.Node:
        out, block, origin = self.out, self.block, self.origin
        y = SlotRows(out, block, self.ids, self.rows).rows(block.y.node)
        (T, k), width = value(self.ids).shape, value(y).shape[-1]
        per_token = out.view(y, value(y).reshape(T, k, width), origin)
        weights = self._zeroed()
        weights = out.view(weights, value(weights).reshape(T, 1, k), origin)
        made = torch.empty_like(value(weights), dtype=value(y).dtype)
        weights = cast(out, weights, made, origin)
        summed = value(per_token).new_empty((T, 1, width))
        product = out.apply(aten.bmm.default, (weights, per_token), {}, summed, origin)
        flat = out.view(product, summed.reshape(T, width), origin)
        (h,) = block.y.dims[2]
        return laid_out(out, Axes(flat, (*block.tokens, h), block.made.dims), origin)

    def _zeroed(self) -> fx.Node:
        """The weights, zero where a pair is dropped."""
        out, made = self.out, value(self.weights)
        hit = torch.empty_like(made, dtype=torch.bool)
        gone = out.apply(aten.lt.Scalar, (self.ids, 0), {}, hit, self.origin)
        operands = (self.weights, gone, 0)
        return out.apply(aten.masked_fill.Scalar, operands, {}, made, self.origin)

    def _kept(self, one: Sent, ids: fx.Node) -> fx.Node:
        """The ids of one term, -1 where a pair is dropped."""
        out, capacity = self.out, self.out.size(self.block.c.size)
        masks = [self._laid(f, one, ids) for f in one.kept]
        bounds = [capacity_below(self.block, f, one) for f in one.kept]
        if capacity not in bounds and not one.fits:
            if not isinstance(capacity, int):
                words = "the capacity of the experts is not a known size"
                raise Refusal(Code.SPELLING, words, location(one.slots.node))
            slot = self._laid(one.slots, one, ids)
            hit = torch.empty_like(value(slot), dtype=torch.bool)
            masks.append(out.emit(aten.lt.Scalar, (slot, capacity), {}, hit, self.origin))
        for mask in masks:
            made = value(ids)
            ids = out.emit(aten.where.ScalarOther, (mask, ids, -1), {}, made, self.origin)
        return ids

    def _weight(self, one: Sent, ids: fx.Node) -> fx.Node:
        """The weights of one term where a pair counts."""
        out, (T, k) = self.out, value(ids).shape
        found = [self._laid(f, one, ids) for f in one.weights]
        if not found:
            made = value(self.block.y.node).new_empty((T, k))
            kept = {"dtype": made.dtype, "device": made.device}
            return out.emit(aten.full.default, (out.sizes(made), 1), kept, made, self.origin)
        total, *more = found
        for other in more:
            made = value(total) * value(other)
            total = arithmetic(out, aten.mul.Tensor, total, other, made, self.origin)
        wide = value(total).expand(T, k)
        if out.same_shape(value(total), wide):
            return total
        return out.apply(aten.expand.default, (total, out.sizes(wide)), {}, wide, self.origin)

    def _laid(self, factor: Factor, one: Sent, ids: fx.Node | None = None) -> fx.Node:
        """``factor`` [T, k], at the pair's own expert; [T, 1] where it is the same for all choices."""
        block, letters = self.block, set(factor.letters)
        dims = [block.tokens, (one.choice,) if one.choice in letters else ()]
        if block.e in letters:
            dims.append((block.e,))
        if letters != {a for d in dims for a in d}:
            words = "a condition or a weight is not one of each token"
            raise Refusal(Code.SPELLING, words, location(factor.node))
        made = laid_out(self.out, Axes(factor.node, factor.letters, tuple(dims)), self.origin)
        return made if block.e not in letters or ids is None else self._at_own(made, ids)

    def _at_own(self, given: fx.Node, ids: fx.Node) -> fx.Node:
        """given [T, k or 1, E] at ids [T, k]"""
        out, found, at = self.out, value(given), value(ids)
        if is_one(found.shape[1]) or is_one(at.shape[1]):
            flat = out.view(given, found.reshape(found.shape[0], found.shape[2]), self.origin)
            made = torch.empty_like(at, dtype=found.dtype)
            return out.apply(aten.gather.default, (flat, 1, ids), {}, made, self.origin)
        column = out.view(ids, at.unsqueeze(-1), self.origin)
        made = torch.empty_like(value(column), dtype=found.dtype)
        picked = out.apply(aten.gather.default, (given, 2, column), {}, made, self.origin)
        return out.view(picked, torch.empty_like(at, dtype=found.dtype), self.origin)

    def _joined(self, parts: list[fx.Node]) -> fx.Node:
        if len(parts) == 1:
            return parts[0]
        made = torch.cat([value(p) for p in parts], dim=1)
        return self.out.emit(aten.cat.default, (parts, 1), {}, made, self.origin)

    def _of_tokens(self) -> fx.Node:
        out, block, (T, k) = self.out, self.block, value(self.ids).shape
        rest = tuple(a for a in block.x.letters if a not in block.tokens)
        axes = Axes(block.x.node, block.x.letters, (block.tokens, rest))
        x = laid_out(out, axes, self.origin)
        column = out.view(x, value(x).unsqueeze(1), self.origin)
        made = value(column).expand(T, k, -1)
        wide = out.apply(aten.expand.default, (column, out.sizes(made)), {}, made, self.origin)
        flat = out.view(wide, made.reshape(T * k, made.shape[-1]), self.origin)
        read = torch.empty_like(value(flat), dtype=value(block.rows).dtype)
        return cast(out, flat, read, self.origin)


class SlotRows(Unsorting):
    """What is computed from the rows of slots, for each pair: ``rows`` of all experts, [E, C, F], as [T k, F], and
    ``parallel`` of one expert after the other, [C, F]."""

    def __init__(self, out: Emitter, block: Block, ids: fx.Node, rows: fx.Node) -> None:
        flat = out.view(ids, value(ids).reshape(-1), None)
        super().__init__(out, Order(flat, ids, block.e.size))
        self._made[block.rows] = rows
        self._depends[block.rows] = True

    def _rows(self, node: fx.Node) -> fx.Node:
        args = node.args
        if node.target is aten.bmm.default and not self._depends_on_order(node_arg(node, 1)):
            self._below += 1
            rows = self.rows(node_arg(node, 0))
            self._below -= 1
            operands = (rows, self.flat_ids, args[1])
            return self.out.apply(PAIR_LINEAR, operands, {}, self._sized(node), origin_of(node))
        if node.target in (aten.stack.default, aten.cat.default) and (args[1:] or (0,))[0] == 0:
            if len(args[0]) != self.order.num_experts:  # type: ignore[arg-type]
                self._refuse(Code.EXPERT_MISSING, "not every expert reads its slots", node)
            return self.parallel(args[0])  # type: ignore[arg-type]
        if node.target is aten.view.default:
            return self.rows(self._kept_in(node, node_arg(node, 0)))
        if value(node).dim() != 3:
            self._refuse(self._code(), f"`{name_of(node)}` is not known to keep rows apart", node)
        return self._one_by_one([node])

    def _parallel(self, nodes: tuple[fx.Node, ...]) -> fx.Node:
        first = nodes[0]
        for node in nodes:
            if node.target is not first.target or len(node.args) != len(first.args):
                words = f"one expert computes `{name_of(first)}`, another `{name_of(node)}`"
                self._refuse(self._code(), words, node)
        if first.target is aten.view.default:
            return self.parallel([self._kept_in(n, node_arg(n, 0)) for n in nodes])
        if first.target is aten.mm.default:
            return self._projection(nodes)
        numbers = [_expert(n) for n in nodes]
        if None not in numbers:
            return self._read(nodes, numbers)
        return self._one_by_one(nodes)

    def _read(self, nodes: Sequence[fx.Node], numbers: Sequence[Any]) -> fx.Node:
        """The slots of each expert"""
        bases = {node_arg(n, 0) for n in nodes}
        if len(bases) > 1:
            self._refuse(Code.INPUTS_DIFFER, "experts read different inputs", nodes[0])
        for e, number in enumerate(numbers):
            if number != e:
                words = f"expert {e} is given the rows of expert {number}"
                self._refuse(Code.EXPERT_WEIGHTS, words, nodes[e])
        return self.rows(bases.pop())

    def _kept_in(self, view: fx.Node, inner: fx.Node) -> fx.Node:
        """What is viewed, if the rows stay what they are: a dimension of size 1 comes or goes."""
        shapes = [[s for s in value(n).shape[:-1] if not is_one(s)] for n in (view, inner)]
        same = same_sizes(*shapes)
        if not same or not same_sizes(value(view).shape[-1:], value(inner).shape[-1:]):
            self._refuse(self._code(), "rows are combined with each other", view)
        return inner

    def _one_by_one(self, nodes: Sequence[fx.Node]) -> fx.Node:
        """A function of each element, or some columns; of all experts (one node) or of one after the other."""
        first, made = nodes[0], self._sized(nodes[0])
        target, args, last = first.target, first.args, value(first).dim() - 1
        differ = (repr(_constants(n)) != repr(_constants(first)) for n in nodes)
        if any(differ) or any(n.kwargs != first.kwargs for n in nodes):
            self._refuse(self._code(), "experts differ in a constant", first)
        if target is aten.slice.Tensor and args[1] == last:
            rows = self._inner([node_arg(n, 0) for n in nodes])
            return self.out.apply(target, (rows, 1, *args[2:]), {}, made, origin_of(first))
        if not is_pointwise(target) and target is not aten._to_copy.default:
            self._refuse(self._code(), f"`{name_of(first)}` is not known to keep rows apart", first)
        given = []
        for column in zip(*(n.args for n in nodes), strict=True):
            is_node = isinstance(column[0], fx.Node)
            given.append(self._argument(column, nodes) if is_node else column[0])
        return self.out.apply(target, tuple(given), dict(first.kwargs), made, origin_of(first))

    def _argument(self, column: Sequence[fx.Node], nodes: Sequence[fx.Node]) -> fx.Node:
        one, where, found = column[0], nodes[0], value(column[0])
        if any(map(self._depends_on_order, column)):
            if not same_sizes(found.shape[:-1], value(where).shape[:-1]):
                self._refuse(self._code(), "rows are combined with each other", where)
            return self._inner(column)
        of_one = one.target is aten.select.int and len(column) > 1
        if found.dim() < 2 and not of_one and all(n is one for n in column):
            return one
        if len(nodes) > 1 and found.dim() == 1:
            stack = self._stacked(column, where)
        elif found.dim() == 3 and is_one(found.shape[1]) and len(nodes) == 1:
            stack = self.out.view(one, found.squeeze(1), origin_of(where))
        else:
            self._refuse(self._code(), "rows of slots are combined with something else", where)
        if not same_sizes(value(stack).shape[:1], [self.order.num_experts]):
            self._refuse(self._code(), "rows of slots are combined with something else", where)
        made = found.new_empty((self.order.pairs, found.shape[-1]))
        args = (stack, [self.flat_ids])
        return self.out.apply(aten.index.Tensor, args, {}, made, origin_of(where))

    def _inner(self, column: Sequence[fx.Node]) -> fx.Node:
        return self.parallel(column) if len(column) > 1 else self.rows(column[0])

    def _sized(self, node: fx.Node) -> torch.Tensor:
        found = value(node)
        return found.new_empty((self.order.pairs, found.shape[-1]))


def _expert(node: fx.Node) -> Any:
    """e where ``node`` is [e] or [e:e + 1] of all experts' slots."""
    if node.target is aten.select.int and node.args[1] == 0:
        return node.args[2]
    if node.target is aten.slice.Tensor and node.args[1] == 0 and len(node.args) == 4:
        start, end = node.args[2:]
        if isinstance(start, int) and isinstance(end, int) and end == start + 1:
            return start
    return None


def _constants(node: fx.Node) -> list[Any]:
    return [None if isinstance(a, fx.Node) else a for a in node.args]
