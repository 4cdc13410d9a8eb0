"""Loops over experts in which each reads its own score from those of all experts, or from the rows of its tokens by
its id: samples of ``expert_loop``.

    token = (topk_ids == e).any(dim=-1).nonzero().squeeze(-1)
    out.index_add_(0, token, expert(x[token]) * probabilities[token, e, None])
    out.index_add_(0, token, expert(x[token]) * topk_weights[token][topk_ids[token] == e].unsqueeze(-1))

The first never looks up the chosen scores as such, and need not use what the top-k gives besides the ids.  In the
normal form the weight is ``topk_weights[token, slot]`` (``region/at_ids.py``, ``region/columns.py``).
"""

import torch
from moe_inductor.patterns import _blocks
from moe_inductor.patterns._blocks import HIDDEN, NUM_EXPERTS
from torch import nn
from torch.nn import functional as F

from moe_inductor.match.api import NearMiss, Sample


class OwnScore(_blocks.Block):
    """Every method is one place to go wrong."""

    def __init__(self):
        super().__init__()
        self.mlps = nn.ModuleList(_blocks.MLP() for _ in range(NUM_EXPERTS))

    def route(self, logits):
        probabilities = F.softmax(logits, dim=-1)
        topk_weights, topk_ids = torch.topk(probabilities, self.k, dim=-1)
        return self.scores(probabilities, topk_weights), topk_ids

    def scores(self, probabilities, topk_weights):
        return probabilities

    def tokens(self, topk_ids, e):
        return (topk_ids == e).any(dim=-1).nonzero().squeeze(-1)

    def weight(self, scores, topk_ids, token, e):
        return scores[token, e, None]

    def expert(self, e, rows):
        return self.mlps[e](rows)

    def experts(self, x, topk_ids, topk_weights):
        out = torch.zeros_like(x)
        for e in range(NUM_EXPERTS):
            token = self.tokens(topk_ids, e)
            weight = self.weight(topk_weights, topk_ids, token, e)
            out.index_add_(0, token, self.expert(e, x[token]) * weight)
        return out


class OwnStacked(OwnScore):
    def expert(self, e, rows):
        return F.linear(self.act(F.linear(rows, self.gate_up_proj[e])), self.down_proj[e])


class OwnRenormalised(OwnScore):
    """All scores are divided by the sum of the chosen ones."""

    def tokens(self, topk_ids, e):
        return torch.where((topk_ids == e).any(-1))[0]

    def scores(self, probabilities, topk_weights):
        return probabilities / topk_weights.sum(dim=-1, keepdim=True)


class OwnRenormalisedInFloat(OwnStacked):
    """What is chosen is looked up for the sum alone; then scores are cast."""

    def route(self, logits):
        probabilities = F.softmax(logits.float(), dim=-1)
        topk_ids = torch.topk(probabilities, self.k, dim=-1)[1]
        total = probabilities.gather(1, topk_ids).sum(dim=-1, keepdim=True)
        return (probabilities / total).to(logits.dtype), topk_ids


class OwnSigmoid(OwnScore):
    def route(self, logits):
        scores = logits.sigmoid()
        return scores, torch.topk(scores, self.k, dim=-1)[1]


class OwnScaled(OwnScore):
    """Scores are scaled by what is the expert's before they are compared: not by what is the token's."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(1, NUM_EXPERTS) + 0.5)

    def route(self, logits):
        scores = F.softmax(logits, dim=-1) * self.scale
        return scores, torch.topk(scores, self.k, dim=-1)[1]


class ChosenWithoutGradient(OwnScore):
    def route(self, logits):
        probabilities = F.softmax(logits, dim=-1)
        with torch.no_grad():
            topk_ids = torch.topk(probabilities, self.k, dim=-1)[1]
        return probabilities, topk_ids


class OwnOfRows(OwnScore):
    def weight(self, scores, topk_ids, token, e):
        return scores[token][:, e].unsqueeze(1)


class OwnOfBatch(OwnScore):
    """Batch and sequence are kept up to the loop."""

    def forward(self, x):
        states = torch.stack((x, 0.5 * x))
        scores, topk_ids = self.route(self.gate(states))
        flat = scores.view(-1, NUM_EXPERTS)
        out = self.experts(states.view(-1, HIDDEN), topk_ids.view(-1, self.k), flat)
        return out.view(states.shape)


class ByMask(OwnScore):
    """The weight is where the token's id is the expert's."""

    def route(self, logits):
        return super(OwnScore, self).route(logits)

    def weight(self, weights, topk_ids, token, e):
        return weights[token][topk_ids[token] == e].unsqueeze(-1)


class ByMaskStacked(ByMask, OwnStacked):
    pass


class ByMaskNotRenormalised(ByMask):
    def route(self, logits):
        return torch.topk(F.softmax(logits, dim=-1), self.k, dim=-1)


class ByMaskOfMask(ByMask):
    def tokens(self, topk_ids, e):
        return (topk_ids == e).any(dim=-1)

    def experts(self, x, topk_ids, topk_weights):
        out = torch.zeros_like(x)
        for e in range(NUM_EXPERTS):
            token = self.tokens(topk_ids, e)
            out[token] += self.expert(e, x[token]) * self.weight(topk_weights, topk_ids, token, e)
        return out


class ByMaskTopOne(ByMaskNotRenormalised):
    k = 1


# -- near misses ------------------------------------------------------------------------------------------------------


class OwnOfOtherLogits(OwnScore):
    """Experts are weighed by scores that they were not chosen by, which only the router minds."""

    def __init__(self):
        super().__init__()
        self.second = nn.Linear(HIDDEN, NUM_EXPERTS, bias=False)

    def forward(self, x):
        self.others = F.softmax(self.second(x), dim=-1)
        return super().forward(x)

    def route(self, logits):
        return self.others, super().route(logits)[1]


class OwnOfTokens(OwnScore):
    """A softmax over tokens."""

    def route(self, logits):
        return F.softmax(logits, dim=0), super().route(logits)[1]


class BeforeOwn(OwnScore):
    def weight(self, scores, topk_ids, token, e):
        return scores[token, e - 1, None]


class OwnReversed(OwnScore):
    def weight(self, scores, topk_ids, token, e):
        return scores[token, NUM_EXPERTS - 1 - e, None]


class OwnBackwards(OwnScore):
    """The scores of an expert's tokens, last token first."""

    def weight(self, scores, topk_ids, token, e):
        return scores[token.flip(0), e, None]


class OwnOfFlipped(OwnScore):
    """The scores of other tokens."""

    def route(self, logits):
        probabilities, topk_ids = super().route(logits)
        return probabilities.flip(0), topk_ids


class OwnPerExpert(OwnScore):
    """Each expert's scores are divided by what is its own, not by what is the token's."""

    def route(self, logits):
        probabilities, topk_ids = super().route(logits)
        return probabilities / probabilities.sum(dim=0, keepdim=True), topk_ids


class OwnOfPairs(OwnScore):
    """A token may have an expert twice: then its result is added twice."""

    def route(self, logits):
        probabilities, topk_ids = super().route(logits)
        return probabilities, topk_ids // 2 * 2

    def tokens(self, topk_ids, e):
        return torch.where(topk_ids == e)[0]


class OwnOfTokensOnce(OwnOfPairs):
    """And here it is added once."""

    def tokens(self, topk_ids, e):
        return (topk_ids == e).any(dim=-1).nonzero().squeeze(-1)


class OwnOfNextIds(OwnOfPairs):
    """Ids of which nobody has shown that each has a score."""

    def route(self, logits):
        probabilities, topk_ids = OwnScore.route(self, logits)
        return probabilities, (topk_ids + 1) % NUM_EXPERTS


class OwnOfMore(OwnScore):
    """One score more than experts are chosen from."""

    def route(self, logits):
        probabilities, topk_ids = super().route(logits)
        return F.pad(probabilities, (1, 0)), topk_ids


class OwnStates(OwnScore):
    """Not a score but what an expert reads is its own."""

    def experts(self, x, topk_ids, topk_weights):
        states = x[:, None] * torch.linspace(0.5, 1.0, NUM_EXPERTS)[:, None]
        out = torch.zeros_like(x)
        for e in range(NUM_EXPERTS):
            token = self.tokens(topk_ids, e)
            weight = self.weight(topk_weights, topk_ids, token, e)
            out.index_add_(0, token, self.expert(e, states[token, e]) * weight)
        return out


class MaskOfNext(ByMask):
    """All experts are chosen, so that any mask has one place in each row."""

    k = NUM_EXPERTS

    def weight(self, weights, topk_ids, token, e):
        return super().weight(weights, topk_ids, token, (e + 1) % NUM_EXPERTS)


class MaskOfOtherRows(ByMask):
    def weight(self, weights, topk_ids, token, e):
        return weights[token.flip(0)][topk_ids[token] == e].unsqueeze(-1)


class MaskOfOtherIds(ByMask):
    """All experts are chosen, and asked for in another order: each is somewhere else in the rows."""

    k = NUM_EXPERTS

    def route(self, logits):
        self.others = torch.topk(-logits, self.k, dim=-1)[1]
        return super().route(logits)

    def weight(self, weights, topk_ids, token, e):
        return super().weight(weights, self.others, token, e)


class MaskBackwards(ByMask):
    def weight(self, weights, topk_ids, token, e):
        return super().weight(weights, topk_ids, token, e).flip(0)


class MaskOfNextIds(ByMask):
    """Ids of which nobody has shown that a token has each once."""

    def route(self, logits):
        weights, topk_ids = super().route(logits)
        return weights, (topk_ids + 1) % NUM_EXPERTS

    def tokens(self, topk_ids, e):
        return torch.where(topk_ids == e)[0]


class MaskOfPairs(ByMask):
    """A token may have two experts twice, and then two weights for each of them: as many as there are pairs."""

    k = NUM_EXPERTS

    def route(self, logits):
        weights, topk_ids = super().route(logits)
        return weights, topk_ids // 2 * 2

    def tokens(self, topk_ids, e):
        return torch.where(topk_ids == e)[0]

    def weight(self, weights, topk_ids, token, e):
        once = token[::2]
        return weights[once][topk_ids[once] == e].unsqueeze(-1)


SAMPLES = (
    Sample(name="own_score", build=OwnScore),
    Sample(name="own_stacked", build=OwnStacked, brief=True),
    Sample(name="own_renormalised", build=OwnRenormalised),
    Sample(name="own_renormalised_in_float", build=OwnRenormalisedInFloat, brief=True),
    Sample(name="own_sigmoid", build=OwnSigmoid, brief=True),
    Sample(name="own_scaled", build=OwnScaled, brief=True),
    Sample(name="own_chosen_without_gradient", build=ChosenWithoutGradient, brief=True),
    Sample(name="own_of_rows", build=OwnOfRows, brief=True),
    Sample(name="own_of_batch", build=OwnOfBatch, brief=True),
    Sample(name="weight_by_mask", build=ByMask),
    Sample(name="weight_by_mask_stacked", build=ByMaskStacked, brief=True),
    Sample(name="weight_by_mask_not_renormalised", build=ByMaskNotRenormalised, brief=True),
    Sample(name="weight_by_mask_of_mask", build=ByMaskOfMask, brief=True),
    Sample(name="weight_by_mask_top_one", build=ByMaskTopOne, brief=True),
)

NEAR_MISSES = (
    NearMiss(name="own_of_other_logits", build=OwnOfOtherLogits, code="ROUTER"),
    NearMiss(name="own_of_tokens", build=OwnOfTokens, code="ROUTER"),
    NearMiss(name="own_per_expert", build=OwnPerExpert, code="ROUTER"),
    NearMiss(name="own_of_flipped", build=OwnOfFlipped, code="ROUTER"),
    NearMiss(name="before_own", build=BeforeOwn, code="INPUTS_DIFFER"),
    NearMiss(name="own_reversed", build=OwnReversed, code="INPUTS_DIFFER"),
    NearMiss(name="own_states", build=OwnStates, code="INPUTS_DIFFER"),
    NearMiss(name="own_backwards", build=OwnBackwards, code="SPELLING"),
    NearMiss(name="own_of_pairs", build=OwnOfPairs, code="SPELLING"),
    NearMiss(name="own_of_tokens_once", build=OwnOfTokensOnce, code="SPELLING"),
    NearMiss(name="own_of_next_ids", build=OwnOfNextIds, code="SPELLING"),
    NearMiss(name="own_of_more", build=OwnOfMore, code="INPUTS_DIFFER"),
    NearMiss(name="mask_of_next", build=MaskOfNext, code="SPELLING"),
    NearMiss(name="mask_of_other_rows", build=MaskOfOtherRows, code="SPELLING"),
    NearMiss(name="mask_of_other_ids", build=MaskOfOtherIds, code="SPELLING"),
    NearMiss(name="mask_backwards", build=MaskBackwards, code="SPELLING"),
    NearMiss(name="mask_of_next_ids", build=MaskOfNextIds, code="SPELLING"),
    NearMiss(name="mask_of_pairs", build=MaskOfPairs, code="SPELLING"),
)
