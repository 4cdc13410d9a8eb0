"""Tokens that a mask sets to zero for the experts that they did not choose, where every expert reads all of them.

    xs = einsum("te,th->eth", mask, x)                    # GShard and others, without a capacity
    out = einsum("te,eth->th", scores, experts(xs))

What an expert makes of zeros is multiplied with the zero of a score, so it may as well read the tokens:

    f(x m) s = f(x) s        for a function f of each row, and m = 1 wherever s is not 0

The uniform spelling of rows for every expert is ``expand(x [T, H], [E, T, H]) * m [E, T, 1]``.

Assumed: a number times zero is zero, as in ``region/sparse.py``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from moe_inductor.region.axes import axes_of, laid_out
from moe_inductor.region.distinct import kept_of
from moe_inductor.region.nodes import (
    is_one,
    is_pointwise,
    is_tensor,
    node_arg,
    origin_of,
    same_sizes,
    uncast,
    unviewed,
    value,
)
from moe_inductor.region.normalise import Emitter, arithmetic, cast, rule
from moe_inductor.region.positive import positive
from moe_inductor.region.sparse import matrix_of

aten = torch.ops.aten

_PRODUCTS = (aten.mm.default, aten.bmm.default)


# -- rows for every expert --------------------------------------------------------------------------------------------


@rule(aten.mul.Tensor, first=True)
def _for_every_expert(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """x [1, T, H] * m [E, T, 1] = expand(x [T, H], [E, T, H]) * m for a routing matrix m, and views of the same:
    x [T, 1, H] * m [T, E, 1],  x [1, B, S, H] * m [E, B, S, 1], .."""
    made, origin = value(node), origin_of(node)
    if kwargs or len(args) != 2 or not all(isinstance(a, fx.Node) and is_tensor(a) for a in args):
        return None
    for x, mask in (args, args[::-1]):
        axes = axes_of(uncast(mask)) if value(mask).dim() == made.dim() > 2 else None
        matrix = axes.base if axes is not None else None
        if axes is None or matrix is None or not _chooses(matrix) or axes.dims[-1]:
            continue
        tokens = value(matrix).dim() - 1
        of_tokens = [a for a in axes.order if a.dim < tokens]
        places = [i for i, dim in enumerate(axes.dims) if dim == axes.of(tokens)]
        others = [a for i, d in enumerate(axes.dims) if i not in places for a in d]
        if len(places) != 1 or others != of_tokens or value(x).dtype != made.dtype:
            continue
        (place,) = places
        flat = _tokens(out, x, place, made, origin)
        if flat is None:
            continue
        E, H = made.shape[place], made.shape[-1]
        whole = value(flat).expand(E, *value(flat).shape)
        rows = out.emit(aten.expand.default, (flat, out.sizes(whole)), {}, whole, origin)
        first = dataclasses.replace(axes, dims=(axes.of(tokens), tuple(of_tokens), ()))
        column = laid_out(out, first, origin)
        column = cast(out, column, torch.empty_like(value(column), dtype=value(mask).dtype), origin)
        product = arithmetic(out, aten.mul.Tensor, rows, column, torch.empty_like(whole), origin)
        if place == 0:
            return out.view(product, made, origin)
        shape = list(made.shape)
        moved = whole.new_empty((E, *shape[:place], *shape[place + 1 :]))
        order = [*range(1, place + 1), 0, *range(place + 1, len(shape))]
        return out.permute(out.view(product, moved, origin), order, made, origin) if H else None
    return None


def _chooses(matrix: fx.Node) -> bool:
    return value(matrix).dtype == torch.bool or matrix_of(matrix) is not None


def _tokens(
    out: Emitter, x: fx.Node, place: int, made: torch.Tensor, origin: str | None
) -> fx.Node | None:
    """``x``, which is the same all along the dimension ``place`` of ``made``, as [T, H]."""
    if x.target is aten.expand.default:
        x = node_arg(x, 0)
    shape, wanted = list(value(x).shape), [*made.shape[:place], *made.shape[place + 1 :]]
    if len(shape) == made.dim() and is_one(shape[place]):
        del shape[place]
    elif place:
        return None
    if not same_sizes(shape, wanted):
        return None
    return out.view(x, value(x).reshape(-1, shape[-1]), origin)


# -- without the mask -------------------------------------------------------------------------------------------------


def unmasked(out: Emitter, y: fx.Node, score: fx.Node) -> fx.Node | None:
    """f(x) where ``y`` is f(x m) and m is 1 wherever the ``score`` is not 0; None where there is no such m."""
    scores = _column(score)
    if scores is None:
        return None
    found = _Unmasking(out, scores)
    made = found.rows(y)
    return made if found.masks else None


@dataclasses.dataclass(frozen=True, eq=False)
class _Column:
    """A routing matrix, for all experts ([E, T, 1], expert None) or for one of them ([T, 1]); scores: or 1.

    ids: a view of [T, width]."""

    ids: fx.Node
    width: Any
    scores: Any
    expert: Any


def _column(node: fx.Node) -> _Column | None:
    axes = axes_of(node)
    if axes is None or not value(node).dim() or not is_one(value(node).shape[-1]):
        return None
    source = axes.base
    if value(node).dim() == 3:
        found = matrix_of(source)
        if found is None or found.fill != 0:
            return None
        *tokens, _ = axes.order
        fits = axes.dims == (axes.of(value(source).dim() - 1), tuple(tokens), ())
        return _Column(found.ids, value(found.ids).shape[-1], found.scores, None) if fits else None
    if value(node).dim() > 2 or value(source).dim() != 1:  # of one token it is a number
        return None
    if source.target is aten.select.int:
        matrix, dim, e = source.args
        found = matrix_of(matrix)
        if found is None or found.fill != 0 or dim != value(matrix).dim() - 1:  # type: ignore[arg-type]
            return None
        return _Column(found.ids, value(found.ids).shape[-1], found.scores, e)
    hit = uncast(source)
    if hit.target is aten.eq.Scalar:  # of a one-hot mask
        ids, e = hit.args
        return _Column(ids, 1, 1, e) if kept_of(ids) is ids else None  # type: ignore[arg-type]
    return None


class _Unmasking:
    """masks: how many have been left out."""

    def __init__(self, out: Emitter, scores: _Column) -> None:
        self.out, self.scores = out, scores
        self.masks = 0
        self._made: dict[fx.Node, fx.Node | None] = {}

    def rows(self, node: fx.Node) -> fx.Node | None:
        """``node`` without masks, row by row; itself where there is none in it, or where one is not seen through."""
        if node not in self._made:
            self._made[node] = self._of(node)
        return self._made[node]

    def _of(self, node: fx.Node) -> fx.Node:
        target, args = node.target, node.args
        if node.op != "call_function" or not isinstance(value(node), torch.Tensor):
            return node
        if target is aten.mul.Tensor and len(args) == 2 and isinstance(args[1], fx.Node):
            x, column = node_arg(node, 0), args[1]
            mask = (
                _column(column)
                if is_tensor(column) and same_sizes(value(x).shape, value(node).shape)
                else None
            )
            if mask is not None and self._is_one(mask) and value(x).dtype == value(node).dtype:
                self.masks += 1
                return x
        last = value(node).dim() - 1
        by_row = is_pointwise(target) or target is aten._to_copy.default
        by_row = by_row or (target is aten.slice.Tensor and args[1] == last)
        if not by_row and target not in _PRODUCTS:
            return node
        first = args[:1] if target in _PRODUCTS else args
        given = [self.rows(a) if isinstance(a, fx.Node) else a for a in first]
        if all(a is b for a, b in zip(given, first, strict=True)):
            return node
        new = (*given, *args[len(given) :])
        return self.out.apply(target, new, dict(node.kwargs), value(node), origin_of(node))

    def _is_one(self, mask: _Column) -> bool:
        """Is it 1 wherever the score is not 0?"""
        own = self.scores
        if unviewed(mask.ids) is not unviewed(own.ids) or mask.expert != own.expert:
            return False
        if not same_sizes([mask.width], [own.width]):
            return False
        given = mask.scores
        if not isinstance(given, fx.Node):
            return bool(given == 1)
        if given.target is aten.full.default:
            return bool(given.args[1] == 1)
        given = uncast(given)
        if value(given).dtype != torch.bool:
            return False
        asks = given.target in (aten.ne.Scalar, aten.gt.Scalar) and given.args[1] == 0
        if not asks and given.target is not aten._to_copy.default:
            return False
        weight = node_arg(given, 0)
        if given.target is aten.gt.Scalar and not positive(weight):
            return False
        return isinstance(own.scores, fx.Node) and weight in _factors(own.scores)


def _factors(node: fx.Node) -> set[fx.Node]:
    """What is multiplied to make ``node``, which is zero where one of them is; casts left out or not."""
    found, todo = set(), [node]
    while todo:
        node = todo.pop()
        found.add(node)
        if node.target is aten._to_copy.default:
            todo.append(node_arg(node, 0))
        elif node.target in (aten.mul.Tensor, aten.div.Tensor):
            nodes = [a for a in node.args if isinstance(a, fx.Node)]
            todo += nodes if node.target is aten.mul.Tensor else nodes[:1]
    return found
