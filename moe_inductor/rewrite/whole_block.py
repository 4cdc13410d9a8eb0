"""The router's product, ``topk_routing`` and ``fused_experts`` as one call of ``fused_moe``, in Inductor's graphs.

Calls may be joined where nobody else reads what passes between them and nothing is written meanwhile.  Not in training:
where the backward pass computes the router once more (activation checkpointing), by the library's product, a logit
rounded otherwise would send it to other experts than the forward pass.  On GPUs alone: on a CPU Inductor fuses the
routing with what surrounds it.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from moe_inductor import _compat
from moe_inductor.ops.block import Block
from moe_inductor.ops.check import Call, Routing
from moe_inductor.rewrite.calls import BLOCK, EXPERTS, ROUTING

DEVICES = {"cuda"}
_aten = torch.ops.aten


def join(node: fx.Node) -> None:
    """Replace ``node``, a call of ``fused_experts``, and what it alone reads by one call, where that is possible."""
    experts = Call(*node.args, **node.kwargs)  # type: ignore[arg-type]
    made = node.meta.get("val")
    if experts.batch_invariant or made is None or made.device.type not in DEVICES:
        return
    route = _maker(experts.topk_ids, operator.getitem)
    routed = route and route.args[0]
    parts = (experts.topk_weights, experts.topk_ids)
    if not isinstance(routed, fx.Node) or routed.target is not ROUTING or len(routed.users) != 2:
        return
    for index, part in enumerate(parts):
        taken = _maker(part, operator.getitem)
        if taken is None or taken.args != (routed, index):
            return
    routing = Routing(*routed.args, **routed.kwargs)  # type: ignore[arg-type]
    product = _maker(routing.router_logits, _aten.mm.default, _aten.addmm.default)
    operands = None if product is None else _operands(product)
    if product is None or operands is None or _written_between(product, node):
        return
    with node.graph.inserting_before(node):
        call = node.graph.call_function(BLOCK, tuple(Block.of(*operands, routing, experts)))
    call.meta.update(node.meta)
    if "eager_input_vals" in node.meta and "eager_input_vals" in routed.meta:
        # The strides that the operands must keep.
        x, weight, bias = (None if n is None else n.meta["val"] for n in operands)
        eager = Block.of(x, weight, bias, _eager(Routing, routed), _eager(Call, node))
        call.meta["eager_input_vals"] = (tuple(eager), {})
    node.replace_all_uses_with(call)
    for gone in (node, *parts, routed, product):
        node.graph.erase_node(gone)  # type: ignore[arg-type]


def _operands(product: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None] | None:
    """``(x [T, H], weight [E, H], bias [E] or None)`` of ``x @ weight^T + bias``; None for any other product."""
    *first, x, transposed = product.args
    bias = first[0] if first else None
    weight = _transpose_of(transposed)
    if product.kwargs or weight is None or not isinstance(x, fx.Node):
        return None
    if bias is None:
        return x, weight, None
    experts = weight.meta["val"].shape[:1]
    if not isinstance(bias, fx.Node) or bias.meta["val"].shape != experts:  # one number for all
        return None
    return x, weight, bias


def _eager(kind: Any, node: fx.Node) -> Any:
    args, kwargs = node.meta["eager_input_vals"]
    return kind(*args, **kwargs)


def _maker(made: Any, *targets: Any) -> fx.Node | None:
    """``made``, if it is a call of one of the ``targets`` and has one reader."""
    if isinstance(made, fx.Node) and made.target in targets and len(made.users) == 1:
        return made
    return None


def _transpose_of(node: Any) -> fx.Node | None:
    if not isinstance(node, fx.Node):
        return None
    if node.target is _aten.t.default or (
        node.target is _aten.permute.default and node.args[1] in ([1, 0], [-1, -2])
    ):
        return node.args[0]  # type: ignore[return-value]
    return None


def _written_between(first: fx.Node, last: fx.Node) -> bool:
    """May anything between the two write to a tensor, so that reading later would read something else?"""
    node = first.next
    while node is not last:
        schema = getattr(node.target, "_schema", None)
        if node.op == "call_function" and (
            schema.is_mutable if schema is not None else node.target is not operator.getitem
        ):
            return True
        node = node.next
    return False


_compat.in_inference(EXPERTS, join)
