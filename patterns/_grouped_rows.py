"""Samples and near misses of sorted rows that grouped GEMMs multiply and that are added up at their tokens.

torchtitan: three GEMMs, scores in fp32 before or after the experts, and a sum that starts from zeros or from what
shared experts gave.
"""

import torch
from moe_inductor.patterns import _blocks
from moe_inductor.patterns._blocks import HIDDEN, INTERMEDIATE, NUM_EXPERTS, TOP_K
from torch import nn
from torch.nn import functional as F

from moe_inductor.match.api import NearMiss, Sample


class Titan(_blocks.Block):
    """Scores after the experts; every method is a place to go wrong."""

    def __init__(self):
        super().__init__()
        del self.gate_up_proj
        self.w1, self.w3 = (
            nn.Parameter(torch.randn(NUM_EXPERTS, INTERMEDIATE, HIDDEN) * HIDDEN**-0.5)
            for _ in range(2)
        )

    def route(self, logits):
        wide = torch.promote_types(logits.dtype, torch.float32)
        topk_weights, topk_ids = torch.topk(torch.sigmoid(logits.to(wide)), k=self.k, dim=1)
        topk_weights = topk_weights / (topk_weights.sum(dim=-1, keepdim=True) + 1e-20)
        return topk_weights * 1.5, topk_ids

    def counts(self, topk_ids):
        ids = topk_ids.view(-1).float()  # integers have a histogram on a GPU only
        return torch.histc(ids, bins=NUM_EXPERTS, min=0, max=NUM_EXPERTS)

    def offsets(self, counts):
        return torch.cumsum(counts, dim=0, dtype=torch.int32)

    def order(self, topk_ids):
        return torch.argsort(topk_ids.view(-1), stable=True)

    def grouped_mm(self, rows, weight, offsets):
        if rows.dtype == torch.float64:  # torch has none; only the oracle computes in fp64
            groups = torch.tensor_split(rows, offsets[:-1].long())
            return torch.cat([g @ w.T for g, w in zip(groups, weight, strict=True)])
        return torch._grouped_mm(rows.bfloat16(), weight.bfloat16().transpose(-2, -1), offs=offsets)

    def mlp(self, rows, counts):
        offsets = self.offsets(counts)
        h = F.silu(self.grouped_mm(rows, self.w1, offsets))
        h = h * self.grouped_mm(rows, self.w3, offsets)
        return self.grouped_mm(h, self.down_proj, offsets).type_as(rows)

    def token(self, order):
        return order // TOP_K

    def scaled(self, rows, weights):
        wide = torch.promote_types(rows.dtype, torch.float32)
        return (rows.to(wide) * weights.reshape(-1, 1)).to(rows.dtype)

    def start(self, x):
        return torch.zeros_like(x)

    def add_to(self, base, token, y):
        return base.scatter_add(dim=0, index=token, src=y)

    def experts(self, x, topk_ids, topk_weights):
        counts, order = self.counts(topk_ids), self.order(topk_ids)
        weights = topk_weights.view(-1)[order]
        token = self.token(order).reshape(-1, 1).expand(-1, HIDDEN)
        rows = torch.gather(x, dim=0, index=token)
        if self.weight_on_input:
            rows = self.scaled(rows, weights)
        y = self.mlp(rows, counts)
        base = self.start(x)
        if not self.weight_on_input:
            y = self.scaled(y, weights)
        return self.add_to(base, token, y)


class TitanBefore(Titan):
    weight_on_input = True


class TitanShared(Titan):
    """Rows are added to what the shared expert gave."""

    def __init__(self):
        super().__init__()
        self.shared = _blocks.MLP()

    def start(self, x):
        return self.shared(x)


class TitanSharedBefore(TitanShared):
    weight_on_input = True


class TitanInPlace(TitanShared):
    def add_to(self, base, token, y):
        return base.scatter_add_(dim=0, index=token, src=y)


class TitanBalanced(TitanSharedBefore):
    """The load of each expert is counted in a buffer, and a bias balances it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("expert_bias", torch.linspace(-0.1, 0.1, NUM_EXPERTS))
        self.register_buffer("tokens_per_expert", torch.zeros(NUM_EXPERTS))

    def route(self, logits):
        wide = torch.promote_types(logits.dtype, torch.float32)
        scores = torch.sigmoid(logits.to(wide))
        _, topk_ids = torch.topk(scores + self.expert_bias, k=self.k, dim=1)
        return scores.gather(dim=1, index=topk_ids), topk_ids

    def counts(self, topk_ids):
        counts = super().counts(topk_ids)
        with torch.no_grad():
            self.tokens_per_expert.add_(counts)
        return super().counts(topk_ids)


class TitanSliced(Titan):
    """Rows are gathered by an index."""

    def experts(self, x, topk_ids, topk_weights):
        counts, order = self.counts(topk_ids), self.order(topk_ids)
        token = self.token(order)
        y = self.scaled(self.mlp(x[token], counts), topk_weights.view(-1)[order])
        return self.start(x).index_add(0, token, y)


class TitanPutBack(Titan):
    """Later releases: pairs are written where they came from, and summed."""

    def experts(self, x, topk_ids, topk_weights):
        counts, order = self.counts(topk_ids), self.order(topk_ids)
        y = self.mlp(x[self.token(order)], counts)
        pairs = torch.zeros(x.shape[0] * TOP_K, HIDDEN, dtype=y.dtype, device=y.device)
        pairs[self.places(order)] = y
        return self.summed(pairs.reshape(-1, TOP_K, HIDDEN), topk_weights).to(x.dtype)

    def places(self, order):
        return order

    def summed(self, pairs, topk_weights):
        wide = torch.promote_types(pairs.dtype, torch.float32)
        return (pairs.to(wide) * topk_weights.unsqueeze(-1)).sum(dim=1)


# -- near misses ------------------------------------------------------------------------------------------------------


class Unrolled(Titan):
    """Rows end where those of the expert after did."""

    def offsets(self, counts):
        return super().offsets(counts.roll(1))


class OtherBins(Titan):
    """Rows of the third expert are counted to the second."""

    def counts(self, topk_ids):
        return torch.histc(topk_ids.view(-1).float(), bins=NUM_EXPERTS, min=0, max=NUM_EXPERTS + 1)


class CountsOfOthers(Titan):
    def forward(self, x):
        self.others = torch.topk(self.gate(x), self.k, largest=False).indices
        return super().forward(x)

    def counts(self, topk_ids):
        return super().counts(self.others)


class OffsetsInFloat(Titan):
    """Added up in half precision, which is exact for a few tokens only."""

    def offsets(self, counts):
        return torch.cumsum(counts.bfloat16(), dim=0).to(torch.int32)


class Descending(Titan):
    def order(self, topk_ids):
        return torch.argsort(topk_ids.view(-1), stable=True, descending=True)


class WrongK(Titan):
    def token(self, order):
        return order // (TOP_K + 1)


class OtherOffsetsForDown(Titan):
    def mlp(self, rows, counts):
        offsets = self.offsets(counts)
        h = F.silu(self.grouped_mm(rows, self.w1, offsets))
        h = h * self.grouped_mm(rows, self.w3, offsets)
        other = self.offsets(counts.flip(0))
        return self.grouped_mm(h, self.down_proj, other).type_as(rows)


class RowsMixed(Titan):
    """A row meets the one before it between the projections."""

    def mlp(self, rows, counts):
        offsets = self.offsets(counts)
        h = F.silu(self.grouped_mm(rows, self.w1, offsets))
        h = h * self.grouped_mm(rows, self.w3, offsets).roll(1, 0)
        return self.grouped_mm(h, self.down_proj, offsets).type_as(rows)


class OtherToken(Titan):
    """Rows are added to the token of the pair at the same place before the sort."""

    def add_to(self, base, token, y):
        return base.scatter_add(dim=0, index=token.sort(0).values, src=y)


class PostNorm(Titan):
    def scaled(self, rows, weights):
        return super().scaled(F.rms_norm(rows, (HIDDEN,)), weights)


class BaseReplaced(TitanShared):
    def add_to(self, base, token, y):
        return base.scatter(dim=0, index=token, src=y)


class BaseReadsRows(TitanShared):
    def add_to(self, base, token, y):
        return super().add_to(base * y[:1], token, y)


class PutElsewhere(TitanPutBack):
    def places(self, order):
        return order.flip(0)


class WeightsNotSorted(Titan):
    def experts(self, x, topk_ids, topk_weights):
        weights = topk_weights.view(-1)[self.order(topk_ids).argsort()]
        return super().experts(x, topk_ids, weights.view(-1, TOP_K))


SAMPLES = (
    Sample(name="titan", build=Titan),
    Sample(name="titan_before", build=TitanBefore, brief=True),
    Sample(name="titan_shared", build=TitanShared, brief=True),
    Sample(name="titan_shared_before", build=TitanSharedBefore, brief=True),
    Sample(name="titan_in_place", build=TitanInPlace, brief=True),
    Sample(name="titan_balanced", build=TitanBalanced, brief=True),
    Sample(name="titan_sliced", build=TitanSliced, brief=True),
    Sample(name="titan_put_back", build=TitanPutBack, brief=True),
)

NEAR_MISSES = (
    NearMiss(name="titan_counts_rolled", build=Unrolled, code="PROOF"),
    NearMiss(name="titan_other_bins", build=OtherBins, code="PROOF"),
    NearMiss(name="titan_counts_of_others", build=CountsOfOthers, code="PROOF"),
    NearMiss(name="titan_offsets_in_float", build=OffsetsInFloat, code="PROOF"),
    NearMiss(name="titan_descending", build=Descending, code="SPELLING"),
    NearMiss(name="titan_wrong_k", build=WrongK, code="SPELLING"),
    NearMiss(name="titan_other_offsets_for_down", build=OtherOffsetsForDown, code="PROOF"),
    NearMiss(name="titan_rows_mixed", build=RowsMixed, code="ACTIVATION"),
    NearMiss(name="titan_other_token", build=OtherToken, code="SPELLING"),
    NearMiss(name="titan_post_norm", build=PostNorm, code="SPELLING"),
    NearMiss(name="titan_base_replaced", build=BaseReplaced, code="SPELLING"),
    NearMiss(name="titan_base_reads_rows", build=BaseReadsRows, code="ESCAPES"),
    NearMiss(name="titan_put_elsewhere", build=PutElsewhere, code="SPELLING"),
    NearMiss(name="titan_weights_not_sorted", build=WeightsNotSorted, code="SPELLING"),
)
