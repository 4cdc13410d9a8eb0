"""Products in batches of one: ``rows @ weight[[e]]`` is a matrix product with a dimension of size 1 in front.

    bmm(view(x, [1, n, k]), view(select(w, 0, e), [1, k, m]))  =  view(mm(x, select(w, 0, e)), [1, n, m])

and what is computed from the result element by element, or of slices of it, is computed before the view.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from moe_inductor.region.nodes import is_one, is_pointwise, node_arg, value
from moe_inductor.region.normalise import rule

if TYPE_CHECKING:
    from moe_inductor.region.normalise import Emitter

aten = torch.ops.aten


@rule(aten.bmm.default)
def _product(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """Of rows with the weight of one expert; that of all experts is another spelling, be there one or many."""
    made, origin = value(node), node.meta.get("stack_trace")
    rows, chosen = (_within(out, a, origin) for a in args)
    if kwargs or rows is None or chosen is None or chosen.target is not aten.select.int:
        return None
    product = out.emit(aten.mm.default, (rows, chosen), {}, made.squeeze(0), origin)
    return out.batched(product, made, origin)


def _within(out: Emitter, batch: fx.Node, origin: str | None) -> fx.Node | None:
    """``x [n, k]`` of ``batch [1, n, k]``; None where that is no batch of one."""
    found = value(batch)
    if found.dim() != 3 or not is_one(found.shape[0]):
        return None
    if batch.target is aten.expand.default:
        inner = node_arg(batch, 0)
        return inner if out.same_sizes(value(inner).shape, found.shape[1:]) else None
    return out.batches.get(batch) or out.view(batch, found.squeeze(0), origin)


@rule(aten.slice.Tensor, first=True)
def _slice(out: Emitter, node: fx.Node, args: tuple[Any, ...], kwargs: dict) -> Any:
    """slice(view(x, [1, ..]), d + 1, ..) = view(slice(x, d, ..), [1, ..])"""
    inner = out.batches.get(args[0])
    dim = args[1] if args[1:] else 0
    if inner is None or dim % value(args[0]).dim() == 0:
        return None
    made, origin = value(node), node.meta.get("stack_trace")
    rest = (dim % value(args[0]).dim() - 1, *args[2:])
    part = out.apply(node.target, (inner, *rest), kwargs, made.squeeze(0), origin)
    return out.batched(part, made, origin)


def element_by_element(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """f(view(x, [1, ..]), view(y, [1, ..])) = view(f(x, y), [1, ..]); further operands are broadcast to each row"""
    given = [a for a in args if isinstance(a, fx.Node)]
    if not any(a in out.batches for a in given):
        return None
    if node.target is not aten._to_copy.default and not is_pointwise(node.target):
        return None
    made, origin = value(node), node.meta.get("stack_trace")
    if not all(a in out.batches or value(a).dim() < made.dim() for a in given):
        return None
    inner = tuple(out.batches.get(a, a) if isinstance(a, fx.Node) else a for a in args)
    result = out.apply(node.target, inner, kwargs, made.squeeze(0), origin)
    return out.batched(result, made, origin)
