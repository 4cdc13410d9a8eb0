"""Parts of what is sorted by expert: consecutive rows, from one number that depends on the data to another.

``x[index[i:j]]`` is a part of ``x[index]``, and ``x[i:j] // k`` one of ``x // k``: the tokens of a part of the sorted
pairs are a part of the tokens of all.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from moe_inductor.region.counts import Form, plus
from moe_inductor.region.nodes import node_arg, origin_of, value
from moe_inductor.region.orders import quotient, tokens_of

if TYPE_CHECKING:
    from moe_inductor.region.normalise import Emitter

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """``whole[start:end]``"""

    whole: fx.Node
    start: Form
    end: Form


def part_of(out: Emitter, node: Any) -> Part | None:
    """x[i:j], or a part of x[index] or of x // k, written as x[index[i:j]] and x[i:j] // k"""
    if not isinstance(node, fx.Node):
        return None
    bounds = out.numbers.bounds(node)
    if node.target is aten.slice.Tensor and bounds is not None:
        return Part(node_arg(node, 0), *bounds)
    pack = node.args[0] if node.target is operator.getitem else None
    if isinstance(pack, fx.Node) and pack.target is aten.split_with_sizes.default:
        base, _, *dim = pack.args
        position = node.args[1]
        if any(dim) or not isinstance(base, fx.Node) or not isinstance(position, int):
            return None
        start: Form = {}
        for part in value(pack)[:position]:
            start = plus(start, out.numbers.form(part.shape[0]))
        length = out.numbers.form(value(pack)[position].shape[0])
        return Part(base, start, plus(start, length))
    args: tuple
    if node.target is aten.index.Tensor and len(node.args[1]) == 1:  # type: ignore[arg-type]
        inner = part_of(out, node.args[1][0])  # type: ignore[index]
        args = () if inner is None else (node.args[0], [inner.whole])
    elif quotient(node) is not None:
        inner = part_of(out, node.args[0])
        args = () if inner is None else (inner.whole, *node.args[1:])
    else:
        return None
    if inner is None:
        return None
    found = value(node)
    made = found.new_empty((value(inner.whole).shape[0], *found.shape[1:]))
    whole = out.apply(node.target, args, dict(node.kwargs), made, origin_of(node))
    return dataclasses.replace(inner, whole=whole)


def part_of_tokens(out: Emitter, rows: Any) -> Part | None:
    """Of the tokens of sorted pairs."""
    part = part_of(out, rows) if isinstance(rows, fx.Node) and value(rows).dim() == 1 else None
    return part if part is not None and tokens_of(part.whole) is not None else None
