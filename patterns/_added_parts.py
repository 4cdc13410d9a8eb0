"""Sorted pairs, of which every expert adds up its own part, one expert after the other.

    order = topk_ids.flatten().argsort()
    for expert, pairs in zip(experts, order.split(counts)):
        token = pairs // k
        out.index_add_(0, token, expert(x[token]) * topk_weights.flatten()[pairs, None])

Nothing is put together again; the parts are, in the normal form (``region/pairs.py``).
"""

import torch
from moe_inductor.patterns import _blocks
from moe_inductor.patterns._blocks import HIDDEN, NUM_EXPERTS, TOP_K
from torch import nn

from moe_inductor.match.api import NearMiss, Sample


class Offsets(_blocks.Block):
    """Every method is one place to go wrong."""

    visited = range(NUM_EXPERTS)

    def __init__(self):
        super().__init__()
        self.mlps = nn.ModuleList(_blocks.MLP() for _ in range(NUM_EXPERTS))

    def counts(self, topk_ids):
        return torch.bincount(topk_ids.flatten(), minlength=NUM_EXPERTS).tolist()

    def token(self, order):
        return order // TOP_K

    def start(self, x):
        return torch.zeros_like(x)

    def rows(self, x, token, out):
        return x[token]

    def bounds(self, counts, e):
        start = sum(counts[:e])
        return start, start + counts[e]

    def tokens_to_add_to(self, topk_ids, tokens):
        return [tokens] * NUM_EXPERTS

    def sorted_weights(self, topk_weights, order):
        return topk_weights.flatten()[order, None]

    def add(self, out, token, y, e):
        out.index_add_(0, token, y)

    def experts(self, x, topk_ids, topk_weights):
        out, order = self.start(x), topk_ids.flatten().argsort()
        tokens, counts = self.token(order), self.counts(topk_ids)
        to, weights = (
            self.tokens_to_add_to(topk_ids, tokens),
            self.sorted_weights(topk_weights, order),
        )
        for e in self.visited:
            start, end = self.bounds(counts, e)
            y = self.mlps[e](self.rows(x, tokens[start:end], out))
            self.add(out, to[e][start:end], y * weights[start:end], e)
        return out


class Skipping(Offsets):
    """Past experts without tokens."""

    def experts(self, x, topk_ids, topk_weights):
        out, order = torch.zeros_like(x), topk_ids.flatten().argsort()
        tokens, start = order // TOP_K, 0
        counts = self.counts(topk_ids)
        for e, n in enumerate(counts):
            if n == 0:
                continue
            token = tokens[start : start + n]
            weights = topk_weights.flatten()[order[start : start + n], None]
            out.index_add_(0, token, self.mlps[e](x[token]) * weights)
            start += n
        return out


class SplitOrder(Offsets):
    def experts(self, x, topk_ids, topk_weights):
        out, order = torch.zeros_like(x), topk_ids.flatten().argsort()
        for e, pairs in enumerate(torch.split(order, self.counts(topk_ids))):
            token = pairs // TOP_K
            y = self.mlps[e](x[token]) * topk_weights.view(-1)[pairs].unsqueeze(-1)
            out = out.index_add(0, token, y)
        return out


class AddedInPlace(Offsets):
    """``out[token] += y``, which is a sum where no token occurs twice."""

    def experts(self, x, topk_ids, topk_weights):
        out, order = torch.zeros_like(x), topk_ids.flatten().argsort()
        counts = self.counts(topk_ids)
        parts = zip(self.mlps, self.token(order).split(counts), order.split(counts), strict=True)
        for expert, token, pairs in parts:
            out[token] += expert(x[token]) * topk_weights.flatten()[pairs][:, None]
        return out


class SortedBefore(Offsets):
    """Rows and weights are sorted before the loop, ids are counted when they are sorted."""

    def experts(self, x, topk_ids, topk_weights):
        ids, order = topk_ids.flatten().sort()
        token = order // TOP_K
        rows, weights = x[token], topk_weights.flatten()[order][:, None]
        out, start = torch.zeros_like(x), 0
        for e, n in enumerate(self.counts(ids)):
            end = start + n
            y = self.mlps[e](rows[start:end]) * weights[start:end]
            out.index_add_(0, token[start:end], y)
            start = end
        return out


# -- near misses ------------------------------------------------------------------------------------------------------


class OneMissing(Offsets):
    visited = range(NUM_EXPERTS - 1)


class OneTwice(Offsets):
    visited = (0, 1, 1, 2)


class TwoSorts(Offsets):
    """The third expert adds to tokens in the order of another sort of the same ids, which may break ties otherwise."""

    def tokens_to_add_to(self, topk_ids, tokens):
        other = self.token(topk_ids.flatten().argsort(stable=True))
        return [tokens, tokens, other, tokens]


class OneRowEarly(Offsets):
    """The second expert's part begins with the last row of the first."""

    def bounds(self, counts, e):
        start, end = super().bounds(counts, e)
        return (start - 1, end - 1) if e == 1 else (start, end)


class AddedBackwards(Offsets):
    def add(self, out, token, y, e):
        super().add(out, token.flip(0), y, e)


class WeightsNotSorted(Offsets):
    def sorted_weights(self, topk_weights, order):
        return topk_weights.flatten()[:, None]


class ReadsTheSum(Offsets):
    def rows(self, x, token, out):
        return x[token] + out[token]


class MoreRows(Offsets):
    """A sum of which the last rows are nobody's."""

    def start(self, x):
        return x.new_zeros(x.shape[0] + 3, HIDDEN)

    def experts(self, x, topk_ids, topk_weights):
        return super().experts(x, topk_ids, topk_weights)[: x.shape[0]]


class OneDoubled(Offsets):
    def add(self, out, token, y, e):
        out.index_add_(0, token, y, alpha=2 if e == 1 else 1)


class WrongK(Offsets):
    def token(self, order):
        return order // (TOP_K + 1)


class AllInPlace(Offsets):
    """Of a token that occurs twice, one row is added."""

    def experts(self, x, topk_ids, topk_weights):
        out, order = torch.zeros_like(x), topk_ids.flatten().argsort()
        token = self.token(order)
        parts = zip(self.mlps, x[token].split(self.counts(topk_ids)), strict=True)
        y = torch.cat([expert(rows) for expert, rows in parts])
        out[token] += y * topk_weights.flatten()[order, None]
        return out


class SkipsOther(Offsets):
    """An expert is skipped where the next has no tokens."""

    def experts(self, x, topk_ids, topk_weights):
        out, order = torch.zeros_like(x), topk_ids.flatten().argsort()
        counts = self.counts(topk_ids)
        for e, expert in enumerate(self.mlps):
            if counts[(e + 1) % NUM_EXPERTS] == 0:
                continue
            start, end = self.bounds(counts, e)
            token = order[start:end] // TOP_K
            weights = topk_weights.flatten()[order[start:end], None]
            out.index_add_(0, token, expert(x[token]) * weights)
        return out


class Normed(Offsets):
    def rows(self, x, token, out):
        return x[token] / x[token].square().mean(0, keepdim=True)


SAMPLES = (
    Sample(name="added_part_by_part", build=Offsets),
    Sample(name="added_past_empty", build=Skipping),
    Sample(name="split_order", build=SplitOrder),
    Sample(name="added_in_place", build=AddedInPlace),
    Sample(name="sorted_before", build=SortedBefore, brief=True),
)
NEAR_MISSES = (
    NearMiss(name="part_missing", build=OneMissing, code="SPELLING"),
    NearMiss(name="part_twice", build=OneTwice, code="EXPERT_TWICE"),
    NearMiss(name="two_sorts", build=TwoSorts, code="SPELLING"),
    NearMiss(name="one_row_early", build=OneRowEarly, code="PROOF"),
    NearMiss(name="added_backwards", build=AddedBackwards, code="SPELLING"),
    NearMiss(name="part_weights_not_sorted", build=WeightsNotSorted, code="SPELLING"),
    NearMiss(name="parts_read_the_sum", build=ReadsTheSum, code="INPUTS_DIFFER"),
    NearMiss(name="more_rows", build=MoreRows, code="SPELLING"),
    NearMiss(name="one_doubled", build=OneDoubled, code="SPELLING"),
    NearMiss(name="parts_of_wrong_k", build=WrongK, code="SPELLING"),
    NearMiss(name="all_in_place", build=AllInPlace, code="SPELLING"),
    NearMiss(name="part_skips_other", build=SkipsOther, code="ASSUMPTION"),
    NearMiss(name="part_normed", build=Normed, code="SPELLING"),
)
