"""Rules about scores that are looked up at ids which were chosen among them, in the words of ``gather``.

Ids that a top-k or an argmax among E scores gives are in ``[0, E)``.  With T the number of rows,

    index(x [T, E], [arange(T) [T, 1], ids [T, k]]) = gather(x, 1, ids)
    index(x [T, E], [arange(T), ids [T]]) = view(gather(x, 1, view(ids, [T, 1])), [T])
    remainder(ids, E) = ids                                                   which take_along_dim does to ids
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from moe_inductor.region.distinct import are_distinct, kept_of
from moe_inductor.region.nodes import is_tensor, node_arg, origin_of, same_sizes, value
from moe_inductor.region.normalise import Emitter, rule

aten = torch.ops.aten


def _among(ids: fx.Node, size: Any) -> bool:
    """Were ``ids`` chosen along the last dimension of ``size`` scores?"""
    return kept_of(ids) is ids and are_distinct(ids, size)


@rule(aten.index.Tensor, first=True)
def _looked_up(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    base, index = args
    if len(index) != 2 or not all(isinstance(i, fx.Node) for i in index) or value(base).dim() != 2:
        return None
    rows, ids = index
    tokens, experts = value(base).shape
    numbers = node_arg(rows, 0) if rows.target is aten.view.default else rows
    made, origin = value(node), origin_of(node)
    fits = (
        numbers.target is aten.arange.default
        and same_sizes(value(numbers).shape, [tokens])
        and is_tensor(ids)
        and same_sizes(value(ids).shape[:1], [tokens])
        and same_sizes(value(rows).shape, [tokens, 1][: value(ids).dim()])
    )
    if not fits:
        return None
    if value(ids).dim() == 2 and _among(ids, experts):
        return out.emit(aten.gather.default, (base, 1, ids), {}, made, origin)
    if value(ids).dim() != 1:
        return None
    column = out.view(ids, value(ids).unsqueeze(1), origin)
    if not _among(column, experts):
        return None
    found = out.emit(aten.gather.default, (base, 1, column), {}, made.unsqueeze(1), origin)
    return out.view(found, made, origin)


@rule(aten.remainder.Scalar)
def _in_range(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    ids, size = args
    return ids if isinstance(size, int) and _among(ids, size) else None
