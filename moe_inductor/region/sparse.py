"""Rules about a routing matrix: scores of all experts, of which only those of the chosen ones are not zero.

The uniform spelling is ``scatter(full(c), ids, w)`` along the last dimension, of size E, for ids [.., k] that are
distinct positions in it.  What a router does to such a matrix afterwards (a sigmoid, a cast, a division by the sum of
the row), or instead of it (masks from one-hot ids, scores that are not chosen set to -inf), is done here to
``w [.., k]`` alone, so that the fill ``c`` that is left says what the experts that were not chosen get.

Assumed: a number that is multiplied with the zero of an expert that was not chosen is finite, and what is divided by
is not zero.  Where a model computes 0 * inf = NaN, we give 0.  And the terms of a sum have no order: k of them and as
many zeros are summed as k.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import fx

from moe_inductor._compat import OpOverload
from moe_inductor.region.distinct import are_distinct
from moe_inductor.region.nodes import (
    is_one,
    node_arg,
    same_sizes,
    uncast,
    value,
)
from moe_inductor.region.normalise import RESHAPES, Emitter, arithmetic, cast, rule

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True, eq=False)
class Matrix:
    """``scatter(full(fill), ids, scores)``; scores: [.., k], or the number that they all are."""

    fill: Any
    ids: fx.Node
    scores: Any


def matrix_of(node: Any) -> Matrix | None:
    """How ``node`` is a routing matrix, if it is one."""
    if not isinstance(node, fx.Node):
        return None
    if node.target is aten.scatter.src:
        base, dim, ids, scores = node.args
        found = value(node)
        if (
            base.target is aten.full.default  # type: ignore[union-attr]
            and dim == found.dim() - 1
            and _alike(scores, ids)
            and same_sizes(value(ids).shape[:-1], found.shape[:-1])  # type: ignore[arg-type]
            and are_distinct(ids, found.shape[-1])  # type: ignore[arg-type]
        ):
            constant = scores.args[1] if scores.target is aten.full.default else scores  # type: ignore[union-attr]
            return Matrix(base.args[1], ids, constant)  # type: ignore[union-attr, arg-type]
    return _one_hot(node)


def _alike(a: Any, b: Any) -> bool:
    return same_sizes(value(a).shape, value(b).shape)


def _one_hot(node: fx.Node) -> Matrix | None:
    """``ids [.., 1] == arange(E)``, cast or not; 0 <= ids < E"""
    compared = uncast(node)
    if compared.target is not aten.eq.Tensor:
        return None
    ids, numbers = compared.args
    if not isinstance(numbers, fx.Node) or numbers.target is not aten.arange.default:
        return None
    fits = len(numbers.args) == 1 and is_one(value(ids).shape[-1])  # type: ignore[arg-type]
    if not fits or value(ids).dim() != value(compared).dim():  # type: ignore[arg-type]
        return None
    if value(node).dtype == torch.bool:
        return Matrix(False, ids, True)  # type: ignore[arg-type]
    return Matrix(0, ids, 1)  # type: ignore[arg-type]


def scattered(
    out: Emitter, fill: Any, ids: fx.Node, scores: Any, made: torch.Tensor, origin: str | None
) -> fx.Node:
    """``scores``: a node, or a number for all."""
    kept = {"dtype": made.dtype, "device": made.device}
    base = out.emit(aten.full.default, (out.sizes(made), fill), kept, made, origin)
    scores = spread(out, ids, scores, made.dtype, origin)
    dim = made.dim() - 1
    return out.emit(aten.scatter.src, (base, dim, ids, scores), {}, made, origin)


def spread(
    out: Emitter, ids: fx.Node, scores: Any, dtype: torch.dtype, origin: str | None
) -> fx.Node:
    """``scores`` as a node [.., k]."""
    if isinstance(scores, fx.Node):
        return scores
    val = torch.empty_like(value(ids), dtype=dtype)
    kept = {"dtype": dtype, "device": val.device}
    return out.emit(aten.full.default, (out.sizes(val), scores), kept, val, origin)


def _picked(out: Emitter, matrix: fx.Node, ids: fx.Node, origin: str | None) -> fx.Node:
    """``matrix [.., E]`` at ``ids``; gather(scatter(.., ids, w), ids) = w"""
    found = matrix_of(matrix)
    if found is not None and found.ids is ids:
        return spread(out, ids, found.scores, value(matrix).dtype, origin)
    dim = value(matrix).dim() - 1
    val = torch.empty_like(value(ids), dtype=value(matrix).dtype)
    return out.emit(aten.gather.default, (matrix, dim, ids), {}, val, origin)


# -- rules ------------------------------------------------------------------------------------------------------------


@rule(aten.scatter.value)
def _scatter_number(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """scatter(x, d, ids, number) = scatter(x, d, ids, full(number))"""
    base, dim, ids, number = args
    if kwargs or not isinstance(number, (bool, int, float)):
        return None
    made, origin = value(node), node.meta.get("stack_trace")
    number = 0 if number == 0 and made.dtype != torch.bool else number
    scores = spread(out, ids, number, made.dtype, origin)
    return out.emit(aten.scatter.src, (base, dim, ids, scores), {}, made, origin)


@rule(aten.gather.default)
def _gather(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """gather(scatter(full, ids, w), ids) = w"""
    found = matrix_of(args[0])
    if found is None or args[1] != value(args[0]).dim() - 1 or found.ids is not args[2]:
        return None
    return spread(out, found.ids, found.scores, value(node).dtype, node.meta.get("stack_trace"))


def pointwise(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """f(scatter(full(c), ids, w)) = scatter(full(f(c)), ids, f(w)) for a function of each element
    f(scatter(full(c), ids, w)[.., e]) = scatter(full(f(c)), ids, f(w))[.., e] for a comparison"""
    source = args[0] if args else None
    rest = (*args[1:], *kwargs.values())
    if not isinstance(source, fx.Node) or any(isinstance(a, fx.Node) for a in rest):
        return None
    made, origin = value(node), node.meta.get("stack_trace")
    if source.target is aten.select.int and made.dtype == torch.bool:
        matrix, dim, e = source.args
        whole = torch.empty_like(value(matrix), dtype=torch.bool)  # type: ignore[arg-type]
        compared = _everywhere(out, node, (matrix, *args[1:]), kwargs, whole, origin)
        return None if compared is None else _hit(out, compared, dim, e, made, origin)
    return _everywhere(out, node, args, kwargs, made, origin)


def _everywhere(
    out: Emitter,
    node: fx.Node,
    args: tuple,
    kwargs: dict,
    made: torch.Tensor,
    origin: str | None,
) -> fx.Node | None:
    """The function of ``node``, of a matrix."""
    source = args[0]
    found = matrix_of(source) if source.target is aten.scatter.src else None
    if found is None:
        return None
    fill = _of_number(node, found.fill, value(source).dtype, args, kwargs)
    if fill is None:
        return None
    if isinstance(found.scores, fx.Node):
        val = torch.empty_like(value(found.scores), dtype=made.dtype)
        if node.target is aten._to_copy.default:
            scores = cast(out, found.scores, val, origin)
        else:
            scores = out.emit(node.target, (found.scores, *args[1:]), kwargs, val, origin)
    else:
        scores = _of_number(node, found.scores, value(source).dtype, args, kwargs)
        if scores is None:
            return None
    return scattered(out, fill, found.ids, scores, made, origin)


def _of_number(node: fx.Node, number: Any, dtype: torch.dtype, args: tuple, kwargs: dict) -> Any:
    """What the function makes of a number, or None where that is no number."""
    options = {k: v for k, v in kwargs.items() if k != "device"}
    assert isinstance(node.target, OpOverload)
    result = node.target(torch.full((), number, dtype=dtype), *args[1:], **options).item()
    if isinstance(result, float) and math.isnan(result):
        return None
    return 0 if result == 0 and not isinstance(result, bool) else result


_FUNCTIONS = (
    aten._to_copy.default, aten.sigmoid.default, aten.relu.default, aten.exp.default, aten.abs.default,
    aten.neg.default, aten.square.default, aten.tanh.default, aten.bitwise_not.default,
    aten.logical_not.default, aten.gt.Scalar, aten.ge.Scalar, aten.lt.Scalar, aten.le.Scalar, aten.ne.Scalar,
    aten.eq.Scalar, aten.clamp.default, aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar,
    aten.add.Tensor, aten.add.Scalar,
)  # fmt: skip
rule(*_FUNCTIONS, first=True)(pointwise)


@rule(aten.mul.Tensor, aten.div.Tensor, first=True)
def _scaled(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """scatter(zeros, ids, w) * p = scatter(zeros, ids, w * gather(p, ids)) for p [.., E]
    scatter(zeros, ids, w) * p = scatter(zeros, ids, w * p) for p [.., 1];  the same for a quotient"""
    if kwargs or len(args) != 2 or not all(isinstance(a, fx.Node) for a in args):
        return None
    made, origin = value(node), node.meta.get("stack_trace")
    orders = (args, args[::-1]) if node.target is aten.mul.Tensor else (args,)
    for source, other in orders:
        found = matrix_of(source)
        if found is None or found.fill != 0 or not same_sizes(value(source).shape, made.shape):
            continue
        if same_sizes(value(other).shape, made.shape):
            factor = _picked(out, other, found.ids, origin)
        elif value(other).dim() == made.dim() and is_one(value(other).shape[-1]):
            factor = other
        else:
            continue
        val = torch.empty_like(value(found.ids), dtype=made.dtype)
        if found.scores is True or (found.scores == 1 and node.target is aten.mul.Tensor):
            scores = _as(out, factor, val, origin)
        else:
            own = spread(out, found.ids, found.scores, value(source).dtype, origin)
            scores = arithmetic(out, node.target, own, factor, val, origin)
        return scattered(out, 0, found.ids, scores, made, origin)
    return None


def _as(out: Emitter, node: fx.Node, val: torch.Tensor, origin: str | None) -> fx.Node:
    """``node`` in the shape and dtype of ``val``."""
    node = cast(out, node, torch.empty_like(value(node), dtype=val.dtype), origin)
    if not out.same_shape(value(node), val):
        node = out.emit(aten.expand.default, (node, out.sizes(val)), {}, val, origin)
    return node


@rule(aten._softmax.default, first=True)
def _softmax(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """softmax(scatter(full(-inf), ids, w)) = scatter(zeros, ids, softmax(w))"""
    found = matrix_of(args[0])
    if found is None or found.fill != -math.inf or args[1] != value(node).dim() - 1:
        return None
    if not isinstance(found.scores, fx.Node):
        return None
    made, origin = value(node), node.meta.get("stack_trace")
    val = torch.empty_like(value(found.scores), dtype=made.dtype)
    scores = out.emit(aten._softmax.default, (found.scores, *args[1:]), kwargs, val, origin)
    return scattered(out, 0, found.ids, scores, made, origin)


@rule(aten.sum.dim_IntList, aten.any.dim, first=True)
def _reduced(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """sum(scatter(zeros, ids, w), -1) = sum(w, -1)
    sum(scatter(zeros [T, k, E], ids [T, k, 1], w), 1) = scatter(zeros [T, E], ids [T, k], w), and so for any()"""
    found = matrix_of(args[0])
    if found is None or found.fill != 0 or len(args) < 2:
        return None
    rank, (dim, *more) = value(args[0]).dim(), args[1] if isinstance(args[1], list) else [args[1]]
    made, origin = value(node), node.meta.get("stack_trace")
    if more:
        return None
    if dim == rank - 1 and node.target is aten.sum.dim_IntList:
        if args[0].target is not aten.scatter.src or not isinstance(found.scores, fx.Node):
            return None
        return out.emit(node.target, (found.scores, *args[1:]), kwargs, made, origin)
    if dim != rank - 2 or len(args) > 2 or not is_one(value(found.ids).shape[-1]):
        return None
    ids = out.view(found.ids, value(found.ids).squeeze(-1), origin)
    if not are_distinct(ids, made.shape[-1]):
        return None
    scores = found.scores
    if isinstance(scores, fx.Node):
        if value(scores).dtype != made.dtype:
            return None
        scores = out.view(scores, value(scores).squeeze(-1), origin)
    return scattered(out, found.fill, ids, scores, made, origin)


@rule(aten.bmm.default, first=True)
def _placed(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """bmm(w [T, 1, k], ids [T, k, 1] == arange(E)) = scatter(zeros, ids, w) as [T, 1, E], also the other way round"""
    (a, b), made, origin = args[:2], value(node), node.meta.get("stack_trace")
    mask, scores = (b, a) if is_one(value(a).shape[1]) else (a, b)
    if mask is a:
        if not is_one(value(b).shape[2]) or a.target is not aten.permute.default:
            return None
        mask = node_arg(a, 0) if a.args[1] == [0, 2, 1] else a
    found = _one_hot(mask)
    if found is None or value(found.ids).dim() != 3:
        return None
    ids = out.view(found.ids, value(found.ids).squeeze(-1), origin)
    flat = out.view(scores, value(scores).reshape(value(ids).shape), origin)
    E = value(mask).shape[-1]
    if not are_distinct(ids, E):
        return None
    matrix = made.reshape(made.shape[0], E)
    return out.view(scattered(out, 0, ids, flat, matrix, origin), made, origin)


@rule(aten.masked_fill.Scalar, aten.where.ScalarOther, aten.where.self)
def _chosen_only(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """where(scatter(False, ids, True), p, c) = scatter(full(c), ids, gather(p, ids))
    masked_fill(p, scatter(True, ids, False), c) = scatter(full(c), ids, gather(p, ids))"""
    made, origin = value(node), node.meta.get("stack_trace")
    if node.target is aten.masked_fill.Scalar:
        scores, mask, fill = args
        keeps = False
    else:
        mask, scores, fill = args
        keeps = True
        if isinstance(fill, fx.Node):
            fill = fill.args[1] if fill.target is aten.full.default else None
    found = matrix_of(mask)
    if found is None or found.fill is keeps or found.scores is not keeps:
        return None
    if not isinstance(fill, (int, float)) or not same_sizes(value(scores).shape, made.shape):
        return None
    if value(scores).dtype != made.dtype:
        return None
    fill = 0 if fill == 0 else fill
    picked = _picked(out, scores, found.ids, origin)
    return scattered(out, fill, found.ids, picked, made, origin)


@rule(*RESHAPES, first=True)
def _leading(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """view(scatter(full [B, S, E], ids, w), [T, E]) = scatter(full [T, E], view(ids), view(w))"""
    source = node_arg(args[0], 0) if args[0].target is aten.view.default else args[0]
    if source.target is not aten.scatter.src:
        return None
    found, made, origin = matrix_of(source), value(node), node.meta.get("stack_trace")
    if found is None or not same_sizes(made.shape[-1:], value(source).shape[-1:]):
        return None
    if made.dim() < 2:
        return None  # of one token: the spellings keep its dimension
    shaped = value(found.ids).reshape(*made.shape[:-1], value(found.ids).shape[-1])
    ids = out.view(found.ids, shaped, origin)
    scores = found.scores
    if isinstance(scores, fx.Node):
        inner = uncast(scores)
        view = out.view(inner, torch.empty_like(shaped, dtype=value(inner).dtype), origin)
        scores = cast(out, view, torch.empty_like(shaped, dtype=value(scores).dtype), origin)
    return scattered(out, found.fill, ids, scores, made, origin)


@rule(aten.sum.dim_IntList, first=True)
def _counted(out: Emitter, node: fx.Node, args: tuple[Any, ...], kwargs: dict) -> Any:
    """sum(scatter(False, ids [.., k], keep), every dimension but the last)
    = sum(where(keep, ids, -1) [N, k, 1] == arange(E), (0, 1)), in any order of the dimensions"""
    if kwargs or len(args) != 2 or value(node).dim() != 1:
        return None
    matrix, dims, rank = args[0], args[1], value(args[0]).dim()
    dims = [d % rank for d in dims]
    if matrix.target is aten.permute.default:
        dims, matrix = [matrix.args[1][d] for d in dims], node_arg(matrix, 0)  # type: ignore[index]
    found = _members(matrix)
    if found is None or sorted(dims) != list(range(rank - 1)):
        return None
    origin, device = node.meta.get("stack_trace"), value(node).device
    ids = _kept(out, found, origin)
    flat = value(ids).reshape(-1, value(ids).shape[-1], 1)
    classes = value(matrix).shape[-1]
    every = torch.empty(classes, dtype=torch.int64, device=device)
    kept = {"dtype": torch.int64, "device": device}
    numbers = out.emit(aten.arange.default, (classes,), kept, every, origin)
    hit = torch.empty_like(flat.expand(*flat.shape[:-1], classes), dtype=torch.bool)
    compared = out.emit(aten.eq.Tensor, (out.view(ids, flat, origin), numbers), {}, hit, origin)
    return out.emit(aten.sum.dim_IntList, (compared, [0, 1]), {}, value(node), origin)


def _members(node: fx.Node) -> Matrix | None:
    """``node`` as a matrix of booleans, of which 0 and 1 are another form; scores: [.., k] booleans or True."""
    found = matrix_of(node) if node.target is aten.scatter.src else None
    if found is None or value(node).dtype.is_floating_point or found.fill not in (False, 0):
        return None
    scores = found.scores
    if isinstance(scores, fx.Node):
        if scores.target is aten._to_copy.default:
            scores = node_arg(scores, 0)
        if value(scores).dtype != torch.bool:
            return None
    elif scores not in (True, 1):
        return None
    return Matrix(False, found.ids, scores if isinstance(scores, fx.Node) else True)


def _kept(out: Emitter, found: Matrix, origin: str | None) -> fx.Node:
    """The ids [N, k] of a matrix of booleans; -1 where one is not kept."""
    flat = value(found.ids).reshape(-1, value(found.ids).shape[-1])
    ids = out.view(found.ids, flat, origin)
    if not isinstance(found.scores, fx.Node):
        return ids
    kept = out.view(found.scores, torch.empty_like(flat, dtype=torch.bool), origin)
    return out.emit(aten.where.ScalarOther, (kept, ids, -1), {}, flat, origin)


@rule(aten.nonzero.default, first=True)
def _listed(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """nonzero(matrix[.., e]) = nonzero(matrix[.., e] != 0) for a matrix of integers 0 and 1"""
    source, turned = args[0], None
    if source.target is aten.permute.default:
        source, turned = node_arg(source, 0), source.args[1]
    if source.target is not aten.select.int or value(source).dtype == torch.bool:
        return None
    matrix, dim, e = source.args
    if matrix.target is aten.permute.default:  # type: ignore[union-attr]
        order: Any = matrix.args[1]  # type: ignore[union-attr]
        rest = [order[d] for d in range(len(order)) if d != dim]
        turned = [sorted(rest).index(d) for d in rest] if turned is None else None
        matrix, dim = matrix.args[0], order[dim]  # type: ignore[union-attr]
    found = _members(matrix)  # type: ignore[arg-type]
    if found is None or (turned is None and value(args[0]).dim() > 1):
        return None
    origin = node.meta.get("stack_trace")
    whole = torch.empty_like(value(matrix), dtype=torch.bool)  # type: ignore[arg-type]
    booleans = scattered(out, False, found.ids, found.scores, whole, origin)
    column = torch.empty_like(whole.select(dim, 0))  # type: ignore[arg-type]
    row = _hit(out, booleans, dim, e, column, origin)
    if row is None:
        return None
    if turned is not None:
        row = out.permute(row, list(turned), value(row).permute(turned), origin)
    return out.emit(aten.nonzero.default, (row,), {}, value(node), origin)


@rule(aten.select.int, first=True)
def _column(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """scatter(False, ids, keep)[.., e] = any(where(keep, ids, -1) == e, -1) for booleans"""
    source, dim, e = args
    return _hit(out, source, dim, e, value(node), node.meta.get("stack_trace"))


def _hit(
    out: Emitter, source: fx.Node, dim: Any, e: Any, made: torch.Tensor, origin: str | None
) -> fx.Node | None:
    if source.target is not aten.scatter.src or made.dtype != torch.bool:
        return None
    found, rank = matrix_of(source), value(source).dim()
    if found is None or found.fill is not False or dim % rank != rank - 1:
        return None
    if isinstance(e, int) and not 0 <= e < value(source).shape[-1]:
        return None
    if not isinstance(found.scores, fx.Node) and found.scores is not True:
        return None
    ids = out.view(_kept(out, found, origin), value(found.ids), origin)
    hit = torch.empty_like(value(ids), dtype=torch.bool)
    if is_one(hit.shape[-1]):
        flat = out.view(ids, value(ids).squeeze(-1), origin)
        return out.emit(aten.eq.Scalar, (flat, e), {}, made, origin)
    compared = out.emit(aten.eq.Scalar, (ids, e), {}, hit, origin)
    return out.emit(aten.any.dim, (compared, rank - 1), {}, made, origin)
