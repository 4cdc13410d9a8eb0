"""One expert per token, by an argmax, and what it weighs by a maximum of the same scores.

    ids = scores.argmax(-1)
    weights = scores.max(-1).values        # or amax

Of equal scores all weigh the same, so it does not matter that the second call may have found another one.
"""

from moe_inductor.patterns._routers import Routed

from moe_inductor.match.api import NearMiss, RouterSpelling, Sample


def reference(scores, choice, k, *, by, keepdim):
    topk_ids = choice.argmax(dim=-1, keepdim=keepdim)
    if by == "max":
        weights, _ = choice.max(dim=-1, keepdim=keepdim)
    else:
        weights = choice.amax(dim=-1, keepdim=keepdim)
    return weights.view(-1, 1), topk_ids.view(-1, 1)


class Switch(Routed):
    """switch_transformers of transformers."""

    k = 1

    def scores(self, logits):
        return logits.float().softmax(-1)

    def weigh(self, scores, choice):
        return choice.max(dim=-1).values.unsqueeze(-1)

    def corrected(self, scores):
        return scores

    def route(self, logits):
        scores = self.scores(logits)
        choice = self.corrected(scores)
        return self.weigh(scores, choice), choice.argmax(dim=-1).unsqueeze(-1)


class Amax(Switch):
    def weigh(self, scores, choice):
        return choice.amax(dim=-1, keepdim=True)

    def route(self, logits):
        scores = logits.sigmoid()
        return self.weigh(scores, scores) * 2.5, scores.argmax(dim=-1, keepdim=True)


class Corrected(Switch):
    """The expert with the largest corrected score, the weight of the one with the largest score."""

    def weigh(self, scores, choice):
        return scores.max(dim=-1).values.unsqueeze(-1)

    def corrected(self, scores):
        return scores + self.bias


class CorrectedWeight(Corrected):
    def weigh(self, scores, choice):
        return choice.max(dim=-1).values.unsqueeze(-1)


class Smallest(Switch):
    def weigh(self, scores, choice):
        return scores.min(dim=-1).values.unsqueeze(-1)


class OfLogits(Switch):
    """A softmax of the largest logit alone is one number for all."""

    def weigh(self, scores, choice):
        return choice.max(dim=-1, keepdim=True).values.softmax(-1)


class OverTokens(Switch):
    """The largest score of each of the first experts, as often as there are tokens."""

    def weigh(self, scores, choice):
        return scores.max(dim=0).values[:1].expand(len(scores)).unsqueeze(-1)


TOP1_TWO_CALLS = RouterSpelling(
    name="top1_two_calls",
    source="transformers switch_transformers; Fedus et al., Switch Transformers (2021), and re-implementations",
    reference=reference,
    facts={"by": ("max", "amax"), "keepdim": (True, False)},
    samples=(
        Sample(name="two_calls", build=Switch),
        Sample(name="two_calls_amax", build=Amax, brief=True),
    ),
    near_misses=(
        NearMiss(name="two_calls_corrected", build=Corrected, code="ROUTER"),
        NearMiss(name="two_calls_corrected_weight", build=CorrectedWeight, code="ROUTER"),
        NearMiss(name="two_calls_smallest", build=Smallest, code="ROUTER"),
        NearMiss(name="two_calls_of_logits", build=OfLogits, code="ROUTER"),
        NearMiss(name="two_calls_over_tokens", build=OverTokens, code="ROUTER"),
    ),
)
