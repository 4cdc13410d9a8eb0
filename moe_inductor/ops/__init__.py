"""The ops that a matched MoE block becomes.  Importing this package registers them.

``moe_inductor::fused_experts``, ``moe_inductor::fused_experts_backward`` and ``moe_inductor::topk_routing``
are ``torch.library`` ops: schema, fake implementation, autograd, CPU and CUDA.  ``moe_inductor::fused_moe`` is all of a
block, for graphs below autograd (``rewrite/whole_block.py``).  Nothing here knows FX or Dynamo, and importing it does
not import Triton: the CUDA implementation is loaded by the first call that has a CUDA tensor.

The ops are out of place: they never write to an input and never return one (a fused MoE that wrote into
its input gave garbage under vLLM, PR 43727).
"""

from __future__ import annotations

from moe_inductor.ops import block as block  # registers its op
from moe_inductor.ops.experts import fused_experts, fused_experts_backward
from moe_inductor.ops.routing import topk_routing

__all__ = ["fused_experts", "fused_experts_backward", "topk_routing"]
