"""``moe_inductor::fused_moe``: a whole MoE block, the router's product included, as one op.

The same as a product, ``topk_routing`` and ``fused_experts`` after one another, for graphs below autograd.  With few
tokens it is the host and the starts of kernels that take the time: one call looks at its arguments once, launches all
kernels in a row and hands out one tensor, and each kernel can start while the one before still runs.
"""

from __future__ import annotations

import collections
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_inductor.ops import cpu
from moe_inductor.ops.check import Call, Routing, check_experts_metadata
from moe_inductor.ops.experts import SCHEMA as EXPERTS_SCHEMA
from moe_inductor.ops.library import LIBRARY, NAMESPACE, TAGS
from moe_inductor.ops.routing import SCHEMA as ROUTING_SCHEMA

LIBRARY.define(
    f"fused_moe(Tensor router_input, Tensor router_weight, Tensor? router_bias, {ROUTING_SCHEMA},"
    f" {EXPERTS_SCHEMA}) -> Tensor",
    tags=TAGS,
)


_ROUTING, _EXPERTS = Routing._fields[1:], Call._fields[3:]
_Arguments = collections.namedtuple(
    "_Arguments",
    ("router_input", "router_weight", "router_bias", *_ROUTING, "hidden_states", *_EXPERTS),
)


class Block(_Arguments):
    """One call of ``fused_moe``: its arguments in the order of the schema.

    router_input [T, H] and hidden_states [T, H] (most models give one tensor as both), router_weight [E, H] and
    router_bias [E] or None, of the dtype of router_input, make ``router_logits [T, E]``; the others are those of
    ``ops.topk_routing`` and ``ops.fused_experts``.  The result is [T, H] in ``out_dtype``.
    """

    __slots__ = ()

    @staticmethod
    def of(
        router_input: Any, router_weight: Any, router_bias: Any, routing: Routing, experts: Call
    ) -> Block:
        """From the arguments of the three parts; those between the parts are not looked at."""
        first = (router_input, router_weight, router_bias)
        return Block(*first, *routing[1:], experts.hidden_states, *experts[3:])

    @property
    def routing(self) -> tuple[Any, ...]:
        """The arguments of ``topk_routing`` behind the logits."""
        return self[3 : 3 + len(_ROUTING)]

    @property
    def experts(self) -> tuple[Any, ...]:
        """The arguments of ``fused_experts`` behind hidden_states, topk_ids and topk_weights."""
        return self[-len(_EXPERTS) :]


def _parts(*args: Any) -> Tensor:
    """The block as its three parts."""
    call = Block(*args)
    router_logits = F.linear(call.router_input, call.router_weight, call.router_bias)
    topk_weights, topk_ids = cpu.topk_routing(router_logits, *call.routing)
    return cpu.fused_experts(call.hidden_states, topk_ids, topk_weights, *call.experts)


def _cuda(*args: Any) -> Tensor:
    # Imported here: Triton must not be needed to import the ops.
    from moe_inductor.ops import cuda

    return cuda.fused_moe(*args)


def _fake(*args: Any) -> Tensor:
    call = Block(*args)
    shape = (call.hidden_states.shape[0], call.k)
    ids = call.router_input.new_empty(shape, dtype=torch.int64)
    weights = call.router_input.new_empty(shape, dtype=call.weights_dtype)
    experts = Call(call.hidden_states, ids, weights, *call.experts)
    check_experts_metadata(experts)
    return call.hidden_states.new_empty(call.hidden_states.shape, dtype=experts.out_dtype)


LIBRARY.impl("fused_moe", _parts, "CPU")
LIBRARY.impl("fused_moe", _cuda, "CUDA")
torch.library.register_fake(f"{NAMESPACE}::fused_moe", _fake, lib=LIBRARY)
