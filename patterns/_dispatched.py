"""Every expert reads all tokens, of which a mask has set those to zero that did not choose it: samples of
``dense_experts`` and ``dense_loop``.

    xs = torch.einsum("te,th->eth", mask, x)
    out = torch.einsum("te,eth->th", scores, experts(xs))

GShard's way to send tokens, without a capacity and so without slots.  In the normal form (``region/dispatched.py``)
experts read the tokens as they are.
"""

import torch
from moe_inductor.patterns import _blocks
from moe_inductor.patterns._blocks import NUM_EXPERTS
from torch import nn
from torch.nn import functional as F

from moe_inductor.match.api import NearMiss, Sample


class Dispatched(_blocks.Block):
    """Stacked weights."""

    transposed = True
    sent, combined = "te,th->eth", "te,eth->th"

    def scores(self, topk_ids, topk_weights):
        zeros = topk_weights.new_zeros(topk_weights.shape[0], NUM_EXPERTS)
        return zeros.scatter(1, topk_ids, topk_weights)

    def mask(self, topk_ids, scores):
        return F.one_hot(topk_ids, NUM_EXPERTS).sum(dim=1).to(scores.dtype)

    def mlp(self, rows):
        return torch.bmm(self.act(torch.bmm(rows, self.gate_up_proj)), self.down_proj)

    def experts(self, x, topk_ids, topk_weights):
        scores = self.scores(topk_ids, topk_weights)
        rows = torch.einsum(self.sent, self.mask(topk_ids, scores), x)
        return torch.einsum(self.combined, scores, self.mlp(rows))


class TokensFirst(Dispatched):
    sent, combined = "te,th->teh", "te,teh->th"

    def mlp(self, rows):
        hidden = self.act(torch.einsum("teh,eho->teo", rows, self.gate_up_proj))
        return torch.einsum("teo,eoh->teh", hidden, self.down_proj)


class Weighted(Dispatched):
    """Sent where the weight is not zero."""

    def mask(self, topk_ids, scores):
        return (scores > 0).type_as(scores)


class Each(Dispatched):
    """Experts in a ModuleList, with biases: what they make of zeros is not zero."""

    def __init__(self):
        super().__init__()
        self.mlps = nn.ModuleList(_blocks.Plain() for _ in range(NUM_EXPERTS))

    def mlp(self, rows):
        return torch.stack([mlp(rows[e]) for e, mlp in enumerate(self.mlps)])


class EachTokensFirst(Each):
    sent, combined = "te,th->teh", "te,teh->th"

    def mlp(self, rows):
        return torch.stack([mlp(rows[:, e]) for e, mlp in enumerate(self.mlps)], dim=1)


class Added(Each):
    """A loop, and one expert per token."""

    k = 1

    def experts(self, x, topk_ids, topk_weights):
        scores, out = self.scores(topk_ids, topk_weights), torch.zeros_like(x)
        rows = torch.einsum(self.sent, self.mask(topk_ids, scores), x)
        for e, mlp in enumerate(self.mlps):
            out = out + scores[:, e : e + 1] * mlp(rows[e])
        return out


class TwoGates(Each):
    """GShard: a second choice among what the first left."""

    def route(self, logits):
        first = logits.softmax(-1).argmax(-1)
        chosen = F.one_hot(first, NUM_EXPERTS)
        left = logits.masked_fill(chosen.bool(), float("-inf"))
        return logits.softmax(-1), torch.stack([first, left.argmax(-1)], dim=-1)

    def choices(self, topk_ids):
        return [F.one_hot(ids, NUM_EXPERTS) for ids in topk_ids.unbind(-1)]

    def scores(self, topk_ids, gates):
        masks = self.choices(topk_ids)
        one, two = ((gates * mask).sum(dim=1) for mask in masks)
        total = one + two
        return (one / total)[:, None] * masks[0] + (two / total)[:, None] * masks[1]

    def mask(self, topk_ids, scores):
        first, second = self.choices(topk_ids)
        return (first + second).type_as(scores)


# -- near misses ------------------------------------------------------------------------------------------------------


class MaskOfOther(Dispatched):
    """An expert reads zeros for the tokens that chose it."""

    def mask(self, topk_ids, scores):
        return super().mask(topk_ids, scores).flip(1)


class MaskOfFirst(Dispatched):
    """Second choices are weighted, and not sent."""

    def mask(self, topk_ids, scores):
        return super().mask(topk_ids[:, :1], scores)


class Halved(Dispatched):
    def mask(self, topk_ids, scores):
        return 0.5 * super().mask(topk_ids, scores)


class Large(Dispatched):
    """Tokens of a small weight are not sent."""

    def mask(self, topk_ids, scores):
        return (scores > 0.5).type_as(scores)


class MayBeNegative(Weighted):
    """Logits for weights: those below zero are not sent, and count."""

    def route(self, logits):
        return torch.topk(logits, self.k, dim=-1)


class WeightedTwice(Dispatched):
    def mask(self, topk_ids, scores):
        return scores


class NonzeroFill(Each):
    """An expert that was not chosen adds what it makes of zeros."""

    def scores(self, topk_ids, topk_weights):
        full = topk_weights.new_full((topk_weights.shape[0], NUM_EXPERTS), 0.01)
        return full.scatter(1, topk_ids, topk_weights)


class RowsMixed(Dispatched):
    """What a token is worth depends on those that are zero."""

    def act(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).softmax(dim=1) * up


class OtherRows(Each):
    """The masked tokens of the next expert."""

    def mlp(self, rows):
        return super().mlp(rows.roll(1, dims=0))


STACKED = (
    Sample(name="dispatched", build=Dispatched),
    Sample(name="dispatched_tokens_first", build=TokensFirst, brief=True),
    Sample(name="dispatched_by_weight", build=Weighted, brief=True),
)

EACH = (
    Sample(name="dispatched", build=Each),
    Sample(name="dispatched_tokens_first", build=EachTokensFirst, brief=True),
    Sample(name="dispatched_added", build=Added, brief=True),
    Sample(name="dispatched_two_gates", build=TwoGates, brief=True),
)

NEAR_STACKED = (
    NearMiss(name="dispatched_by_other_mask", build=MaskOfOther, code="SPELLING"),
    NearMiss(name="dispatched_first_only", build=MaskOfFirst, code="SPELLING"),
    NearMiss(name="dispatched_halved", build=Halved, code="SPELLING"),
    NearMiss(name="dispatched_large", build=Large, code="SPELLING"),
    NearMiss(name="dispatched_positive", build=MayBeNegative, code="SPELLING"),
    NearMiss(name="dispatched_weighted", build=WeightedTwice, code="SPELLING"),
    NearMiss(name="dispatched_rows_mixed", build=RowsMixed, code="ACTIVATION"),
)

NEAR_EACH = (
    NearMiss(name="dispatched_nonzero_fill", build=NonzeroFill, code="INPUTS_DIFFER"),
    NearMiss(name="dispatched_other_rows", build=OtherRows, code="INPUTS_DIFFER"),
)
