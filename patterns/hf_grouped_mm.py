"""Hugging Face transformers 5.x, ``experts_implementation="grouped_mm"`` (the default).

Token-expert pairs are sorted by expert, both projections run as one grouped GEMM over all experts, and the pairs are
put back by the inverse permutation and summed.  Over the 5.x releases the masking of expert-parallel sentinels
came and moved; without expert parallelism the masks select nothing, but they are in the graph.
"""

import torch
from moe_inductor.patterns import _blocks
from moe_inductor.patterns._grouped_mm import NEAR_MISSES, SAMPLES, with_fallback

from moe_inductor.match.api import ExpertsSpelling, NearMiss, Sample


def _native(rows: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    return torch._grouped_mm(rows.to(weight.dtype), weight, offs=offsets)


def _fallback(rows: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    # What transformers emits under torch.compile when the weights are not bfloat16.
    op = torch.ops.transformers.grouped_mm_fallback
    return op(rows.to(weight.dtype), weight, offs=offsets)


def _experts(x, topk_ids, topk_weights, experts, grouped_mm, masks, permutation, weight_on):
    T, k = topk_ids.shape
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
    counts = torch.histc(countable, bins=experts.num_experts, min=0, max=experts.num_experts - 1)
    offsets = torch.cumsum(counts, dim=0, dtype=torch.int32)

    sentinel = (sorted_ids >= experts.num_experts).unsqueeze(-1) if masks else None

    def masked(tensor, step):
        return tensor.masked_fill(sentinel, 0.0) if step in masks else tensor

    def linear(operand, weight, bias):
        made = grouped_mm(operand, weight.transpose(-2, -1), offsets)
        if bias is not None:
            made = made + bias[sorted_ids]
        return masked(made, "projections")

    rows = masked(rows, "rows")
    if weight_on == "input":
        rows = (rows * weights.unsqueeze(-1)).to(rows.dtype)
    y = experts(rows, linear)
    if weight_on == "output":
        y = masked(y * weights.unsqueeze(-1), "weighted")
    if permutation == "sort":
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.size(0), device=x.device)
    else:
        inverse = torch.argsort(order)
    return y[inverse].view(T, k, -1).sum(dim=1).to(x.dtype)


def native(x, topk_ids, topk_weights, experts, **facts):
    return _experts(x, topk_ids, topk_weights, experts, _native, **facts)


def fallback(x, topk_ids, topk_weights, experts, **facts):
    return _experts(x, topk_ids, topk_weights, experts, _fallback, **facts)


_FACTS = {
    # none: 5.20 and later; the others: the releases before, newest first.
    "masks": ((), ("rows", "projections"), ("rows", "weighted")),
    # argsort: 5.0.
    "permutation": ("sort", "argsort"),
    "weight_on": ("output", "input"),
}


GROUPED_MM = ExpertsSpelling(
    name="hf_grouped_mm",
    source="transformers 5.0 to 5.23, integrations/moe.py, grouped_mm_experts_forward",
    reference=native,
    anchor="aten::_grouped_mm",
    facts=_FACTS,
    samples=tuple(
        Sample(name=name, build=block, dtypes=(torch.bfloat16,), brief=brief)
        for name, block, brief in SAMPLES
    ),
    near_misses=tuple(
        NearMiss(name=name, build=block, code=code) for name, block, code in NEAR_MISSES
    ),
)

GROUPED_MM_FALLBACK = ExpertsSpelling(
    name="hf_grouped_mm_fallback",
    source="transformers 5.x, integrations/moe.py, transformers::grouped_mm_fallback",
    reference=fallback,
    anchor="transformers::grouped_mm_fallback",
    defined_in="transformers.integrations.moe",
    facts=_FACTS,
    samples=tuple(
        Sample(name=name, build=with_fallback(block), dtypes=(torch.float32,), brief=brief)
        for name, block, brief in SAMPLES
        # In one dtype, and without what the operator has nothing to do with.
        if name not in (*_blocks.VARIANTS, "mixed_dtypes") or name in ("weight_on_input", "gpt_oss")
    ),
    near_misses=tuple(
        NearMiss(name=name, build=with_fallback(block), code=code)
        for name, block, code in NEAR_MISSES
        if code != "ACTIVATION"
    ),
)
