"""Experts on sorted tokens: sort the (token, choice) pairs by expert, cut, run each expert on its slice, put back.

    order = topk_ids.view(-1).argsort()
    rows = x[order // k].split(counts.tolist())
    y = torch.cat([expert[e](rows[e]) for e in range(num_experts)])
    out.index_add_(0, order // k, y * topk_weights.view(-1)[order, None])

What is sorted, how it is counted, cut and put back is written in many ways.  The normal form has none of it
(``region/pairs.py``), so the reference says what is left: each pair's row through its own expert.
"""

import torch

from moe_inductor.match.api import ExpertsSpelling, linear_of_pairs


def reference(x, topk_ids, topk_weights, experts, *, weight_on, sum_in):
    T, k = topk_ids.shape
    ids = topk_ids.reshape(-1)
    rows = x.unsqueeze(1).expand(T, k, -1).reshape(T * k, -1)
    if weight_on == "input":
        rows = (rows * topk_weights.reshape(-1, 1)).to(x.dtype)
    y = experts(rows, lambda operand, *weights: linear_of_pairs(operand, ids, *weights))
    y = y.view(T, k, -1)
    if weight_on == "output":
        y = y * topk_weights.unsqueeze(-1)
    return y.to({"product": y.dtype, "x": x.dtype}[sum_in]).sum(dim=1)


SORTED_EXPERTS = ExpertsSpelling(
    name="sorted_experts",
    source="transformers 4.57: granitemoe, jetmoe, deepseek_v2, aria; torchtitan; Megatron's SequentialMLP",
    reference=reference,
    anchor="moe_inductor_region::pair_linear",
    facts={
        "weight_on": ("output", "input"),
        "sum_in": ("product", "x"),
    },
)
