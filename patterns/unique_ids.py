"""The experts that were chosen, as the distinct ids: the hit list of those who do not make a mask first.

for e in topk_ids.unique():             # or: torch.unique(topk_ids).tolist(), topk_ids.flatten().unique(sorted=False)
    token, slot = torch.where(topk_ids == e)
    ...
"""

import torch
from moe_inductor.patterns._blocks import NUM_EXPERTS
from moe_inductor.patterns._loop_mistakes import loop_mistakes
from moe_inductor.patterns.expert_loop import Loop

from moe_inductor.match.api import HitListSpelling, NearMiss, Sample


def reference(topk_ids, num_classes, *, sort):
    return torch.unique(topk_ids, sorted=sort)


class Distinct(Loop):
    def listed(self, topk_ids):
        return topk_ids.unique()

    def rows(self, topk_ids, e):
        return torch.where(topk_ids == e)

    def experts(self, x, topk_ids, topk_weights):
        out = self.start(x)
        for e in self.listed(topk_ids):
            token, slot = self.rows(topk_ids, e)
            y = self.expert(e, x[token]) * self.weight(topk_weights, token, slot)
            self.add(out, token, y)
        return out


class Numbers(Distinct):
    def listed(self, topk_ids):
        return torch.unique(topk_ids).tolist()


class Unsorted(Distinct):
    def listed(self, topk_ids):
        return topk_ids.flatten().unique(sorted=False).tolist()


class Items(Distinct):
    def experts(self, x, topk_ids, topk_weights):
        out = self.start(x)
        for row in topk_ids.view(-1).unique():
            e = row.item()
            token, slot = (topk_ids == e).nonzero(as_tuple=True)
            self.add(out, token, self.expert(e, x[token]) * topk_weights[token, slot, None])
        return out


class Array(Distinct):
    """By way of NumPy."""

    def listed(self, topk_ids):
        return topk_ids.unique().cpu().numpy()


class Pairs(Distinct):
    """One row per pair, each of which has one expert."""

    def experts(self, x, topk_ids, topk_weights):
        ids, rows = topk_ids.flatten(), x.repeat_interleave(topk_ids.shape[1], dim=0)
        y = torch.zeros_like(rows)
        for e in self.listed(ids):
            y[ids == e] = self.expert(e, rows[ids == e])
        y = y.view(*topk_ids.shape, -1) * topk_weights[..., None]
        return y.sum(dim=1)


# -- near misses ------------------------------------------------------------------------------------------------------


class FirstChoices(Distinct):
    """Experts that are nobody's first choice are left out."""

    def listed(self, topk_ids):
        return topk_ids[:, 0].unique()


class OtherTokens(Distinct):
    def listed(self, topk_ids):
        return topk_ids[1:].unique()


class Next(Distinct):
    """Each expert in the place of the one before it."""

    def listed(self, topk_ids):
        return (topk_ids + 1).remainder(NUM_EXPERTS).unique()


class Counts(Distinct):
    """How often each is chosen, taken for who is chosen."""

    def listed(self, topk_ids):
        return topk_ids.unique(return_counts=True)[1]


class Neighbours(Distinct):
    """Equal neighbours are one: an expert may be listed twice."""

    def listed(self, topk_ids):
        return topk_ids.flatten().unique_consecutive()


class Rows(Distinct):
    """The list is that of other ids, which are the same in another order: that is not known."""

    def rows(self, topk_ids, e):
        return torch.where(topk_ids.flip(0) == e)


class WithoutFirst(Distinct):
    """The list is said to start with a sentinel, and does not."""

    def listed(self, topk_ids):
        return topk_ids.unique()[1:]


class WithoutLast(Distinct):
    def listed(self, topk_ids):
        return topk_ids.unique()[:-1]


class Halves(Distinct):
    """Groups of two experts, taken for experts."""

    def listed(self, topk_ids):
        return (topk_ids // 2).unique()


class Clamped(Distinct):
    """The last expert is never listed."""

    def listed(self, topk_ids):
        return topk_ids.clamp(max=NUM_EXPERTS - 2).unique()


class Best(Distinct):
    """The largest id of each token."""

    def listed(self, topk_ids):
        return topk_ids.amax(dim=-1).unique()


class LastChoices(Distinct):
    def listed(self, topk_ids):
        return topk_ids[:, 1:].unique()


class EveryOtherToken(Distinct):
    def listed(self, topk_ids):
        return topk_ids[::2].unique()


class Places(Distinct):
    """Where each id stands in the list of distinct ones: 0, 1, .., whoever was chosen."""

    def listed(self, topk_ids):
        return topk_ids.unique(return_inverse=True)[1].unique()


class Order(Distinct):
    """The list is sorted once more, by place instead of by value."""

    def listed(self, topk_ids):
        return topk_ids.unique().argsort()


class Numbered(Distinct):
    """The number of the pass for that of the expert."""

    def experts(self, x, topk_ids, topk_weights):
        out, i = self.start(x), 0
        for e in self.listed(topk_ids):
            token, slot = self.rows(topk_ids, e)
            y = self.expert(i, x[token]) * self.weight(topk_weights, token, slot)
            self.add(out, token, y)
            i += 1  # noqa: SIM113  (enumerate is not captured either)
        return out


class Twice(Distinct):
    """Every expert is listed twice."""

    def listed(self, topk_ids):
        return topk_ids.unique().repeat(2)


class OtherRouter(Distinct):
    """The list is that of another router."""

    def forward(self, x):
        self.others = self.route(self.gate(x.flip(-1)))[1]
        return super().forward(x)

    def listed(self, topk_ids):
        return self.others.unique()


class AtLeast(Distinct):
    def rows(self, topk_ids, e):
        return torch.where(topk_ids >= e)


class Others(Distinct):
    def rows(self, topk_ids, e):
        return torch.where(topk_ids != e)


class FirstSlotOnly(Distinct):
    """Tokens that chose the expert first."""

    def rows(self, topk_ids, e):
        return torch.where(topk_ids[:, :1] == e)


class SkipsOne(Distinct):
    """Expert 2 is for something else."""

    def experts(self, x, topk_ids, topk_weights):
        out = self.start(x)
        for e in self.listed(topk_ids):
            if e == 2:
                continue
            token, slot = self.rows(topk_ids, e)
            y = self.expert(e, x[token]) * self.weight(topk_weights, token, slot)
            self.add(out, token, y)
        return out


class SumRead(Distinct):
    """The sum is read between two experts."""

    def experts(self, x, topk_ids, topk_weights):
        out, norm = self.start(x), torch.zeros(())
        for e in self.listed(topk_ids):
            token, slot = self.rows(topk_ids, e)
            y = self.expert(e, x[token]) * self.weight(topk_weights, token, slot)
            self.add(out, token, y)
            norm = norm + out.sum()
        return out + norm


UNIQUE_IDS = HitListSpelling(
    name="unique_ids",
    source="many re-implementations of Mixtral and DeepSeek-MoE",
    reference=reference,
    facts={"sort": (True, False)},
    ids_in_range=True,
    samples=(
        Sample(name="distinct", build=Distinct),
        Sample(name="distinct_numbers", build=Numbers),
        Sample(name="unsorted", build=Unsorted, brief=True),
        Sample(name="distinct_items", build=Items, brief=True),
        Sample(name="distinct_array", build=Array, brief=True),
        Sample(name="distinct_pairs", build=Pairs, brief=True),
    ),
    near_misses=(
        NearMiss(name="distinct_first_choices", build=FirstChoices, code="ASSUMPTION"),
        NearMiss(name="distinct_of_other_tokens", build=OtherTokens, code="ASSUMPTION"),
        NearMiss(name="distinct_shifted", build=Next, code="ASSUMPTION"),
        NearMiss(name="counts_of_distinct", build=Counts, code="ASSUMPTION"),
        NearMiss(name="distinct_neighbours", build=Neighbours, code="ASSUMPTION"),
        NearMiss(name="rows_of_another", build=Rows, code="ASSUMPTION"),
        NearMiss(name="without_first", build=WithoutFirst, code="CONTROL_FLOW"),
        NearMiss(name="without_last", build=WithoutLast, code="CONTROL_FLOW"),
        NearMiss(name="halves", build=Halves, code="ASSUMPTION"),
        NearMiss(name="clamped", build=Clamped, code="ASSUMPTION"),
        NearMiss(name="largest_of_each", build=Best, code="EXPERT_MISSING"),
        NearMiss(name="last_choices", build=LastChoices, code="ASSUMPTION"),
        NearMiss(name="every_other_token", build=EveryOtherToken, code="ASSUMPTION"),
        NearMiss(name="places", build=Places, code="ASSUMPTION"),
        NearMiss(name="order", build=Order, code="ASSUMPTION"),
        NearMiss(name="numbered", build=Numbered, code="CONTROL_FLOW"),
        NearMiss(name="listed_twice", build=Twice, code="CONTROL_FLOW"),
        NearMiss(name="other_router", build=OtherRouter, code="ASSUMPTION"),
        NearMiss(name="at_least", build=AtLeast, code="SPELLING"),
        NearMiss(name="others", build=Others, code="SPELLING"),
        NearMiss(name="first_slot_only", build=FirstSlotOnly, code="SPELLING"),
        NearMiss(name="skips_one", build=SkipsOne, code="EXPERT_MISSING"),
        NearMiss(name="sum_read_in_between", build=SumRead, code="ASSUMPTION"),
        *loop_mistakes(
            Distinct,
            expert_of_next="CONTROL_FLOW",
            down_of_next="ASSUMPTION",
            written_over="SPELLING",
            weight_of_other_slot="SPELLING",
        ),
    ),
)
