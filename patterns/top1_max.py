"""One expert per token, by a maximum: ``weights, ids = scores.max(dim=-1)``."""

from moe_inductor.patterns._routers import Routed

from moe_inductor.match.api import NearMiss, RouterSpelling, Sample


def reference(scores, choice, k, *, keepdim):
    weights, topk_ids = choice.max(dim=-1, keepdim=keepdim)
    return weights.view(-1, 1), topk_ids.view(-1, 1)


class Kept(Routed):
    k = 1

    def route(self, logits):
        return logits.float().softmax(-1).max(dim=-1, keepdim=True)


class Unkept(Routed):
    k = 1

    def route(self, logits):
        weights, topk_ids = logits.sigmoid().max(dim=-1)
        return weights.unsqueeze(-1) * 2.5, topk_ids.unsqueeze(-1)


class OverTokens(Kept):
    def route(self, logits):
        return logits.float().softmax(0).max(dim=-1, keepdim=True)


class Biased(Kept):
    def route(self, logits):
        return (logits.float().softmax(-1) + self.bias).max(dim=-1, keepdim=True)


class OtherIds(Kept):
    """The expert with the largest corrected score, the weight of the one with the largest score."""

    def route(self, logits):
        scores = logits.float().softmax(-1)
        return scores.max(dim=-1, keepdim=True)[0], (scores + self.bias).max(dim=-1, keepdim=True)[
            1
        ]


class OtherWeight(Kept):
    """The weight of the least likely expert for the most likely one."""

    def route(self, logits):
        scores = logits.float().softmax(-1)
        return scores.min(dim=-1, keepdim=True)[0], scores.max(dim=-1, keepdim=True)[1]


TOP1_MAX = RouterSpelling(
    name="top1_max",
    source="top-1 routers as in Switch and its likes, without their capacity",
    reference=reference,
    facts={"keepdim": (True, False)},
    samples=(
        Sample(name="kept", build=Kept),
        Sample(name="unkept", build=Unkept, brief=True),
    ),
    near_misses=(
        NearMiss(name="over_tokens", build=OverTokens, code="ROUTER"),
        NearMiss(name="biased", build=Biased, code="ROUTER"),
        NearMiss(name="other_ids", build=OtherIds, code="ROUTER"),
        NearMiss(name="other_weight", build=OtherWeight, code="ROUTER"),
    ),
)
