"""Hugging Face transformers 5.x, ``experts_implementation="batched_mm"``: what ``generate`` decodes with on a GPU.

Every token-expert pair gathers its own weight matrices, and both projections are one batched GEMM.
"""

import torch
from moe_inductor.patterns import _blocks
from moe_inductor.patterns._blocks import HIDDEN, NUM_EXPERTS, TOP_K

from moe_inductor.match.api import ExpertsSpelling, NearMiss, Sample


def reference(x, topk_ids, topk_weights, experts, *, rows, clamp, weight_on):
    T, k = topk_ids.shape
    expert_ids = topk_ids.reshape(-1)
    if clamp:  # out-of-range ids of expert parallelism, whose weights are zero
        expert_ids = expert_ids.clamp(0, experts.num_experts - 1)
    if rows == "repeat":
        repeated = x.repeat_interleave(k, dim=0)
    else:
        token_ids = torch.arange(T, device=x.device).unsqueeze(1).expand(-1, k).reshape(-1)
        repeated = x[token_ids]

    weights = topk_weights.reshape(-1, 1)
    if weight_on == "input":
        repeated = (repeated * weights).to(x.dtype)

    def linear(operand, weight, bias):
        out = torch.bmm(weight[expert_ids], operand.unsqueeze(-1)).squeeze(-1)
        return out if bias is None else out + bias[expert_ids]

    y = experts(repeated, linear)
    if weight_on == "output":
        y = y * weights
    return y.view(T, k, -1).sum(dim=1).to(x.dtype)


class Batched(_blocks.Block):
    """As transformers writes it."""

    def rows(self, x):
        return x.repeat_interleave(TOP_K, dim=0)

    def linear(self, operand, weight, expert_ids):
        return torch.bmm(weight[expert_ids], operand.unsqueeze(-1)).squeeze(-1)

    def combine(self, y, weights):
        return (y * weights.unsqueeze(-1)).view(-1, TOP_K, HIDDEN).sum(dim=1)

    def experts(self, x, topk_ids, topk_weights):
        expert_ids = topk_ids.reshape(-1)
        hidden = self.act(self.linear(self.rows(x), self.gate_up_proj, expert_ids))
        y = self.linear(hidden, self.down_proj, expert_ids)
        return self.combine(y, topk_weights.reshape(-1)).to(x.dtype)


class Gathered(Batched):
    """transformers 5.0."""

    def rows(self, x):
        token_ids = (
            torch.arange(x.size(0), device=x.device).unsqueeze(1).expand(-1, TOP_K).reshape(-1)
        )
        return x[token_ids]


class ClampedIds(Batched):
    """transformers up to 5.19: ids of expert parallelism are brought into range."""

    def experts(self, x, topk_ids, topk_weights):
        return super().experts(x, topk_ids.reshape(-1).clamp(0, NUM_EXPERTS - 1), topk_weights)


class CountsTokens(Batched):
    """A load-balancing counter that the block keeps up to date (torchtitan, DeepSeek's bias update)."""

    def __init__(self):
        super().__init__()
        self.register_buffer("load", torch.zeros(NUM_EXPERTS))

    def experts(self, x, topk_ids, topk_weights):
        with torch.no_grad():
            self.load.add_(torch.nn.functional.one_hot(topk_ids, NUM_EXPERTS).sum((0, 1)))
        y = super().experts(x, topk_ids, topk_weights)
        return y + 0 * self.load.sum()


class WrongClamp(Batched):
    """The last expert is never used."""

    def experts(self, x, topk_ids, topk_weights):
        return super().experts(x, topk_ids.reshape(-1).clamp(0, NUM_EXPERTS - 2), topk_weights)


class GeluBatched(_blocks.Gelu, Batched):
    pass


class SwappedBatched(_blocks.Swapped, Batched):
    pass


class Tiled(Batched):
    """Tokens repeated as a whole instead of one by one: every second pair has another token's state."""

    def rows(self, x):
        return x.repeat(TOP_K, 1)


class OtherIdsForDown(Batched):
    def experts(self, x, topk_ids, topk_weights):
        expert_ids = topk_ids.reshape(-1)
        hidden = self.act(self.linear(self.rows(x), self.gate_up_proj, expert_ids.flip(0)))
        y = self.linear(hidden, self.down_proj, expert_ids)
        return self.combine(y, topk_weights.reshape(-1))


class MeanOverExperts(Batched):
    def combine(self, y, weights):
        return (y * weights.unsqueeze(-1)).view(-1, TOP_K, HIDDEN).mean(dim=1)


class Unweighted(Batched):
    def combine(self, y, weights):
        return y.view(-1, TOP_K, HIDDEN).sum(dim=1)


class WeightOnInput(Batched):
    """Llama 4: the routing weight scales what the expert reads."""

    def experts(self, x, topk_ids, topk_weights):
        expert_ids = topk_ids.reshape(-1)
        rows = self.rows(x) * topk_weights.reshape(-1, 1)
        y = self.linear(
            self.act(self.linear(rows, self.gate_up_proj, expert_ids)), self.down_proj, expert_ids
        )
        return y.view(-1, TOP_K, HIDDEN).sum(dim=1)


class HiddenReturned(Batched):
    def act(self, gate_up):
        self.hidden = super().act(gate_up)
        return self.hidden

    def forward(self, x):
        return super().forward(x), self.hidden


BATCHED_MM = ExpertsSpelling(
    name="hf_batched_mm",
    source="transformers 5.0 to 5.23, integrations/moe.py, batched_mm_experts_forward",
    reference=reference,
    anchor="aten::bmm",
    # repeat: since 5.1; gather: 5.0.  clamp: releases up to 5.19 had it.
    facts={
        "rows": ("repeat", "gather"),
        "clamp": (True, False),
        "weight_on": ("output", "input"),
    },
    ids_in_range="clamp",
    samples=(
        Sample(name="repeat", build=Batched),
        Sample(name="gather", build=Gathered),
        Sample(name="clamp", build=ClampedIds),
        Sample(name="counts_tokens", build=CountsTokens),
    ),
    near_misses=(
        NearMiss(name="gelu_for_silu", build=GeluBatched, code="ACTIVATION"),
        NearMiss(name="gate_up_swapped", build=SwappedBatched, code="GATE_ORDER"),
        NearMiss(name="clamped_too_low", build=WrongClamp, code="ROUTER"),
        NearMiss(name="tokens_tiled", build=Tiled, code="SPELLING"),
        NearMiss(name="other_ids_for_down", build=OtherIdsForDown, code="INPUTS_DIFFER"),
        NearMiss(name="mean_over_experts", build=MeanOverExperts, code="SPELLING"),
        NearMiss(name="unweighted", build=Unweighted, code="SPELLING"),
        NearMiss(name="weight_on_input", build=WeightOnInput, code="SPELLING"),
        NearMiss(name="hidden_returned", build=HiddenReturned, code="ESCAPES"),
    ),
)
