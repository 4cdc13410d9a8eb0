"""A loop over all experts, each of which computes all tokens: nanoMoE and many re-implementations.

    for e, expert in enumerate(experts):
        out = out + scores[:, e:e + 1] * expert(x)

or all results stacked, times the scores, and summed.  ``scores [T, E]`` are as in ``dense_experts``, and so is what is
assumed about infinities and NaNs.
"""

import torch
from moe_inductor.patterns import _blocks, _dispatched, _picked
from moe_inductor.patterns._blocks import HIDDEN, NUM_EXPERTS
from torch import nn
from torch.nn import functional as F

from moe_inductor.match.api import ExpertsSpelling, NearMiss, Sample


def reference(x, topk_ids, topk_weights, experts):
    shape = (x.shape[0], experts.num_experts)
    scores = torch.zeros(shape, dtype=topk_weights.dtype, device=x.device)
    scores = scores.scatter(1, topk_ids, topk_weights)
    out = torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, scores.dtype), device=x.device)
    for e, expert in experts:
        out = out + expert(x) * scores[:, e, None]
    return out


class DenseLoop(_blocks.Block):
    """Every method is one place to go wrong."""

    visited = range(NUM_EXPERTS)

    def scores(self, topk_ids, topk_weights):
        zeros = topk_weights.new_zeros(topk_weights.shape[0], NUM_EXPERTS)
        return zeros.scatter(1, topk_ids, topk_weights)

    def linear(self, rows, weight, bias, e):
        if not self.transposed:
            return F.linear(rows, weight[e], None if bias is None else bias[e])
        return rows @ weight[e] if bias is None else rows @ weight[e] + bias[e]

    def expert(self, e, rows):
        hidden = self.act(self.linear(rows, self.gate_up_proj, self.gate_up_bias, e))
        return self.linear(hidden, self.down_proj, self.down_bias, e)

    def start(self, x):
        return torch.zeros_like(x)

    def score(self, scores, e):
        return scores[:, e, None]

    def experts(self, x, topk_ids, topk_weights):
        out, scores = self.start(x), self.scores(topk_ids, topk_weights)
        for e in self.visited:
            out = out + self.score(scores, e) * self.expert(e, x)
        return out


class InPlace(DenseLoop):
    """Experts in a ModuleList, and a column of the scores as a slice."""

    def __init__(self):
        super().__init__()
        self.mlps = nn.ModuleList(_blocks.MLP() for _ in range(NUM_EXPERTS))

    def experts(self, x, topk_ids, topk_weights):
        out, scores = torch.zeros_like(x), self.scores(topk_ids, topk_weights)
        for e, expert in enumerate(self.mlps):
            out += expert(x) * scores[:, e : e + 1]
        return out


class InFloat(InPlace):
    """Scores and the sum in fp32, whatever the experts compute in."""

    def scores(self, topk_ids, topk_weights):
        wide = torch.promote_types(topk_weights.dtype, torch.float32)
        return super().scores(topk_ids, topk_weights.to(wide))

    def experts(self, x, topk_ids, topk_weights):
        scores = self.scores(topk_ids, topk_weights)
        out = torch.zeros_like(x, dtype=scores.dtype)
        for e, expert in enumerate(self.mlps):
            out += expert(x) * scores[:, e : e + 1]
        return out.to(x.dtype)


class Stacked(InPlace):
    def experts(self, x, topk_ids, topk_weights):
        scores = self.scores(topk_ids, topk_weights)
        y = torch.stack([expert(x) for expert in self.mlps], dim=1)
        return (y * scores.unsqueeze(-1)).sum(dim=1)


class Summed(InPlace):
    """Python's ``sum`` starts from the number 0."""

    def experts(self, x, topk_ids, topk_weights):
        scores = self.scores(topk_ids, topk_weights)
        return sum(expert(x) * scores[:, e, None] for e, expert in enumerate(self.mlps))


class ChosenScores(DenseLoop):
    """Scores of all experts times a mask, divided by their sum."""

    def forward(self, x):
        probabilities = self.gate(x).softmax(-1)
        _, topk_ids = torch.topk(probabilities, self.k, dim=-1)
        return self.experts(x, topk_ids, probabilities)

    def scores(self, topk_ids, topk_weights):
        mask = torch.zeros_like(topk_weights).scatter_(1, topk_ids, 1.0)
        kept = topk_weights * mask
        return kept / kept.sum(dim=-1, keepdim=True)


class MaskedSum(DenseLoop):
    """The score of an expert as a sum over the slots that chose it."""

    def experts(self, x, topk_ids, topk_weights):
        out = self.start(x)
        chosen = F.one_hot(topk_ids, NUM_EXPERTS).to(x.dtype)
        scores = (chosen * topk_weights[..., None]).sum(dim=1)
        for e in self.visited:
            out = out + self.score(scores, e) * self.expert(e, x)
        return out


class Compared(InPlace):
    """The score of an expert as a sum over the slots whose ids are its number."""

    def experts(self, x, topk_ids, topk_weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.mlps):
            out += expert(x) * (topk_weights * (topk_ids == e)).sum(dim=-1, keepdim=True)
        return out


# -- near misses ------------------------------------------------------------------------------------------------------


class NonzeroFill(DenseLoop):
    def scores(self, topk_ids, topk_weights):
        full = topk_weights.new_full((topk_weights.shape[0], NUM_EXPERTS), 0.01)
        return full.scatter(1, topk_ids, topk_weights)


class SigmoidOfZeros(DenseLoop):
    def scores(self, topk_ids, topk_weights):
        return super().scores(topk_ids, topk_weights).sigmoid()


class SoftmaxOfZeros(DenseLoop):
    def scores(self, topk_ids, topk_weights):
        return super().scores(topk_ids, topk_weights).softmax(-1)


class SameTwice(DenseLoop):
    def route(self, logits):
        topk_weights, topk_ids = super().route(logits)
        return topk_weights, topk_ids // 2 * 2


class Added(DenseLoop):
    def scores(self, topk_ids, topk_weights):
        zeros = topk_weights.new_zeros(topk_weights.shape[0], NUM_EXPERTS)
        return zeros.scatter_add(1, topk_ids, topk_weights)


class OtherColumn(DenseLoop):
    def score(self, scores, e):
        return scores[:, NUM_EXPERTS - 1 - e, None]


class OneColumn(DenseLoop):
    """The same score for all experts."""

    def score(self, scores, e):
        return scores[:, 0, None]


class OtherDown(DenseLoop):
    def expert(self, e, rows):
        hidden = self.act(F.linear(rows, self.gate_up_proj[e]))
        return F.linear(hidden, self.down_proj[(e + 1) % NUM_EXPERTS])


class Missing(DenseLoop):
    visited = range(NUM_EXPERTS - 1)


class Twice(DenseLoop):
    visited = (*range(NUM_EXPERTS), 1)


class FromX(DenseLoop):
    def start(self, x):
        return x.clone()


class FromOnes(DenseLoop):
    def start(self, x):
        return torch.ones_like(x)


class Decayed(DenseLoop):
    """The sum so far is scaled before each addition."""

    def experts(self, x, topk_ids, topk_weights):
        out, scores = self.start(x), self.scores(topk_ids, topk_weights)
        for e in self.visited:
            out = 0.9 * out + self.score(scores, e) * self.expert(e, x)
        return out


class ReadsTheSum(DenseLoop):
    def experts(self, x, topk_ids, topk_weights):
        out, scores = self.start(x), self.scores(topk_ids, topk_weights)
        for e in self.visited:
            out = out + self.score(scores, e) * self.expert(e, x + out)
        return out


class OtherRows(DenseLoop):
    """Expert 1 reads other tokens."""

    def experts(self, x, topk_ids, topk_weights):
        out, scores = self.start(x), self.scores(topk_ids, topk_weights)
        for e in self.visited:
            out = out + self.score(scores, e) * self.expert(e, x.flip(0) if e == 1 else x)
        return out


class WeightedAfter(DenseLoop):
    """The score is also on the input."""

    def experts(self, x, topk_ids, topk_weights):
        out, scores = self.start(x), self.scores(topk_ids, topk_weights)
        for e in self.visited:
            score = self.score(scores, e)
            out = out + score * self.expert(e, x * score)
        return out


class PostNorm(DenseLoop):
    def expert(self, e, rows):
        return F.rms_norm(super().expert(e, rows), (HIDDEN,))


class OneGelu(DenseLoop):
    def expert(self, e, rows):
        gate, up = F.linear(rows, self.gate_up_proj[e]).chunk(2, dim=-1)
        hidden = (F.gelu(gate) if e == 2 else F.silu(gate)) * up
        return F.linear(hidden, self.down_proj[e])


class PartialSumEscapes(DenseLoop):
    def experts(self, x, topk_ids, topk_weights):
        out, scores, norm = self.start(x), self.scores(topk_ids, topk_weights), 0.0
        for e in self.visited:
            out = out + self.score(scores, e) * self.expert(e, x)
            norm = norm + out.sum()
        return out + norm


class StackedOverTokens(Stacked):
    """The mean over experts instead of the sum."""

    def experts(self, x, topk_ids, topk_weights):
        scores = self.scores(topk_ids, topk_weights)
        y = torch.stack([expert(x) for expert in self.mlps], dim=1)
        return (y * scores.unsqueeze(-1)).mean(dim=1)


class StackedReversed(Stacked):
    def experts(self, x, topk_ids, topk_weights):
        return super().experts(x, NUM_EXPERTS - 1 - topk_ids, topk_weights)


class BiasNotWeighted(DenseLoop):
    biased = True

    def experts(self, x, topk_ids, topk_weights):
        out, scores = self.start(x), self.scores(topk_ids, topk_weights)
        for e in self.visited:
            hidden = self.act(F.linear(x, self.gate_up_proj[e], self.gate_up_bias[e]))
            out = out + (
                self.score(scores, e) * F.linear(hidden, self.down_proj[e]) + self.down_bias[e]
            )
        return out


class Subtracted(DenseLoop):
    def experts(self, x, topk_ids, topk_weights):
        out, scores = self.start(x), self.scores(topk_ids, topk_weights)
        for e in self.visited:
            out = out - self.score(scores, e) * self.expert(e, x)
        return out


DENSE_LOOP = ExpertsSpelling(
    name="dense_loop",
    source="nanoMoE and other small re-implementations; tests of MoE kernels",
    reference=reference,
    anchor="aten::scatter",
    loop=True,
    dense=True,
    samples=(
        Sample(name="columns", build=DenseLoop),
        Sample(name="in_place", build=InPlace, brief=True),
        Sample(name="scores_in_fp32", build=InFloat, brief=True),
        Sample(name="stacked_results", build=Stacked),
        Sample(name="summed", build=Summed, brief=True),
        Sample(name="chosen_scores", build=ChosenScores, brief=True),
        Sample(name="masked_sum", build=MaskedSum, brief=True),
        Sample(name="compared", build=Compared, brief=True),
        *_picked.SAMPLES,
        *_dispatched.EACH,
    ),
    near_misses=(
        *_picked.NEAR_MISSES,
        *_dispatched.NEAR_EACH,
        NearMiss(name="scores_not_zero", build=NonzeroFill, code="PROOF"),
        NearMiss(name="sigmoid_of_zeros", build=SigmoidOfZeros, code="PROOF"),
        NearMiss(name="softmax_of_zeros", build=SoftmaxOfZeros, code="SPELLING"),
        NearMiss(name="same_expert_twice", build=SameTwice, code="SPELLING"),
        NearMiss(name="scores_added", build=Added, code="SPELLING"),
        NearMiss(name="score_of_other_expert", build=OtherColumn, code="EXPERT_WEIGHTS"),
        NearMiss(name="one_score_for_all", build=OneColumn, code="EXPERT_WEIGHTS"),
        NearMiss(name="other_down_projection", build=OtherDown, code="EXPERT_WEIGHTS"),
        NearMiss(name="missing", build=Missing, code="EXPERT_MISSING"),
        NearMiss(name="twice", build=Twice, code="EXPERT_TWICE"),
        NearMiss(name="starts_from_x", build=FromX, code="ACCUMULATOR"),
        NearMiss(name="starts_from_ones", build=FromOnes, code="ACCUMULATOR"),
        NearMiss(name="decayed", build=Decayed, code="SPELLING"),
        NearMiss(name="reads_the_sum", build=ReadsTheSum, code="INPUTS_DIFFER"),
        NearMiss(name="other_rows", build=OtherRows, code="INPUTS_DIFFER"),
        NearMiss(name="weight_twice", build=WeightedAfter, code="INPUTS_DIFFER"),
        NearMiss(name="norm_after_expert", build=PostNorm, code="SPELLING"),
        NearMiss(name="one_expert_gelu", build=OneGelu, code="ACTIVATION"),
        NearMiss(name="partial_sum_escapes", build=PartialSumEscapes, code="ESCAPES"),
        NearMiss(name="mean_over_experts", build=StackedOverTokens, code="SPELLING"),
        NearMiss(name="ids_reversed", build=StackedReversed, code="SPELLING"),
        NearMiss(name="bias_not_weighted", build=BiasNotWeighted, code="SPELLING"),
        NearMiss(name="subtracted", build=Subtracted, code="SPELLING"),
        *(
            NearMiss(name=n, build=b, code=c)
            for n, b, c in _blocks.near_variants(DenseLoop)
            if n in ("mish", "rounded", "other_halves")
        ),
    ),
)
