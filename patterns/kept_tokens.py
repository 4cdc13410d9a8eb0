"""One expert per token, whose result takes the place of the token; a token that no expert takes stays as it is.

    out = x.clone()
    for e in range(num_experts):
        out[mask[:, e]] = expert[e](x[mask[:, e]])

gptsan_japanese of transformers 4.57: switch transformers with a capacity, where what is beyond it is not dropped.  The
routing weight comes afterwards.
"""

import torch
from moe_inductor.patterns import _blocks
from moe_inductor.patterns._blocks import HIDDEN, NUM_EXPERTS
from moe_inductor.patterns._mask_loops import Capacity
from torch.nn import functional as F

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

    def read(self, states, kept, e):
        return states[kept[:, :, e]]

    def write(self, out, kept, e, y):
        out[kept[:, :, e]] = y

    def experts(self, x, topk_ids, topk_weights):
        states, kept = x[None], self.kept(topk_ids).bool()
        out = self.start(states)
        for e in self.visited:
            self.write(out, kept, e, self.expert(e, self.read(states, kept, e)))
        return (topk_weights[None] * out)[0]


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


class StartsScaled(Kept):
    def start(self, x):
        return 2.0 * x


class StartsNormed(Kept):
    """Experts read the states as they were before the norm."""

    def start(self, x):
        return F.rms_norm(x, (HIDDEN,))


class ReadsNormed(Kept):
    """Experts read what comes out of a norm, and what stays is what went in."""

    def read(self, states, kept, e):
        return super().read(F.rms_norm(states, (HIDDEN,)), kept, e)


class StartsFromOthers(Kept):
    """A token stays as another one."""

    def start(self, x):
        return x.flip(1)


class ReadsOthers(Kept):
    def read(self, states, kept, e):
        return super().read(states.flip(1), kept, e)


class GivenToOthers(Kept):
    """The expert's tokens get what is another's of them."""

    def write(self, out, kept, e, y):
        super().write(out, kept, e, y.flip(0))


class WrittenElsewhere(Kept):
    """As many tokens, and others."""

    def write(self, out, kept, e, y):
        super().write(out, kept.flip(1), e, y)


class Halved(Kept):
    def write(self, out, kept, e, y):
        super().write(out, kept, e, 0.5 * y)


class Decayed(Kept):
    """Half of what was there stays."""

    def write(self, out, kept, e, y):
        super().write(out, kept, e, 0.5 * out[kept[:, :, e]] + y)


class Squared(Kept):
    def write(self, out, kept, e, y):
        super().write(out, kept, e, y * y)


class NormAfter(Kept):
    def expert(self, e, rows):
        return F.rms_norm(super().expert(e, rows), (HIDDEN,))


class MeanOverTokens(Kept):
    def expert(self, e, rows):
        return super().expert(e, rows) / rows.shape[0]


class WeightInside(Kept):
    """What stays is not weighted, what experts give is."""

    def experts(self, x, topk_ids, topk_weights):
        states, kept = x[None], self.kept(topk_ids).bool()
        out = self.start(states)
        for e in self.visited:
            y = self.expert(e, self.read(states, kept, e))
            self.write(out, kept, e, y * self.read(topk_weights[None], kept, e))
        return out[0]


class KeptTwice(Kept):
    visited = (*range(NUM_EXPERTS), 1)


class MaskOfNext(Kept):
    """Ids that count from one."""

    def kept(self, topk_ids):
        return super().kept(topk_ids).roll(1, -1)


class AtMost(Kept):
    """Each expert's tokens are those of the ones before it as well, and the last one stays."""

    def kept(self, topk_ids):
        return super().kept(topk_ids).cumsum(-1)


class NotKept(Kept):
    def kept(self, topk_ids):
        return 1 - super().kept(topk_ids)


class DownOfNext(Kept):
    def expert(self, e, rows):
        hidden = self.act(F.linear(rows, self.gate_up_proj[e]))
        return F.linear(hidden, self.down_proj[(e + 1) % NUM_EXPERTS])


class OneGelu(Kept):
    """One expert is of another kind."""

    def expert(self, e, rows):
        if e != 2:
            return super().expert(e, rows)
        gate, up = F.linear(rows, self.gate_up_proj[e]).chunk(2, dim=-1)
        return F.linear(F.gelu(gate) * up, self.down_proj[e])


class NoGradExpert(Kept):
    def expert(self, e, rows):
        with torch.no_grad():
            return super().expert(e, rows)


class DetachedExpert(Kept):
    def expert(self, e, rows):
        return super().expert(e, rows).detach()


class ChangesStates(Kept):
    """The states are changed between two experts."""

    def experts(self, x, topk_ids, topk_weights):
        return super().experts(x.clone(), topk_ids, topk_weights)

    def read(self, states, kept, e):
        rows = super().read(states, kept, e)
        states.mul_(0.9)
        return rows


class GivenEscapes(Kept):
    """What each expert gives is read for a loss."""

    def expert(self, e, rows):
        y = super().expert(e, rows)
        self.norm = self.norm + y.square().sum()
        return y

    def forward(self, x):
        self.norm = 0.0
        return super().forward(x), self.norm


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
        NearMiss(name="starts_scaled", build=StartsScaled, code="ACCUMULATOR"),
        NearMiss(name="starts_normed", build=StartsNormed, code="ACCUMULATOR"),
        NearMiss(name="reads_normed", build=ReadsNormed, code="ACCUMULATOR"),
        NearMiss(name="starts_from_others", build=StartsFromOthers, code="ACCUMULATOR"),
        NearMiss(name="reads_others", build=ReadsOthers, code="ACCUMULATOR"),
        NearMiss(name="given_to_others", build=GivenToOthers, code="SPELLING"),
        NearMiss(name="written_elsewhere", build=WrittenElsewhere, code="SPELLING"),
        NearMiss(name="halved", build=Halved, code="SPELLING"),
        NearMiss(name="decayed", build=Decayed, code="SPELLING"),
        NearMiss(name="squared", build=Squared, code="SPELLING"),
        NearMiss(name="norm_after", build=NormAfter, code="SPELLING"),
        NearMiss(name="mean_over_tokens", build=MeanOverTokens, code="SPELLING"),
        NearMiss(name="weight_inside", build=WeightInside, code="SPELLING"),
        NearMiss(name="kept_twice", build=KeptTwice, code="EXPERT_TWICE"),
        NearMiss(name="mask_of_next", build=MaskOfNext, code="SPELLING"),
        NearMiss(name="kept_at_most", build=AtMost, code="SPELLING"),
        NearMiss(name="not_kept", build=NotKept, code="SPELLING"),
        NearMiss(name="down_of_next", build=DownOfNext, code="EXPERT_WEIGHTS"),
        NearMiss(name="one_gelu", build=OneGelu, code="ACTIVATION"),
        NearMiss(name="no_grad_expert", build=NoGradExpert, code="GRAD_STATE"),
        NearMiss(name="detached_expert", build=DetachedExpert, code="SPELLING"),
        NearMiss(name="changes_states", build=ChangesStates, code="MUTATION"),
        NearMiss(name="given_escapes", build=GivenEscapes, code="ESCAPES"),
    ),
)
