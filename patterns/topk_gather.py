"""Scores are compared in one form and looked up in another: a bias for the choice, groups, or a function of the chosen
logits alone.  ``ids = topk(choice).indices; weights = scores.gather(1, ids)``."""

import torch
from moe_inductor.patterns._routers import Routed, limited, two_largest
from torch.nn import functional as F

from moe_inductor.match.api import NearMiss, RouterSpelling, Sample


def reference(scores, choice, k, *, sorted):
    topk_ids = torch.topk(choice, k, dim=-1, sorted=sorted)[1]
    return scores.gather(1, topk_ids), topk_ids


class DeepseekV3(Routed):
    """deepseek_v3, dots1, glm4_moe and a dozen more; the parts of it are for near misses to change."""

    fill = float("-inf")
    kept = 1

    def score(self, logits):
        return logits.float().sigmoid()

    def correct(self, scores):
        return scores + self.bias

    def limit(self, choice):
        return limited(choice, 2, self.kept, self.fill, two_largest)

    def pick(self, scores, topk_ids):
        return scores.gather(1, topk_ids)

    def finish(self, topk_weights):
        topk_weights /= topk_weights.sum(dim=-1, keepdim=True) + 1e-20
        return topk_weights * 2.5

    def route(self, logits):
        scores = self.score(logits)
        choice = self.limit(self.correct(scores))
        topk_ids = torch.topk(choice, k=self.k, dim=-1, sorted=False)[1]
        return self.finish(self.pick(scores, topk_ids)), topk_ids


class FillOfZero(DeepseekV3):
    """4.57.6: dropped groups compare as 0, which is more than a biased score may be."""

    fill = 0.0


class ChoiceWithoutGradient(FillOfZero):
    """4.57.6: ``get_topk_indices`` runs under no_grad, which ids do not mind."""

    @torch.no_grad()
    def indices(self, scores):
        choice = self.limit(scores.view(-1, 4) + self.bias.unsqueeze(0))
        return torch.topk(choice, k=self.k, dim=-1, sorted=False)[1]

    def route(self, logits):
        scores = self.score(logits)
        topk_ids = self.indices(scores)
        return self.finish(scores.gather(1, topk_ids)), topk_ids


class Mistral4(DeepseekV3):
    """softmax in the dtype of the model, groups, no bias."""

    fill = 0.0

    def score(self, logits):
        return logits.softmax(-1)

    def correct(self, scores):
        return scores


class Corrected(DeepseekV3):
    """afmoe, hy_v3: no groups."""

    def limit(self, choice):
        return choice

    def finish(self, topk_weights):
        return topk_weights / (topk_weights.sum(dim=-1, keepdim=True) + 1e-20) * 2.5


class Sorted(Corrected):
    """minimax_m2, laguna; ids are returned."""

    def route(self, logits):
        scores = self.score(logits)
        topk_ids = torch.topk(scores + self.bias.to(scores.dtype), self.k, dim=-1)[1]
        topk_weights = scores.gather(-1, topk_ids)
        topk_weights = topk_weights / topk_weights.sum(dim=-1, keepdim=True)
        return topk_weights.to(logits.dtype), topk_ids

    def forward(self, x):
        topk_weights, topk_ids = self.route(self.gate(x))
        return self.experts(x, topk_ids, topk_weights), topk_ids


class SoftmaxCorrected(Corrected):
    """ernie4_5_moe."""

    def score(self, logits):
        return F.softmax(logits, dim=1, dtype=torch.float)

    def finish(self, topk_weights):
        return topk_weights / torch.clamp(topk_weights.sum(dim=-1, keepdim=True), min=0.6)


class SqrtSoftplus(Corrected):
    """deepseek_v4: scores in the dtype of the model."""

    def score(self, logits):
        return F.softplus(logits).sqrt()


class ModelDtype(Corrected):
    """lfm2_moe."""

    def score(self, logits):
        return logits.sigmoid()


class SigmoidOfChosen(Corrected):
    """kolibri1: logits are compared."""

    def score(self, logits):
        return logits.float()

    def finish(self, topk_weights):
        scores = topk_weights.sigmoid()
        return scores / scores.sum(dim=-1, keepdim=True)


class Capped(Corrected):
    """laguna: logits are capped before they are anything; that stays with the model."""

    def score(self, logits):
        return (torch.tanh(logits.float() / 3.0) * 3.0).sigmoid()


class DeepseekOwn(DeepseekV3):
    """deepseek-ai/DeepSeek-V3, inference/model.py: groups stay a dimension until experts are compared."""

    def limit(self, choice):
        grouped = choice.view(choice.shape[0], 2, -1)
        best = grouped.topk(2, dim=-1)[0].sum(dim=-1).topk(1, dim=-1)[1]
        return self.keep(grouped, best).flatten(1)

    def keep(self, grouped, best):
        dropped = grouped.new_ones(grouped.shape[:2], dtype=torch.bool).scatter_(1, best, False)
        return grouped.masked_fill_(dropped.unsqueeze(-1), float("-inf"))


class DeepseekOwnFirst(DeepseekOwn):
    """Its first version: the scores of dropped groups are multiplied with zero."""

    def keep(self, grouped, best):
        kept = torch.zeros_like(grouped[..., 0]).scatter_(1, best, True)
        return grouped * kept.unsqueeze(-1)


class Indexed(Corrected):
    def pick(self, scores, topk_ids):
        return scores[torch.arange(len(scores))[:, None], topk_ids]


class Along(Corrected):
    def pick(self, scores, topk_ids):
        return torch.take_along_dim(scores, topk_ids, dim=-1)


# -- near misses: one part each ---------------------------------------------------------------------------------------


class OtherScores(DeepseekV3):
    def pick(self, scores, topk_ids):
        return (2 * scores).gather(1, topk_ids)


class BiasedWeights(DeepseekV3):
    def pick(self, scores, topk_ids):
        return self.correct(scores).gather(1, topk_ids)


class NextExpert(DeepseekV3):
    """The weight of the expert after the chosen one."""

    def pick(self, scores, topk_ids):
        return scores.gather(1, (topk_ids + 1) % 4)


class OtherRows(DeepseekV3):
    def pick(self, scores, topk_ids):
        return scores.flip(0).gather(1, topk_ids)


class RowBefore(Indexed):
    """The scores of the token before."""

    def pick(self, scores, topk_ids):
        return scores[torch.arange(-1, len(scores) - 1)[:, None], topk_ids]


class HalfIds(Corrected):
    """Experts share the scores of the first two."""

    def pick(self, scores, topk_ids):
        return scores.gather(1, topk_ids % 2)


class NextIndexed(Indexed):
    def pick(self, scores, topk_ids):
        return super().pick(scores, (topk_ids + 1) % 4)


class GroupsDoubled(DeepseekOwnFirst):
    """The scores of kept groups count twice."""

    def keep(self, grouped, best):
        kept = torch.zeros_like(grouped[..., 0]).scatter_(1, best, 2.0)
        return grouped * kept.unsqueeze(-1)


class GroupsDropped(DeepseekOwn):
    """The best group is the one that is dropped."""

    def keep(self, grouped, best):
        dropped = torch.zeros(grouped.shape[:2], dtype=torch.bool).scatter_(1, best, True)
        return grouped.masked_fill(dropped.unsqueeze(-1), -9.0)


class BiasPerToken(Corrected):
    def correct(self, scores):
        return scores + scores.mean(dim=-1, keepdim=True) * self.bias


class BiasTwice(DeepseekV3):
    def correct(self, scores):
        return scores + self.bias + self.bias


class BiasTimesTwo(Corrected):
    def correct(self, scores):
        return torch.add(scores, self.bias, alpha=2)


class BiasMultiplied(Corrected):
    def correct(self, scores):
        return scores * (1 + self.bias)


class BiasSubtracted(Corrected):
    def correct(self, scores):
        return scores - self.bias


class BiasAfterGroups(DeepseekV3):
    fill = 0.0

    def route(self, logits):
        scores = self.score(logits)
        choice = self.correct(self.limit(scores))
        topk_ids = torch.topk(choice, k=self.k, dim=-1, sorted=False)[1]
        return self.finish(scores.gather(1, topk_ids)), topk_ids


class ThreeLargest(DeepseekV3):
    """Groups by the largest alone, in the words of two."""

    def limit(self, choice):
        return limited(choice, 2, 1, self.fill, lambda g: g.topk(1, dim=-1)[0].sum(dim=-1))


class GroupsBySmallest(DeepseekV3):
    def limit(self, choice):
        return limited(
            choice, 2, 1, self.fill, lambda g: g.topk(2, dim=-1, largest=False)[0].mean(-1)
        )


class GroupsOfOtherScores(DeepseekV3):
    """Groups are rated without the bias, experts with it."""

    def route(self, logits):
        scores = self.score(logits)
        mask = self.limit(scores) > float("-inf")
        choice = self.correct(scores).masked_fill(~mask, self.fill)
        topk_ids = torch.topk(choice, k=self.k, dim=-1, sorted=False)[1]
        return self.finish(scores.gather(1, topk_ids)), topk_ids


class KeptFilled(DeepseekV3):
    """The experts of the best groups are the ones that are filled."""

    def limit(self, choice):
        dropped = self.bias.new_zeros(choice.shape[0], 2)
        index = choice.view(-1, 2, 2).topk(2, dim=-1)[0].sum(-1).topk(1, sorted=False)[1]
        mask = dropped.scatter(1, index, 1).unsqueeze(-1).expand(-1, 2, 2).reshape(-1, 4)
        return choice.masked_fill(mask.bool(), -9.0)


class NormalisedChoice(Corrected):
    """The sum is that of what was compared."""

    def route(self, logits):
        scores = self.score(logits)
        values, topk_ids = torch.topk(self.correct(scores), k=self.k, dim=-1)
        return scores.gather(1, topk_ids) / values.sum(dim=-1, keepdim=True), topk_ids


class ClampedWeights(Corrected):
    """Each weight is clamped, not their sum."""

    def finish(self, topk_weights):
        return topk_weights / torch.clamp(topk_weights, min=0.6)


class ClampedFromAbove(Corrected):
    def finish(self, topk_weights):
        return topk_weights / torch.clamp(topk_weights.sum(dim=-1, keepdim=True), max=0.6)


class EpsilonPerToken(Corrected):
    def finish(self, topk_weights):
        return topk_weights / (topk_weights.sum(-1, keepdim=True) + topk_weights[:, :1].detach())


class Squared(Corrected):
    def finish(self, topk_weights):
        return topk_weights.square() * 2.5


class Shifted(Corrected):
    def finish(self, topk_weights):
        return topk_weights * 2.5 + 0.1


class OrderReturned(DeepseekV3):
    def forward(self, x):
        topk_weights, topk_ids = self.route(self.gate(x))
        return self.experts(x, topk_ids, topk_weights), topk_weights


class WeightsWithoutGradient(DeepseekV3):
    def pick(self, scores, topk_ids):
        return scores.detach().gather(1, topk_ids)


class SumWithoutGradient(DeepseekV3):
    def finish(self, topk_weights):
        return topk_weights / (topk_weights.detach().sum(dim=-1, keepdim=True) + 1e-20)


class ScoresWithoutGradient(DeepseekV3):
    def score(self, logits):
        with torch.no_grad():
            return super().score(logits)


class SoftplusAlone(Corrected):
    def score(self, logits):
        return F.softplus(logits)


class Steeper(Corrected):
    """Softplus with another beta."""

    def score(self, logits):
        return F.softplus(logits, beta=2.0).sqrt()


class RoundedScores(Corrected):
    """Scores are rounded once more before the bias is added."""

    def correct(self, scores):
        return scores.bfloat16() + self.bias.bfloat16()


TOPK_GATHER = RouterSpelling(
    name="topk_gather",
    source="transformers: deepseek_v3, glm4_moe, dots1, afmoe, minimax_m2, mistral4, ernie4_5_moe, kolibri1, ...",
    reference=reference,
    facts={"sorted": (True, False)},
    unordered=lambda facts: not facts["sorted"],
    samples=(
        Sample(name="deepseek_v3", build=DeepseekV3),
        Sample(name="fill_of_zero", build=FillOfZero, brief=True),
        Sample(name="choice_without_gradient", build=ChoiceWithoutGradient),
        Sample(name="mistral4", build=Mistral4),
        Sample(name="corrected", build=Corrected, brief=True),
        Sample(name="sorted", build=Sorted),
        Sample(name="softmax_corrected", build=SoftmaxCorrected, brief=True),
        Sample(name="sqrt_softplus", build=SqrtSoftplus),
        Sample(name="model_dtype", build=ModelDtype, brief=True),
        Sample(name="sigmoid_of_chosen", build=SigmoidOfChosen, brief=True),
        Sample(name="capped", build=Capped, brief=True),
        Sample(name="deepseek_own", build=DeepseekOwn),
        Sample(name="deepseek_own_first", build=DeepseekOwnFirst),
        Sample(name="indexed", build=Indexed),
        Sample(name="along", build=Along),
    ),
    near_misses=tuple(
        NearMiss(name=name, build=build, code="ROUTER")
        for name, build in {
            "other_scores": OtherScores,
            "biased_weights": BiasedWeights,
            "next_expert": NextExpert,
            "other_rows": OtherRows,
            "row_before": RowBefore,
            "half_ids": HalfIds,
            "next_indexed": NextIndexed,
            "groups_doubled": GroupsDoubled,
            "groups_dropped": GroupsDropped,
            "bias_per_token": BiasPerToken,
            "bias_twice": BiasTwice,
            "bias_times_two": BiasTimesTwo,
            "bias_multiplied": BiasMultiplied,
            "bias_subtracted": BiasSubtracted,
            "bias_after_groups": BiasAfterGroups,
            "group_by_one_of_two": ThreeLargest,
            "groups_by_smallest": GroupsBySmallest,
            "groups_of_other_scores": GroupsOfOtherScores,
            "kept_filled": KeptFilled,
            "normalised_by_choice": NormalisedChoice,
            "clamped_weights": ClampedWeights,
            "clamped_from_above": ClampedFromAbove,
            "epsilon_per_token": EpsilonPerToken,
            "squared": Squared,
            "shifted": Shifted,
            "order_returned": OrderReturned,
            "weights_without_gradient": WeightsWithoutGradient,
            "sum_without_gradient": SumWithoutGradient,
            "scores_without_gradient": ScoresWithoutGradient,
            "softplus_alone": SoftplusAlone,
            "steeper": Steeper,
            "rounded_scores": RoundedScores,
        }.items()
    ),
)
