"""Loops over experts in which a token's ids are compared with the expert, for its tokens and for its weight alike:
samples of ``expert_loop``.

    hit = topk_ids == e
    token = hit.any(dim=-1)
    out[token] += expert(x[token]) * (topk_weights * hit).sum(dim=-1)[token, None]

What many write who have not read a library's loop.  In the normal form the weight is the token's for that expert,
``topk_weights[token, slot]`` (``region/columns.py``, ``region/pair_rows.py``).
"""

import torch
from moe_inductor.patterns import _blocks
from moe_inductor.patterns._blocks import NUM_EXPERTS
from torch.nn import functional as F

from moe_inductor.match.api import NearMiss, Sample


class Compared(_blocks.Block):
    """Every method is one place to go wrong."""

    def expert(self, e, rows):
        return F.linear(self.act(F.linear(rows, self.gate_up_proj[e])), self.down_proj[e])

    def hit(self, topk_ids, e):
        return topk_ids == e

    def tokens(self, hit):
        return hit.any(dim=-1)

    def weight(self, topk_weights, hit, token):
        return (topk_weights * hit).sum(dim=-1)[token].unsqueeze(-1)

    def experts(self, x, topk_ids, topk_weights):
        out = torch.zeros_like(x)
        for e in range(NUM_EXPERTS):
            hit = self.hit(topk_ids, e)
            token = self.tokens(hit)
            out[token] += self.expert(e, x[token]) * self.weight(topk_weights, hit, token)
        return out


class KeptDimension(Compared):
    def weight(self, topk_weights, hit, token):
        return (topk_weights * hit.to(topk_weights.dtype)).sum(dim=-1, keepdim=True)[token]


class Where(Compared):
    def weight(self, topk_weights, hit, token):
        return torch.where(hit, topk_weights, 0.0).sum(dim=1)[token][:, None]


class Filled(Compared):
    def weight(self, topk_weights, hit, token):
        return topk_weights.masked_fill(~hit, 0.0).sum(dim=-1)[token, None]


class Picked(Compared):
    """As many true places as tokens, and in their order."""

    def weight(self, topk_weights, hit, token):
        return topk_weights[hit].unsqueeze(-1)


class OfRows(Compared):
    """Tokens as a list, and the rows of everything taken first."""

    def tokens(self, hit):
        return hit.any(dim=-1).nonzero().squeeze(-1)

    def weight(self, topk_weights, hit, token):
        return (topk_weights[token] * hit[token]).sum(dim=-1, keepdim=True)


class Slot(Compared):
    """Where in the token's row the expert stands."""

    def slot(self, hit, token):
        return hit[token].int().argmax(dim=-1)

    def weight(self, topk_weights, hit, token):
        return topk_weights[token, self.slot(hit, token)].unsqueeze(-1)


class GatheredSlot(Slot):
    def slot(self, hit, token):
        return hit[token].long().argmax(dim=1, keepdim=True)

    def weight(self, topk_weights, hit, token):
        return topk_weights[token].gather(1, self.slot(hit, token))


class ByScore(Compared):
    """The tokens are those whose weight is not zero."""

    def experts(self, x, topk_ids, topk_weights):
        out = torch.zeros_like(x)
        for e in range(NUM_EXPERTS):
            score = (topk_weights * (topk_ids == e)).sum(dim=-1)
            token = self.tokens(score)
            out = out.index_add(0, token, self.expert(e, x[token]) * score[token, None])
        return out

    def tokens(self, score):
        return score.nonzero().squeeze(-1)


class PlacedByProduct(ByScore):
    """Scores of all experts as a product of the weights with one-hot ids."""

    def experts(self, x, topk_ids, topk_weights):
        out = torch.zeros_like(x)
        hit = F.one_hot(topk_ids, NUM_EXPERTS).to(x.dtype)
        scores = self.place(topk_weights, hit)
        for e in range(NUM_EXPERTS):
            token = self.tokens(scores[:, e])
            out = out.index_add(0, token, self.expert(e, x[token]) * scores[token, e, None])
        return out

    def place(self, topk_weights, hit):
        return torch.einsum("tk,tke->te", topk_weights, hit)


class PairNumbers(Compared):
    """The expert's places among all pairs of a token and a choice."""

    def token(self, pair, topk_ids):
        return pair // topk_ids.shape[1]

    def score(self, topk_weights, pair):
        return topk_weights.flatten()[pair]

    def experts(self, x, topk_ids, topk_weights):
        out, flat = torch.zeros_like(x), topk_ids.flatten()
        for e in range(NUM_EXPERTS):
            pair = (flat == e).nonzero().squeeze(-1)
            token = self.token(pair, topk_ids)
            y = self.expert(e, x[token]) * self.score(topk_weights, pair)[:, None]
            out.index_add_(0, token, y)
        return out


class PlaceInRow(PairNumbers):
    def score(self, topk_weights, pair):
        k = topk_weights.shape[1]
        return topk_weights[pair.div(k, rounding_mode="floor"), pair % k]


class TokenOfPair(PairNumbers):
    """A list of the token of each pair, and masks over the pairs."""

    def token(self, pair, topk_ids):
        T, k = topk_ids.shape
        return torch.arange(T, device=pair.device).repeat_interleave(k)[pair]


# -- near misses ------------------------------------------------------------------------------------------------------


class WeightOfNext(Compared):
    def experts(self, x, topk_ids, topk_weights):
        out = torch.zeros_like(x)
        for e in range(NUM_EXPERTS):
            token = self.tokens(self.hit(topk_ids, e))
            other = self.hit(topk_ids, (e + 1) % NUM_EXPERTS)
            out[token] += self.expert(e, x[token]) * self.weight(topk_weights, other, token)
        return out


class MeanWeight(Compared):
    def weight(self, topk_weights, hit, token):
        return (topk_weights * hit).mean(dim=-1)[token, None]


class WeightOfOthers(Compared):
    """The weights of the token's other experts."""

    def weight(self, topk_weights, hit, token):
        return topk_weights.masked_fill(hit, 0.0).sum(dim=-1)[token, None]


class FilledWithMore(Compared):
    def weight(self, topk_weights, hit, token):
        return torch.where(hit, topk_weights, 0.1).sum(dim=-1)[token, None]


class SummedTwice(Compared):
    """A token may have an expert twice: then it is among the expert's tokens twice, each time with both weights."""

    def route(self, logits):
        topk_weights, topk_ids = super().route(logits)
        return topk_weights, topk_ids // 2 * 2

    def experts(self, x, topk_ids, topk_weights):
        out = torch.zeros_like(x)
        for e in range(NUM_EXPERTS):
            hit = self.hit(topk_ids, e)
            token, _ = torch.where(hit)
            y = self.expert(e, x[token]) * self.weight(topk_weights, hit, token)
            out = out.index_add(0, token, y)
        return out


class OtherSlot(Slot):
    """The first slot in which the expert does not stand."""

    def slot(self, hit, token):
        return (~hit[token]).int().argmax(dim=-1)


class SlotOfNext(WeightOfNext, Slot):
    """Slots of one expert in the rows of another, where there are none: argmax then gives 0."""


class SlotGatheredElsewhere(Compared):
    """The slots of an expert's tokens, in the rows of those tokens backwards."""

    def weight(self, topk_weights, hit, token):
        rows = token.nonzero().squeeze(-1)
        return topk_weights[rows.flip(0)].gather(1, hit[token].long().argmax(1, keepdim=True))


class OtherSlotGathered(GatheredSlot):
    def slot(self, hit, token):
        return (~hit[token]).long().argmax(dim=1, keepdim=True)


class RowsOfOthers(OfRows):
    def weight(self, topk_weights, hit, token):
        return (topk_weights[token.flip(0)] * hit[token]).sum(dim=-1, keepdim=True)


class PickedBackwards(Compared):
    """The weights of an expert's tokens, last token first."""

    def weight(self, topk_weights, hit, token):
        return topk_weights[hit].flip(0).unsqueeze(-1)


class PickedBySlot(Compared):
    """First the tokens that chose the expert first: as many weights, and in another order."""

    def weight(self, topk_weights, hit, token):
        return topk_weights.T[hit.T].unsqueeze(-1)


class OtherQuotient(PairNumbers):
    """Not the token, but among the first of them."""

    def token(self, pair, topk_ids):
        return pair // (topk_ids.shape[1] + 1)


class RemainderAsToken(PairNumbers):
    def token(self, pair, topk_ids):
        return pair % topk_ids.shape[1]


class SlotsFirst(PairNumbers):
    """Weights in the order of the choices."""

    def score(self, topk_weights, pair):
        return topk_weights.T.flatten()[pair]


class TokensRepeated(PairNumbers):
    """0, 1, .., T - 1, again and again."""

    def token(self, pair, topk_ids):
        return torch.arange(topk_ids.shape[0], device=pair.device).repeat(topk_ids.shape[1])[pair]


class NextScore(PairNumbers):
    def score(self, topk_weights, pair):
        return topk_weights.flatten().roll(1)[pair]


class WeightAtMost(Compared):
    """The weights of all experts up to this one."""

    def experts(self, x, topk_ids, topk_weights):
        out = torch.zeros_like(x)
        for e in range(NUM_EXPERTS):
            token = self.tokens(topk_ids == e)
            weight = self.weight(topk_weights, topk_ids <= e, token)
            out[token] += self.expert(e, x[token]) * weight
        return out


class AtMost(Compared):
    def hit(self, topk_ids, e):
        return topk_ids <= e


class PlacedTwice(PlacedByProduct):
    """An expert that a token has twice gets the sum of both weights."""

    def route(self, logits):
        topk_weights, topk_ids = super().route(logits)
        return topk_weights, topk_ids // 2 * 2


class ByWeight(ByScore):
    """Tokens of little weight are left out of the list, and their weights are not."""

    def tokens(self, score):
        return (score - 0.3).clamp(min=0).nonzero().squeeze(-1)


SAMPLES = (
    Sample(name="compared", build=Compared),
    Sample(name="compared_kept_dimension", build=KeptDimension, brief=True),
    Sample(name="compared_where", build=Where, brief=True),
    Sample(name="compared_filled", build=Filled, brief=True),
    Sample(name="compared_picked", build=Picked, brief=True),
    Sample(name="compared_rows", build=OfRows, brief=True),
    Sample(name="compared_slot", build=Slot, brief=True),
    Sample(name="compared_gathered_slot", build=GatheredSlot, brief=True),
    Sample(name="compared_scores", build=ByScore, brief=True),
    Sample(name="pair_numbers", build=PairNumbers),
    Sample(name="place_in_row", build=PlaceInRow, brief=True),
    Sample(name="token_of_pair", build=TokenOfPair, brief=True),
    Sample(name="placed_by_product", build=PlacedByProduct, brief=True),
)

NEAR_MISSES = (
    NearMiss(name="compared_with_next", build=WeightOfNext, code="SPELLING"),
    NearMiss(name="compared_mean", build=MeanWeight, code="SPELLING"),
    NearMiss(name="weights_of_others", build=WeightOfOthers, code="SPELLING"),
    NearMiss(name="filled_with_more", build=FilledWithMore, code="SPELLING"),
    NearMiss(name="summed_twice", build=SummedTwice, code="SPELLING"),
    NearMiss(name="other_slot", build=OtherSlot, code="SPELLING"),
    NearMiss(name="slot_of_next", build=SlotOfNext, code="SPELLING"),
    NearMiss(name="slot_gathered_elsewhere", build=SlotGatheredElsewhere, code="SPELLING"),
    NearMiss(name="rows_of_others", build=RowsOfOthers, code="SPELLING"),
    NearMiss(name="picked_backwards", build=PickedBackwards, code="SPELLING"),
    NearMiss(name="picked_by_slot", build=PickedBySlot, code="SPELLING"),
    NearMiss(name="other_quotient", build=OtherQuotient, code="SPELLING"),
    NearMiss(name="remainder_as_token", build=RemainderAsToken, code="SPELLING"),
    NearMiss(name="weights_slots_first", build=SlotsFirst, code="SPELLING"),
    NearMiss(name="tokens_repeated", build=TokensRepeated, code="SPELLING"),
    NearMiss(name="next_score", build=NextScore, code="SPELLING"),
    NearMiss(name="other_slot_gathered", build=OtherSlotGathered, code="SPELLING"),
    NearMiss(name="weight_at_most", build=WeightAtMost, code="SPELLING"),
    NearMiss(name="compared_at_most", build=AtMost, code="SPELLING"),
    NearMiss(name="placed_twice", build=PlacedTwice, code="SPELLING"),
    NearMiss(name="tokens_by_weight", build=ByWeight, code="SPELLING"),
)
