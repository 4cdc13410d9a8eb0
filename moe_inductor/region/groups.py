"""Rules about limits to groups of experts: a mask [T, G] of the groups, spread over the n experts of each.

The uniform spelling is ``masked_fill(x [T, E], spread(m), c)`` with
``spread(m) = view(expand(view(m, [T, G, 1]), [T, G, n]), [T, E])``, where ``m`` is what is not kept, as booleans.

    f(spread(m)) = spread(f(m))                                              for a function of each element
    view(masked_fill(view(x, [T, G, n]), view(m, [T, G, 1]), c), [T, E]) = masked_fill(x, spread(m), c)
    view(view(x, [T, G, n]) * view(m, [T, G, 1]), [T, E]) = masked_fill(x, spread(m == 0), 0)     for m of 0 and 1

Assumed in the last one, as in ``region/sparse.py``: a score that is multiplied with zero is finite.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from moe_inductor.region.nodes import is_one, node_arg, origin_of, same_sizes, value
from moe_inductor.region.normalise import RESHAPES, Emitter, rule
from moe_inductor.region.sparse import matrix_of

aten = torch.ops.aten

_OF_MASKS = (
    aten._to_copy.default, aten.bitwise_not.default, aten.logical_not.default, aten.eq.Scalar, aten.ne.Scalar,
    aten.gt.Scalar, aten.lt.Scalar,
)  # fmt: skip
_MOVES = (aten.view.default, aten.expand.default)


@rule(*_OF_MASKS, first=True)
def _of_spread(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    if len(args) < 1 or not isinstance(args[0], fx.Node):
        return None
    moves: list[fx.Node] = []
    base = args[0]
    while base.target in _MOVES:
        moves.append(base)
        base = node_arg(base, 0)
    if not any(m.target is aten.expand.default for m in moves) or not _is_mask(base):
        return None
    dtype, origin = value(node).dtype, origin_of(node)
    made = torch.empty_like(value(base), dtype=dtype)
    found = out.apply(node.target, (base, *args[1:]), kwargs, made, origin)
    for move in reversed(moves):
        made = torch.empty_like(value(move), dtype=dtype)
        found = out.apply(move.target, (found, *move.args[1:]), dict(move.kwargs), made, origin)
    return found


def _is_mask(node: fx.Node) -> bool:
    """Numbers that say which groups are kept."""
    found = matrix_of(node) if node.target is aten.scatter.src else None
    return found is not None and not isinstance(found.scores, fx.Node)


@rule(*RESHAPES, first=True)
def _filled(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    limited, made, origin = args[0], value(node), origin_of(node)
    if limited.target not in (aten.masked_fill.Scalar, aten.mul.Tensor) or made.dim() != 2:
        return None
    grouped, mask, *fill = limited.args
    if not all(isinstance(n, fx.Node) and n.target is aten.view.default for n in (grouped, mask)):
        return None
    x, groups = node_arg(grouped, 0), node_arg(mask, 0)
    fits = (
        same_sizes(value(x).shape, made.shape)
        and value(x).dtype == made.dtype
        and value(grouped).dim() == 3
        and same_sizes(value(grouped).shape, value(limited).shape)
        and same_sizes(value(grouped).shape[:1], made.shape[:1])
        and same_sizes(value(groups).shape, value(grouped).shape[:2])
        and same_sizes(value(mask).shape[:2], value(grouped).shape[:2])
        and is_one(value(mask).shape[-1])
        and _is_mask(groups)
    )
    if not fits:
        return None
    if limited.target is aten.mul.Tensor:
        kept = matrix_of(groups)
        if kept is None or (kept.fill, kept.scores) != (0, 1):
            return None
        fill = [0]
        booleans = torch.empty_like(value(groups), dtype=torch.bool)
        groups = out.apply(aten.eq.Scalar, (groups, 0), {}, booleans, origin)
    column = torch.empty_like(value(mask), dtype=torch.bool)
    wide = torch.empty_like(value(grouped), dtype=torch.bool)
    spread = out.view(groups, column, origin)
    spread = out.emit(aten.expand.default, (spread, out.sizes(wide)), {}, wide, origin)
    spread = out.view(spread, torch.empty_like(made, dtype=torch.bool), origin)
    return out.emit(aten.masked_fill.Scalar, (x, spread, *fill), {}, made, origin)
