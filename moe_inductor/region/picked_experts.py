"""Rules about what a token's experts gave, picked from what all experts gave: it becomes a sum over the experts.

    sum_j w[t, j] y[ids[t, j]][t]  =  sum_j sum_e w[t, j] (ids[t, j] == e) y[e][t]  =  sum_e scores[t, e] y[e][t]

with ``scores = scatter(zeros, ids, w)``, for ids [T, k] that are distinct positions among as many scores as there are
experts.  The uniform spelling of the right hand side is that of ``stacks.py``.  The terms of a sum have no order.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from moe_inductor.region.axes import axes_of
from moe_inductor.region.distinct import chosen_from, kept_of
from moe_inductor.region.einsums import is_of_experts
from moe_inductor.region.nodes import (
    is_floating,
    is_one,
    node_arg,
    origin_of,
    same_sizes,
    uncast,
    value,
)
from moe_inductor.region.normalise import Emitter, arithmetic, cast, rule
from moe_inductor.region.sparse import matrix_of, scattered
from moe_inductor.region.stacks import chain

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True, eq=False)
class _All:
    """``node``, what all experts gave: experts are its dimension ``e``, features ``f``, and tokens the others.

    pieces: [T, ..] of each expert; None where ``node`` is a view of one tensor [E, T, H], ``whole``.
    """

    node: fx.Node
    e: int
    f: int
    pieces: tuple[fx.Node, ...] | None = None
    whole: fx.Node | None = None

    @property
    def count(self) -> Any:
        return value(self.node).shape[self.e]


@dataclasses.dataclass(frozen=True, eq=False)
class _Picked:
    """``node [.., k, .., H]``, of which k is dimension ``j``: the results of a token's experts.  ids: [T, k]."""

    node: fx.Node
    of: _All
    ids: fx.Node
    j: int
    f: int


# -- reading ----------------------------------------------------------------------------------------------------------


def _all(node: fx.Node) -> _All | None:
    """``stack(ys, d)``, or a view of what a batched product with all experts' matrices gave."""
    rank = value(node).dim()
    stack, order = node, list(range(rank))
    if node.target is aten.permute.default:
        stack, order = node_arg(node, 0), list(node.args[1])  # type: ignore[call-overload]
    if stack.target is aten.stack.default:
        dim: Any = (*stack.args[1:], 0)[0]
        pieces: Any = stack.args[0]
        e, f = order.index(dim), order.index(rank - 1 if dim != rank - 1 else rank - 2)
        tokens = [d for i, d in enumerate(order) if i not in (e, f)]
        if rank < 3 or not is_floating(node) or tokens != sorted(tokens):
            return None
        return _All(node, e, f, pieces=tuple(pieces))
    axes = axes_of(node) if rank >= 3 and is_floating(node) else None
    if axes is None or not is_of_experts(axes.base) or not axes.of(0) or not axes.of(2):
        return None
    places = [d for d, dim in enumerate(axes.dims) if dim == axes.of(0)]
    features = [d for d, dim in enumerate(axes.dims) if dim == axes.of(2)]
    if not places or not features:
        return None
    e, f = places[0], features[0]
    rest = [a for d, dim in enumerate(axes.dims) if d not in (e, f) for a in dim]
    return _All(node, e, f, whole=axes.base) if tuple(rest) == axes.of(1) else None


def _picked(out: Emitter, node: Any) -> _Picked | None:
    """``gather(ys, e, ids)`` of all features, or ``ys[arange, ids]``, permuted or not"""
    if not isinstance(node, fx.Node):
        return None
    if node.target is aten.permute.default:
        inner, order = _picked(out, node.args[0]), list(node.args[1])  # type: ignore[call-overload]
        if inner is None:
            return None
        j, f = order.index(inner.j), order.index(inner.f)
        rest = [d for i, d in enumerate(order) if i not in (j, f)]
        return dataclasses.replace(inner, node=node, j=j, f=f) if rest == sorted(rest) else None
    if node.target is aten.gather.default and len(node.args) == 3:
        of = _all(node_arg(node, 0))
        if of is None or node.args[1] != of.e:
            return None
        index = node_arg(node, 2)
        if index.target is aten.remainder.Scalar and index.args[1] == of.count:
            index = node_arg(index, 0)  # take_along_dim; that they are in [0, E) is shown anyway
        wide, narrow = (
            [s for d, s in enumerate(value(n).shape) if d != of.e] for n in (of.node, index)
        )
        ids = _columns(out, index, of.e, of.f) if same_sizes(wide, narrow) else None
        return None if ids is None else _Picked(node, of, ids, of.e, of.f)
    if node.target is aten.index.Tensor and len(node.args[1]) == 2:  # type: ignore[arg-type]
        of = _all(node_arg(node, 0))
        if of is None or value(of.node).dim() != 3 or of.f != 2:
            return None
        indices: Any = node.args[1]
        ids, tokens = indices[of.e], indices[1 - of.e]
        if ids is None or value(ids).dim() > 2 or not _numbers_tokens(tokens, ids):
            return None
        if value(ids).dim() == 1:
            ids = out.view(ids, value(ids).unsqueeze(1), origin_of(node))
        return _Picked(node, of, ids, 1, value(node).dim() - 1)
    return None


def _numbers_tokens(node: Any, ids: fx.Node) -> bool:
    """arange(T), one for each row of ``ids [T, k]`` or ``[T]``"""
    if not isinstance(node, fx.Node):
        return False
    if node.target is aten.expand.default and same_sizes(value(node).shape, value(ids).shape):
        node = node_arg(node, 0)
    shape = value(node).shape
    if len(shape) != value(ids).dim() or not same_sizes(shape[:1], value(ids).shape[:1]):
        return False
    if not all(map(is_one, shape[1:])):
        return False
    if node.target is aten.view.default:
        node = node_arg(node, 0)
    counts = node.target is aten.arange.default and len(node.args) == 1
    return counts and value(node).dim() == 1 and same_sizes(value(node).shape, shape[:1])


def _columns(out: Emitter, node: fx.Node, j: int, f: int) -> fx.Node | None:
    """``node``, of one number for each token and choice, as [T, k]: its dimension ``f`` has size 1, or it is the same
    all along ``f``; k is dimension ``j``, and the others are the tokens'."""
    if node.target in (aten.expand.default, aten.repeat.default):
        inner = node_arg(node, 0)
        wide = [*value(inner).shape]
        if len(wide) != value(node).dim():
            return None
        wide[f] = value(node).shape[f]
        if not same_sizes(wide, value(node).shape):
            return None
        node = inner
    inner, origin = uncast(node), origin_of(node)
    found = value(inner)
    if not is_one(found.shape[f]):
        return None
    narrow = found.squeeze(f)
    node_of = _view(out, inner, narrow, origin)
    j -= j > f
    order = [d for d in range(narrow.dim()) if d != j] + [j]
    turned = narrow.permute(order)
    node_of = out.permute(node_of, order, turned, origin)
    flat = turned.reshape(-1, turned.shape[-1])
    node_of = _view(out, node_of, flat, origin)
    return cast(out, node_of, torch.empty_like(flat, dtype=value(node).dtype), origin)


def _view(out: Emitter, base: fx.Node, made: torch.Tensor, origin: str | None) -> fx.Node:
    return out.apply(aten.view.default, (base, out.sizes(made)), {}, made, origin)


def _choices(ids: fx.Node) -> Any:
    """E, where ``ids [T, k]`` are positions among E scores, none replaced by -1; else None."""
    inner = ids
    while inner.target is aten.view.default and chosen_from(inner) is None:
        inner = node_arg(inner, 0)
    source = chosen_from(inner)
    if source is None or kept_of(ids) is not ids:
        return None
    scores, dim = source
    E = value(scores).shape[dim]
    return E if isinstance(E, int) else None  # that they are distinct is asked for by ``matrix_of``


# -- writing ----------------------------------------------------------------------------------------------------------


def _of_choices(
    out: Emitter, found: _Picked, weights: fx.Node | None, dtype: torch.dtype, origin: Any
) -> fx.Node | None:
    """sum_j w[:, j] * ys[ids[:, j]] = sum_e ys[e] * scatter(zeros, ids, w)[:, e], as [T, H]"""
    E = _choices(found.ids)
    if weights is None or E is None:
        return None
    made = value(weights).new_empty((value(found.ids).shape[0], E))
    matrix = scattered(out, 0, found.ids, weights, made, origin)
    return _of_experts(out, found.of, matrix, dtype, origin)


def _of_experts(
    out: Emitter, of: _All, matrix: fx.Node | None, dtype: torch.dtype, origin: Any
) -> fx.Node | None:
    """sum_e ys[e] * matrix[:, e], as [T, H], for a routing matrix [T, E]"""
    if matrix is None or matrix_of(matrix) is None:
        return None
    features = value(of.node).shape[of.f]
    if not same_sizes(
        [value(of.node).numel() // of.count // features, of.count], value(matrix).shape
    ):
        return None
    if of.pieces is None:
        assert of.whole is not None
        turned = out.permute(matrix, [1, 0], value(matrix).t(), origin)
        column = out.view(turned, value(turned).unsqueeze(-1), origin)
        made = torch.empty_like(value(of.whole), dtype=dtype)
        product = arithmetic(out, aten.mul.Tensor, of.whole, column, made, origin)
        return out.emit(aten.sum.dim_IntList, (product, [0]), {}, made.sum(0), origin)
    flat = value(of.pieces[0]).reshape(-1, features)
    ys = {e: out.view(y, flat, origin) for e, y in enumerate(of.pieces)}
    return chain(out, ys, matrix, torch.empty_like(flat, dtype=dtype), origin)


def _weighted(
    out: Emitter, given: Any, other: Any, made: torch.Tensor, contracted: int, origin: Any
) -> fx.Node | None:
    """The sum over dimension ``contracted`` of ``given`` of its product with ``other``, which has one number for all
    features; as [T, H]."""
    if not isinstance(given, fx.Node) or not isinstance(other, fx.Node):
        return None
    inner = uncast(given)  # the product casts again
    picked = _picked(out, inner)
    if picked is not None and picked.j == contracted:
        weights = _columns(out, other, picked.j, picked.f)
        return _of_choices(out, picked, weights, made.dtype, origin)
    of = _all(inner)
    if of is not None and of.pieces is not None and of.e == contracted:
        matrix = _columns(out, other, of.e, of.f)
        return _of_experts(out, of, matrix, made.dtype, origin)
    return None


@rule(aten.sum.dim_IntList, first=True)
def _summed(out: Emitter, node: fx.Node, args: tuple[Any, ...], kwargs: dict) -> Any:
    """sum(gather(ys, ids) * w, the choices) = sum_e ys[e] * scatter(zeros, ids, w)[:, e]
    sum(ys * matrix, the experts) = sum_e ys[e] * matrix[:, e]"""
    if kwargs or len(args) != 2 or len(args[1]) != 1 or args[0].target is not aten.mul.Tensor:
        return None
    product, made, origin = args[0], value(node), origin_of(node)
    if made.dtype != value(product).dtype:
        return None
    for given, other in (product.args, product.args[::-1]):
        if not isinstance(other, fx.Node) or value(other).dim() != value(product).dim():
            continue
        total = _weighted(out, given, other, made, args[1][0], origin)
        if total is not None:
            return out.view(total, made, origin)
    return None


@rule(aten.bmm.default, first=True)
def _multiplied(out: Emitter, node: fx.Node, args: tuple[Any, ...], kwargs: dict) -> Any:
    """bmm(w [T, 1, k], gather(ys, ids) [T, k, H]) = view(sum(gather(ys, ids) * view(w, [T, k, 1]), 1)), and the other
    way round;  bmm(matrix [T, 1, E], ys [T, E, H]) in the same way"""
    (one, other), made, origin = args, value(node), origin_of(node)
    for given, contracted, factor in ((other, 1, one), (one, 2, other)):
        across = out.permute(factor, [0, 2, 1], value(factor).transpose(1, 2), origin)
        total = _weighted(out, given, across, made, contracted, origin)
        if total is not None:
            return out.view(total, made, origin)
    return None
