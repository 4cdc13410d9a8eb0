"""One expert per token, whose result takes the place of the token; a token that no expert takes stays as it is.

    out = x.clone()
    for e in range(num_experts):
        out[mask[:, e]] = expert[e](x[mask[:, e]])

gptsan_japanese of transformers 4.57: switch transformers with a capacity, where what is beyond it is not dropped.  The
routing weight comes afterwards.
"""

import torch
from moe_inductor.patterns import _blocks
from moe_inductor.patterns._blocks import NUM_EXPERTS
from moe_inductor.patterns._mask_loops import Capacity

from moe_inductor.match.api import ExpertsSpelling, NearMiss, Sample


def reference(x, topk_ids, topk_weights, experts, *, weight_on):
    out = x
    for e, expert in experts:
        token, _ = torch.where(topk_ids == e)
        out = out.index_put((token,), expert(x[token]).to(x.dtype))
    return out


class Kept(Capacity):
    """gptsan_japanese: every method is one place to go wrong."""

    def start(self, x):
        return x.clone()


class KeptModules(Kept):
    """Plain experts with biases, in a ModuleDict."""

    def __init__(self):
        super().__init__()
        self.mlps = torch.nn.ModuleDict(
            {f"expert_{e}": _blocks.Plain() for e in range(NUM_EXPERTS)}
        )

    def expert(self, e, rows):
        return self.mlps[f"expert_{e}"](rows).to(rows.dtype)


class KeptAll(Kept):
    """No capacity: nobody stays."""

    def kept(self, topk_ids):
        return torch.nn.functional.one_hot(topk_ids[None, :, 0], num_classes=NUM_EXPERTS)


class StartsElsewhere(Kept):
    """What stays is not what the experts would have read."""

    def __init__(self):
        super().__init__()
        self.states = torch.nn.Parameter(torch.randn(64, 32))

    def start(self, x):
        return self.states[None, : x.shape[1]].clone()


class StartsDetached(Kept):
    def start(self, x):
        return x.detach().clone()


class ReadsTheSum(Kept):
    """An expert reads what the ones before it have written: its own tokens are not among these, and nobody shows it."""

    def experts(self, x, topk_ids, topk_weights):
        states, kept = x[None], self.kept(topk_ids).bool()
        out = self.start(states)
        for e in self.visited:
            rows = out[kept[:, :, e]] if e == 2 else states[kept[:, :, e]]
            out[kept[:, :, e]] = self.expert(e, rows)
        return (topk_weights[None] * out)[0]


class KeptMissing(Kept):
    visited = (0, 1, 3)


class KeptOtherWeights(Kept):
    def expert(self, e, rows):
        return super().expert(NUM_EXPERTS - 1 - e, rows)


class KeptTwo(Kept):
    """Two experts per token: the later one stays."""

    k = 2

    def kept(self, topk_ids):
        zeros = torch.zeros(1, topk_ids.shape[0], NUM_EXPERTS, dtype=torch.int64)
        return zeros.scatter(2, topk_ids[None], 1)

    def experts(self, x, topk_ids, topk_weights):
        return super().experts(x, topk_ids, topk_weights[:, :1])


class KeptSumRead(Kept):
    """What stands there in between is read outside."""

    def experts(self, x, topk_ids, topk_weights):
        states, kept, norm = x[None], self.kept(topk_ids).bool(), 0.0
        out = self.start(states)
        for e in self.visited:
            out[kept[:, :, e]] = self.expert(e, states[kept[:, :, e]])
            norm = norm + out.sum() if e == 1 else norm
        return (topk_weights[None] * out)[0] + norm


KEPT_TOKENS = ExpertsSpelling(
    name="kept_tokens",
    source="transformers 4.57: gptsan_japanese",
    reference=reference,
    anchor="aten::nonzero",
    facts={"weight_on": ("nothing",)},
    loop=True,
    keeps_tokens=True,
    samples=(
        Sample(name="kept", build=Kept),
        Sample(name="kept_modules", build=KeptModules, brief=True),
        Sample(name="kept_all", build=KeptAll, brief=True),
    ),
    near_misses=(
        NearMiss(name="starts_elsewhere", build=StartsElsewhere, code="ACCUMULATOR"),
        NearMiss(name="starts_detached", build=StartsDetached, code="ACCUMULATOR"),
        NearMiss(name="reads_the_sum", build=ReadsTheSum, code="INPUTS_DIFFER"),
        NearMiss(name="kept_expert_missing", build=KeptMissing, code="EXPERT_MISSING"),
        NearMiss(name="kept_other_weights", build=KeptOtherWeights, code="EXPERT_WEIGHTS"),
        NearMiss(name="kept_two", build=KeptTwo, code="ACCUMULATOR"),
        NearMiss(name="kept_sum_read", build=KeptSumRead, code="ESCAPES"),
    ),
)
