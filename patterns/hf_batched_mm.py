"""Hugging Face transformers 5.x, ``experts_implementation="batched_mm"``: what ``generate`` decodes with on a GPU.

Every token-expert pair gathers its own weight matrices, and both projections are one batched GEMM.
"""

import torch
from moe_inductor.patterns import _blocks
from moe_inductor.patterns._blocks import HIDDEN, NUM_EXPERTS

from moe_inductor.match.api import ExpertsSpelling, NearMiss, Sample


def reference(x, topk_ids, topk_weights, experts, *, rows, clamp, weight_on, operands):
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
        if operands == "weight first":
            out = torch.bmm(weight[expert_ids], operand.unsqueeze(-1)).squeeze(-1)
        else:
            out = torch.bmm(operand.unsqueeze(1), weight.transpose(-2, -1)[expert_ids]).squeeze(1)
        return out if bias is None else out + bias[expert_ids]

    y = experts(repeated, linear)
    if weight_on == "output":
        y = y * weights
    return y.view(T, k, -1).sum(dim=1).to(x.dtype)


class Batched(_blocks.Block):
    """As transformers writes it."""

    def rows(self, x):
        return x.repeat_interleave(self.k, dim=0)

    def linear(self, operand, weight, expert_ids, bias=None):
        if self.transposed:
            out = torch.bmm(operand.unsqueeze(1), weight[expert_ids]).squeeze(1)
        else:
            out = torch.bmm(weight[expert_ids], operand.unsqueeze(-1)).squeeze(-1)
        if bias is not None:
            out.add_(bias[expert_ids])
        return out

    def combine(self, y, weights):
        weighted = y if weights is None else y * weights.unsqueeze(-1)
        return weighted.view(-1, self.k, HIDDEN).sum(dim=1)

    def experts(self, x, topk_ids, topk_weights):
        expert_ids, weights = topk_ids.reshape(-1), topk_weights.reshape(-1)
        rows = self.rows(x)
        if self.weight_on_input:
            rows, weights = rows * weights[:, None], None
        first = self.linear(rows, self.gate_up_proj, expert_ids, self.gate_up_bias)
        y = self.linear(self.act(first), self.down_proj, expert_ids, self.down_bias)
        return self.combine(y, weights).to(x.dtype)


class Gathered(Batched):
    """transformers 5.0."""

    def rows(self, x):
        token_ids = (
            torch.arange(x.size(0), device=x.device).unsqueeze(1).expand(-1, self.k).reshape(-1)
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


class Biased(Batched):
    biased = True


class BiasOfOtherIds(Biased):
    def linear(self, operand, weight, expert_ids, bias=None):
        assert bias is not None
        out = super().linear(operand, weight, expert_ids)
        return out + bias[expert_ids.flip(0)]


class OneBias(Biased):
    """The same bias for every expert."""

    def linear(self, operand, weight, expert_ids, bias=None):
        assert bias is not None
        return super().linear(operand, weight, expert_ids) + bias[0]


class BiasNotWeighted(Biased):
    def experts(self, x, topk_ids, topk_weights):
        expert_ids = topk_ids.reshape(-1)
        first = self.linear(self.rows(x), self.gate_up_proj, expert_ids, self.gate_up_bias)
        y = self.linear(self.act(first), self.down_proj, expert_ids)
        y = y * topk_weights.reshape(-1, 1) + self.down_bias[expert_ids]
        return y.view(-1, self.k, HIDDEN).sum(dim=1)


class DoubleBias(Biased):
    def linear(self, operand, weight, expert_ids, bias=None):
        assert bias is not None
        out = super().linear(operand, weight, expert_ids)
        return torch.add(out, bias[expert_ids], alpha=2)


class PostNorm(Batched):
    """muse_spark."""

    def combine(self, y, weights):
        return super().combine(torch.nn.functional.rms_norm(y, (HIDDEN,)), weights)


class WeightTwice(Batched):
    def rows(self, x):
        return super().rows(x) * self.topk_weights.reshape(-1, 1)

    def experts(self, x, topk_ids, topk_weights):
        self.topk_weights = topk_weights
        return super().experts(x, topk_ids, topk_weights)


class Tiled(Batched):
    """Tokens repeated as a whole instead of one by one: every second pair has another token's state."""

    def rows(self, x):
        return x.repeat(self.k, 1)


class OtherIdsForDown(Batched):
    def experts(self, x, topk_ids, topk_weights):
        expert_ids = topk_ids.reshape(-1)
        hidden = self.act(self.linear(self.rows(x), self.gate_up_proj, expert_ids.flip(0)))
        y = self.linear(hidden, self.down_proj, expert_ids)
        return self.combine(y, topk_weights.reshape(-1))


class MeanOverExperts(Batched):
    def combine(self, y, weights):
        return (y * weights.unsqueeze(-1)).view(-1, self.k, HIDDEN).mean(dim=1)


class Unweighted(Batched):
    def combine(self, y, weights):
        return y.view(-1, self.k, HIDDEN).sum(dim=1)


class HiddenReturned(Batched):
    def act(self, gate_up):
        self.hidden = super().act(gate_up)
        return self.hidden

    def forward(self, x):
        return super().forward(x), self.hidden


class SlotsFirst(Batched):
    """Pairs are taken to be in the order of slots when they are summed."""

    def combine(self, y, weights):
        return (y * weights.unsqueeze(-1)).view(self.k, -1, HIDDEN).sum(dim=0)


class WeightsSlotsFirst(Batched):
    def experts(self, x, topk_ids, topk_weights):
        return super().experts(x, topk_ids, topk_weights.T)


class IdsSlotsFirst(Batched):
    def experts(self, x, topk_ids, topk_weights):
        return super().experts(x, topk_ids.T, topk_weights)


class WeightsOfNext(Batched):
    """Every pair is scaled like the one before it."""

    def combine(self, y, weights):
        return super().combine(y, weights.roll(1))


class LargestOfSlots(Batched):
    def combine(self, y, weights):
        return (y * weights.unsqueeze(-1)).view(-1, self.k, HIDDEN).amax(dim=1)


class FirstSlotOnly(Batched):
    def combine(self, y, weights):
        return (y * weights.unsqueeze(-1)).view(-1, self.k, HIDDEN)[:, 0]


class LastSlotLeftOut(Batched):
    def combine(self, y, weights):
        return (y * weights.unsqueeze(-1)).view(-1, self.k, HIDDEN)[:, :-1].sum(dim=1)


class SummedOverTokens(Batched):
    """The sum runs over the wrong one of two dimensions."""

    def combine(self, y, weights):
        y = (y * weights.unsqueeze(-1)).view(-1, self.k, HIDDEN)
        return y + y.sum(dim=0)


class RowsOfNext(Batched):
    def rows(self, x):
        return super().rows(x).roll(1, 0)


class Residual(Batched):
    """A skip connection around each expert, weighted like it."""

    def experts(self, x, topk_ids, topk_weights):
        self.skipped = self.rows(x)
        return super().experts(x, topk_ids, topk_weights)

    def combine(self, y, weights):
        return super().combine(y + self.skipped, weights)


class NextIds(Batched):
    """Ids that count from one: the experts are others, and not those of the router."""

    def linear(self, operand, weight, expert_ids, bias=None):
        return super().linear(operand, weight, (expert_ids + 1) % NUM_EXPERTS, bias)


class ScaledBias(Biased):
    def linear(self, operand, weight, expert_ids, bias=None):
        assert bias is not None
        given = bias[expert_ids].unsqueeze(-1)
        return torch.baddbmm(given, weight[expert_ids], operand.unsqueeze(-1), beta=0.5).squeeze(-1)


class Detached(Batched):
    def combine(self, y, weights):
        return super().combine(y.detach(), weights)


class NoGradDown(Batched):
    def linear(self, operand, weight, expert_ids, bias=None):
        with torch.set_grad_enabled(weight is not self.down_proj):
            return super().linear(operand, weight, expert_ids, bias)


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
        "operands": (
            "weight first",
            "rows first",
        ),  # rows first where weights are stored transposed
    },
    ids_in_range="clamp",
    samples=(
        Sample(name="repeat", build=Batched),
        Sample(name="gather", build=Gathered),
        Sample(name="clamp", build=ClampedIds),
        Sample(name="counts_tokens", build=CountsTokens),
        *(Sample(name=name, build=block, brief=True) for name, block in _blocks.variants(Batched)),
    ),
    near_misses=(
        *(NearMiss(name=n, build=b, code=c) for n, b, c in _blocks.near_variants(Batched)),
        NearMiss(name="bias_of_other_ids", build=BiasOfOtherIds, code="SPELLING"),
        NearMiss(name="one_bias_for_all", build=OneBias, code="SPELLING"),
        NearMiss(name="double_bias", build=DoubleBias, code="SPELLING"),
        NearMiss(name="bias_not_weighted", build=BiasNotWeighted, code="SPELLING"),
        NearMiss(name="norm_after_expert", build=PostNorm, code="SPELLING"),
        NearMiss(name="weight_twice", build=WeightTwice, code="SPELLING"),
        NearMiss(name="clamped_too_low", build=WrongClamp, code="ROUTER"),
        NearMiss(name="tokens_tiled", build=Tiled, code="SPELLING"),
        NearMiss(name="other_ids_for_down", build=OtherIdsForDown, code="INPUTS_DIFFER"),
        NearMiss(name="mean_over_experts", build=MeanOverExperts, code="SPELLING"),
        NearMiss(name="unweighted", build=Unweighted, code="SPELLING"),
        NearMiss(name="hidden_returned", build=HiddenReturned, code="ESCAPES"),
        NearMiss(name="slots_first", build=SlotsFirst, code="PROOF"),
        NearMiss(name="weights_slots_first", build=WeightsSlotsFirst, code="ROUTER"),
        NearMiss(name="ids_slots_first", build=IdsSlotsFirst, code="SPELLING"),
        NearMiss(name="weights_of_next", build=WeightsOfNext, code="ROUTER"),
        NearMiss(name="largest_of_slots", build=LargestOfSlots, code="SPELLING"),
        NearMiss(name="first_slot_only", build=FirstSlotOnly, code="SPELLING"),
        NearMiss(name="last_slot_left_out", build=LastSlotLeftOut, code="SPELLING"),
        NearMiss(name="summed_over_tokens", build=SummedOverTokens, code="SPELLING"),
        NearMiss(name="rows_of_next", build=RowsOfNext, code="SPELLING"),
        NearMiss(name="residual", build=Residual, code="SPELLING"),
        NearMiss(name="next_ids", build=NextIds, code="ROUTER"),
        NearMiss(name="scaled_bias", build=ScaledBias, code="SPELLING"),
        NearMiss(name="detached", build=Detached, code="SPELLING"),
        NearMiss(name="no_grad_down", build=NoGradDown, code="GRAD_STATE"),
    ),
)
