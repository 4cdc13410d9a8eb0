"""One expert per token, by an argmax, and what it weighs looked up: ``ids = scores.argmax(-1)``, then a gather.

Of equal scores the first is promised, and given.  A maximum of whose two results only the ids are read is the same.
"""

from moe_inductor.patterns._routers import Routed

from moe_inductor.match.api import NearMiss, RouterSpelling, Sample


def reference(scores, choice, k, *, by, keepdim):
    best = choice.argmax if by == "argmax" else lambda **dims: choice.max(**dims)[1]
    topk_ids = best(dim=-1, keepdim=keepdim).view(-1, 1)
    return scores.gather(1, topk_ids), topk_ids


class Switch(Routed):
    k = 1

    def choose(self, scores):
        return scores.argmax(dim=-1, keepdim=True)

    def pick(self, scores, topk_ids):
        return scores.gather(1, topk_ids)

    def route(self, logits):
        scores = logits.float().softmax(-1)
        topk_ids = self.choose(scores)
        return self.pick(scores, topk_ids), topk_ids


class Unkept(Switch):
    def choose(self, scores):
        return scores.argmax(dim=-1).unsqueeze(-1)


class Corrected(Switch):
    def choose(self, scores):
        return (scores + self.bias).argmax(dim=-1, keepdim=True)


class CorrectedMaximum(Switch):
    def choose(self, scores):
        return (scores + self.bias).max(dim=-1)[1].unsqueeze(-1)


class Smallest(Switch):
    def choose(self, scores):
        return scores.argmin(dim=-1, keepdim=True)


class OverTokens(Switch):
    """The best of the first tokens for each expert, as often as there are tokens."""

    def choose(self, scores):
        return scores[:4].argmax(dim=0)[None, :1].expand(len(scores), 1)


class NextExpert(Switch):
    def pick(self, scores, topk_ids):
        return scores.gather(1, (topk_ids + 1) % 4)


class BiasedWeights(Corrected):
    def pick(self, scores, topk_ids):
        return (scores + self.bias).gather(1, topk_ids)


TOP1_GATHER = RouterSpelling(
    name="top1_gather",
    source="re-implementations of Switch that ask for the expert first; top-1 with a bias for the choice",
    reference=reference,
    facts={"by": ("argmax", "max"), "keepdim": (True, False)},
    samples=(
        Sample(name="switch", build=Switch),
        Sample(name="switch_unkept", build=Unkept, brief=True),
        Sample(name="switch_corrected", build=Corrected),
        Sample(name="switch_corrected_maximum", build=CorrectedMaximum, brief=True),
    ),
    near_misses=(
        NearMiss(name="switch_smallest", build=Smallest, code="ROUTER"),
        NearMiss(name="switch_over_tokens", build=OverTokens, code="ROUTER"),
        NearMiss(name="switch_next_expert", build=NextExpert, code="ROUTER"),
        NearMiss(name="switch_biased_weights", build=BiasedWeights, code="ROUTER"),
    ),
)
