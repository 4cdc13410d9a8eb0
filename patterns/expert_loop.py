"""A Python loop over all experts: select an expert's tokens, run them, add the weighted result at their rows.

    for e in range(num_experts):
        slot, token = torch.where(expert_mask[e])
        y = expert[e](x[token]) * topk_weights[token, slot, None]
        out.index_add_(0, token, y)

The most common eager spelling: Mixtral and Qwen of transformers up to 4.51, OLMoE of 4.57, DeepSeek-V3 of 4.5x.
"""

import torch

from moe_inductor.match.api import ExpertsSpelling


def reference(x, topk_ids, topk_weights, experts, *, mask, sum_in):
    E = experts.num_experts
    dtype = topk_weights.dtype if sum_in == "weights" else x.dtype
    out = torch.zeros(x.shape, dtype=dtype, device=x.device)
    if mask == "slots first":
        expert_mask = torch.nn.functional.one_hot(topk_ids, E).permute(2, 1, 0)
    elif mask == "tokens first":
        expert_mask = torch.nn.functional.one_hot(topk_ids, E).permute(2, 0, 1)
    for e, expert in experts:
        if mask == "slots first":
            slot, token = torch.where(expert_mask[e])
        elif mask == "tokens first":
            token, slot = torch.where(expert_mask[e])
        else:
            token, slot = torch.where(topk_ids == e)
        y = expert(x[token]) * topk_weights[token, slot, None]
        out = out.index_add(0, token, y.to(dtype))
    return out


EXPERT_LOOP = ExpertsSpelling(
    name="expert_loop",
    source="transformers 4.36 to 4.57: mixtral, qwen2_moe, qwen3_moe, olmoe, deepseek_v3",
    reference=reference,
    anchor="aten::nonzero",
    facts={
        "mask": ("slots first", "tokens first", "compare"),
        "sum_in": ("x", "weights"),
    },
    loop=True,
)
