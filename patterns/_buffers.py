"""Experts that take turns at a tensor [E, T, H], which is summed over the experts: samples of ``expert_loop``.

    mask = router_probs.bool()                                       # nllb_moe
    xs = einsum("th,te->eth", x, mask)
    for e, expert in enumerate(experts):
        token = mask[:, e]
        xs[e, token] = einsum("t,th->th", router_probs[token, e], expert(xs[e, token]))
    out = xs.sum(dim=0)

In the normal form (``region/buffers.py``) an expert reads rows of x, and what experts give is added up by index_add.
The scores are those of two choices, made one after the other (``region/distinct.py``, ``region/joined.py``), of which
those beyond a capacity are zero.
"""

import torch
from moe_inductor.patterns import _blocks
from moe_inductor.patterns._blocks import NUM_EXPERTS
from torch import nn
from torch.nn import functional as F

from moe_inductor.match.api import NearMiss, Sample


class TwoChoices(_blocks.Block):
    """nllb_moe of transformers 4.57, in evaluation, which scales what experts give as dropout does in training."""

    capacity = 9
    kept_rows = 0.8
    normalised_first = False

    def __init__(self):
        super().__init__()
        experts = {f"expert_{e}": _blocks.Plain() for e in range(NUM_EXPERTS)}
        self.mlps = nn.ModuleDict(experts)

    def without(self, logits, chosen):
        return logits.masked_fill(chosen.bool(), float("-inf"))

    def choices(self, logits):
        first = logits.softmax(-1).argmax(-1)
        left = self.without(logits, F.one_hot(first, NUM_EXPERTS))
        return first, left.argmax(-1)

    def route(self, logits):
        return None, torch.stack(self.choices(logits), dim=-1)

    def normalised(self, scores, first, second):
        one, two = (scores * first).sum(1), (scores * second).sum(1)
        total = torch.clamp(one + two, min=torch.finfo(scores.dtype).eps)
        return one / total, two / total

    def kept(self, first, second):
        place1 = torch.cumsum(first, dim=0) - 1
        place2 = torch.cumsum(second, dim=0) - 1
        place2 += torch.sum(first, dim=0, keepdim=True)
        return first * torch.lt(place1, self.capacity), second * torch.lt(place2, self.capacity)

    def scores(self, logits):
        probs = F.softmax(logits, dim=-1, dtype=torch.float32).to(logits.dtype)
        if logits.dtype == torch.float64:
            probs = logits.softmax(-1)
        first, second = (F.one_hot(c, NUM_EXPERTS) for c in self.choices(logits))
        weights = self.normalised(probs, first, second)
        first, second = self.kept(first, second)
        if not self.normalised_first:
            weights = self.normalised(probs, first, second)
        return weights[0][:, None] * first + weights[1][:, None] * second

    def mask(self, scores):
        return scores.bool()

    def buffer(self, x, mask):
        return torch.einsum("th,te->eth", x, mask)

    def read(self, x, buffer, e, token):
        return buffer[e, token]

    def part(self, e):
        return e

    def visited(self):
        return enumerate(self.mlps.values())

    def result(self, buffer):
        return buffer.sum(dim=0)

    def forward(self, x):
        scores = self.scores(self.gate(x))
        mask = self.mask(scores)
        buffer = self.buffer(x, mask)
        for e, expert in self.visited():
            token = mask[:, e]
            y = expert(self.read(x, buffer, e, token))
            y *= self.kept_rows
            buffer[self.part(e), token] = torch.einsum("b,be->be", scores[token, e], y)
        return self.result(buffer)


class NormalisedFirst(TwoChoices):
    normalised_first = True


class NothingDropped(TwoChoices):
    def kept(self, first, second):
        return first, second

    def mask(self, scores):
        return scores != 0

    def buffer(self, x, mask):
        return x.unsqueeze(0) * mask.t().unsqueeze(-1).to(x.dtype)


class FromZeros(TwoChoices):
    """Nothing is in the tensor before, and experts read the tokens."""

    def mask(self, scores):
        return scores > 0

    def buffer(self, x, mask):
        return x.new_zeros(NUM_EXPERTS, *x.shape)

    def read(self, x, buffer, e, token):
        return x[token]


class TokensFirst(TwoChoices):
    """[T, E, H]"""

    def forward(self, x):
        scores = self.scores(self.gate(x))
        mask = self.mask(scores)
        buffer = x[:, None] * mask[..., None]
        for e, expert in self.visited():
            token = mask[:, e]
            y = expert(buffer[token, e])
            buffer[token, e] = scores[token, e, None] * y
        return buffer.sum(dim=1)


class OfOneTopK(TwoChoices):
    """One choice of two, scattered into zeros."""

    def choices(self, logits):
        return logits.topk(2, dim=-1).indices.unbind(-1)

    def scores(self, logits):
        weights, topk_ids = logits.softmax(-1).topk(2, dim=-1)
        return torch.zeros_like(logits).scatter(1, topk_ids, weights)


class Stacked(TwoChoices):
    """A tensor for each expert."""

    def forward(self, x):
        scores, parts = self.scores(self.gate(x)), []
        for e, expert in self.visited():
            token = self.mask(scores)[:, e]
            part = torch.zeros_like(x)
            part[token] = scores[token, e, None] * expert(x[token])
            parts.append(part)
        return torch.stack(parts).sum(dim=0)


# -- near misses ------------------------------------------------------------------------------------------------------


class NotMasked(TwoChoices):
    """A token that an expert has not chosen stays in its part."""

    def buffer(self, x, mask):
        return x.expand(NUM_EXPERTS, *x.shape).clone()


class MaskOfOther(TwoChoices):
    """Part e holds the tokens of another expert."""

    def buffer(self, x, mask):
        return super().buffer(x, mask.flip(1))


class FromOnes(FromZeros):
    def buffer(self, x, mask):
        return x.new_ones(NUM_EXPERTS, *x.shape)


class Missing(TwoChoices):
    """The tokens of the last expert stay what they are."""

    def visited(self):
        return list(super().visited())[:-1]


class OtherPart(TwoChoices):
    """Written where the next expert reads."""

    def part(self, e):
        return (e + 1) % NUM_EXPERTS


class OnePart(FromZeros):
    """The last expert's rows stay."""

    def part(self, e):
        return 0


class ReadsOther(TwoChoices):
    """Rows of what the expert before has written."""

    def read(self, x, buffer, e, token):
        return buffer[max(e - 1, 0), token]


class Mean(TwoChoices):
    def result(self, buffer):
        return buffer.mean(dim=0)


class SumOfTokens(TwoChoices):
    def result(self, buffer):
        return buffer.sum(dim=1)


class Escapes(TwoChoices):
    """What one expert gave is read as well."""

    def result(self, buffer):
        return buffer.sum(dim=0), buffer[1].mean()


class SameTwice(TwoChoices):
    """The second choice may be the first."""

    def without(self, logits, chosen):
        return logits + 0.1 * torch.sin(5 * logits)


class NotExcluded(TwoChoices):
    """The second choice is the first wherever all logits are negative."""

    def without(self, logits, chosen):
        return logits.masked_fill(chosen.bool(), 0.0)


class OtherExcluded(TwoChoices):
    def without(self, logits, chosen):
        return super().without(logits, chosen.roll(1, dims=0))


class MayRoundToZero(TwoChoices):
    """Of scores that are all zero but one, the second choice may be the first."""

    def without(self, logits, chosen):
        return logits.softmax(-1) * (1 - chosen)


SAMPLES = (
    Sample(name="nllb_moe", build=TwoChoices),
    Sample(name="nllb_moe_normalised_first", build=NormalisedFirst, brief=True),
    Sample(name="nllb_moe_nothing_dropped", build=NothingDropped),
    Sample(name="parts_of_zeros", build=FromZeros, brief=True),
    Sample(name="parts_tokens_first", build=TokensFirst, brief=True),
    Sample(name="parts_of_one_top_k", build=OfOneTopK, brief=True),
    Sample(name="parts_stacked", build=Stacked, brief=True),
)

NEAR_MISSES = (
    NearMiss(name="part_not_masked", build=NotMasked, code="SPELLING"),
    NearMiss(name="part_of_other_mask", build=MaskOfOther, code="SPELLING"),
    NearMiss(name="part_of_ones", build=FromOnes, code="SPELLING"),
    NearMiss(name="part_missing", build=Missing, code="SPELLING"),
    NearMiss(name="part_of_next", build=OtherPart, code="SPELLING"),
    NearMiss(name="part_of_all", build=OnePart, code="SPELLING"),
    NearMiss(name="part_read_of_other", build=ReadsOther, code="INPUTS_DIFFER"),
    NearMiss(name="parts_mean", build=Mean, code="SPELLING"),
    NearMiss(name="parts_over_tokens", build=SumOfTokens, code="SPELLING"),
    NearMiss(name="part_escapes", build=Escapes, code="ESCAPES"),
    NearMiss(name="second_choice_is_first", build=SameTwice, code="SPELLING"),
    NearMiss(name="second_choice_not_excluded", build=NotExcluded, code="SPELLING"),
    NearMiss(name="second_choice_other_excluded", build=OtherExcluded, code="SPELLING"),
    NearMiss(name="second_choice_rounds", build=MayRoundToZero, code="SPELLING"),
)
