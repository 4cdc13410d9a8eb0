"""A small MoE block in plain PyTorch, from which patterns derive their samples and near misses.

A subclass overrides the one method in which it differs.  Sizes are small and all different: E=4, k=2, H=32, I=48.
"""

import torch
from torch import nn
from torch.nn import functional as F

NUM_EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 4, 2, 32, 48


class MLP(nn.Module):
    """One expert with its own parameters: ``w2(act(w1 x) * w3 x)``."""

    def __init__(self, activation=F.silu):
        super().__init__()
        self.w1, self.w3 = (nn.Linear(HIDDEN, INTERMEDIATE, bias=False) for _ in range(2))
        self.w2 = nn.Linear(INTERMEDIATE, HIDDEN, bias=False)
        self.activation = activation

    def forward(self, x):
        return self.w2(self.activation(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """softmax -> top-k -> renormalise, then ``self.experts(x, topk_ids, topk_weights)``; weights are stacked."""

    k = TOP_K

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(HIDDEN, NUM_EXPERTS, bias=False)
        self.gate_up_proj = nn.Parameter(
            torch.randn(NUM_EXPERTS, 2 * INTERMEDIATE, HIDDEN) * HIDDEN**-0.5
        )
        self.down_proj = nn.Parameter(
            torch.randn(NUM_EXPERTS, HIDDEN, INTERMEDIATE) * INTERMEDIATE**-0.5
        )

    def act(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def route(self, logits):
        scores = F.softmax(logits, dim=-1, dtype=torch.float32)
        topk_weights, topk_ids = torch.topk(scores, self.k, dim=-1)
        topk_weights = topk_weights / topk_weights.sum(dim=-1, keepdim=True)
        return topk_weights.to(logits.dtype), topk_ids

    def experts(self, x, topk_ids, topk_weights):
        raise NotImplementedError

    def forward(self, x):
        topk_weights, topk_ids = self.route(self.gate(x))
        return self.experts(x, topk_ids, topk_weights)


class Gelu:
    """Mixed into a block: another activation."""

    def act(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return F.gelu(gate) * up


class Swapped:
    """Mixed into a block: up rows first, gate rows second."""

    def act(self, gate_up):
        up, gate = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up


class Interleaved:
    """Mixed into a block: gate and up in alternating columns (gpt-oss)."""

    def act(self, gate_up):
        return F.silu(gate_up[..., ::2]) * gate_up[..., 1::2]


class Clamped:
    """Mixed into a block: the gate is clamped before its activation."""

    def act(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate.clamp(max=1.0)) * up
