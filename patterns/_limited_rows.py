"""Experts that take the first C of their tokens and drop the others, by a slice: samples of ``expert_loop``.

    makeMoE with a capacity     rows = torch.nonzero(mask).squeeze(-1)
                                rows = rows[:capacity] if rows.numel() > capacity else rows
                                if rows.numel() > 0:
                                    updates.index_add_(0, rows, expert(x[rows]) * scores[rows, e, None])

In the normal form a pair that is dropped has the id -1 (``region/limited.py``).
"""

import torch
from moe_inductor.patterns import _blocks
from moe_inductor.patterns._blocks import NUM_EXPERTS
from torch import nn
from torch.nn import functional as F

from moe_inductor.match.api import NearMiss, Sample


class Limited(_blocks.Block):
    """Every method is one place to go wrong.  Of 29 tokens about half are dropped by one of their experts."""

    capacity = 7

    def __init__(self):
        super().__init__()
        self.mlps = nn.ModuleList(_blocks.MLP() for _ in range(NUM_EXPERTS))

    def scores(self, topk_ids, topk_weights):
        zeros = torch.zeros(topk_ids.shape[0], NUM_EXPERTS, dtype=topk_weights.dtype)
        return zeros.scatter(-1, topk_ids, topk_weights)

    def rows(self, topk_ids, e):
        return torch.nonzero((topk_ids == e).any(dim=-1)).squeeze(-1)

    def first(self, rows):
        return rows[: self.capacity] if rows.numel() > self.capacity else rows

    def experts(self, x, topk_ids, topk_weights):
        updates, scores = torch.zeros_like(x), self.scores(topk_ids, topk_weights)
        for e, expert in enumerate(self.mlps):
            rows = self.first(self.rows(topk_ids, e))
            if rows.numel() > 0:
                updates.index_add_(0, rows, expert(x[rows]) * scores[rows, e].unsqueeze(1))
        return updates


class AtLeast(Limited):
    """The test the other way round."""

    def first(self, rows):
        return rows if rows.shape[0] <= self.capacity else rows[: self.capacity]


class CutShort(Limited):
    """Nothing is done for experts that have room."""

    def first(self, rows):
        if rows.numel() > self.capacity:
            rows = rows[: self.capacity]
        return rows


class Sliced(Limited):
    """Without a test: a slice takes no more rows than there are."""

    def first(self, rows):
        return rows[: self.capacity]

    def experts(self, x, topk_ids, topk_weights):
        out, scores = torch.zeros_like(x), self.scores(topk_ids, topk_weights)
        for e, expert in enumerate(self.mlps):
            rows = self.first(self.rows(topk_ids, e))
            out[rows] += expert(x[rows]) * scores[rows, e, None]
        return out


class One(Sliced):
    k = 1


# -- near misses ------------------------------------------------------------------------------------------------------


class LastRows(Sliced):
    def first(self, rows):
        return rows[-self.capacity :]


class SecondRow(Sliced):
    """The first token of each expert is dropped as well."""

    def first(self, rows):
        return rows[1 : self.capacity]


class EveryOther(Sliced):
    def first(self, rows):
        return rows[: self.capacity : 2]


class SlotBySlot(Sliced):
    """All first choices come before all second ones: other pairs are dropped."""

    def rows(self, topk_ids, e):
        return torch.where((topk_ids == e).T)[1]


class LateTest(Limited):
    """Experts with a few tokens more than they have room for take them all."""

    def first(self, rows):
        return rows[: self.capacity] if rows.numel() > self.capacity + 2 else rows


class OtherRows(Limited):
    """One of the two is not a slice of the other."""

    def first(self, rows):
        return rows[: self.capacity] if rows.numel() > self.capacity else rows.flip(0)


class CutTooShort(Limited):
    """An expert with too many tokens takes less than others may."""

    def first(self, rows):
        if rows.numel() > self.capacity:
            rows = rows[: self.capacity - 1]
        return rows


class CutAndChanged(Limited):
    """Where tokens are dropped, the last one weighs nothing."""

    def experts(self, x, topk_ids, topk_weights):
        updates, scores = torch.zeros_like(x), self.scores(topk_ids, topk_weights)
        for e, expert in enumerate(self.mlps):
            rows = self.rows(topk_ids, e)
            if rows.numel() > self.capacity:
                rows = rows[: self.capacity]
                scores[-1] = 0
            updates.index_add_(0, rows, expert(x[rows]) * scores[rows, e].unsqueeze(1))
        return updates


class DropsRead(Sliced):
    """All tokens of an expert are read, and the first C of them get what it gives for the last."""

    def experts(self, x, topk_ids, topk_weights):
        out, scores = torch.zeros_like(x), self.scores(topk_ids, topk_weights)
        for e, expert in enumerate(self.mlps):
            all_rows = self.rows(topk_ids, e)
            rows = self.first(all_rows)
            y = expert(x[all_rows].flip(0)[: rows.shape[0]])
            out.index_add_(0, rows, y * scores[rows, e, None])
        return out


class Dropout(Limited):
    """makeMoE: dropout at the end of each expert, which is trained."""

    def experts(self, x, topk_ids, topk_weights):
        out, scores = torch.zeros_like(x), self.scores(topk_ids, topk_weights)
        for e, expert in enumerate(self.mlps):
            rows = self.rows(topk_ids, e)
            y = F.dropout(expert(x[rows]), 0.5) * 0
            out.index_add_(0, rows, (expert(x[rows]) + y) * scores[rows, e, None])
        return out


SAMPLES = (
    Sample(name="limited", build=Limited),
    Sample(name="limited_at_least", build=AtLeast, brief=True),
    Sample(name="limited_cut_short", build=CutShort, brief=True),
    Sample(name="limited_by_slice", build=Sliced, brief=True),
    Sample(name="limited_one", build=One, brief=True),
)
NEAR_MISSES = (
    NearMiss(name="limited_last_rows", build=LastRows, code="SPELLING"),
    NearMiss(name="limited_from_second", build=SecondRow, code="SPELLING"),
    NearMiss(name="limited_every_other", build=EveryOther, code="SPELLING"),
    NearMiss(name="limited_slot_by_slot", build=SlotBySlot, code="SPELLING"),
    NearMiss(name="limited_late", build=LateTest, code="CONTROL_FLOW"),
    NearMiss(name="limited_other_rows", build=OtherRows, code="CONTROL_FLOW"),
    NearMiss(name="limited_too_short", build=CutTooShort, code="CONTROL_FLOW"),
    NearMiss(name="limited_and_changed", build=CutAndChanged, code="CONTROL_FLOW"),
    NearMiss(name="limited_drops_read", build=DropsRead, code="SPELLING"),
    NearMiss(name="limited_dropout", build=Dropout, code="SPELLING"),
)
