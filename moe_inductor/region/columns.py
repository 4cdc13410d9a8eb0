"""Rules about the weight that a token has for one expert, where it is found by comparing the token's ids with it.

The uniform spelling is a column of the routing matrix, ``select(scatter(zeros [T, E], ids, w), -1, e)``, and in the
rows of the expert's tokens ``index(w, [token, slot])`` for (token, slot) = nonzero(ids == e).  For ids [T, k] that are
distinct in each row and below E.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from moe_inductor.region.distinct import are_distinct, chosen_from, kept_of
from moe_inductor.region.nodes import is_integral, node_arg, origin_of, same_sizes, uncast, value
from moe_inductor.region.normalise import Emitter, cast, row_of, rule
from moe_inductor.region.rows import hits, index_of
from moe_inductor.region.sparse import scattered

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True, eq=False)
class _Hit:
    """``ids == expert``; rows: of the tokens in this list alone."""

    ids: fx.Node
    expert: Any
    rows: fx.Node | None = None


def _hit(node: Any) -> _Hit | None:
    """ids == e, index(ids == e, [rows]), index(ids, [rows]) == e; cast or not"""
    if not isinstance(node, fx.Node):
        return None
    compared, rows = uncast(node), None
    if compared.target is aten.index.Tensor:
        compared, rows = _of_rows(compared)
    if compared.target is not aten.eq.Scalar:
        return None
    ids = node_arg(compared, 0)
    if ids.target is aten.index.Tensor and rows is None:
        ids, rows = _of_rows(ids)
    return _Hit(ids, compared.args[1], rows) if is_integral(ids) else None


def _of_rows(node: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """x and i of ``index(x, [i])``; else the node itself."""
    indices: Any = node.args[1]
    if len(indices) != 1 or indices[0] is None or value(indices[0]).dim() != 1:
        return node, None
    return node_arg(node, 0), indices[0]


def _weight_of_hit(node: fx.Node) -> tuple[fx.Node, _Hit] | None:
    """w and ``ids == e`` of a node that is w where they are equal, and 0 elsewhere."""
    args: Any = node.args
    if node.kwargs:
        return None
    if node.target is aten.mul.Tensor:
        for scores, mask in (args, args[::-1]):
            hit = _hit(mask)
            if hit is not None and isinstance(scores, fx.Node):
                return scores, hit
    elif node.target in (aten.where.ScalarOther, aten.where.self):
        hit = _hit(args[0])
        if hit is not None and _is_zero(args[2]):
            return args[1], hit
    elif node.target is aten.masked_fill.Scalar:
        hit = _hit(node_arg(args[1], 0)) if args[1].target is aten.bitwise_not.default else None
        if hit is not None and _is_zero(args[2]):
            return args[0], hit
    return None


def _is_zero(item: Any) -> bool:
    if isinstance(item, fx.Node):
        return item.target is aten.full.default and bool(item.args[1] == 0)
    return bool(item == 0)


@rule(aten.sum.dim_IntList, first=True)
def _own_weight(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """sum(where(ids == e, w, 0), -1) = select(scatter(zeros, ids, w), -1, e), and so for w * (ids == e)
    sum(where(index(ids == e, [i]), index(w, [i]), 0), -1) = index(select(scatter(zeros, ids, w), -1, e), [i])"""
    found = _weight_of_hit(args[0])
    rank = value(args[0]).dim()
    if found is None or kwargs or [d % rank for d in args[1]] != [rank - 1]:
        return None
    scores, hit = found
    if hit.rows is not None:
        scores, rows = _of_rows(scores) if scores.target is aten.index.Tensor else (scores, None)
        if rows is not hit.rows:
            return None
    column = _column(out, scores, hit, value(node), origin_of(node))
    if column is None or hit.rows is None:
        return None if column is None else out.view(column, value(node), origin_of(node))
    flat = value(args[0])[..., 0]
    gathered = index_of(out, column, [hit.rows], flat, origin_of(node))
    return out.view(gathered, value(node), origin_of(node))


def _column(
    out: Emitter, scores: fx.Node, hit: _Hit, made: torch.Tensor, origin: str | None
) -> fx.Node | None:
    """scatter(zeros, ids, w)[.., e], for ids that were chosen from E; made: of the dtype that w is cast to."""
    chosen, ids = chosen_from(kept_of(hit.ids)), value(hit.ids)
    if chosen is None or not same_sizes(value(scores).shape, ids.shape):
        return None
    E = value(chosen[0]).shape[chosen[1]]
    if not _is_expert(hit.expert, E):
        return None
    matrix = torch.empty_like(ids[..., :1].expand(*ids.shape[:-1], E), dtype=made.dtype)
    scores = cast(out, scores, torch.empty_like(ids, dtype=made.dtype), origin)
    whole = scattered(out, 0, hit.ids, scores, matrix, origin)
    return row_of(out, whole, matrix.dim() - 1, hit.expert, matrix[..., 0], origin)


def _is_expert(e: Any, E: Any) -> bool:
    return not isinstance(e, int) or not isinstance(E, int) or 0 <= e < E


@rule(aten.argmax.default)
def _slot(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """argmax(index(ids == e, [token]), 1) = slot, where (token, slot) = nonzero(ids == e)"""
    hit = _hit(args[0])
    if hit is None or hit.rows is None or kwargs or len(args) < 2 or args[1] not in (1, -1):
        return None
    if not _is_once_in_each(hit):
        return None
    slot = _slot_of(out, hit.rows)
    return out.view(slot, value(node), origin_of(node))


def _is_once_in_each(hit: _Hit) -> bool:
    """Are the rows those of the expert's tokens, in each of which it stands once?"""
    of_expert = hits(hit.rows) if hit.rows is not None else None
    return of_expert == (hit.ids, hit.expert) and are_distinct(hit.ids)


def _slot_of(out: Emitter, token: fx.Node) -> fx.Node:
    """The other row of the list of pairs that ``token`` is one of."""
    place: Any = token.args[2]
    return row_of(out, node_arg(token, 0), 1, 1 - place, value(token), origin_of(token))


@rule(aten.gather.default)
def _gathered(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """gather(index(w, [token]), 1, view(slot, [n, 1])) = view(index(w, [token, slot]), [n, 1])"""
    source, dim, slots = args
    slot = node_arg(slots, 0) if slots.target is aten.view.default else slots
    if source.target is not aten.index.Tensor or dim not in (1, -1) or value(slot).dim() != 1:
        return None
    scores, token = _of_rows(source)
    if token is None or hits(token) is None or value(scores).dim() != 2:
        return None
    if _slot_of(out, token) is not slot:
        return None
    flat = value(node).squeeze(-1)
    made = index_of(out, scores, [token, slot], flat, origin_of(node))
    return out.view(made, value(node), origin_of(node))


@rule(aten.index.Tensor, first=True)
def _of_pairs(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """index(w, [ids == e]) = index(w, [token, slot]) for w [T, k]
    index(index(w, [token]), [index(ids, [token]) == e]) = index(w, [token, slot]), which has one place in each row"""
    base, indices = args[0], list(args[1])
    mask = indices[0]
    if len(indices) != 1 or not isinstance(mask, fx.Node) or value(mask).dtype != torch.bool:
        return None
    hit = _hit(mask)
    if hit is None or value(mask).dim() != 2:
        return None
    made = value(node)
    if hit.rows is not None:
        scores, token = _of_rows(base) if base.target is aten.index.Tensor else (base, None)
        if token is None or token is not hit.rows or not _is_once_in_each(hit):
            return None
        if not same_sizes(value(scores).shape, value(hit.ids).shape):
            return None
        out.note_equal(made.shape[0], value(token).shape[0])
        slot = _slot_of(out, token)
        return index_of(out, scores, [token, slot], made, origin_of(node))
    if not same_sizes(value(base).shape, value(mask).shape):
        return None  # rows of tokens in a batch of one
    pairs = made.new_empty((made.shape[0], 2), dtype=torch.int64)
    listed = out.emit(aten.nonzero.default, (mask,), {}, pairs, origin_of(node))
    token, slot = (row_of(out, listed, 1, i, pairs[:, i], origin_of(node)) for i in (0, 1))
    return index_of(out, base, [token, slot], made, origin_of(node))


@rule(aten.index.Tensor, first=True)
def _of_one_choice(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """index(view(y, [n, 1]), [view(index(ids [T], [token]), [n, 1]) == e]) = y for token = nonzero(ids == e)"""
    base, (mask, *more) = args
    if more or base.target is not aten.view.default or not isinstance(mask, fx.Node):
        return None
    compared = node_arg(mask, 0) if mask.target is aten.eq.Scalar else mask
    if mask is compared or compared.target is not aten.view.default:
        return None
    rows, y = node_arg(compared, 0), node_arg(base, 0)
    ids, token = _of_rows(rows) if rows.target is aten.index.Tensor else (rows, None)
    if token is None or value(ids).dim() != 1:
        return None
    column = value(ids).unsqueeze(1)
    if hits(token) != (out.view(ids, column, origin_of(node)), mask.args[1]):
        return None
    shape = [value(token).shape[0], 1]
    if value(y).dim() != 1 or not all(out.same_sizes(value(n).shape, shape) for n in (base, mask)):
        return None
    out.note_equal(value(node).shape[0], value(y).shape[0])
    return y


@rule(aten.select.int, first=True)
def _of_token_rows(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """select(index(p [T, E], [token]), 1, e) = index(select(p, 1, e), [token]) where e has the tokens"""
    source, dim, e = args
    if source.target is not aten.index.Tensor or value(source).dim() != 2 or dim not in (1, -1):
        return None
    scores, token = _of_rows(source)
    of_expert = hits(token) if token is not None else None
    if of_expert is None or of_expert[1] != e:
        return None
    column = row_of(out, scores, 1, e, value(scores)[:, 0], origin_of(node))
    return index_of(out, column, [token], value(node), origin_of(node))
