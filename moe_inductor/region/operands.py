"""Operands of batched products that were cast on their way.

    bmm(w, cast(view(h, [.., n, 1])))  =  bmm(w, view(cast(h), [.., n, 1]))

Autocast casts what a GEMM reads, thus after the view that makes a batch of rows.  Where the experts' activation is
computed in more bits (``pow`` under CUDA's autocast is), that view would stand within the activation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from moe_inductor.region.nodes import is_pointwise, node_arg, origin_of, value
from moe_inductor.region.normalise import cast, rule

if TYPE_CHECKING:
    from moe_inductor.region.normalise import Emitter

aten = torch.ops.aten


@rule(aten.bmm.default, first=True)
def _computed_before(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    moved = tuple(_cast_before_view(out, operand) for operand in args)
    if moved == args:
        return None
    return out.apply(aten.bmm.default, moved, kwargs, value(node), origin_of(node))


def _cast_before_view(out: Emitter, operand: fx.Node) -> fx.Node:
    """``view(cast(h))`` of ``cast(view(h))``, for an ``h`` that is computed element by element."""
    if operand.target is not aten._to_copy.default:
        return operand
    viewed = node_arg(operand, 0)
    if viewed.target is not aten.view.default or not is_pointwise(node_arg(viewed, 0).target):
        return operand
    h, made, origin = node_arg(viewed, 0), value(operand), origin_of(operand)
    narrowed = cast(out, h, value(h).to(made.dtype), origin)
    return out.view(narrowed, made, origin)
