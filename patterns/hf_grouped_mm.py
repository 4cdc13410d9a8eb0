"""Hugging Face transformers 5.x, ``experts_implementation="grouped_mm"`` (the default).

Token-expert pairs are sorted by expert, both projections run as one grouped GEMM over all experts, and the pairs are
put back by the inverse permutation and summed.  Over the 5.x releases the masking of expert-parallel sentinels
came and moved; without expert parallelism the masks select nothing, but they are in the graph.
"""

import torch

from moe_inductor.match.api import ExpertsSpelling


def _native(rows: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    return torch._grouped_mm(rows.to(weight.dtype), weight, offs=offsets)


def _fallback(rows: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    # What transformers emits under torch.compile when the weights are not bfloat16.
    op = torch.ops.transformers.grouped_mm_fallback
    return op(rows.to(weight.dtype), weight, offs=offsets)


def _experts(x, topk_ids, topk_weights, experts, grouped_mm, masks, permutation):
    T, k = topk_ids.shape
    E = experts.num_experts
    expert_ids = topk_ids.reshape(-1)
    weights = topk_weights.reshape(-1)
    if permutation == "sort":
        sorted_ids, order = torch.sort(expert_ids)
        rows, weights = x[order // k], weights[order]
    else:
        token_ids = torch.arange(T, device=x.device).unsqueeze(1).expand(-1, k).reshape(-1)
        order = torch.argsort(expert_ids)
        sorted_ids = expert_ids[order]
        rows, weights = x[token_ids][order], weights[order]
    countable = (
        sorted_ids.float()
        if x.device.type in ("cpu", "mps") or permutation == "argsort"
        else sorted_ids.int()
    )
    counts = torch.histc(countable, bins=E, min=0, max=E - 1)
    offsets = torch.cumsum(counts, dim=0, dtype=torch.int32)

    sentinel = (sorted_ids >= E).unsqueeze(-1) if masks else None

    def masked(tensor, step):
        return tensor.masked_fill(sentinel, 0.0) if step in masks else tensor

    def linear(operand, weight):
        made = grouped_mm(operand, weight.transpose(-2, -1), offsets)
        return masked(made, "projections")

    y = experts(masked(rows, "rows"), linear)
    y = masked(y * weights.unsqueeze(-1), "weighted")
    if permutation == "sort":
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.size(0), device=x.device)
    else:
        inverse = torch.argsort(order)
    return y[inverse].view(T, k, -1).sum(dim=1).to(x.dtype)


def native(x, topk_ids, topk_weights, experts, *, masks, permutation):
    return _experts(x, topk_ids, topk_weights, experts, _native, masks, permutation)


def fallback(x, topk_ids, topk_weights, experts, *, masks, permutation):
    return _experts(x, topk_ids, topk_weights, experts, _fallback, masks, permutation)


_FACTS = {
    # none: 5.20 and later; the others: the releases before, newest first.
    "masks": ((), ("rows", "projections"), ("rows", "weighted")),
    # argsort: 5.0.
    "permutation": ("sort", "argsort"),
}

GROUPED_MM = ExpertsSpelling(
    name="hf_grouped_mm",
    source="transformers 5.0 to 5.23, integrations/moe.py, grouped_mm_experts_forward",
    reference=native,
    anchor="aten::_grouped_mm",
    facts=_FACTS,
)

GROUPED_MM_FALLBACK = ExpertsSpelling(
    name="hf_grouped_mm_fallback",
    source="transformers 5.x, integrations/moe.py, transformers::grouped_mm_fallback",
    reference=fallback,
    anchor="transformers::grouped_mm_fallback",
    facts=_FACTS,
)
