"""The ops that a rewritten graph calls, and how Inductor's code calls them."""

from __future__ import annotations

import torch

from moe_inductor import _compat
from moe_inductor.ops import cpu

EXPERTS = torch.ops.moe_inductor.fused_experts.default
ROUTING = torch.ops.moe_inductor.topk_routing.default
BLOCK = torch.ops.moe_inductor.fused_moe.default
_compat.call_directly(
    EXPERTS,
    {"cpu": "moe_inductor.ops.cpu.fused_experts", "cuda": "moe_inductor.ops.cuda.fused_experts"},
)
_compat.call_directly(BLOCK, {"cuda": "moe_inductor.ops.cuda.fused_moe"})
_compat.call_directly(ROUTING, {"cuda": "moe_inductor.ops.cuda.topk_routing"})
# Nothing is gained on the CPU by twenty calls of ATen in one op, and at one token they are a tenth of the block.
_compat.decompose(ROUTING, cpu.topk_routing, "cpu")
