"""What the fused ops can compute.  Legality is proved elsewhere; this is about dtypes, devices and tensor types."""

from __future__ import annotations

from typing import Any

import torch

from moe_inductor._compat import FakeTensor
from moe_inductor.match.bind import Bound
from moe_inductor.reasons import Code, Refusal
from moe_inductor.region.nodes import value

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
    if x.dtype not in _DTYPES[x.device.type]:
        raise Refusal(Code.DTYPE, f"{x.dtype} on {x.device.type} is not supported", where)
    if bound.moe.experts.weight_dtype != x.dtype:
        raise Refusal(
            Code.DTYPE,
            f"hidden states are {x.dtype}, expert weights {bound.moe.experts.weight_dtype}",
            where,
        )


def _is_plain(found: Any) -> bool:
    return isinstance(found, FakeTensor) and found.layout is torch.strided
