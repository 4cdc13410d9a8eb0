"""fp64 reference, weights in every storage, and the acceptance rule, for the kernel tests."""

from __future__ import annotations

import dataclasses

import torch

LAYOUTS = (
    "stacked",
    "stacked_separate",
    "stacked_transposed",
    "stacked_mixed_strides",
    "stacked_unaligned",
    "per_expert",
    "per_expert_separate",
    "per_expert_transposed",
    "per_expert_unaligned",
    "stacked_interleaved",
    "stacked_interleaved_transposed",
    "stacked_separate_transposed",
    "per_expert_interleaved",
    "per_expert_interleaved_transposed",
    "per_expert_separate_transposed",
)


@dataclasses.dataclass
class Weights:
    """gate_up_proj, up_proj, down_proj, interleaved as ``fused_experts`` takes them; gate, up, down [E, out, in]."""

    gate_up_proj: list[torch.Tensor]
    up_proj: list[torch.Tensor]
    down_proj: list[torch.Tensor]
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    interleaved: bool = False


def make_weights(layout: str, E: int, H: int, I: int, dtype: torch.dtype, device="cpu") -> Weights:
    gate = (torch.randn(E, I, H, device=device) / H**0.5).to(dtype)
    up = (torch.randn(E, I, H, device=device) / H**0.5).to(dtype)
    down = (torch.randn(E, H, I, device=device) / I**0.5).to(dtype)

    def store(weight: torch.Tensor, how: str) -> torch.Tensor:
        if "transposed" in how:
            return weight.transpose(1, 2).contiguous().transpose(1, 2)
        if "unaligned" in how:
            flat = torch.empty(weight.numel() + 1, dtype=dtype, device=device)
            return flat[1:].view(weight.shape).copy_(weight)
        return weight.contiguous()

    if layout == "stacked_mixed_strides":
        gate_up_proj, up_proj = [store(gate, "")], [store(up, "transposed")]
    elif "separate" in layout:
        gate_up_proj, up_proj = [store(gate, layout)], [store(up, layout)]
    elif "interleaved" in layout:
        gate_up_proj, up_proj = [store(torch.stack([gate, up], 2).flatten(1, 2), layout)], []
    else:
        gate_up_proj, up_proj = [store(torch.cat([gate, up], 1), layout)], []
    down_proj = [store(down, layout)]
    if layout.startswith("per_expert"):
        # Views of one storage would hide a wrong pointer; give each expert its own memory.
        def split(weights: list[torch.Tensor]) -> list[torch.Tensor]:
            return [store(w[None], layout)[0] for w in weights[0].unbind(0)] if weights else []

        gate_up_proj, up_proj, down_proj = split(gate_up_proj), split(up_proj), split(down_proj)
    interleaved = "interleaved" in layout
    return Weights(gate_up_proj, up_proj, down_proj, gate, up, down, interleaved)


def experts(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    weights: Weights,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """The formula, expert by expert, computed in ``dtype``; ids outside [0, E) are skipped."""
    x, topk_weights = x.to(dtype), topk_weights.to(dtype)
    y = torch.zeros_like(x)
    for expert in range(weights.gate.shape[0]):
        row, column = torch.where(topk_ids == expert)
        if row.numel():
            gate = x[row] @ weights.gate[expert].to(dtype).T
            up = x[row] @ weights.up[expert].to(dtype).T
            out = (torch.nn.functional.silu(gate) * up) @ weights.down[expert].to(dtype).T
            y.index_add_(0, row, out * topk_weights[row, column, None])
    return y


def random_routing(T: int, E: int, k: int, device="cpu") -> tuple[torch.Tensor, torch.Tensor]:
    scores = torch.rand(T, E, device=device)
    topk_weights, topk_ids = scores.topk(k, dim=-1)
    return topk_weights, topk_ids


def assert_accurate(
    got: torch.Tensor,
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    weights: Weights,
) -> None:
    """rmse to fp64 at most twice eager's in the same dtype (+ 1e-5), over all elements and for every row."""
    wanted = experts(x, topk_ids, topk_weights, weights)
    eager = experts(x, topk_ids, topk_weights, weights, x.dtype)
    error = (got.double() - wanted).square()
    eager_error = (eager.double() - wanted).square()
    assert not error.isnan().any()
    assert error.mean().sqrt() <= 2 * eager_error.mean().sqrt() + 1e-5
    worst = error.mean(1).sqrt().max()
    allowed = 8 * torch.maximum(eager_error.mean(1).sqrt().max(), eager_error.mean().sqrt()) + 1e-5
    assert worst <= allowed
