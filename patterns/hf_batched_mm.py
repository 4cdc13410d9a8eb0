"""Hugging Face transformers 5.x, ``experts_implementation="batched_mm"``, which ``generate`` uses for decoding on a GPU.

Every token-expert pair gathers its own weight matrices, and both projections are one batched GEMM.
"""

import torch

from moe_inductor.match.api import ExpertsSpelling


def reference(x, topk_ids, topk_weights, experts, *, rows, clamp):
    T, k = topk_ids.shape
    expert_ids = topk_ids.reshape(-1)
    if clamp:  # out-of-range ids of expert parallelism, whose weights are zero
        expert_ids = expert_ids.clamp(0, experts.num_experts - 1)
    if rows == "repeat":
        repeated = x.repeat_interleave(k, dim=0)
    else:
        token_ids = torch.arange(T, device=x.device).unsqueeze(1).expand(-1, k).reshape(-1)
        repeated = x[token_ids]

    def linear(operand, weight):
        return torch.bmm(weight[expert_ids], operand.unsqueeze(-1)).squeeze(-1)

    y = experts(repeated, linear) * topk_weights.reshape(-1, 1)
    return y.view(T, k, -1).sum(dim=1).to(x.dtype)


BATCHED_MM = ExpertsSpelling(
    name="hf_batched_mm",
    source="transformers 5.0 to 5.23, integrations/moe.py, batched_mm_experts_forward",
    reference=reference,
    anchor="aten::bmm",
    # repeat: since 5.1; gather: 5.0.  clamp: releases up to 5.19 had it.
    facts={"rows": ("repeat", "gather"), "clamp": (False, True)},
)
