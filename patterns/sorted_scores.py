"""All scores are sorted and the first k kept: ``w, ids = scores.sort(dim=-1, descending=True)``, then ``[:, :k]``."""

import torch
from moe_inductor.patterns._routers import Routed

from moe_inductor.match.api import NearMiss, RouterSpelling, Sample


def reference(scores, choice, k):
    values, topk_ids = torch.sort(choice, dim=-1, descending=True)
    return values[:, :k], topk_ids[:, :k]


class Sorted(Routed):
    def sort(self, scores):
        return scores.sort(dim=-1, descending=True)

    def first(self, values, topk_ids):
        return values[:, : self.k], topk_ids[:, : self.k]

    def route(self, logits):
        return self.first(*self.sort(logits.float().softmax(-1)))


class Renormalised(Sorted):
    def route(self, logits):
        weights, topk_ids = self.first(*self.sort(logits.sigmoid()))
        return weights / weights.sum(dim=-1, keepdim=True), topk_ids


class Ascending(Sorted):
    def sort(self, scores):
        return scores.sort(dim=-1)


class Biased(Sorted):
    """The corrected scores are also the weights."""

    def sort(self, scores):
        return super().sort(scores + self.bias)


class AllButFirst(Sorted):
    def first(self, values, topk_ids):
        return values[:, 1 : self.k + 1], topk_ids[:, 1 : self.k + 1]


class WeightsOfNext(Sorted):
    def first(self, values, topk_ids):
        return values[:, 1 : self.k + 1], topk_ids[:, : self.k]


class Stable(Sorted):
    """Of equal scores the first, which a top-k leaves open."""

    def sort(self, scores):
        return scores.sort(dim=-1, descending=True, stable=True)


SORTED_SCORES = RouterSpelling(
    name="sorted_scores",
    source="small re-implementations of top-k gating that rank all experts",
    reference=reference,
    samples=(
        Sample(name="sorted_values", build=Sorted),
        Sample(name="sorted_renormalised", build=Renormalised, brief=True),
    ),
    near_misses=(
        NearMiss(name="ascending", build=Ascending, code="ROUTER"),
        NearMiss(name="biased_values", build=Biased, code="ROUTER"),
        NearMiss(name="all_but_first", build=AllButFirst, code="ROUTER"),
        NearMiss(name="weights_of_next", build=WeightsOfNext, code="ROUTER"),
        NearMiss(name="stable", build=Stable, code="ROUTER"),
    ),
)
