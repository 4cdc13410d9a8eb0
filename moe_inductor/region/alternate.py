"""Columns that are told apart by a view of their dimension: gate and up, stored in turn or as halves.

    select(view(x [.., n s], [.., n, s]), -1, i)  =  every s-th column of x, from i on
    select(view(x [.., s n], [.., s, n]), -2, i)  =  columns i n to (i + 1) n of x

for all leading dimensions, which may be viewed as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from moe_inductor.region.nodes import is_one, node_arg, value

if TYPE_CHECKING:
    from moe_inductor.region.normalise import Emitter

aten = torch.ops.aten


def columns_of(
    out: Emitter, base: fx.Node, dim: int, index: Any, made: Any, origin: str | None
) -> fx.Node | None:
    """``select(base, dim, index)`` as a slice of what ``base`` views, if that is computed: weights stay as they are."""
    x = node_arg(base, 0) if base.target is aten.view.default else base
    shape = value(base).shape
    if x is base or x.op != "call_function" or len(shape) < 3 or not isinstance(index, int):
        return None
    sizes = list(value(x).shape)
    while sizes and is_one(sizes[-1]):
        sizes.pop()
    outer, inner = shape[-2:]
    if not sizes or not all(isinstance(n, int) for n in (outer, inner, sizes[-1])):
        return None
    width = outer * inner
    if sizes[-1] % width:
        return None
    if sizes[-1] != width:
        # What the columns are for is told apart as well: n experts of a token, of s n columns each.
        sizes = [*shape[:-2], width]
    places = {len(shape) - 1: inner, len(shape) - 2: outer}
    if not 0 <= index < places.get(dim, 0) or 1 in (outer, inner):
        return None
    bounds = (
        (index, width, inner) if dim == len(shape) - 1 else (index * inner, (index + 1) * inner)
    )
    rows = value(x).new_empty(sizes)
    cut = rows.new_empty((*sizes[:-1], made.shape[-1]))
    args = (out.view(x, rows, origin), len(sizes) - 1, *bounds)
    return out.view(out.apply(aten.slice.Tensor, args, {}, cut, origin), made, origin)
