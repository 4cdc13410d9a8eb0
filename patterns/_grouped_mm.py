"""A block on grouped GEMMs as transformers 5.x writes it, and what may go wrong in it: samples and near misses of both
spellings in ``hf_grouped_mm``, which differ in the operator alone.
"""

import torch
from moe_inductor.patterns import _blocks
from moe_inductor.patterns._blocks import HIDDEN, NUM_EXPERTS, TOP_K


class Grouped(_blocks.Block):
    """As transformers writes it today."""

    def linear(self, rows, weight, bias, sorted_ids, offsets):
        out = self.grouped_mm(rows, weight.mT if self.transposed else weight, offsets)
        if bias is not None:
            out.add_(bias[sorted_ids])
        return out

    def grouped_mm(self, rows, weight, offsets):
        if rows.dtype == torch.float64:  # torch has none; only the oracle computes in fp64
            groups = torch.tensor_split(rows, offsets[:-1].long())
            return torch.cat([g @ w.T for g, w in zip(groups, weight, strict=True)])
        return torch._grouped_mm(rows.to(weight.dtype), weight.transpose(-2, -1), offs=offsets)

    def sort(self, expert_ids):
        return torch.sort(expert_ids)

    def rows(self, x, order):
        return x[order // TOP_K]

    def offsets(self, sorted_ids):
        counts = torch.histc(sorted_ids.float(), bins=NUM_EXPERTS, min=0, max=NUM_EXPERTS - 1)
        return torch.cumsum(counts, dim=0, dtype=torch.int32)

    def inverse(self, order):
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.size(0), device=order.device)
        return inverse

    def experts(self, x, topk_ids, topk_weights):
        sorted_ids, order = self.sort(topk_ids.reshape(-1))
        offsets = self.offsets(sorted_ids)
        rows, weights = self.rows(x, order), self.weights(topk_weights.reshape(-1), order)
        if self.weight_on_input:
            rows = rows * weights.unsqueeze(-1)
        first = self.linear(rows, self.gate_up_proj, self.gate_up_bias, sorted_ids, offsets)
        y = self.linear(self.act(first), self.down_proj, self.down_bias, sorted_ids, offsets)
        if not self.weight_on_input:
            y = y * weights.unsqueeze(-1)
        return self.combine(y[self.inverse(order)]).to(x.dtype)

    def weights(self, weights, order):
        return weights[order]

    def combine(self, y):
        return y.view(-1, TOP_K, HIDDEN).sum(dim=1)


class Masked(Grouped):
    """transformers 5.9 to 5.19: rows of expert-parallel sentinels are masked."""

    experts_here = NUM_EXPERTS

    def experts(self, x, topk_ids, topk_weights):
        sorted_ids, order = torch.sort(topk_ids.reshape(-1))
        offsets = self.offsets(sorted_ids)
        sentinel = (sorted_ids >= self.experts_here).unsqueeze(-1)
        sorted_ids.clamp_(max=NUM_EXPERTS - 1)
        rows = x[order // TOP_K]
        rows.masked_fill_(sentinel, 0.0)
        made = self.grouped_mm(rows, self.gate_up_proj, offsets).masked_fill(sentinel, 0.0)
        y = self.grouped_mm(self.act(made), self.down_proj, offsets).masked_fill(sentinel, 0.0)
        y = y * topk_weights.reshape(-1)[order].unsqueeze(-1)
        return y[self.inverse(order)].view(-1, TOP_K, HIDDEN).sum(dim=1).to(x.dtype)


class MaskedLate(Grouped):
    """transformers 5.6 to 5.8: the second mask comes after the routing weights."""

    def experts(self, x, topk_ids, topk_weights):
        sorted_ids, order = torch.sort(topk_ids.reshape(-1))
        offsets = self.offsets(sorted_ids)
        sentinel = (sorted_ids >= NUM_EXPERTS).unsqueeze(-1)
        rows = x[order // TOP_K]
        rows.masked_fill_(sentinel, 0.0)
        y = self.grouped_mm(rows, self.gate_up_proj, offsets)
        y = self.grouped_mm(self.act(y), self.down_proj, offsets)
        y = y * topk_weights.reshape(-1)[order].unsqueeze(-1)
        y.masked_fill_(sentinel, 0.0)
        return y[self.inverse(order)].view(-1, TOP_K, HIDDEN).sum(dim=1).to(x.dtype)


class ArgSorted(Grouped):
    """transformers 5.0."""

    def experts(self, x, topk_ids, topk_weights):
        expert_ids = topk_ids.reshape(-1)
        token_ids = (
            torch.arange(x.size(0), device=x.device).unsqueeze(1).expand(-1, TOP_K).reshape(-1)
        )
        order = torch.argsort(expert_ids)
        offsets = self.offsets(expert_ids[order])
        hidden = self.act(self.grouped_mm(x[token_ids][order], self.gate_up_proj, offsets))
        y = self.grouped_mm(hidden, self.down_proj, offsets)
        y = y * topk_weights.reshape(-1, 1)[order]
        return y[torch.argsort(order)].view(-1, TOP_K, HIDDEN).sum(dim=1).to(x.dtype)


class MixedDtypes(Grouped):
    """Hidden states in fp32 (after a norm that does not cast back), weights in bf16."""

    def forward(self, x):
        topk_weights, topk_ids = self.route(self.gate(x))
        return self.experts(x.float() if x.dtype == torch.bfloat16 else x, topk_ids, topk_weights)


class Biased(Grouped):
    biased = True


# -- near misses ------------------------------------------------------------------------------------------------------


class BiasNotSorted(Biased):
    """The bias of each pair's expert in the order of pairs, where rows are in the order of experts."""

    def experts(self, x, topk_ids, topk_weights):
        self.ids = topk_ids.reshape(-1)
        return super().experts(x, topk_ids, topk_weights)

    def linear(self, rows, weight, bias, sorted_ids, offsets):
        return super().linear(rows, weight, bias, self.ids, offsets)


class OneBias(Biased):
    def linear(self, rows, weight, bias, sorted_ids, offsets):
        return super().linear(rows, weight, None, sorted_ids, offsets) + bias[0]


class DoubleBias(Biased):
    def linear(self, rows, weight, bias, sorted_ids, offsets):
        out = super().linear(rows, weight, None, sorted_ids, offsets)
        return torch.add(out, bias[sorted_ids], alpha=2)


class PostNorm(Grouped):
    """muse_spark: a norm between the expert and its routing weight."""

    def linear(self, rows, weight, bias, sorted_ids, offsets):
        out = super().linear(rows, weight, bias, sorted_ids, offsets)
        return out if weight is self.gate_up_proj else torch.nn.functional.rms_norm(out, (HIDDEN,))


class WeightTwice(Grouped):
    def rows(self, x, order):
        return x[order // TOP_K] * self.topk_weights.reshape(-1)[order, None]

    def experts(self, x, topk_ids, topk_weights):
        self.topk_weights = topk_weights
        return super().experts(x, topk_ids, topk_weights)


class OtherOffsetsForDown(Grouped):
    def linear(self, rows, weight, bias, sorted_ids, offsets):
        shifted = offsets if weight is self.gate_up_proj else offsets.roll(1).sort().values
        return super().linear(rows, weight, bias, sorted_ids, shifted)


class WrongK(Grouped):
    """Rows are divided among tokens by another k than the one they were chosen with."""

    def rows(self, x, order):
        return x[order // (TOP_K + 1)]


class OtherBins(Grouped):
    """The same counts for these ids, by other bins: equal in value, but nothing that a trace can show."""

    def offsets(self, sorted_ids):
        counts = torch.histc(sorted_ids.float(), bins=NUM_EXPERTS, min=0, max=NUM_EXPERTS)
        return torch.cumsum(counts, dim=0, dtype=torch.int32)


class NotInverse(Grouped):
    def inverse(self, order):
        return order


class WeightsNotSorted(Grouped):
    def weights(self, weights, order):
        return weights


class OtherOffsets(Grouped):
    def offsets(self, sorted_ids):
        return super().offsets(sorted_ids.flip(0).sort().values.clamp(0, NUM_EXPERTS - 2))


class HiddenEscapes(Grouped):
    def act(self, gate_up):
        hidden = super().act(gate_up)
        self.norm = hidden.float().square().mean()
        return hidden

    def forward(self, x):
        return super().forward(x), self.norm


class Descending(Grouped):
    """The last expert's rows come first; the groups are those of the first."""

    def sort(self, expert_ids):
        return torch.sort(expert_ids, descending=True)


class GroupsOfEqualSize(Grouped):
    """As if a loss had balanced the experts perfectly."""

    def offsets(self, sorted_ids):
        ends = torch.arange(1, NUM_EXPERTS + 1, device=sorted_ids.device)
        return (ends * sorted_ids.shape[0] // NUM_EXPERTS).int()


class OffsetsOfFirstChoices(Grouped):
    """Twice the counts of first choices: as many rows in all."""

    def experts(self, x, topk_ids, topk_weights):
        self.first = topk_ids[:, 0].sort().values
        return super().experts(x, topk_ids, topk_weights)

    def offsets(self, sorted_ids):
        return TOP_K * super().offsets(self.first)


class OffsetsReversed(Grouped):
    def offsets(self, sorted_ids):
        return super().offsets(sorted_ids).flip(0).sort().values


class InverseOfIds(Grouped):
    """Sorted ids are sorted already: the rows stay where they are."""

    def experts(self, x, topk_ids, topk_weights):
        self.ids = topk_ids.reshape(-1)
        return super().experts(x, topk_ids, topk_weights)

    def inverse(self, order):
        return torch.argsort(self.ids[order], stable=True)


class InverseBackwards(Grouped):
    def inverse(self, order):
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.size(0), device=order.device).flip(0)
        return inverse


class InverseDescending(Grouped):
    def inverse(self, order):
        return torch.argsort(order, descending=True)


class RowsByRemainder(Grouped):
    """Pairs are divided among tokens as if all first choices came first."""

    def rows(self, x, order):
        return x[order % x.shape[0]]


class WeightsUnsorted(Grouped):
    """Put back in the order of pairs once more, in which they were."""

    def weights(self, weights, order):
        return weights[torch.argsort(order)]


class WeightsSquared(Grouped):
    def weights(self, weights, order):
        return super().weights(weights, order).square()


class IdsSlotsFirst(Grouped):
    def experts(self, x, topk_ids, topk_weights):
        return super().experts(x, topk_ids.T, topk_weights)


class SlotsFirst(Grouped):
    """Pairs are taken to be in the order of slots when they are summed."""

    def combine(self, y):
        return y.view(TOP_K, -1, HIDDEN).sum(dim=0)


class LargestOfSlots(Grouped):
    def combine(self, y):
        return y.view(-1, TOP_K, HIDDEN).amax(dim=1)


class LastMasked(Masked):
    """The last expert is taken for the sentinel."""

    experts_here = NUM_EXPERTS - 1


class Detached(Grouped):
    def combine(self, y):
        return super().combine(y.detach())


class Fallback:
    """``transformers::grouped_mm_fallback``, which transformers emits under torch.compile for weights not in bf16."""

    def grouped_mm(self, rows, weight, offsets):
        op = torch.ops.transformers.grouped_mm_fallback
        return op(rows.to(weight.dtype), weight.transpose(-2, -1), offs=offsets)


def with_fallback(block):
    return type(block.__name__, (Fallback, block), {})


# (name, block, brief)
SAMPLES = (
    ("sort", Grouped, False),
    ("masked", Masked, False),
    ("masked_late", MaskedLate, False),
    ("argsort", ArgSorted, False),
    ("mixed_dtypes", MixedDtypes, False),
    *((name, block, True) for name, block in _blocks.variants(Grouped)),
)

# (name, block, code)
NEAR_MISSES = (
    *_blocks.near_variants(Grouped),
    ("bias_not_sorted", BiasNotSorted, "SPELLING"),
    ("one_bias_for_all", OneBias, "SPELLING"),
    ("double_bias", DoubleBias, "SPELLING"),
    ("norm_after_expert", PostNorm, "SPELLING"),
    ("weight_twice", WeightTwice, "SPELLING"),
    ("other_offsets_for_down", OtherOffsetsForDown, "SPELLING"),
    ("wrong_k", WrongK, "PROOF"),
    ("other_bins", OtherBins, "PROOF"),
    ("not_the_inverse", NotInverse, "SPELLING"),
    ("weights_not_sorted", WeightsNotSorted, "SPELLING"),
    ("offsets_of_other_ids", OtherOffsets, "SPELLING"),
    ("hidden_escapes", HiddenEscapes, "ESCAPES"),
    ("descending", Descending, "SPELLING"),
    ("groups_of_equal_size", GroupsOfEqualSize, "SPELLING"),
    ("offsets_of_first_choices", OffsetsOfFirstChoices, "SPELLING"),
    ("offsets_reversed", OffsetsReversed, "SPELLING"),
    ("inverse_of_ids", InverseOfIds, "SPELLING"),
    ("inverse_backwards", InverseBackwards, "SPELLING"),
    ("inverse_descending", InverseDescending, "SPELLING"),
    ("rows_by_remainder", RowsByRemainder, "SPELLING"),
    ("weights_unsorted", WeightsUnsorted, "SPELLING"),
    ("weights_squared", WeightsSquared, "SPELLING"),
    ("ids_slots_first", IdsSlotsFirst, "SPELLING"),
    ("slots_first", SlotsFirst, "PROOF"),
    ("largest_of_slots", LargestOfSlots, "SPELLING"),
    ("last_masked", LastMasked, "PROOF"),
    ("detached", Detached, "SPELLING"),
)
