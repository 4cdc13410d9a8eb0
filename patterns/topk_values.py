"""The k largest scores are the weights: ``weights, ids = topk(scores)``, in whatever way scores are made and weights
are finished."""

import torch
from moe_inductor.patterns._blocks import TOP_K
from moe_inductor.patterns._routers import Routed, limited
from torch.nn import functional as F

from moe_inductor.match.api import NearMiss, RouterSpelling, Sample


def reference(scores, choice, k, *, sorted):
    return torch.topk(choice, k, dim=-1, sorted=sorted)


class CastFirst(Routed):
    """Mixtral of transformers 5.x: weights stay fp32."""

    def route(self, logits):
        topk_weights, topk_ids = torch.topk(F.softmax(logits.float(), dim=-1), TOP_K, dim=-1)
        topk_weights /= topk_weights.sum(dim=-1, keepdim=True)
        return topk_weights, topk_ids


class NotRenormalised(Routed):
    """OLMoE, Jamba."""

    def route(self, logits):
        topk_weights, topk_ids = torch.topk(
            F.softmax(logits, dim=1, dtype=torch.float), TOP_K, dim=-1
        )
        return topk_weights.to(logits.dtype), topk_ids


class ModelDtype(Routed):
    def route(self, logits):
        return torch.topk(logits.softmax(-1), TOP_K)


class Greedy(Routed):
    """DeepSeek-V2: scaled, not renormalised, not sorted."""

    def route(self, logits):
        scores = logits.softmax(dim=-1, dtype=torch.float32)
        topk_weights, topk_ids = torch.topk(scores, k=TOP_K, dim=-1, sorted=False)
        return topk_weights * 2.5, topk_ids


class GroupLimited(Greedy):
    """DeepSeek-V2: experts of groups without a large maximum have a score of 0, and would weigh that."""

    def route(self, logits):
        scores = logits.softmax(dim=-1, dtype=torch.float32)
        scores = limited(scores, 2, 1, 0.0, lambda groups: groups.max(dim=-1).values)
        topk_weights, topk_ids = torch.topk(scores, k=TOP_K, dim=-1, sorted=False)
        return topk_weights * 2.5, topk_ids


class ByLargest(Greedy):
    def route(self, logits):
        scores = limited(logits.float().softmax(-1), 2, 1, 0.0, lambda groups: groups.amax(-1))
        return torch.topk(scores, k=TOP_K, dim=-1)


class Sigmoid(Routed):
    """Flint."""

    def route(self, logits):
        topk_weights, topk_ids = torch.topk(logits.sigmoid(), TOP_K, dim=-1)
        return topk_weights / topk_weights.sum(dim=-1, keepdim=True), topk_ids


class SigmoidEpsilon(Routed):
    """lfm2_moe without a bias."""

    def route(self, logits):
        topk_weights, topk_ids = torch.topk(logits.sigmoid(), k=TOP_K, dim=-1)
        topk_weights = topk_weights / (topk_weights.sum(dim=-1, keepdim=True) + 1e-2)
        return topk_weights * 1.5, topk_ids


class AfterTopk(Routed):
    """gpt_oss, aria: softmax of the k largest logits, in the dtype of the model."""

    def route(self, logits):
        topk_logits, topk_ids = torch.topk(logits, TOP_K, dim=-1)
        return F.softmax(topk_logits, dim=1, dtype=topk_logits.dtype), topk_ids


class AfterTopkInFloat(Routed):
    """granitemoe, jetmoe."""

    def route(self, logits):
        topk_logits, topk_ids = logits.float().topk(TOP_K, dim=-1)
        return torch.softmax(topk_logits, dim=-1).type_as(logits), topk_ids


class SigmoidAfterTopk(Routed):
    """cohere2_moe."""

    def route(self, logits):
        scores, topk_ids = torch.topk(logits, TOP_K, dim=-1)
        scores = F.sigmoid(scores)
        return scores / scores.sum(dim=-1, keepdim=True), topk_ids


class Divided(AfterTopk):
    """openai_privacy_filter: each weighs a k-th of its share."""

    def route(self, logits):
        topk_weights, topk_ids = super().route(logits)
        return topk_weights / TOP_K, topk_ids


class OneNorm(Routed):
    """dbrx."""

    def route(self, logits):
        weights = logits.softmax(dim=-1, dtype=torch.float32)
        topk_weights, topk_ids = torch.topk(weights, TOP_K, dim=-1)
        topk_weights = topk_weights / torch.norm(topk_weights, p=1.0, dim=-1, keepdim=True)
        return topk_weights.to(logits.dtype), topk_ids


class Squashed(Routed):
    """A function of the logits that the op does not know stays with the model: its results are the logits."""

    def route(self, logits):
        return torch.topk(logits.float().tanh(), TOP_K, dim=-1)


class TopOne(Routed):
    """llama4's sigmoid of one logit."""

    k = 1

    def route(self, logits):
        topk_logits, topk_ids = torch.topk(logits, 1, dim=1)
        return torch.sigmoid(topk_logits.float()).to(logits.dtype), topk_ids


class WrongDim(Routed):
    def route(self, logits):
        return torch.topk(F.softmax(logits, dim=0, dtype=torch.float32), TOP_K, dim=-1)


class OrderReturned(Routed):
    """The order of the k experts is left to the implementation and is visible in what the block returns."""

    def route(self, logits):
        return torch.topk(
            F.softmax(logits, dim=-1, dtype=torch.float32), TOP_K, dim=-1, sorted=False
        )

    def forward(self, x):
        topk_weights, topk_ids = self.route(self.gate(x))
        return self.experts(x, topk_ids, topk_weights), topk_ids


class OrderWeighted(OrderReturned):
    """The first of the chosen counts twice, whichever that is."""

    def forward(self, x):
        topk_weights, topk_ids = self.route(self.gate(x))
        return self.experts(x, topk_ids, topk_weights), topk_weights[:, 0]


class Smallest(Routed):
    def route(self, logits):
        return torch.topk(
            F.softmax(logits, dim=-1, dtype=torch.float32), TOP_K, dim=-1, largest=False
        )


class SumOfAll(Routed):
    """Divided by the sum along the wrong axis."""

    def route(self, logits):
        topk_weights, topk_ids = torch.topk(
            F.softmax(logits, dim=-1, dtype=torch.float32), TOP_K, dim=-1
        )
        return topk_weights / topk_weights.sum(dim=0, keepdim=True), topk_ids


class SumOfScores(Routed):
    """Divided by the sum over all experts."""

    def route(self, logits):
        scores = logits.float().sigmoid()
        topk_weights, topk_ids = torch.topk(scores, TOP_K, dim=-1)
        return topk_weights / scores.sum(dim=-1, keepdim=True), topk_ids


class BiasedWeights(Routed):
    """The bias is part of what the experts weigh."""

    def route(self, logits):
        return torch.topk(logits.float().softmax(-1) + self.bias, TOP_K, dim=-1)


class OtherIds(Routed):
    """Weights of one top-k, ids of another."""

    def route(self, logits):
        scores = F.softmax(logits, dim=-1, dtype=torch.float32)
        return torch.topk(scores, TOP_K, dim=-1).values, torch.topk(
            scores, TOP_K, dim=-1, largest=False
        ).indices


class ScoresWithoutGradient(Routed):
    def route(self, logits):
        with torch.no_grad():
            scores = F.softmax(logits, dim=-1, dtype=torch.float32)
        return torch.topk(scores, TOP_K, dim=-1)


class SumWithoutGradient(Routed):
    """The weights are divided by a constant, as far as gradients go."""

    def route(self, logits):
        topk_weights, topk_ids = torch.topk(logits.float().softmax(-1), TOP_K, dim=-1)
        return topk_weights / topk_weights.sum(dim=-1, keepdim=True).detach(), topk_ids


class ValuesEscape(Routed):
    """The scores before renormalisation are returned too, so the model's own top-k has to stay."""

    def forward(self, x):
        scores = F.softmax(self.gate(x), dim=-1, dtype=torch.float32)
        values, topk_ids = torch.topk(scores, TOP_K, dim=-1)
        return self.experts(x, topk_ids, values / values.sum(dim=-1, keepdim=True)), values


class TwoNorm(Routed):
    def route(self, logits):
        topk_weights, topk_ids = torch.topk(logits.float().softmax(-1), TOP_K, dim=-1)
        return topk_weights / torch.norm(topk_weights, p=2.0, dim=-1, keepdim=True), topk_ids


class OneNormOfLogits(Routed):
    """Logits can be negative, and then their 1-norm is not their sum."""

    def route(self, logits):
        topk_weights, topk_ids = torch.topk(logits.float(), TOP_K, dim=-1)
        return topk_weights / torch.norm(topk_weights, p=1.0, dim=-1, keepdim=True), topk_ids


class ScaledFirst(Routed):
    """Scaled before an epsilon is added to the sum."""

    def route(self, logits):
        topk_weights, topk_ids = torch.topk(logits.float().sigmoid(), TOP_K, dim=-1)
        topk_weights = topk_weights * 2.5
        return topk_weights / (topk_weights.sum(dim=-1, keepdim=True) + 1e-2), topk_ids


class TwoFunctions(Routed):
    def route(self, logits):
        topk_weights, topk_ids = torch.topk(logits.float().sigmoid(), TOP_K, dim=-1)
        return topk_weights.softmax(-1), topk_ids


class OtherGroups(GroupLimited):
    """The best group by the mean of its scores."""

    def route(self, logits):
        scores = limited(logits.float().softmax(-1), 2, 1, 0.0, lambda groups: groups.mean(-1))
        return torch.topk(scores, k=TOP_K, dim=-1)


class WorstGroup(GroupLimited):
    def route(self, logits):
        scores = logits.float().softmax(-1)
        scores = limited(scores, 2, 1, 0.0, lambda groups: groups.amax(-1), largest=False)
        return torch.topk(scores, k=TOP_K, dim=-1)


class WeightsOfOtherGroups(GroupLimited):
    """A token that runs out of experts in its groups gives others a weight that is not 0."""

    def route(self, logits):
        scores = limited(logits.float().softmax(-1), 2, 1, 0.25, lambda groups: groups.amax(-1))
        return torch.topk(scores, k=TOP_K, dim=-1)


TOPK_VALUES = RouterSpelling(
    name="topk_values",
    source="transformers: mixtral, qwen2_moe, olmoe, jamba, deepseek_v2, flint, gpt_oss, granitemoe, dbrx, ...",
    reference=reference,
    facts={"sorted": (True, False)},
    unordered=lambda facts: not facts["sorted"],
    samples=(
        Sample(name="cast_first", build=CastFirst),
        Sample(name="dtype_argument", build=Routed, brief=True),
        Sample(name="not_renormalised", build=NotRenormalised),
        Sample(name="model_dtype", build=ModelDtype),
        Sample(name="greedy", build=Greedy, brief=True),
        Sample(name="group_limited", build=GroupLimited),
        Sample(name="by_largest", build=ByLargest, brief=True),
        Sample(name="sigmoid", build=Sigmoid, brief=True),
        Sample(name="sigmoid_epsilon", build=SigmoidEpsilon, brief=True),
        Sample(name="after_topk", build=AfterTopk),
        Sample(name="after_topk_in_float", build=AfterTopkInFloat, brief=True),
        Sample(name="sigmoid_after_topk", build=SigmoidAfterTopk, brief=True),
        Sample(name="divided", build=Divided, brief=True),
        Sample(name="one_norm", build=OneNorm, brief=True),
        Sample(name="squashed", build=Squashed, brief=True),
        Sample(name="top_one", build=TopOne, brief=True),
    ),
    near_misses=tuple(
        NearMiss(name=name, build=build, code="ROUTER")
        for name, build in {
            "softmax_over_tokens": WrongDim,
            "order_returned": OrderReturned,
            "order_weighted": OrderWeighted,
            "smallest": Smallest,
            "renormalised_over_tokens": SumOfAll,
            "renormalised_over_all": SumOfScores,
            "biased_weights": BiasedWeights,
            "ids_of_another_topk": OtherIds,
            "scores_without_gradient": ScoresWithoutGradient,
            "sum_without_gradient": SumWithoutGradient,
            "scores_escape": ValuesEscape,
            "two_norm": TwoNorm,
            "one_norm_of_logits": OneNormOfLogits,
            "scaled_first": ScaledFirst,
            "two_functions": TwoFunctions,
            "groups_by_mean": OtherGroups,
            "worst_group": WorstGroup,
            "weights_of_other_groups": WeightsOfOtherGroups,
        }.items()
    ),
)
