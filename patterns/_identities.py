"""Experts that compute nothing: ids from E on give x itself, times the routing weight; samples of ``expert_loop``.

longcat_flash (4.57)    ModuleList of MLPs, then of nn.Identity
longcat_flash (5.x)     ``if expert_idx >= num_experts: y = rows``; the stack of one projection has rows for all
"""

import torch
from moe_inductor.patterns import _blocks
from moe_inductor.patterns._blocks import HIDDEN, NUM_EXPERTS
from torch import nn
from torch.nn import functional as F

from moe_inductor.match.api import NearMiss, Sample

IDENTITIES = 2
ALL = NUM_EXPERTS + IDENTITIES


class Identities(_blocks.Block):
    """As transformers 5.x writes it, over all ids; every method is one place to go wrong."""

    k = 3

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(HIDDEN, ALL, bias=False)

    def expert(self, e, rows):
        hidden = self.act(F.linear(rows, self.gate_up_proj[e], self.bias(self.gate_up_bias, e)))
        return F.linear(hidden, self.down_proj[e], self.bias(self.down_bias, e))

    def bias(self, biases, e):
        return None if biases is None else biases[e]

    def is_identity(self, e):
        return e >= NUM_EXPERTS

    def identity(self, x, token, rows, e):
        return rows

    def weight(self, topk_weights, token, slot, e):
        return topk_weights[token, slot, None]

    def start(self, x, topk_weights):
        return torch.zeros_like(x)

    def experts(self, x, topk_ids, topk_weights):
        out, mask = self.start(x, topk_weights), F.one_hot(topk_ids, ALL).permute(2, 1, 0)
        for e in range(ALL):
            slot, token = torch.where(mask[e])
            if token.numel() == 0:
                continue
            weight, rows = self.weight(topk_weights, token, slot, e), x[token]
            if self.weight_on_input:
                rows = rows * weight
            y = self.identity(x, token, rows, e) if self.is_identity(e) else self.expert(e, rows)
            if not self.weight_on_input:
                y = y * weight
            out.index_add_(0, token, y.to(out.dtype))
        return out


class HitIdentities(Identities):
    """Only experts that were hit; the first projection has rows for all ids, the second has not."""

    def __init__(self):
        super().__init__()
        more = self.gate_up_proj.detach()[:IDENTITIES]
        self.gate_up_proj = nn.Parameter(torch.cat((self.gate_up_proj.detach(), more)))

    def experts(self, x, topk_ids, topk_weights):
        out, mask = torch.zeros_like(x), F.one_hot(topk_ids, ALL).permute(2, 1, 0)
        for row in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
            e = int(row.item())
            slot, token = torch.where(mask[e])
            rows = x[token]
            y = rows if e >= NUM_EXPERTS else self.expert(e, rows)
            out.index_add_(0, token, (y * topk_weights[token, slot, None]).to(x.dtype))
        return out


class IdentityModules(Identities):
    """One list of modules; the router looks at a bias for the choice and leaves the order open; the sum in fp32."""

    def __init__(self):
        super().__init__()
        mlps = [_blocks.MLP() for _ in range(NUM_EXPERTS)]
        self.modules_of = nn.ModuleList(mlps + [nn.Identity() for _ in range(IDENTITIES)])
        self.register_buffer("correction", torch.linspace(-0.1, 0.1, ALL))

    def route(self, logits):
        scores = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        with torch.no_grad():
            topk_ids = torch.topk(scores + self.correction, self.k, dim=-1, sorted=False)[1]
        return scores.gather(1, topk_ids) * 2.5, topk_ids

    def start(self, x, topk_weights):
        return torch.zeros_like(x, dtype=topk_weights.dtype)

    def experts(self, x, topk_ids, topk_weights):
        return super().experts(x, topk_ids, topk_weights).to(x.dtype)

    def expert(self, e, rows):
        return self.modules_of[e](rows)

    identity = lambda self, x, token, rows, e: self.modules_of[e](rows)  # noqa: E731


class BiasedIdentities(Identities):
    biased = True


class IdentityOfWeighted(Identities):
    weight_on_input = True


class OtherBase(Identities):
    """Rows of another tensor."""

    def identity(self, x, token, rows, e):
        return (x * 0.5)[token]


class OtherToken(Identities):
    """Rows of other tokens."""

    def identity(self, x, token, rows, e):
        return x[x.shape[0] - 1 - token]


class Scaled(Identities):
    def identity(self, x, token, rows, e):
        return rows * 1.5


class ScaledOnce(Identities):
    """One of them is no identity."""

    def identity(self, x, token, rows, e):
        return rows if e == ALL - 1 else -rows


class Unweighted(Identities):
    def weight(self, topk_weights, token, slot, e):
        weight = topk_weights[token, slot, None]
        return torch.ones_like(weight) if self.is_identity(e) else weight


class OtherSlot(Identities):
    """Weighed as another choice of the token."""

    def weight(self, topk_weights, token, slot, e):
        return topk_weights[token, (slot + 1) % self.k if self.is_identity(e) else slot, None]


class IdentitiesFirst(Identities):
    """Ids of identities come before those of experts."""

    def is_identity(self, e):
        return e < IDENTITIES

    def expert(self, e, rows):
        return super().expert(e - IDENTITIES, rows)


class IdentityAmong(Identities):
    """Expert 1 is an identity, and so are not its weights."""

    def is_identity(self, e):
        return e == 1 or e >= NUM_EXPERTS


class IdentityDetached(Identities):
    def identity(self, x, token, rows, e):
        return rows.detach()


class IdentityEscapes(Identities):
    """What has been added up is read between two identities."""

    def experts(self, x, topk_ids, topk_weights):
        out, norm = self.start(x, topk_weights), 0.0
        mask = F.one_hot(topk_ids, ALL).permute(2, 1, 0)
        for e in range(ALL):
            slot, token = torch.where(mask[e])
            y = x[token] if self.is_identity(e) else self.expert(e, x[token])
            out.index_add_(0, token, y * topk_weights[token, slot, None])
            norm = norm + out.sum() if e == NUM_EXPERTS else norm
        return out + norm


SAMPLES = (
    Sample(name="identities", build=Identities),
    Sample(name="identity_modules", build=IdentityModules, brief=True),
    Sample(name="identities_hit", build=HitIdentities, brief=True),
    Sample(name="identities_biased", build=BiasedIdentities, brief=True),
    Sample(name="identities_of_weighted", build=IdentityOfWeighted, brief=True),
)

NEAR_MISSES = (
    NearMiss(name="identity_of_other_base", build=OtherBase, code="INPUTS_DIFFER"),
    NearMiss(name="identity_of_other_token", build=OtherToken, code="SPELLING"),
    NearMiss(name="identity_scaled", build=Scaled, code="SPELLING"),
    NearMiss(name="one_identity_negated", build=ScaledOnce, code="SPELLING"),
    NearMiss(name="identity_unweighted", build=Unweighted, code="MUTATION"),
    NearMiss(name="identity_of_other_slot", build=OtherSlot, code="MUTATION"),
    NearMiss(name="identities_first", build=IdentitiesFirst, code="EXPERT_WEIGHTS"),
    NearMiss(name="identity_among_experts", build=IdentityAmong, code="EXPERT_MISSING"),
    NearMiss(name="identity_detached", build=IdentityDetached, code="SPELLING"),
    NearMiss(name="identity_sum_escapes", build=IdentityEscapes, code="ESCAPES"),
)
