"""What the fused ops can compute.  Legality is proved elsewhere; this is about dtypes, devices and tensor types."""

from __future__ import annotations

from typing import Any

import torch

from moe_inductor._compat import FakeTensor
from moe_inductor.match.bind import Bound
from moe_inductor.reasons import Code, Refusal
from moe_inductor.region.nodes import value
from moe_inductor.unit import parse

_DTYPES = {
    "cpu": {torch.float32, torch.bfloat16, torch.float16, torch.float64},
    "cuda": {torch.float32, torch.bfloat16, torch.float16},
}


def check_support(bound: Bound, where: str) -> None:
    """Raises Refusal(TENSOR_TYPE, DEVICE, DTYPE) when the ops cannot take the block's tensors."""
    x = value(bound.x)
    for node in bound.inputs():
        found = value(node)
        if not _is_plain(found):
            raise Refusal(Code.TENSOR_TYPE, f"{type(found).__name__} is not supported", where)
        if found.device != x.device:
            raise Refusal(Code.DEVICE, f"tensors on {x.device} and on {found.device}", where)
    if x.device.type not in _DTYPES:
        raise Refusal(Code.DEVICE, f"device {x.device.type} is not supported", where)
    experts = bound.moe.experts
    for dtype in (experts.compute_dtype, *parse(experts.activation).casts):
        if dtype not in _DTYPES[x.device.type]:
            raise Refusal(Code.DTYPE, f"{dtype} on {x.device.type} is not supported", where)


def _is_plain(found: Any) -> bool:
    return isinstance(found, FakeTensor) and found.layout is torch.strided
