"""CPU implementations, in ATen."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_inductor.ops.check import (
    Sizes,
    check_expert,
    check_experts_metadata,
    check_experts_sizes,
    check_routing,
)


def topk_routing(
    router_logits: Tensor, k: int, renormalise: bool, weights_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See ``moe_inductor.ops.topk_routing``.  The same ATen calls as the models make, so the same ids."""
    check_routing(router_logits, k, weights_dtype)
    compute = torch.float64 if router_logits.dtype == torch.float64 else torch.float32
    scores = torch.softmax(router_logits, -1, dtype=compute)
    weights, ids = torch.topk(scores, k, dim=-1)
    if renormalise:
        weights /= weights.sum(-1, keepdim=True)
    return weights.to(weights_dtype), ids


def fused_experts(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_proj: Sequence[Tensor],
    up_proj: Sequence[Tensor],
    down_proj: Sequence[Tensor],
    activation: str,
    out_dtype: torch.dtype,
) -> Tensor:
    """See ``moe_inductor.ops.fused_experts``.

    Rows are grouped by expert with one sort; only experts that have rows are computed, on exactly those rows.
    """
    check_experts_metadata(
        hidden_states,
        topk_ids,
        topk_weights,
        gate_up_proj,
        up_proj,
        down_proj,
        activation,
        out_dtype,
    )
    sizes = check_experts_sizes(
        hidden_states, topk_ids, topk_weights, gate_up_proj, up_proj, down_proj
    )
    tokens, k = topk_ids.shape
    compute = torch.float64 if hidden_states.dtype == torch.float64 else torch.float32
    if tokens == 0 or k == 0:
        return hidden_states.new_zeros(hidden_states.shape, dtype=out_dtype)

    flat_ids = topk_ids.reshape(-1)
    order = torch.argsort(flat_ids, stable=True)
    bounds = torch.searchsorted(
        flat_ids[order], torch.arange(sizes.num_experts + 1, dtype=flat_ids.dtype)
    ).tolist()
    first, last = bounds[0], bounds[-1]
    token_of_row = order.div(k, rounding_mode="floor")
    rows = hidden_states.index_select(0, token_of_row)
    result = torch.empty_like(rows)
    for expert in range(sizes.num_experts):
        start, end = bounds[expert], bounds[expert + 1]
        if start == end:
            continue
        inner = _inner(rows[start:end], expert, gate_up_proj, up_proj, sizes)
        down = _weight(down_proj, expert, "down_proj", sizes)
        torch.mm(inner, down.t(), out=result[start:end])
    # Rows of ids outside 0..E-1 sort to the two ends and were not computed.
    if first:
        result[:first].zero_()
    if last < result.shape[0]:
        result[last:].zero_()
    weights = topk_weights.to(compute)
    if first or last < result.shape[0]:
        weights = weights.masked_fill((topk_ids < 0) | (topk_ids >= sizes.num_experts), 0)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0])
    gathered = result.index_select(0, inverse).view(tokens, k, -1).to(compute)
    return (gathered * weights.unsqueeze(-1)).sum(1).to(out_dtype)


def _weight(weights: Sequence[Tensor], expert: int, name: str, sizes: Sizes) -> Tensor:
    if sizes.stacked:
        return weights[0][expert]
    weight = weights[expert]
    wanted = (
        (sizes.hidden_size, sizes.intermediate_size)
        if name == "down_proj"
        else (sizes.inner_rows, sizes.hidden_size)
    )
    check_expert(expert, name, weight, wanted)
    return weight


def _inner(
    rows: Tensor,
    expert: int,
    gate_up_proj: Sequence[Tensor],
    up_proj: Sequence[Tensor],
    sizes: Sizes,
) -> Tensor:
    gate_up = F.linear(rows, _weight(gate_up_proj, expert, "gate_up_proj", sizes))
    if sizes.concatenated:
        gate, up = gate_up.chunk(2, -1)
    else:
        gate, up = gate_up, F.linear(rows, _weight(up_proj, expert, "up_proj", sizes))
    return F.silu(gate, inplace=True).mul_(up)
