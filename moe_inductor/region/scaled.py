"""Rules about a number per row, the routing weight, that scales what an expert has computed before its last projection.

    (h s) W  =  (h W) s        for h [n, I], s [n, 1], W [I, H]

The uniform spelling has it behind the projection.  With a bias there the two are not the same, and the product of rows
that come straight from the tokens stays: that is a weight on the input, and who has one
may scale by ones afterwards.

A constant that scales a row as well, ``1 - dropout`` for one, belongs to its weight: ``(y c) s = y (s c)``.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from moe_inductor.region.nodes import (
    is_one,
    is_pointwise,
    is_tensor,
    node_arg,
    uncast,
    value,
)
from moe_inductor.region.normalise import Emitter, arithmetic, cast, rule
from moe_inductor.region.row_ops import PAIR_LINEAR

aten = torch.ops.aten


@rule(aten.mm.default, PAIR_LINEAR)
def _scaled(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> fx.Node | None:
    """(h s) W = (h W) s for each row; a cast of h s is one of h, and one of the result

    Widened for the product alone, both factors can do without: torch rounds a product once."""
    rows, *others = args
    product = uncast(rows)
    if product.target is not aten.mul.Tensor or len(product.args) != 2:
        return None
    h, s = product.args
    if not isinstance(h, fx.Node) or not isinstance(s, fx.Node):
        return None
    if not is_column(s) or not follows_a_projection(h) or _depends(s, h):
        return None
    origin, made = node.meta.get("stack_trace"), value(node)
    h, s = (_narrow(n, made.dtype) for n in (h, s))
    plain = cast(out, h, value(rows), origin)
    projected = out.apply(node.target, (plain, *others), kwargs, made, origin)
    wide = torch.empty_like(made, dtype=torch.promote_types(value(s).dtype, made.dtype))
    return cast(out, arithmetic(out, aten.mul.Tensor, projected, s, wide, origin), made, origin)


def _narrow(node: fx.Node, dtype: torch.dtype) -> fx.Node:
    is_cast = node.target is aten._to_copy.default
    return node_arg(node, 0) if is_cast and value(node_arg(node, 0)).dtype == dtype else node


def _depends(node: fx.Node, on: fx.Node) -> bool:
    """Is ``node`` computed from ``on``, cast or not?  Then it is part of a norm, and no routing weight."""
    source = uncast(on)
    todo, seen = [node], set()
    while todo:
        at = todo.pop()
        if at is source:
            return True
        if at not in seen:
            seen.add(at)
            todo += at.all_input_nodes
    return False


@rule(aten.mul.Tensor, first=True)
def _by_constant(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> fx.Node | None:
    """(y c) s = (y s) c = y (s c) for a column s of gathered weights and a number c"""
    made, origin = value(node), node.meta.get("stack_trace")
    if kwargs or len(args) != 2 or not isinstance(args[0], fx.Node):
        return None
    if isinstance(args[1], (int, float)):
        product, number, s = args[0], args[1], None
        if product.target is not aten.mul.Tensor or not all(
            isinstance(a, fx.Node) for a in product.args
        ):
            return None
        y, s = product.args if is_column(product.args[1]) else product.args[::-1]
    else:
        product, s = args if is_column(args[1]) else args[::-1]
        if not isinstance(product, fx.Node) or product.target is not aten.mul.Tensor:
            return None
        y, number = product.args
    if not isinstance(y, fx.Node) or not isinstance(number, (int, float)):
        return None
    if not isinstance(s, fx.Node) or not is_column(s) or not out.same_shape(value(y), made):
        return None
    if not follows_a_projection(y):
        return None
    scaled = _times(out, s, number, made.dtype, origin)
    if scaled is None:
        return None
    wide = torch.empty_like(made, dtype=torch.promote_types(value(scaled).dtype, made.dtype))
    return cast(out, arithmetic(out, aten.mul.Tensor, y, scaled, wide, origin), made, origin)


def _times(
    out: Emitter, column: fx.Node, number: float, dtype: torch.dtype, origin: str | None
) -> fx.Node | None:
    """s c, where rows of the weights are gathered to make s: before that, and with as many bits as ``dtype`` has, or
    32, so that it is not rounded once more for every row."""
    if column.target is aten.index.Tensor:
        base, indices = node_arg(column, 0), column.args[1]
        wide = torch.promote_types(torch.promote_types(value(base).dtype, dtype), torch.float32)
        if not value(base).dtype.is_floating_point or value(base).dim() > 2:
            return None
        made = torch.empty_like(value(base), dtype=wide)
        scaled = cast(out, base, made, origin)
        scaled = out.apply(aten.mul.Tensor, (scaled, number), {}, made, origin)
        gathered = torch.empty_like(value(column), dtype=wide)
        return out.emit(aten.index.Tensor, (scaled, indices), {}, gathered, origin)
    if column.target is aten.view.default:
        inner = _times(out, node_arg(column, 0), number, dtype, origin)
        if inner is None:
            return None
        made = torch.empty_like(value(column), dtype=value(inner).dtype)
        return out.view(inner, made, origin)
    if column.target is aten._to_copy.default:
        return _times(out, node_arg(column, 0), number, dtype, origin)
    return None


@rule(aten.mul.Tensor, first=True)
def _by_ones(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> fx.Node | None:
    """x * full(1) = cast(x), where x has the shape of the result"""
    made = value(node)
    if kwargs or not all(isinstance(a, fx.Node) for a in args):
        return None
    for x, ones in (args, args[::-1]):
        is_ones = ones.target is aten.full.default and ones.args[1] == 1
        if is_ones and out.same_shape(value(x), made):
            return cast(out, x, made, node.meta.get("stack_trace"))
    return None


@rule(aten.ones.default, aten.ones_like.default, aten.new_ones.default)
def _ones(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> fx.Node:
    """ones(..), ones_like(..), new_ones(..) = full(shape, 1, dtype)"""
    return _full(out, node, 1)


@rule(operator.getitem, first=True)
def _part_of_full(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> fx.Node | None:
    """split(full(shape, c), n)[i] = full(its shape, c)"""
    pack = args[0]
    if not isinstance(pack, fx.Node) or pack.target is not aten.split_with_sizes.default:
        return None
    base = node_arg(pack, 0)
    return _full(out, node, base.args[1]) if base.target is aten.full.default else None


def _full(out: Emitter, node: fx.Node, fill: object) -> fx.Node:
    made = value(node)
    fill = bool(fill) if made.dtype == torch.bool else fill
    kept = {"dtype": made.dtype, "device": made.device}
    return out.emit(
        aten.full.default, (out.sizes(made), fill), kept, made, node.meta.get("stack_trace")
    )


def is_column(node: object) -> bool:
    if not isinstance(node, fx.Node) or not is_tensor(node):
        return False
    return value(node).dim() == 2 and is_one(value(node).shape[1])


def follows_a_projection(node: fx.Node) -> bool:
    """Is it computed from what a projection gave, element by element or of columns?"""
    todo, seen = [node], set()
    while todo:
        at = todo.pop()
        if at.target in (aten.mm.default, PAIR_LINEAR):
            return True
        if at in seen or not (
            is_pointwise(at.target) or at.target in (aten._to_copy.default, aten.slice.Tensor)
        ):
            continue
        seen.add(at)
        todo += at.all_input_nodes
    return False
