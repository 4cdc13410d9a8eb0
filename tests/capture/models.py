"""Small expert loops, written the way their authors write them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

E, H, I, K = 4, 8, 16, 2


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(H, I, bias=False)
        self.up = nn.Linear(H, I, bias=False)
        self.down = nn.Linear(I, H, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Router and experts; subclasses write the loop."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(H, E, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(E))
        self.by_name = nn.ModuleDict({f"expert_{e}": each for e, each in enumerate(self.experts)})
        self.gate_up = nn.Parameter(torch.randn(E, 2 * I, H) * 0.2)
        self.down = nn.Parameter(torch.randn(E, H, I) * 0.2)

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights [T, K] and the mask [E, K, T]."""
        weights, ids = torch.topk(F.softmax(self.router(x), dim=-1), K, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights, F.one_hot(ids, num_classes=E).permute(2, 1, 0)

    def stacked_expert(self, e: int | torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        gate, up = F.linear(x, self.gate_up[e]).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.down[e])


class RangeModuleList(Block):
    """transformers 4.46 Mixtral: range(E), one module per expert."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, mask = self.route(x)
        out = torch.zeros_like(x)
        for e in range(E):
            k, t = torch.where(mask[e])
            out.index_add_(0, t, self.experts[e](x[t]) * weights[t, k, None])
        return out


class RangeStacked(Block):
    """The same over stacked weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, mask = self.route(x)
        out = torch.zeros_like(x)
        for e in range(E):
            k, t = torch.where(mask[e])
            out.index_add_(0, t, self.stacked_expert(e, x[t]) * weights[t, k, None])
        return out
