"""All experts computed for all tokens by batched products, and weighted by scores that are zero for most.

    rows = x.repeat(E, 1).view(E, T, H)
    y = bmm(act(bmm(rows, gate_up)), down)
    out = (y * scores.T[..., None]).sum(dim=0)

``scores [T, E]`` are those of a top-k, scattered into zeros, or whatever comes to the same (``region/sparse.py``).
Llama 4 scales the rows instead of the results; there an expert that was not chosen reads zeros, and has to make zeros
of them.  What is assumed besides: a number times zero is zero.  An infinity or a NaN in the result of an expert that a
token did not choose makes that token's result a NaN in eager, and leaves it alone here.
"""

import torch
from moe_inductor.patterns import _blocks, _dispatched, _picked
from moe_inductor.patterns._blocks import HIDDEN, NUM_EXPERTS
from torch.nn import functional as F

from moe_inductor.match.api import ExpertsSpelling, NearMiss, Sample


def reference(x, topk_ids, topk_weights, experts, *, weight_on):
    shape = (x.shape[0], experts.num_experts)
    scores = torch.zeros(shape, dtype=topk_weights.dtype, device=x.device)
    scores = scores.scatter(1, topk_ids, topk_weights).transpose(0, 1).unsqueeze(-1)
    rows = x.expand(experts.num_experts, *x.shape)
    if weight_on == "input":
        rows = (rows * scores).to(x.dtype)

    def linear(operand, weight, bias):
        made = torch.bmm(operand, weight.transpose(-2, -1))
        return made if bias is None else made + bias.unsqueeze(1)

    y = experts(rows, linear)
    if weight_on == "output":
        y = y * scores
    return y.sum(dim=0)


class Dense(_blocks.Block):
    """qwen3_vl_moe and gpt_oss of transformers 4.57, when they do not train."""

    def scores(self, topk_ids, topk_weights):
        zeros = topk_weights.new_zeros(topk_weights.shape[0], NUM_EXPERTS)
        return zeros.scatter_(1, topk_ids, topk_weights)

    def rows(self, x):
        return x.repeat(NUM_EXPERTS, 1).view(NUM_EXPERTS, -1, HIDDEN)

    def linear(self, rows, weight, bias):
        made = torch.bmm(rows, weight if self.transposed else weight.transpose(-2, -1))
        return made if bias is None else made + bias[..., None, :]

    def combine(self, y, scores):
        y = y.view(NUM_EXPERTS, 1, -1, HIDDEN)
        weighted = y * scores.transpose(0, 1).view(NUM_EXPERTS, 1, -1)[..., None]
        return weighted.sum(dim=0)[0]

    def experts(self, x, topk_ids, topk_weights):
        scores = self.scores(topk_ids, topk_weights)
        rows = self.rows(x)
        if self.weight_on_input:
            rows = rows * scores.transpose(0, 1)[..., None]
        first = self.linear(rows, self.gate_up_proj, self.gate_up_bias)
        y = self.linear(self.act(first), self.down_proj, self.down_bias)
        return y.sum(dim=0) if self.weight_on_input else self.combine(y, scores)


class Llama4(Dense):
    """The sigmoid of one score, which is zero where the score is -inf."""

    k = 1
    transposed = True

    def route(self, logits):
        topk_logits, topk_ids = torch.topk(logits, self.k, dim=1)
        return topk_logits, topk_ids

    def scores(self, topk_ids, topk_weights):
        full = topk_weights.new_full((topk_weights.shape[0], NUM_EXPERTS), float("-inf"))
        scores = full.scatter_(1, topk_ids, topk_weights)
        return F.sigmoid(scores.float()).to(scores.dtype)

    def experts(self, x, topk_ids, topk_weights):
        scores = self.scores(topk_ids, topk_weights)
        rows = x.repeat(NUM_EXPERTS, 1) * scores.transpose(0, 1).reshape(-1, 1)
        rows = rows.view(NUM_EXPERTS, -1, HIDDEN)
        gate, up = torch.bmm(rows, self.gate_up_proj).chunk(2, dim=-1)
        y = torch.bmm(up * F.silu(gate), self.down_proj).view(-1, HIDDEN)
        return y.reshape(NUM_EXPERTS, -1, HIDDEN).sum(dim=0)


class NanoMoE(Dense):
    """nanoMoE: the scores are scattered in place, and the softmax gives zeros to those that are left at -inf."""

    transposed = True

    def route(self, logits):
        return torch.topk(logits, self.k, dim=-1)

    def scores(self, topk_ids, topk_weights):
        scores = topk_weights.new_full((topk_weights.shape[0], NUM_EXPERTS), float("-inf"))
        scores.scatter_(-1, topk_ids, topk_weights)
        return F.softmax(scores, dim=-1)


class Expanded(Dense):
    """Broadcast instead of repeated, and tokens first in the sum."""

    def rows(self, x):
        return x.unsqueeze(0).expand(NUM_EXPERTS, -1, -1)

    def combine(self, y, scores):
        return (y.transpose(0, 1) * scores.unsqueeze(-1)).sum(dim=1)


class Einsums(Dense):
    """One letter per dimension; the tokens come first all along."""

    first, second, combined = "th,eoh->teo", "teo,eho->teh", "te,teh->th"

    def linear(self, rows, weight, bias):
        equation = self.first if rows.dim() == 2 else self.second
        if self.transposed:
            letters, made = equation.split("->")
            a, b = letters.split(",")
            equation = f"{a},{b[0]}{b[2]}{b[1]}->{made}"
        made = torch.einsum(equation, rows, weight)
        return made if bias is None else made + bias

    def rows(self, x):
        return x

    def combine(self, y, scores):
        return torch.einsum(self.combined, scores, y)


class ExpertsFirst(Einsums):
    first, second, combined = "th,eoh->eto", "eto,eho->eth", "te,eth->th"


class ExpertsLast(Einsums):
    """Neither order that a batched product has."""

    first, second, combined = "th,eoh->toe", "toe,eho->hte", "te,hte->th"

    def act(self, gate_up):
        gate, up = gate_up.chunk(2, dim=1)
        return F.silu(gate) * up


class Sequences(Einsums):
    """Hidden states [B, S, H], also in the router."""

    first, second, combined = "bsh,eoh->bseo", "bseo,eho->bseh", "bse,bseh->bsh"

    def linear(self, rows, weight, bias):
        return torch.einsum(self.first if rows.dim() == 3 else self.second, rows, weight)

    def scores(self, topk_ids, topk_weights):
        zeros = topk_weights.new_zeros(*topk_weights.shape[:-1], NUM_EXPERTS)
        return zeros.scatter(-1, topk_ids, topk_weights)

    def forward(self, x):
        states = x[: x.shape[0] // 5 * 5].view(5, -1, HIDDEN)
        topk_weights, topk_ids = self.route(self.gate(states))
        return self.experts(states, topk_ids, topk_weights).flatten(0, 1)


class Thrice(Einsums):
    """Hidden states, weights and scores in one einsum."""

    def experts(self, x, topk_ids, topk_weights):
        hidden = self.act(torch.einsum("th,eoh->teo", x, self.gate_up_proj))
        scores = self.scores(topk_ids, topk_weights)
        return torch.einsum("teo,eho,te->th", hidden, self.down_proj, scores)


class HiddenScored(Einsums):
    """The scores on the hidden states, and one sum over experts and hidden states."""

    def experts(self, x, topk_ids, topk_weights):
        hidden = self.act(torch.einsum("th,eoh->teo", x, self.gate_up_proj))
        hidden = hidden * self.scores(topk_ids, topk_weights).unsqueeze(-1)
        return torch.einsum("teo,eho->th", hidden, self.down_proj)


# -- near misses ------------------------------------------------------------------------------------------------------


class NonzeroFill(Dense):
    def scores(self, topk_ids, topk_weights):
        full = topk_weights.new_full((topk_weights.shape[0], NUM_EXPERTS), 0.01)
        return full.scatter(1, topk_ids, topk_weights)


class Shifted(Dense):
    """Zeros that were scattered into, and are zeros no more."""

    def scores(self, topk_ids, topk_weights):
        return super().scores(topk_ids, topk_weights) + 0.1


class SigmoidOfZeros(Dense):
    def scores(self, topk_ids, topk_weights):
        return super().scores(topk_ids, topk_weights).sigmoid()


class SoftmaxOfZeros(Dense):
    def scores(self, topk_ids, topk_weights):
        return super().scores(topk_ids, topk_weights).softmax(dim=-1)


class SoftmaxOverTokens(Dense):
    def scores(self, topk_ids, topk_weights):
        full = topk_weights.new_full((topk_weights.shape[0], NUM_EXPERTS), -1e9)
        return full.scatter(1, topk_ids, topk_weights).softmax(dim=0)


class Added(Dense):
    """Scores of one expert would add up."""

    def scores(self, topk_ids, topk_weights):
        zeros = topk_weights.new_zeros(topk_weights.shape[0], NUM_EXPERTS)
        return zeros.scatter_add(1, topk_ids, topk_weights)


class SameTwice(Dense):
    """An expert may occur twice for a token; the last score stays."""

    def route(self, logits):
        topk_weights, topk_ids = super().route(logits)
        return topk_weights, topk_ids // 2 * 2


class Noisy(Dense):
    """Every score is a little above zero."""

    def scores(self, topk_ids, topk_weights):
        scores = super().scores(topk_ids, topk_weights)
        return torch.maximum(scores, scores.new_full((), 1e-3))


class AllScores(Dense):
    """Softmax over all experts; the top-k is for somebody else."""

    def forward(self, x):
        probabilities = self.gate(x).softmax(-1)
        _, topk_ids = torch.topk(probabilities, self.k, dim=-1)
        return self.combine(
            self.linear(
                self.act(self.linear(self.rows(x), self.gate_up_proj, None)), self.down_proj, None
            ),
            probabilities,
        ), topk_ids


class NotTransposed(Dense):
    """``[T, E]`` read as ``[E, T]``."""

    def combine(self, y, scores):
        return (y * scores.reshape(NUM_EXPERTS, -1)[..., None]).sum(dim=0)


class MeanOverExperts(Dense):
    def combine(self, y, scores):
        return (y * scores.transpose(0, 1)[..., None]).mean(dim=0)


class LargestOfExperts(Dense):
    def combine(self, y, scores):
        return (y * scores.transpose(0, 1)[..., None]).amax(dim=0)


class ScoresReversed(Dense):
    """Each expert's result with another one's score."""

    def combine(self, y, scores):
        return super().combine(y, scores.flip(-1))


class ScoresSquared(Dense):
    """On the rows and on the results."""

    weight_on_input = True

    def experts(self, x, topk_ids, topk_weights):
        scores = self.scores(topk_ids, topk_weights).transpose(0, 1)[..., None]
        first = self.linear(self.rows(x) * scores, self.gate_up_proj, None)
        return (self.linear(self.act(first), self.down_proj, None) * scores).sum(dim=0)


class BiasedInput(Dense):
    """An expert that was not chosen reads zeros, and gives its biases."""

    weight_on_input = True
    biased = True


class OneBiasOnInput(Dense):
    weight_on_input = True

    def __init__(self):
        super().__init__()
        _, self.bias = type("B", (Dense,), {"biased": True})().projection(HIDDEN, 48)

    def experts(self, x, topk_ids, topk_weights):
        scores = self.scores(topk_ids, topk_weights).transpose(0, 1)[..., None]
        first = self.linear(self.rows(x) * scores, self.gate_up_proj, None)
        return self.linear(self.act(first), self.down_proj, self.bias).sum(dim=0)


class SigmoidOnInput(Dense):
    """An expert that was not chosen reads zeros, and its hidden states are one half."""

    weight_on_input = True
    gated = False

    def act(self, gate_up):
        return torch.sigmoid(gate_up)


class ExpOnInput(Dense):
    weight_on_input = True

    def act(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.exp(gate) * (up + 1)


class OtherDown(Dense):
    def experts(self, x, topk_ids, topk_weights):
        first = self.linear(self.rows(x), self.gate_up_proj, None)
        y = self.linear(self.act(first), self.down_proj.flip(0), None)
        return self.combine(y.roll(1, dims=0), self.scores(topk_ids, topk_weights))


class RowsOfOthers(Dense):
    """Expert e reads the tokens shifted by one against those of expert e - 1."""

    def rows(self, x):
        return torch.stack([x.roll(e, dims=0) for e in range(NUM_EXPERTS)])


class RowsInterleaved(Dense):
    """Every token repeated for itself, where the block is read expert by expert."""

    def rows(self, x):
        return x.repeat_interleave(NUM_EXPERTS, dim=0).view(NUM_EXPERTS, -1, HIDDEN)


class PostNorm(Dense):
    def combine(self, y, scores):
        return super().combine(F.rms_norm(y, (HIDDEN,)), scores)


class Unweighted(Dense):
    """Scores choose whether, not how much: a mask of scores above a number, times all."""

    def combine(self, y, scores):
        return super().combine(y, (scores < 0.4).to(y.dtype))


class ScoresDetached(Dense):
    def scores(self, topk_ids, topk_weights):
        return super().scores(topk_ids, topk_weights).detach() * 1.0


class HiddenEscapes(Dense):
    def act(self, gate_up):
        self.hidden = super().act(gate_up)
        return self.hidden

    def forward(self, x):
        return super().forward(x), self.hidden.float().square().mean()


class EinsumOfDiagonal(Einsums):
    """Tokens and experts have the same letter where a token's own expert is not meant."""

    def combine(self, y, scores):
        return torch.einsum("te,teh->eh", scores, y)[:1].expand(y.shape[0], HIDDEN)


class EinsumOverTokens(Einsums):
    """Scores of all tokens for the results of each."""

    def combine(self, y, scores):
        return torch.einsum("se,teh->th", scores, y)


class EinsumUnweighted(Einsums):
    def combine(self, y, scores):
        return torch.einsum("teh->th", y)


class EinsumOverExpertsFirst(Einsums):
    """The hidden states of all experts added up, for each of them."""

    second = "tfo,eho->teh"


class EinsumOtherWeight(Einsums):
    """A weight whose experts and columns have changed places."""

    def experts(self, x, topk_ids, topk_weights):
        hidden = self.act(torch.einsum("th,eoh->teo", x, self.gate_up_proj))
        turned = self.down_proj.reshape(HIDDEN, NUM_EXPERTS, -1)
        y = torch.einsum("teo,heo->teh", hidden, turned)
        return self.combine(y, self.scores(topk_ids, topk_weights))


class EinsumOneMatrix(Einsums):
    """The last projection of the first expert for all."""

    def experts(self, x, topk_ids, topk_weights):
        hidden = self.act(torch.einsum("th,eoh->teo", x, self.gate_up_proj))
        y = torch.einsum("teo,ho->teh", hidden, self.down_proj[0])
        return self.combine(y, self.scores(topk_ids, topk_weights))


class HiddenScoredBiased(HiddenScored):
    """Biases after the scores are those of all experts."""

    biased = True

    def experts(self, x, topk_ids, topk_weights):
        hidden = self.act(torch.einsum("th,eoh->teo", x, self.gate_up_proj))
        hidden = hidden * self.scores(topk_ids, topk_weights).unsqueeze(-1)
        return (torch.einsum("teo,eho->teh", hidden, self.down_proj) + self.down_bias).sum(1)


class GateScored(Einsums):
    """Scores before the activation."""

    def experts(self, x, topk_ids, topk_weights):
        first = torch.einsum("th,eoh->teo", x, self.gate_up_proj)
        first = first * self.scores(topk_ids, topk_weights).unsqueeze(-1)
        return torch.einsum("teo,eho->th", self.act(first), self.down_proj)


class Half(Dense):
    """Only the first experts are in the sum."""

    def combine(self, y, scores):
        return super().combine(torch.cat([y[:2], torch.zeros_like(y[2:])]), scores)


DENSE_EXPERTS = ExpertsSpelling(
    name="dense_experts",
    source="transformers: llama4 (4.x and 5.x), qwen3_vl_moe and gpt_oss (4.57)",
    reference=reference,
    anchor="aten::bmm",
    facts={"weight_on": ("output", "input")},
    dense=True,
    samples=(
        Sample(name="repeated", build=Dense),
        Sample(name="llama4", build=Llama4),
        Sample(name="nanomoe", build=NanoMoE),
        Sample(name="expanded", build=Expanded, brief=True),
        Sample(name="einsum", build=Einsums),
        Sample(name="einsum_experts_first", build=ExpertsFirst, brief=True),
        Sample(name="einsum_experts_last", build=ExpertsLast, brief=True),
        Sample(name="einsum_sequences", build=Sequences),
        Sample(name="einsum_of_three", build=Thrice, brief=True),
        Sample(name="einsum_hidden_scored", build=HiddenScored, brief=True),
        *_picked.STACKED,
        *_dispatched.STACKED,
        *(
            Sample(name=f"einsum_{name}", build=block, brief=True)
            for name, block in _blocks.variants(Einsums)
            if name in ("gpt_oss", "softcapped", "plain_gelu_biased")
        ),
        *(
            Sample(name=name, build=block, brief=True)
            for name, block in _blocks.variants(Dense)
            if name in ("gpt_oss", "plain_gelu_biased", "weight_on_input")
        ),
    ),
    near_misses=(
        *_dispatched.NEAR_STACKED,
        *(
            NearMiss(name=n, build=b, code=c)
            for n, b, c in _blocks.near_variants(Dense)
            if n in ("mish", "cumulated", "rows_mixed", "other_halves")
        ),
        NearMiss(name="scores_not_zero", build=NonzeroFill, code="PROOF"),
        NearMiss(name="scores_shifted", build=Shifted, code="PROOF"),
        NearMiss(name="sigmoid_of_zeros", build=SigmoidOfZeros, code="PROOF"),
        NearMiss(name="softmax_of_zeros", build=SoftmaxOfZeros, code="SPELLING"),
        NearMiss(name="softmax_over_tokens", build=SoftmaxOverTokens, code="SPELLING"),
        NearMiss(name="scores_added", build=Added, code="SPELLING"),
        NearMiss(name="same_expert_twice", build=SameTwice, code="SPELLING"),
        NearMiss(name="scores_at_least", build=Noisy, code="SPELLING"),
        NearMiss(name="all_scores", build=AllScores, code="SPELLING"),
        NearMiss(name="scores_not_transposed", build=NotTransposed, code="SPELLING"),
        NearMiss(name="mean_over_experts", build=MeanOverExperts, code="SPELLING"),
        NearMiss(name="largest_of_experts", build=LargestOfExperts, code="SPELLING"),
        NearMiss(name="scores_reversed", build=ScoresReversed, code="SPELLING"),
        NearMiss(name="scores_twice", build=ScoresSquared, code="SPELLING"),
        NearMiss(name="biases_of_zero_rows", build=BiasedInput, code="PROOF"),
        NearMiss(name="bias_of_zero_rows", build=OneBiasOnInput, code="PROOF"),
        NearMiss(name="sigmoid_of_zero_rows", build=SigmoidOnInput, code="PROOF"),
        NearMiss(name="exp_of_zero_rows", build=ExpOnInput, code="PROOF"),
        NearMiss(name="experts_shifted", build=OtherDown, code="SPELLING"),
        NearMiss(name="rows_of_other_tokens", build=RowsOfOthers, code="SPELLING"),
        NearMiss(name="rows_interleaved", build=RowsInterleaved, code="SPELLING"),
        NearMiss(name="norm_after_expert", build=PostNorm, code="SPELLING"),
        NearMiss(name="mask_of_small_scores", build=Unweighted, code="PROOF"),
        NearMiss(name="scores_detached", build=ScoresDetached, code="SPELLING"),
        NearMiss(name="hidden_escapes", build=HiddenEscapes, code="ESCAPES"),
        NearMiss(name="half_of_the_experts", build=Half, code="SPELLING"),
        NearMiss(name="einsum_of_tokens", build=EinsumOfDiagonal, code="SPELLING"),
        NearMiss(name="einsum_over_tokens", build=EinsumOverTokens, code="SPELLING"),
        NearMiss(name="einsum_unweighted", build=EinsumUnweighted, code="SPELLING"),
        NearMiss(name="einsum_over_experts_first", build=EinsumOverExpertsFirst, code="ACTIVATION"),
        NearMiss(name="einsum_weight_turned", build=EinsumOtherWeight, code="SPELLING"),
        NearMiss(name="einsum_one_matrix", build=EinsumOneMatrix, code="SPELLING"),
        NearMiss(name="einsum_biases_of_all", build=HiddenScoredBiased, code="SPELLING"),
        NearMiss(name="einsum_gate_scored", build=GateScored, code="SPELLING"),
    ),
)
