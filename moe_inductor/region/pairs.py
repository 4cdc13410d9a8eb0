"""Experts on sorted rows, as if nothing had been sorted.

Many models sort the (token, choice) pairs by expert, cut the sorted rows into one slice per expert, run each expert on
its slice, concatenate, and undo the sort, or add each row up at its token; or they give the sorted rows, and where each
expert's end, to a grouped GEMM, and then add them up.  All of that only moves rows.  In the normal
form a pair stays where it is: pair ``j`` of token ``t`` is row ``t k + j``, and ``pair_linear`` multiplies each row by
the matrix of its own expert.  What is computed row by row commutes with the order of rows, so

    y[order] for what is computed from rows[order]  =  what is computed from rows, in the order of ``order``

and undoing the sort gives the right hand side without it.  The equation needs that the slices are those of the experts,
one after the other: their lengths count the very ids that were sorted, all of which are positions among the E scores of
a top-k (``counts.choices``), and each begins where the one before ends.  ``unsorting.py`` shows that for every slice;
where it cannot be shown, the graph stays as it is, and why is noted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import fx

from moe_inductor.reasons import Refusal
from moe_inductor.region.counts import fill_of
from moe_inductor.region.nodes import is_one, node_arg, origin_of, unbacked, uncast, value, written
from moe_inductor.region.orders import Order, inverted, order_of, tokens_of
from moe_inductor.region.parts import Part, part_of_tokens
from moe_inductor.region.row_ops import PAIR_LINEAR
from moe_inductor.region.unsorting import Unsorting

if TYPE_CHECKING:
    from moe_inductor.region.normalise import Emitter

aten = torch.ops.aten


def unsorted(out: Emitter, node: fx.Node) -> fx.Node | None:
    """What ``node`` is worth, made without a sort, if it undoes one; None if it does not, or not that we can show."""
    if node.target is aten.view.default:
        return _of_tokens(out, node)
    if node.target is aten.bmm.default:
        return _combined(out, node)
    if node.target is aten.index_add.default and part_of_tokens(out, node.args[2]) is not None:
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
        part = part_of_tokens(out, base.args[2])
        if part is None:
            break
        parts.append((part, node_arg(base, 3), base))
        base = node_arg(base, 0)
    order = tokens_of(parts[0][0].whole) if parts else None
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


def _undoes(node: fx.Node) -> tuple[Order, fx.Node, fx.Node | None] | None:
    """The order, the sorted rows, and what they are added to at their tokens, if they are added up."""
    target, args = node.target, node.args
    if target is aten.index.Tensor and len(args[1]) == 1:  # type: ignore[arg-type]
        order = inverted(args[1][0])  # type: ignore[index]
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
        order = tokens_of(index)
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
    if order is None or not is_one(value(weights).shape[1]):
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
