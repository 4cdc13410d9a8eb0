"""Loops over experts that pick tokens with boolean masks, or that read, add and write back: samples of ``expert_loop``.

    mistral-inference, litgpt       results[token] += weights[token, slot, None] * expert(x[token])
    makeMoE, nanoMoE                out[mask] += expert(x[mask]) * scores[mask, e, None]
    switch_transformers (4.x)       out[mask] = expert(x[mask]), with one expert per token and a capacity
    DeepSeek's remote code          y[flat_ids == e] = expert(repeated[flat_ids == e])

In the normal form these are index_add over ``nonzero(ids == e)`` (``region/rows.py``, ``region/sparse.py``): a pair
that a capacity or a threshold drops has the id -1 there, which no expert has.
"""

import torch
from moe_inductor.patterns import _blocks
from moe_inductor.patterns._blocks import NUM_EXPERTS
from torch import nn
from torch.nn import functional as F

from moe_inductor.match.api import NearMiss, Sample


class MaskLoop(_blocks.Block):
    """``out[mask] += expert(x[mask]) * scores[mask, e, None]`` over scores of all experts."""

    visited = range(NUM_EXPERTS)

    def scores(self, topk_ids, topk_weights):
        zeros = topk_weights.new_zeros(topk_weights.shape[0], NUM_EXPERTS)
        return zeros.scatter(1, topk_ids, topk_weights)

    def mask(self, topk_ids, scores, e):
        return (topk_ids == e).any(dim=-1)

    def expert(self, e, rows):
        return F.linear(self.act(F.linear(rows, self.gate_up_proj[e])), self.down_proj[e])

    def start(self, x):
        return torch.zeros_like(x)

    def add(self, out, mask, y):
        out[mask] += y

    def column(self, e):
        return e

    def experts(self, x, topk_ids, topk_weights):
        out, scores = self.start(x), self.scores(topk_ids, topk_weights)
        for e in self.visited:
            mask = self.mask(topk_ids, scores, e)
            y = self.expert(e, x[mask])
            self.add(out, mask, y * scores[mask, self.column(e), None])
        return out


class ReadAndWritten(MaskLoop):
    """mistral-inference: an addition that would lose one of two rows of the same token, of which there are none."""

    def where(self, topk_ids, e):
        return torch.where(topk_ids == e)

    def experts(self, x, topk_ids, topk_weights):
        results = self.start(x)
        for e in self.visited:
            token, slot = self.where(topk_ids, e)
            self.add(results, token, topk_weights[token, slot, None] * self.expert(e, x[token]))
        return results


class ListOfMasks(MaskLoop):
    """litgpt: all masks at once, and experts in a ModuleList."""

    def __init__(self):
        super().__init__()
        self.mlps = nn.ModuleList(_blocks.MLP() for _ in range(NUM_EXPERTS))

    def experts(self, x, topk_ids, topk_weights):
        masks = topk_ids.unsqueeze(-1) == torch.arange(NUM_EXPERTS, device=x.device)
        results = torch.zeros_like(x)
        for mask, expert in zip(masks.permute(2, 0, 1), self.mlps, strict=True):
            token, slot = torch.where(mask)
            results[token] += topk_weights[token, slot, None] * expert(x[token])
        return results


class Accumulated(ReadAndWritten):
    def add(self, out, mask, y):
        out.index_put_((mask,), y, accumulate=True)


class Tested(MaskLoop):
    """makeMoE: softmax over scores of which those of the other experts are -inf, and a test of the mask."""

    def route(self, logits):
        topk_logits, topk_ids = torch.topk(logits, self.k, dim=-1)
        return topk_logits, topk_ids

    def scores(self, topk_ids, topk_weights):
        full = topk_weights.new_full((topk_weights.shape[0], NUM_EXPERTS), float("-inf"))
        return F.softmax(full.scatter(-1, topk_ids, topk_weights), dim=-1)

    def experts(self, x, topk_ids, topk_weights):
        out, scores = self.start(x), self.scores(topk_ids, topk_weights)
        for e in self.visited:
            mask = self.mask(topk_ids, scores, e)
            if mask.any():
                out[mask] += self.expert(e, x[mask]) * scores[mask, e].unsqueeze(1)
        return out


class MakeMoE(Tested):
    """makeMoE as it is: batch and sequence are kept, biased experts without a gate, a mask for what is read and another
    shape of it for what is written."""

    def __init__(self):
        super().__init__()
        self.mlps = nn.ModuleList(_blocks.Plain() for _ in range(NUM_EXPERTS))

    def forward(self, x):
        states = torch.stack((x, 0.5 * x))
        topk_logits, topk_ids = self.route(self.gate(states))
        return self.experts(states, topk_ids, topk_logits)

    def scores(self, topk_ids, topk_weights):
        full = topk_weights.new_full((*topk_weights.shape[:-1], NUM_EXPERTS), float("-inf"))
        return F.softmax(full.scatter(-1, topk_ids, topk_weights), dim=-1)

    def score(self, flat, mask, e):
        return flat[mask, e].unsqueeze(1)

    def experts(self, x, topk_ids, topk_weights):
        out, scores = self.start(x), self.scores(topk_ids, topk_weights)
        flat_x, flat_scores = x.view(-1, x.size(-1)), scores.view(-1, scores.size(-1))
        for e, expert in enumerate(self.mlps):
            mask = (topk_ids == e).any(dim=-1)
            flat = mask.view(-1)
            if flat.any():
                y = expert(flat_x[flat]) * self.score(flat_scores, flat, e)
                self.put(out, mask, y)
        return out

    def put(self, out, mask, y):
        out[mask] += y.squeeze(1)


class Positive(MaskLoop):
    def mask(self, topk_ids, scores, e):
        return scores[:, e] > 0


class Threshold(MaskLoop):
    """Pairs of little weight are dropped."""

    def mask(self, topk_ids, scores, e):
        return scores[:, e] >= 0.4


class ChosenScores(MaskLoop):
    """Scores of all experts times a mask of the chosen ones, divided by their sum."""

    def forward(self, x):
        probabilities = self.gate(x).softmax(-1)
        _, topk_ids = torch.topk(probabilities, self.k, dim=-1)
        return self.experts(x, topk_ids, self.chosen(probabilities, topk_ids))

    def chosen(self, probabilities, topk_ids):
        kept = probabilities * F.one_hot(topk_ids, NUM_EXPERTS).sum(dim=1)
        return kept / kept.sum(dim=-1, keepdim=True)

    def scores(self, topk_ids, topk_weights):
        return topk_weights

    def mask(self, topk_ids, scores, e):
        return scores[:, e].bool()


class FilledScores(ChosenScores):
    """Logits of experts that were not chosen are set to -inf."""

    def forward(self, x):
        logits = self.gate(x)
        _, topk_ids = torch.topk(logits, self.k, dim=-1)
        return self.experts(x, topk_ids, self.chosen(logits, topk_ids))

    def chosen(self, probabilities, topk_ids):
        chosen = torch.zeros_like(probabilities, dtype=torch.bool).scatter_(1, topk_ids, True)
        return probabilities.masked_fill(~chosen, float("-inf")).softmax(-1)


class FromOnes(MaskLoop):
    def start(self, x):
        return torch.ones_like(x)


class FromShared(MaskLoop):
    """Rows are added to what a shared expert gave."""

    def __init__(self):
        super().__init__()
        self.shared = _blocks.MLP()

    def start(self, x):
        return self.shared(x)


class Capacity(MaskLoop):
    """switch_transformers: one expert per token, of which each takes only the first few; the weight comes after."""

    k = 1
    capacity = 2

    def kept(self, topk_ids):
        chosen = F.one_hot(topk_ids[None, :, 0], num_classes=NUM_EXPERTS)
        return chosen * (torch.cumsum(chosen, dim=-2) <= self.capacity)

    def start(self, x):
        return torch.zeros(x.shape, device=x.device, dtype=x.dtype)

    def experts(self, x, topk_ids, topk_weights):
        states, kept = x[None], self.kept(topk_ids).bool()
        out = self.start(states)
        for e in self.visited:
            out[kept[:, :, e]] = self.expert(e, states[kept[:, :, e]])
        return (topk_weights[None] * out)[0]


class AddedToTokens(Capacity):
    """What an expert gives is added to the token, in three dimensions."""

    def start(self, x):
        return x.clone()

    def experts(self, x, topk_ids, topk_weights):
        states, kept = x[None], self.kept(topk_ids).bool()
        out = self.start(states)
        for e in self.visited:
            out[kept[:, :, e]] += self.expert(e, states[kept[:, :, e]])
        return (topk_weights[None] * out)[0]


class CapacityHits(Capacity):
    """switch_transformers of 5.x: the loop is over the experts that have kept somebody."""

    def experts(self, x, topk_ids, topk_weights):
        mask = self.kept(topk_ids).view(-1, 1, NUM_EXPERTS).permute(2, 1, 0)
        out, hits = self.start(x), torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
        for hit in hits:
            slot, token = torch.where(mask[hit].squeeze(0))
            y = self.expert(hit[0], x[token]) * topk_weights[token, slot, None]
            out.index_add_(0, token, y)
        return out


class TensorForEach(MaskLoop):
    """What each expert gives is put into a tensor of its own, and these are added up."""

    def put(self, out, mask, y):
        z = torch.zeros_like(out)
        z[mask] = y
        return z

    def experts(self, x, topk_ids, topk_weights):
        out, scores = 0, self.scores(topk_ids, topk_weights)
        for e in self.visited:
            mask = self.mask(topk_ids, scores, e)
            out = out + self.put(x, mask, self.expert(e, x[mask]) * scores[mask, e, None])
        return out


class Assigned(MaskLoop):
    """One expert per token, chosen by an argmax: nothing is added to, every row is written once."""

    k = 1

    def forward(self, x):
        scores = self.gate(x).softmax(-1)
        best, ids = scores.max(dim=-1)
        return self.experts(x, ids, best)

    def experts(self, x, topk_ids, topk_weights):
        out = self.start(x)
        for e in self.visited:
            mask = self.mask(topk_ids, None, e)
            out[mask] = self.expert(e, x[mask])
        return out * topk_weights[:, None]

    def mask(self, topk_ids, scores, e):
        return topk_ids == e


class Pairs(MaskLoop):
    """DeepSeek's remote code: one row per pair, each of which has one expert."""

    def rows(self, x):
        return x.repeat_interleave(self.k, dim=0)

    def start(self, x):
        return torch.zeros_like(x)

    def experts(self, x, topk_ids, topk_weights):
        rows, ids = self.rows(x), topk_ids.view(-1)
        y = self.start(rows)
        for e in self.visited:
            y[ids == e] = self.expert(e, rows[ids == e])
        y = y.view(*topk_weights.shape, -1) * topk_weights.unsqueeze(-1)
        return y.sum(dim=1)


class PairsOfEmpty(Pairs):
    """All rows are written, so what was in them is nothing to anybody."""

    def start(self, x):
        return torch.empty_like(x)


class Halved(MaskLoop):
    """A constant belongs to the weights."""

    def add(self, out, mask, y):
        out[mask] += 0.5 * y


# -- near misses ------------------------------------------------------------------------------------------------------


class Overwritten(MaskLoop):
    """Two experts per token: the second one's rows replace the first one's."""

    def add(self, out, mask, y):
        out[mask] = y


class SameTwice(ReadAndWritten):
    """An expert may occur twice for a token, and one of the two is lost."""

    def route(self, logits):
        topk_weights, topk_ids = super().route(logits)
        return topk_weights, topk_ids // 2 * 2


class OtherRowsRead(ReadAndWritten):
    def add(self, out, mask, y):
        out[mask] = out[mask.flip(0)] + y


class Subtracted(ReadAndWritten):
    def add(self, out, mask, y):
        out[mask] -= y


class Decayed(ReadAndWritten):
    def add(self, out, mask, y):
        out[mask] = 0.5 * out[mask] + y


class NextMask(MaskLoop):
    def mask(self, topk_ids, scores, e):
        return (topk_ids == (e + 1) % NUM_EXPERTS).any(dim=-1)


class NotChosen(MaskLoop):
    def mask(self, topk_ids, scores, e):
        return ~(topk_ids == e).any(dim=-1)


class AllTokens(MaskLoop):
    """A mask that has every token in it for which all choices are this expert."""

    def mask(self, topk_ids, scores, e):
        return (topk_ids == e).all(dim=-1)


class Small(MaskLoop):
    """True for every expert that was not chosen."""

    def mask(self, topk_ids, scores, e):
        return scores[:, e] < 0.4


class NonzeroFill(Positive):
    def scores(self, topk_ids, topk_weights):
        full = topk_weights.new_full((topk_weights.shape[0], NUM_EXPERTS), 0.1)
        return full.scatter(1, topk_ids, topk_weights)


class Added(Positive):
    """Scores are added to what others have left there."""

    def scores(self, topk_ids, topk_weights):
        zeros = topk_weights.new_zeros(topk_weights.shape[0], NUM_EXPERTS)
        return zeros.scatter_add(1, topk_ids, topk_weights)


class OtherScattered(Positive):
    """Scores are put where other experts were chosen."""

    def scores(self, topk_ids, topk_weights):
        return super().scores(topk_ids, topk_weights.flip(-1))

    def mask(self, topk_ids, scores, e):
        return (topk_ids[:, :1] == e).any(dim=-1)


class SigmoidOfZeros(Positive):
    """The sigmoid of what was not chosen is one half."""

    def scores(self, topk_ids, topk_weights):
        return super().scores(topk_ids, topk_weights).sigmoid()


class SoftmaxOfZeros(MaskLoop):
    """What was not chosen has a part in the sum."""

    def scores(self, topk_ids, topk_weights):
        return super().scores(topk_ids, topk_weights).softmax(-1)


class AboveTheKth(FilledScores):
    """Logits below the k-th largest are set to -inf: where two are the same, both are kept."""

    def chosen(self, probabilities, topk_ids):
        least = torch.topk(probabilities, self.k, dim=-1).values[..., -1:]
        return probabilities.masked_fill(probabilities < least, float("-inf")).softmax(-1)


class SoftmaxOverTokens(Tested):
    def scores(self, topk_ids, topk_weights):
        full = topk_weights.new_full((topk_weights.shape[0], NUM_EXPERTS), -1e9)
        return F.softmax(full.scatter(-1, topk_ids, topk_weights), dim=0)


class ScoresPerExpert(MaskLoop):
    """Divided by the sum over tokens."""

    def scores(self, topk_ids, topk_weights):
        scores = super().scores(topk_ids, topk_weights)
        return scores / scores.sum(dim=0, keepdim=True)


class OtherColumn(MaskLoop):
    def column(self, e):
        return (e + 1) % NUM_EXPERTS


class Missing(MaskLoop):
    visited = range(NUM_EXPERTS - 1)


class Twice(MaskLoop):
    visited = (*range(NUM_EXPERTS), 2)


class OtherWeights(MaskLoop):
    def expert(self, e, rows):
        return super().expert(NUM_EXPERTS - 1 - e, rows)


class CapacityOfTwo(Capacity):
    """Two experts per token: what the second one assigns replaces what the first one did."""

    k = 2

    def kept(self, topk_ids):
        return torch.zeros(
            1, topk_ids.shape[0], NUM_EXPERTS, dtype=torch.int64, device=topk_ids.device
        ).scatter(2, topk_ids[None], 1)

    def experts(self, x, topk_ids, topk_weights):
        return super().experts(x, topk_ids, topk_weights[:, :1])


class RowsOfOthers(MaskLoop):
    """The rows of one mask at the places of another, which has as many."""

    def experts(self, x, topk_ids, topk_weights):
        return super().experts(x, topk_ids.flip(0), topk_weights)


class WrittenTransposed(MakeMoE):
    """Rows are written where another token of the same number stands: as many, and elsewhere."""

    def put(self, out, mask, y):
        out[mask.flip(0)] += y


class ScoreOfOther(MakeMoE):
    def score(self, flat, mask, e):
        return super().score(flat, mask, (e + 1) % NUM_EXPERTS)


class WrittenNotAdded(MakeMoE):
    def put(self, out, mask, y):
        out[mask] = y


class TestsOther(MakeMoE):
    """Whether an expert is run depends on whether the next one was chosen."""

    def experts(self, x, topk_ids, topk_weights):
        out, scores = self.start(x), self.scores(topk_ids, topk_weights)
        flat_x, flat_scores = x.view(-1, x.size(-1)), scores.view(-1, scores.size(-1))
        for e, expert in enumerate(self.mlps):
            mask = (topk_ids == e).any(dim=-1)
            if (topk_ids == (e + 1) % NUM_EXPERTS).any():
                y = expert(flat_x[mask.view(-1)]) * self.score(flat_scores, mask.view(-1), e)
                self.put(out, mask, y)
        return out


class OnesForEach(TensorForEach):
    def put(self, out, mask, y):
        z = torch.ones_like(out)
        z[mask] = y
        return z


class LastOfEach(TensorForEach):
    """A token that an expert has twice gets one of two results."""

    def put(self, out, mask, y):
        (token,) = torch.where(mask)
        z = torch.zeros_like(out)
        z[token // 2] = y
        return z


class SumRead(MaskLoop):
    """An expert reads what the others have given."""

    def experts(self, x, topk_ids, topk_weights):
        out, scores = self.start(x), self.scores(topk_ids, topk_weights)
        for e in self.visited:
            mask = self.mask(topk_ids, scores, e)
            out[mask] += self.expert(e, x[mask] + out[mask]) * scores[mask, e, None]
        return out


class PairsTwice(Pairs):
    """A pair has two experts, and the later one stays."""

    visited = (0, 1, 2, 3, 1)


class PairsOfOnes(Pairs):
    visited = (1, 2, 3)

    def start(self, x):
        return torch.ones_like(x)


SAMPLES = (
    Sample(name="read_and_written", build=ReadAndWritten, brief=True),
    Sample(name="list_of_masks", build=ListOfMasks, brief=True),
    Sample(name="accumulated", build=Accumulated, brief=True),
    Sample(name="any_mask", build=MaskLoop),
    Sample(name="tested_mask", build=Tested, brief=True),
    Sample(name="make_moe", build=MakeMoE),
    Sample(name="positive_scores", build=Positive, brief=True),
    Sample(name="threshold", build=Threshold, dtypes=(torch.float32,), brief=True),
    Sample(name="chosen_scores", build=ChosenScores, brief=True),
    Sample(name="filled_scores", build=FilledScores, brief=True),
    Sample(name="capacity", build=Capacity),
    Sample(name="added_to_tokens", build=AddedToTokens, brief=True),
    Sample(name="capacity_hits", build=CapacityHits, brief=True),
    Sample(name="from_ones", build=FromOnes, brief=True),
    Sample(name="from_shared", build=FromShared, brief=True),
    Sample(name="pairs_of_empty", build=PairsOfEmpty, brief=True),
    Sample(name="tensor_for_each", build=TensorForEach, brief=True),
    Sample(name="assigned", build=Assigned, brief=True),
    Sample(name="pairs", build=Pairs, brief=True),
    Sample(name="halved", build=Halved, brief=True),
)

NEAR_MISSES = (
    NearMiss(name="overwritten", build=Overwritten, code="ACCUMULATOR"),
    NearMiss(name="same_expert_twice", build=SameTwice, code="SPELLING"),
    NearMiss(name="other_rows_read", build=OtherRowsRead, code="SPELLING"),
    NearMiss(name="subtracted", build=Subtracted, code="SPELLING"),
    NearMiss(name="decayed", build=Decayed, code="SPELLING"),
    NearMiss(name="mask_of_next_expert", build=NextMask, code="SPELLING"),
    NearMiss(name="mask_of_not_chosen", build=NotChosen, code="SPELLING"),
    NearMiss(name="mask_of_all", build=AllTokens, code="SPELLING"),
    NearMiss(name="mask_of_small_scores", build=Small, code="SPELLING"),
    NearMiss(name="scores_not_zero", build=NonzeroFill, code="SPELLING"),
    NearMiss(name="scores_added", build=Added, code="SPELLING"),
    NearMiss(name="scores_of_other_slots", build=OtherScattered, code="INPUTS_DIFFER"),
    NearMiss(name="sigmoid_of_zeros", build=SigmoidOfZeros, code="SPELLING"),
    NearMiss(name="softmax_of_zeros", build=SoftmaxOfZeros, code="ROUTER"),
    NearMiss(name="above_the_kth", build=AboveTheKth, code="SPELLING"),
    NearMiss(name="softmax_over_tokens_of_scores", build=SoftmaxOverTokens, code="ROUTER"),
    NearMiss(name="scores_per_expert", build=ScoresPerExpert, code="ROUTER"),
    NearMiss(name="scores_of_other_expert", build=OtherColumn, code="SPELLING"),
    NearMiss(name="mask_missing", build=Missing, code="EXPERT_MISSING"),
    NearMiss(name="mask_twice", build=Twice, code="EXPERT_TWICE"),
    NearMiss(name="mask_of_other_weights", build=OtherWeights, code="EXPERT_WEIGHTS"),
    NearMiss(name="capacity_of_two", build=CapacityOfTwo, code="ACCUMULATOR"),
    NearMiss(name="mask_of_other_tokens", build=RowsOfOthers, code="SPELLING"),
    NearMiss(name="written_elsewhere", build=WrittenTransposed, code="SPELLING"),
    NearMiss(name="score_of_next", build=ScoreOfOther, code="SPELLING"),
    NearMiss(name="written_not_added", build=WrittenNotAdded, code="ACCUMULATOR"),
    NearMiss(name="tests_other", build=TestsOther, code="ASSUMPTION"),
    NearMiss(name="ones_for_each", build=OnesForEach, code="ACCUMULATOR"),
    NearMiss(name="last_of_each", build=LastOfEach, code="SPELLING"),
    NearMiss(name="sum_read", build=SumRead, code="SPELLING"),
    NearMiss(name="pairs_twice", build=PairsTwice, code="EXPERT_TWICE"),
    NearMiss(name="pairs_from_ones", build=PairsOfOnes, code="ACCUMULATOR"),
)
