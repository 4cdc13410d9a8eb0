"""Hugging Face transformers 5.x, ``experts_implementation="grouped_mm"`` (the default).

Token-expert pairs are sorted by expert, both projections run as one grouped GEMM over all experts, and the pairs are
put back by the inverse permutation and summed.  Over the 5.x releases the masking of expert-parallel sentinels
came and moved; without expert parallelism the masks select nothing, but they are in the graph.
"""

import torch
from moe_inductor.patterns import _blocks
from moe_inductor.patterns._blocks import HIDDEN, NUM_EXPERTS, TOP_K

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
        sorted_ids, order = torch.sort(topk_ids.reshape(-1))
        offsets = self.offsets(sorted_ids)
        rows, weights = self.rows(x, order), self.weights(topk_weights.reshape(-1), order)
        if self.weight_on_input:
            rows = rows * weights.unsqueeze(-1)
        first = self.linear(rows, self.gate_up_proj, self.gate_up_bias, sorted_ids, offsets)
        y = self.linear(self.act(first), self.down_proj, self.down_bias, sorted_ids, offsets)
        if not self.weight_on_input:
            y = y * weights.unsqueeze(-1)
        y = y[self.inverse(order)].view(-1, TOP_K, HIDDEN).sum(dim=1)
        return y.to(x.dtype)

    def weights(self, weights, order):
        return weights[order]


class Masked(Grouped):
    """transformers 5.9 to 5.19: rows of expert-parallel sentinels are masked."""

    def experts(self, x, topk_ids, topk_weights):
        sorted_ids, order = torch.sort(topk_ids.reshape(-1))
        offsets = self.offsets(sorted_ids)
        sentinel = (sorted_ids >= NUM_EXPERTS).unsqueeze(-1)
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


GROUPED_MM = ExpertsSpelling(
    name="hf_grouped_mm",
    source="transformers 5.0 to 5.23, integrations/moe.py, grouped_mm_experts_forward",
    reference=native,
    anchor="aten::_grouped_mm",
    facts=_FACTS,
    samples=(
        Sample(name="sort", build=Grouped, dtypes=(torch.bfloat16,)),
        Sample(name="masked", build=Masked, dtypes=(torch.bfloat16,)),
        Sample(name="masked_late", build=MaskedLate, dtypes=(torch.bfloat16,)),
        Sample(name="argsort", build=ArgSorted, dtypes=(torch.bfloat16,)),
        Sample(name="mixed_dtypes", build=MixedDtypes, dtypes=(torch.bfloat16,)),
        *(
            Sample(name=name, build=block, dtypes=(torch.bfloat16,), brief=True)
            for name, block in _blocks.variants(Grouped)
        ),
    ),
    near_misses=(
        *(NearMiss(name=n, build=b, code=c) for n, b, c in _blocks.near_variants(Grouped)),
        NearMiss(name="bias_not_sorted", build=BiasNotSorted, code="SPELLING"),
        NearMiss(name="one_bias_for_all", build=OneBias, code="SPELLING"),
        NearMiss(name="double_bias", build=DoubleBias, code="SPELLING"),
        NearMiss(name="norm_after_expert", build=PostNorm, code="SPELLING"),
        NearMiss(name="weight_twice", build=WeightTwice, code="SPELLING"),
        NearMiss(name="other_offsets_for_down", build=OtherOffsetsForDown, code="SPELLING"),
        NearMiss(name="wrong_k", build=WrongK, code="PROOF"),
        NearMiss(name="other_bins", build=OtherBins, code="PROOF"),
        NearMiss(name="not_the_inverse", build=NotInverse, code="SPELLING"),
        NearMiss(name="weights_not_sorted", build=WeightsNotSorted, code="SPELLING"),
        NearMiss(name="offsets_of_other_ids", build=OtherOffsets, code="SPELLING"),
        NearMiss(name="hidden_escapes", build=HiddenEscapes, code="ESCAPES"),
    ),
)

GROUPED_MM_FALLBACK = ExpertsSpelling(
    name="hf_grouped_mm_fallback",
    source="transformers 5.x, integrations/moe.py, transformers::grouped_mm_fallback",
    reference=fallback,
    anchor="transformers::grouped_mm_fallback",
    facts=_FACTS,
)
