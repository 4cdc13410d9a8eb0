"""What is measured: shapes, token counts, data, and the roofline floor of a cell."""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class Shape:
    name: str
    E: int
    k: int
    H: int
    I: int


# One MoE layer each, at real size.  gptoss runs plain SwiGLU without bias; all run softmax, top-k, renormalise.
SHAPES = (
    Shape("mixtral", 8, 2, 4096, 14336),
    Shape("qwen3", 128, 8, 2048, 768),
    Shape("dsv3", 256, 8, 7168, 2048),
    Shape("gptoss", 32, 4, 2880, 2880),
    Shape("olmoe", 64, 8, 2048, 1024),
    Shape("scout", 16, 1, 5120, 8192),
)
TOKENS = (1, 2, 4, 8, 32, 128, 512, 2048, 8192, 16384)

# Ceilings of the H200 that the floor refers to: best weight read seen in any MoE kernel, cuBLAS bf16 8192^3.
BYTES_PER_S = 4.57e12
FLOP_PER_S = 773.6e12


@dataclasses.dataclass
class Weights:
    gate_up: torch.Tensor  # [E, 2I, H]
    down: torch.Tensor  # [E, H, I]


@dataclasses.dataclass
class Inputs:
    """One set; a cell is measured over several, so that a cache does not hold the weights of the last call."""

    hidden_states: torch.Tensor  # [T, H]
    router_logits: torch.Tensor  # [T, E]


def make_weights(
    shape: Shape, device: str = "cuda", dtype: torch.dtype = torch.bfloat16
) -> Weights:
    gate_up = torch.empty((shape.E, 2 * shape.I, shape.H), device=device, dtype=dtype)
    down = torch.empty((shape.E, shape.H, shape.I), device=device, dtype=dtype)
    return Weights(gate_up.normal_(std=shape.H**-0.5), down.normal_(std=shape.I**-0.5))


def make_inputs(
    shape: Shape, T: int, device: str = "cuda", dtype: torch.dtype = torch.bfloat16
) -> list[Inputs]:
    """Logits are N(0, 1) plus a popularity N(0, 0.5) per expert: load is skewed and not every expert is hit."""
    sets = 8 if T <= 32 else 4 if T <= 512 else 2
    popularity = 0.5 * torch.randn(shape.E, device=device)
    return [
        Inputs(
            torch.randn(T, shape.H, device=device, dtype=dtype),
            (torch.randn(T, shape.E, device=device) + popularity).to(dtype),
        )
        for _ in range(sets)
    ]


def active_experts(shape: Shape, inputs: list[Inputs]) -> float:
    hit = [i.router_logits.topk(shape.k, dim=-1).indices.unique().numel() for i in inputs]
    return sum(hit) / len(hit)


def floor_us(shape: Shape, T: int, active: float) -> float:
    weights = active * 3 * shape.I * shape.H * 2 / BYTES_PER_S
    arithmetic = 2 * T * shape.k * 3 * shape.I * shape.H / FLOP_PER_S
    return 1e6 * max(weights, arithmetic)
