"""The experts that were chosen, as the distinct ids: the hit list of those who do not make a mask first.

for e in topk_ids.unique():             # or: torch.unique(topk_ids).tolist(), topk_ids.flatten().unique(sorted=False)
    token, slot = torch.where(topk_ids == e)
    ...
"""

import torch
from moe_inductor.patterns._blocks import NUM_EXPERTS
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
            self.add(out, token, self.expert(e, x[token]) * topk_weights[token, slot, None])
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
    ),
)
