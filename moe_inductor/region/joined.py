"""Routing matrices that are added up: those of a first and of a second choice are one of both.

    scatter(zeros, a, w) + scatter(zeros, b, v) = scatter(zeros, cat([a, b], -1), cat([w, v], -1))

where no expert is among ``a`` and ``b`` (``region/distinct.py``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from moe_inductor.region.distinct import are_distinct, parts_of
from moe_inductor.region.nodes import is_tensor, origin_of, same_sizes, value
from moe_inductor.region.normalise import Emitter, rule
from moe_inductor.region.sparse import matrix_of, scattered, spread

aten = torch.ops.aten


@rule(aten.add.Tensor, aten.bitwise_or.Tensor, aten.logical_or.default, first=True)
def _joined(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """The equation above, and so for booleans and ``or``"""
    made, origin = value(node), origin_of(node)
    if kwargs or len(args) != 2 or not all(isinstance(a, fx.Node) and is_tensor(a) for a in args):
        return None
    if (node.target is aten.add.Tensor) is (made.dtype == torch.bool):
        return None
    found = [m for a in args if (m := matrix_of(a)) is not None and m.fill == 0]
    if len(found) != 2 or any(value(a).dtype != made.dtype for a in args):
        return None
    if not same_sizes(value(args[0]).shape, value(args[1]).shape):
        return None
    for first, second in (found, found[::-1]):
        parts = [*_each(first.ids), *_each(second.ids)]
        ids = _side_by_side(out, parts, origin)
        if not are_distinct(ids, made.shape[-1]):
            continue
        numbers = [m.scores for m in (first, second)]
        if numbers[0] == numbers[1] and not isinstance(numbers[0], fx.Node):
            return scattered(out, 0, ids, numbers[0], made, origin)
        scores = [spread(out, m.ids, m.scores, made.dtype, origin) for m in (first, second)]
        columns = [p for s in scores for p in _each(s)]
        return scattered(out, 0, ids, _side_by_side(out, columns, origin), made, origin)
    return None


def _each(node: fx.Node) -> list[fx.Node]:
    parts = parts_of(node) if node.target is aten.cat.default else None
    return [node] if parts is None else parts


def _side_by_side(out: Emitter, parts: list[fx.Node], origin: str | None) -> fx.Node:
    made = torch.cat([value(p) for p in parts], dim=-1)
    return out.emit(aten.cat.default, (parts, made.dim() - 1), {}, made, origin)
