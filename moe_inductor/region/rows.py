"""Rules about rows that are picked by a mask: the ways to write "the tokens of expert e" become one.

The uniform spelling is ``token = nonzero(ids == e)[:, 0]`` for ids [T, k], and a sum over experts is ``index_add``.
Where an equation needs it, it is shown that the ids of a token are distinct: then a token occurs once among the rows of
an expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from moe_inductor.region.at_ids import scores_at
from moe_inductor.region.distinct import are_distinct, kept_of
from moe_inductor.region.nodes import is_one, node_arg, same_sizes, uncast, value
from moe_inductor.region.normalise import Emitter, arithmetic, row_of, rule
from moe_inductor.region.unsorting import is_of_one_expert

aten = torch.ops.aten


@rule(aten.index.Tensor)
def _masked(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """index(x, [mask]) = index(view(x), [nonzero(view(mask))]) for a boolean mask over the leading dimensions
    index(x, [mask [T], i [n]]) = index(x, [nonzero(mask), i])"""
    base, indices = args[0], list(args[1])
    made, origin = value(node), node.meta.get("stack_trace")
    if len(indices) == 2 and _is_mask(indices[0]) and value(indices[0]).dim() == 1:
        mask, others = indices
        if not isinstance(others, fx.Node) or value(others).dim() != 1 or _is_mask(others):
            return None
        rows = _rows(out, mask, value(others).shape[0], origin)
        return index_of(out, base, [rows, others], made, origin)
    if len(indices) != 1 or not _is_mask(indices[0]):
        return None
    rows = _rows(out, indices[0], made.shape[0], origin)
    flat = _flat(out, base, indices[0], origin)
    return out.apply(aten.index.Tensor, (flat, [rows]), {}, made, origin)


@rule(aten.index.Tensor)
def _index(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    return index_of(out, args[0], list(args[1]), value(node), node.meta.get("stack_trace"))


def index_of(
    out: Emitter, base: fx.Node, indices: list[Any], made: torch.Tensor, origin: str | None
) -> fx.Node:
    """index(x [1, n, ..], [None, i]) = view(index(view(x, [n, ..]), [i]), [1, ..])
    index(x [.., 1], [i..]) = view(index(view(x, [..]), [i..]), [.., 1])
    index(x [n, 1], [i, j]) = index(view(x, [n]), [i])
    index(scatter(zeros [T, E], 1, ids, w)[:, e], [token]) = index(w, [token, slot])
    index(p [T, E][:, e], [token]) = index(gather(p, 1, ids), [token, slot]) for ids that were chosen from E
        where (token, slot) = nonzero(ids == e), also where some ids of the right hand side have been replaced by -1"""
    score = _own_score(out, base, indices)
    if score is not None:
        base, indices = score
    shape = value(base).shape
    inner = [ix for ix in indices if ix is not None]
    if len(indices) == len(shape) == 2 and len(inner) == 2 and is_one(shape[1]):
        source = out.view(base, value(base).squeeze(-1), origin)
        return out.emit(aten.index.Tensor, (source, inner[:1]), {}, made, origin)
    if indices[:1] == [None] and len(inner) == len(indices) - 1 == 1 and is_one(shape[0]):
        narrow, gathered = value(base).squeeze(0), made.squeeze(0)
    elif len(inner) == len(indices) < len(shape) and is_one(shape[-1]):
        narrow, gathered = value(base).squeeze(-1), made.squeeze(-1)
    else:
        return out.emit(aten.index.Tensor, (base, indices), {}, made, origin)
    source = out.view(base, narrow, origin)
    return out.view(index_of(out, source, inner, gathered, origin), made, origin)


def _own_score(
    out: Emitter, base: fx.Node, indices: list[Any]
) -> tuple[fx.Node, list[fx.Node]] | None:
    """What is read, and where, in the left hand side of the last two equations of ``index_of``."""
    if len(indices) != 1 or base.target is not aten.select.int or base.args[1] != 1:
        return None
    of_expert = hits(indices[0])
    matrix = node_arg(base, 0)
    if of_expert is None or base.args[2] != of_expert[1]:
        return None
    if isinstance(of_expert[1], int) and of_expert[1] < 0:
        return None  # an id that has been dropped, and the last column
    token = indices[0]
    ids = kept_of(of_expert[0])
    scores = _scattered_at(matrix, ids)
    if scores is None:
        scores = scores_at(out, matrix, ids, token.meta.get("stack_trace"))
    if scores is None:
        return None
    pairs = node_arg(token, 0)
    listed = value(token)
    slot = row_of(out, pairs, 1, 1 - token.args[2], listed, token.meta.get("stack_trace"))
    return scores, [token, slot]


def _scattered_at(matrix: fx.Node, ids: fx.Node) -> fx.Node | None:
    """``w`` of ``scatter(zeros [T, E], 1, ids, w)``."""
    if matrix.target is not aten.scatter.src or matrix.args[1] != 1:
        return None
    placed, scores = node_arg(matrix, 2), node_arg(matrix, 3)
    if ids is not kept_of(placed):
        return None
    fits = same_sizes(value(scores).shape, value(placed).shape)
    return scores if fits and are_distinct(placed, value(matrix).shape[1]) else None


@rule(aten.index_put.default)
def _put(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """index_put(x, [mask], y) = index_put(view(x), [nonzero(view(mask))], y) for a boolean mask
    index_put(x, [i], y, accumulate) = index_add(x, 0, i, y)
    index_put(x, [i], index(x, [i]) + y) = index_add(x, 0, i, y) for distinct i
    index_put(x, [i], y) = index_add(x, 0, i, y) where the rows i of x are zero"""
    base, indices, given = args[0], list(args[1]), args[2]
    accumulate = len(args) > 3 and args[3] is True
    made, origin = value(node), node.meta.get("stack_trace")
    if len(indices) != 1 or not isinstance(given, fx.Node) or not value(given).dim():
        return None
    (rows,) = indices
    if _is_mask(rows):
        base = _flat(out, base, rows, origin)
        rows = _rows(out, rows, value(given).shape[0], origin)
    elif value(rows).dim() != 1 or value(rows).dtype not in (torch.int32, torch.int64):
        return None
    found = value(base)
    if value(given).dim() != found.dim():
        return None
    added = given if accumulate else _increment(out, base, rows, given)
    if added is None and _are_zero(base, rows):
        added = given
    if added is None or value(added).dtype != found.dtype:
        return out.view(
            out.emit(aten.index_put.default, (base, [rows], *args[2:]), {}, found, origin),
            made,
            origin,
        )
    return out.view(add_rows(out, base, rows, added, found, origin), made, origin)


@rule(aten.index_add.default)
def _add(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    if len(args) != 4 or kwargs or args[1] != 0:
        return None
    base, _, rows, added = args
    return add_rows(out, base, rows, added, value(node), node.meta.get("stack_trace"))


def add_rows(
    out: Emitter, base: fx.Node, rows: fx.Node, added: fx.Node, made: torch.Tensor, origin: Any
) -> fx.Node:
    """index_add(b, 0, i, y) = b + index_add(zeros, 0, i, y)
    index_add(b + s, 0, i, y) = b + index_add(s, 0, i, y) for such a sum s
    where i are the rows of an expert: what experts give is added up by itself, and then to what was there."""
    if hits(rows) is None or _is_sum(base):
        return out.emit(aten.index_add.default, (base, 0, rows, added), {}, made, origin)
    before, total = base, None
    if base.target is aten.add.Tensor and len(base.args) == 2:
        for one, other in (base.args, base.args[::-1]):
            if isinstance(other, fx.Node) and isinstance(one, fx.Node) and _is_sum(other):
                before, total = one, other
    if total is None:
        kept = {"dtype": made.dtype, "device": made.device}
        total = out.emit(aten.full.default, (out.sizes(made), 0), kept, made, origin)
    total = out.emit(aten.index_add.default, (total, 0, rows, added), {}, made, origin)
    return arithmetic(out, aten.add.Tensor, before, total, made, origin)


@rule(aten.add.Tensor, first=True)
def _added(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """s + index_put(zeros, [i], y) = index_add(s, 0, i, y) for distinct rows i of an expert, and a sum s, or 0"""
    made = value(node)
    if kwargs or len(args) != 2:
        return None
    for total, one in (args, args[::-1]):
        if not isinstance(one, fx.Node) or one.target is not aten.index_put.default:
            continue
        base, indices, given, *more = _given(one)
        of_expert = not more and len(indices) == 1 and hits(indices[0]) is not None
        if not of_expert or not _is_zero(base) or not occur_once(indices[0]):
            continue
        if not isinstance(total, fx.Node):
            total = base if total == 0 else None
        if total is None or not _is_sum(total) or value(given).dim() != made.dim():
            continue
        if any(value(n).dtype != made.dtype for n in (total, one, given)):
            continue
        if not all(out.same_shape(value(n), made) for n in (total, one)):
            continue
        added = (total, 0, indices[0], given)
        return out.emit(aten.index_add.default, added, {}, made, node.meta.get("stack_trace"))
    return None


def _given(node: fx.Node) -> list[Any]:
    return list(node.args)


def _is_sum(node: fx.Node) -> bool:
    """Is it zeros, to which rows may have been added?"""
    while node.target is aten.index_add.default and len(node.args) == 4:
        node = node_arg(node, 0)
    return _is_zero(node)


def _is_zero(node: fx.Node) -> bool:
    return node.target is aten.full.default and bool(node.args[1] == 0)


def _increment(out: Emitter, base: fx.Node, rows: fx.Node, given: fx.Node) -> fx.Node | None:
    """``y`` where ``given`` is ``index(base, [rows]) + y`` and no row occurs twice."""
    if given.target is not aten.add.Tensor or len(given.args) != 2:
        return None
    if not occur_once(rows) and not is_of_one_expert(out, rows):
        return None
    for mine, other in (given.args, given.args[::-1]):
        if (
            isinstance(mine, fx.Node)
            and isinstance(other, fx.Node)
            and mine.target is aten.index.Tensor
            and mine.args[0] is base
            and list(mine.args[1]) == [rows]  # type: ignore[call-overload]
            and out.same_shape(value(other), value(mine))
        ):
            return other
    return None


def _are_zero(base: fx.Node, rows: fx.Node) -> bool:
    """Were the rows of other experts the only ones that were added to zeros?

    One expert per token: then the rows of different experts have no token in common.
    """
    of_expert = hits(rows)
    if of_expert is None or value(of_expert[0]).shape[-1] != 1:
        return False
    ids, *seen = of_expert
    for step in index_chain(base):
        other = hits(node_arg(step, 2))
        # Of two symbolic experts it is not known that they are different ones.
        if other is None or other[0] is not ids or not _is_another(other[1], seen):
            return False
        seen.append(other[1])
        base = node_arg(step, 0)
    return base.target is aten.full.default and bool(base.args[1] == 0)


def _is_another(e: Any, seen: list[Any]) -> bool:
    return all(type(other) is int for other in (e, *seen)) and e not in seen


def _is_mask(node: Any) -> bool:
    return isinstance(node, fx.Node) and value(node).dtype == torch.bool


def _flat(out: Emitter, base: fx.Node, mask: fx.Node, origin: str | None) -> fx.Node:
    """``base`` with the dimensions of ``mask`` put into one."""
    found, rank = value(base), value(mask).dim()
    return out.view(base, found.reshape(-1, *found.shape[rank:]), origin)


def _rows(out: Emitter, mask: fx.Node, count: Any, origin: str | None) -> fx.Node:
    """``nonzero(mask)`` as ``[n]``; count: n."""
    flat = out.view(mask, value(mask).reshape(-1), origin)
    found = value(flat)
    listed = found.new_empty((count, 1), dtype=torch.int64)
    return rows_of(out, flat, listed, origin)


def rows_of(out: Emitter, mask: fx.Node, listed: torch.Tensor, origin: str | None) -> fx.Node:
    """view(nonzero(any(ids == e, 1)), [n]) = nonzero(ids == e)[:, 0] for ids [T, k] that are distinct in each row
    view(nonzero(ids == e), [n]) = nonzero(view(ids, [T, 1]) == e)[:, 0] for ids [T]"""
    inner = node_arg(mask, 0) if mask.target is aten.view.default else mask
    any_slot = inner.target is aten.any.dim and inner.args[1:] == (value(inner).dim(),)
    compared = node_arg(inner, 0) if any_slot else inner
    if compared.target is aten.eq.Scalar:
        ids, e = node_arg(compared, 0), compared.args[1]
        width = value(ids).shape[-1] if any_slot else 1
        if not any_slot or are_distinct(ids):
            ids = out.view(ids, value(ids).reshape(-1, width), origin)
            hit = torch.empty_like(value(ids), dtype=torch.bool)
            compared = out.emit(aten.eq.Scalar, (ids, e), {}, hit, origin)
            pairs = listed.new_empty((listed.shape[0], 2))
            pairs_of = out.emit(aten.nonzero.default, (compared,), {}, pairs, origin)
            return row_of(out, pairs_of, 1, 0, listed.squeeze(-1), origin)
    found = out.emit(aten.nonzero.default, (mask,), {}, listed, origin)
    return out.view(found, listed.squeeze(-1), origin)


@rule(aten.nonzero.default)
def _nonzero(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """nonzero(cast(b)) = nonzero(b) for a boolean b"""
    cast = args[0]
    if cast.target is not aten._to_copy.default or value(node_arg(cast, 0)).dtype != torch.bool:
        return None
    return out.emit(
        aten.nonzero.default, cast.args[:1], {}, value(node), node.meta.get("stack_trace")
    )


@rule(aten.nonzero.default, first=True)
def _nonzero_number(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """nonzero(x) = nonzero(x != 0) for floating-point numbers [T]"""
    numbers, origin = args[0], node.meta.get("stack_trace")
    if value(numbers).dim() != 1 or not value(numbers).dtype.is_floating_point:
        return None
    mask = torch.empty_like(value(numbers), dtype=torch.bool)
    compared = out.apply(aten.ne.Scalar, (numbers, 0), {}, mask, origin)
    return out.apply(aten.nonzero.default, (compared,), {}, value(node), origin)


@rule(aten.nonzero.default)
def _nonzero_of_one(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """nonzero(mask [T]) = view(its rows, [n, 1])"""
    mask, made = args[0], value(node)
    if value(mask).dim() != 1 or value(mask).dtype != torch.bool:
        return None
    origin = node.meta.get("stack_trace")
    return out.view(rows_of(out, mask, made, origin), made, origin)


@rule(aten.any.dim)
def _any(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """any(permute(x, [1, 0]), d) = any(x, 1 - d) for booleans, or what is cast from them"""
    turned = uncast(args[0])
    if turned.target is not aten.permute.default or turned.args[1] != [1, 0] or len(args) != 2:
        return None
    hit = node_arg(turned, 0)
    if value(hit).dtype != torch.bool:
        return None
    dim = 1 - args[1] % 2
    return out.apply(aten.any.dim, (hit, dim), {}, value(node), node.meta.get("stack_trace"))


# -- what is known about ids ------------------------------------------------------------------------------------------


def hits(rows: fx.Node) -> tuple[fx.Node, Any] | None:
    """(ids [T, k], e) where ``rows`` are the tokens of ``nonzero(ids == e)``, whichever way round that was written."""
    if rows.target is not aten.select.int or rows.args[1] != 1:
        return None
    pairs, tokens = node_arg(rows, 0), 0
    if pairs.target is not aten.nonzero.default:
        return None
    compared = node_arg(pairs, 0)
    if compared.target is aten.permute.default and compared.args[1] == [1, 0]:
        compared, tokens = node_arg(compared, 0), 1
    if compared.target is not aten.eq.Scalar or rows.args[2] != tokens:
        return None
    ids = node_arg(compared, 0)
    return (ids, compared.args[1]) if value(ids).dim() == 2 else None


def occur_once(rows: fx.Node) -> bool:
    """Is no row listed twice?"""
    found = hits(rows)
    if found is not None:
        return are_distinct(found[0])
    listed = node_arg(rows, 0) if rows.target is aten.view.default else rows
    return listed.target is aten.nonzero.default and value(node_arg(listed, 0)).dim() == 1


def index_chain(node: fx.Node) -> Iterator[fx.Node]:
    """The sums that ``node`` was made of, last first."""
    while node.target is aten.index_add.default:
        yield node
        node = node_arg(node, 0)
