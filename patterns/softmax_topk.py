"""Softmax over all experts, then top-k, then (or not) weights that sum to one: Mixtral, Qwen, OLMoE, Jamba, ..."""

import torch
from moe_inductor.patterns._blocks import TOP_K
from moe_inductor.patterns.hf_batched_mm import Batched
from torch.nn import functional as F

from moe_inductor.match.api import NearMiss, RouterSpelling, Sample


def reference(router_logits, k, *, softmax, renormalise, cast):
    if softmax == "cast first":
        scores = torch.softmax(router_logits.float(), dim=-1)
    elif softmax == "dtype argument":
        scores = torch.softmax(router_logits, dim=-1, dtype=torch.float32)
    else:
        scores = torch.softmax(router_logits, dim=-1)
    topk_weights, topk_ids = torch.topk(scores, k, dim=-1)
    if renormalise:
        topk_weights = topk_weights / topk_weights.sum(dim=-1, keepdim=True)
    if cast:
        topk_weights = topk_weights.to(router_logits.dtype)
    return topk_weights, topk_ids


class CastFirst(Batched):
    """Mixtral of transformers 5.x: weights stay fp32."""

    def route(self, logits):
        topk_weights, topk_ids = torch.topk(F.softmax(logits.float(), dim=-1), TOP_K, dim=-1)
        topk_weights /= topk_weights.sum(dim=-1, keepdim=True)
        return topk_weights, topk_ids


class NotRenormalised(Batched):
    """OLMoE, Jamba."""

    def route(self, logits):
        topk_weights, topk_ids = torch.topk(
            F.softmax(logits, dim=1, dtype=torch.float), TOP_K, dim=-1
        )
        return topk_weights.to(logits.dtype), topk_ids


class ModelDtype(Batched):
    def route(self, logits):
        return torch.topk(logits.softmax(-1), TOP_K)


class WrongDim(Batched):
    def route(self, logits):
        return torch.topk(F.softmax(logits, dim=0, dtype=torch.float32), TOP_K, dim=-1)


class Unsorted(Batched):
    """The order of the k experts is left to the implementation and is visible in what the block returns."""

    def route(self, logits):
        return torch.topk(
            F.softmax(logits, dim=-1, dtype=torch.float32), TOP_K, dim=-1, sorted=False
        )

    def forward(self, x):
        topk_weights, topk_ids = self.route(self.gate(x))
        return self.experts(x, topk_ids, topk_weights), topk_ids


class Smallest(Batched):
    def route(self, logits):
        return torch.topk(
            F.softmax(logits, dim=-1, dtype=torch.float32), TOP_K, dim=-1, largest=False
        )


class Sigmoid(Batched):
    def route(self, logits):
        return torch.topk(logits.float().sigmoid(), TOP_K, dim=-1)


class AfterTopk(Batched):
    def route(self, logits):
        topk_logits, topk_ids = torch.topk(logits.float(), TOP_K, dim=-1)
        return topk_logits.softmax(-1), topk_ids


class Epsilon(Batched):
    def route(self, logits):
        topk_weights, topk_ids = torch.topk(
            F.softmax(logits, dim=-1, dtype=torch.float32), TOP_K, dim=-1
        )
        return topk_weights / (topk_weights.sum(dim=-1, keepdim=True) + 1e-2), topk_ids


class Scaled(Batched):
    def route(self, logits):
        topk_weights, topk_ids = torch.topk(
            F.softmax(logits, dim=-1, dtype=torch.float32), TOP_K, dim=-1
        )
        return topk_weights * 2.5, topk_ids


class SumOfAll(Batched):
    """Divided by the sum along the wrong axis."""

    def route(self, logits):
        topk_weights, topk_ids = torch.topk(
            F.softmax(logits, dim=-1, dtype=torch.float32), TOP_K, dim=-1
        )
        return topk_weights / topk_weights.sum(dim=0, keepdim=True), topk_ids


class Biased(Batched):
    def route(self, logits):
        scores = F.softmax(logits, dim=-1, dtype=torch.float32)
        topk_ids = torch.topk(scores + torch.arange(4.0), TOP_K, dim=-1).indices
        return scores.gather(1, topk_ids), topk_ids


class OtherIds(Batched):
    """Weights of one top-k, ids of another."""

    def route(self, logits):
        scores = F.softmax(logits, dim=-1, dtype=torch.float32)
        return torch.topk(scores, TOP_K, dim=-1).values, torch.topk(
            scores, TOP_K, dim=-1, largest=False
        ).indices


class PartWithoutGradient(Batched):
    def route(self, logits):
        with torch.no_grad():
            scores = F.softmax(logits, dim=-1, dtype=torch.float32)
        return torch.topk(scores, TOP_K, dim=-1)


class ValuesEscape(Batched):
    """The scores before renormalisation are returned too, so the model's own top-k has to stay."""

    def forward(self, x):
        scores = F.softmax(self.gate(x), dim=-1, dtype=torch.float32)
        values, topk_ids = torch.topk(scores, TOP_K, dim=-1)
        return self.experts(x, topk_ids, values / values.sum(dim=-1, keepdim=True)), values


SOFTMAX_TOPK = RouterSpelling(
    name="softmax_topk",
    source="transformers: mixtral, qwen2_moe, qwen3_moe, olmoe, jamba (4.x and 5.x)",
    reference=reference,
    facts={
        "softmax": ("cast first", "dtype argument", "model dtype"),
        "renormalise": (True, False),
        "cast": (False, True),
    },
    samples=(
        Sample(name="cast_first", build=CastFirst),
        Sample(name="dtype_argument", build=Batched),
        Sample(name="not_renormalised", build=NotRenormalised),
        Sample(name="model_dtype", build=ModelDtype),
    ),
    near_misses=(
        NearMiss(name="softmax_over_tokens", build=WrongDim, code="ROUTER"),
        NearMiss(name="unsorted", build=Unsorted, code="ROUTER"),
        NearMiss(name="smallest", build=Smallest, code="ROUTER"),
        NearMiss(name="sigmoid", build=Sigmoid, code="ROUTER"),
        NearMiss(name="softmax_after_topk", build=AfterTopk, code="ROUTER"),
        NearMiss(name="renormalised_with_epsilon", build=Epsilon, code="ROUTER"),
        NearMiss(name="scaled", build=Scaled, code="ROUTER"),
        NearMiss(name="renormalised_over_tokens", build=SumOfAll, code="ROUTER"),
        NearMiss(name="biased_choice", build=Biased, code="ROUTER"),
        NearMiss(name="ids_of_another_topk", build=OtherIds, code="ROUTER"),
        NearMiss(name="scores_without_gradient", build=PartWithoutGradient, code="GRAD_STATE"),
        NearMiss(name="scores_escape", build=ValuesEscape, code="ROUTER"),
    ),
)
