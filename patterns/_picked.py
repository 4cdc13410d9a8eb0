"""All experts computed for all tokens, of which a token then picks those that it chose.

    ys = torch.stack([expert(x) for expert in experts], dim=1)
    chosen = torch.gather(ys, 1, topk_ids[..., None].expand(-1, -1, H))
    out = (chosen * topk_weights[..., None]).sum(dim=1)

In the normal form (``region/picked_experts.py``) that is a sum over all experts, with scores that are zero for most.
"""

import torch
from moe_inductor.patterns import _blocks
from moe_inductor.patterns._blocks import HIDDEN, NUM_EXPERTS
from torch import nn
from torch.nn import functional as F

from moe_inductor.match.api import NearMiss, Sample


class Gathered(_blocks.Block):
    """Every method is one place to go wrong."""

    def __init__(self):
        super().__init__()
        self.mlps = nn.ModuleList(_blocks.MLP() for _ in range(NUM_EXPERTS))

    def results(self, x):
        return torch.stack([expert(x) for expert in self.mlps], dim=1)

    def index(self, topk_ids):
        return topk_ids[..., None].expand(-1, -1, HIDDEN)

    def chosen(self, ys, topk_ids):
        return torch.gather(ys, 1, self.index(topk_ids))

    def combine(self, chosen, topk_weights):
        return (chosen * topk_weights[..., None]).sum(dim=1)

    def experts(self, x, topk_ids, topk_weights):
        return self.combine(self.chosen(self.results(x), topk_ids), topk_weights)


class Indexed(Gathered):
    def token(self, ys):
        return torch.arange(ys.shape[0], device=ys.device)

    def chosen(self, ys, topk_ids):
        return ys[self.token(ys)[:, None], topk_ids]


class ExpertsFirst(Indexed):
    def results(self, x):
        return torch.stack([expert(x) for expert in self.mlps])

    def chosen(self, ys, topk_ids):
        return ys[topk_ids, torch.arange(ys.shape[1], device=ys.device).unsqueeze(1)]


class ExpertsLast(Gathered):
    def results(self, x):
        return torch.stack([expert(x) for expert in self.mlps], dim=-1)

    def experts(self, x, topk_ids, topk_weights):
        chosen = self.results(x).gather(-1, topk_ids[:, None].expand(-1, HIDDEN, -1))
        return (chosen * topk_weights[:, None]).sum(-1)


class Along(Gathered):
    """``take_along_dim``, of results that were put together by ``cat``; and an einsum."""

    def results(self, x):
        return torch.cat([expert(x).unsqueeze(1) for expert in self.mlps], dim=1)

    def chosen(self, ys, topk_ids):
        return torch.take_along_dim(ys, topk_ids.unsqueeze(-1), dim=1)

    def combine(self, chosen, topk_weights):
        return torch.einsum("tkh,tk->th", chosen, topk_weights)


class Product(Gathered):
    def combine(self, chosen, topk_weights):
        return torch.bmm(topk_weights.unsqueeze(1), chosen).squeeze(1)


class InFloat(Gathered):
    def combine(self, chosen, topk_weights):
        wide = torch.promote_types(chosen.dtype, torch.float32)
        made = chosen.to(wide) * topk_weights[..., None].to(wide)
        return made.sum(dim=1).to(chosen.dtype)


class ScoredByProduct(Gathered):
    """Scores of all experts, in a product with all results."""

    def experts(self, x, topk_ids, topk_weights):
        zeros = topk_weights.new_zeros(topk_weights.shape[0], NUM_EXPERTS)
        scores = zeros.scatter(1, topk_ids, topk_weights)
        return torch.einsum("te,eth->th", scores, self.results(x).transpose(0, 1))


class Stacked(Gathered):
    """Experts in stacks, all computed by one product."""

    def __init__(self):
        super().__init__()
        del self.mlps

    def results(self, x):
        hidden = self.act(torch.einsum("th,eoh->teo", x, self.gate_up_proj))
        return torch.einsum("teo,eho->teh", hidden, self.down_proj)


class StackedIndexed(Stacked):
    def results(self, x):
        rows = x.expand(NUM_EXPERTS, -1, -1)
        hidden = self.act(torch.bmm(rows, self.gate_up_proj.transpose(1, 2)))
        return torch.bmm(hidden, self.down_proj.transpose(1, 2)).transpose(0, 1)

    def experts(self, x, topk_ids, topk_weights):
        token = torch.arange(x.shape[0], device=x.device)[:, None]
        return torch.einsum("tkh,tk->th", self.results(x)[token, topk_ids], topk_weights)


# -- near misses ------------------------------------------------------------------------------------------------------


class SameTwice(Gathered):
    def route(self, logits):
        topk_weights, topk_ids = super().route(logits)
        return topk_weights, topk_ids // 2 * 2


class LastForSmall(Indexed):
    """What weighs little goes to the last expert, which is -1."""

    def experts(self, x, topk_ids, topk_weights):
        ids = torch.where(topk_weights > 0.5, topk_ids, -1)
        return super().experts(x, ids, topk_weights)


class IdsModulo(Gathered):
    def index(self, topk_ids):
        return super().index(topk_ids) % (NUM_EXPERTS - 1)


class OtherTokens(Indexed):
    def token(self, ys):
        return super().token(ys).flip(0)


class FirstToken(Indexed):
    def token(self, ys):
        return torch.arange(1, device=ys.device)


class TwoPerFeature(Gathered):
    """Odd features are those of the other choice."""

    def index(self, topk_ids):
        return torch.stack((topk_ids, topk_ids.flip(1)), dim=-1).repeat(1, 1, HIDDEN // 2)


class HalfOfFeatures(Gathered):
    def index(self, topk_ids):
        return topk_ids[..., None].expand(-1, -1, HIDDEN // 2)

    def combine(self, chosen, topk_weights):
        return super().combine(chosen, topk_weights).repeat(1, 2)


class FirstTokens(Gathered):
    """``gather`` reads as many tokens as there are indices: here the last ones choose for the first."""

    def forward(self, x):
        topk_weights, topk_ids = self.route(self.gate(x[3:]))
        return F.pad(self.experts(x, topk_ids, topk_weights), (0, 0, 3, 0))


class FirstTokensIndexed(Indexed, FirstTokens):
    def token(self, ys):
        return torch.arange(ys.shape[0] - 3, device=ys.device)


class OneMoreExpert(Gathered):
    """One that nobody can choose."""

    def results(self, x):
        return torch.stack([*(expert(x) for expert in self.mlps), self.mlps[0](x)], dim=1)


class WeightsOfFirstToken(Gathered):
    def combine(self, chosen, topk_weights):
        return super().combine(chosen, topk_weights[:1])


class WeightsPerFeature(Gathered):
    def combine(self, chosen, topk_weights):
        scale = torch.linspace(0.5, 1.5, HIDDEN, dtype=chosen.dtype)
        return (chosen * (topk_weights[..., None] * scale)).sum(dim=1)


class SummedOverTokens(Gathered):
    def combine(self, chosen, topk_weights):
        return (chosen * topk_weights[..., None]).sum(dim=0).repeat(2, 1)


class Rounded(Gathered):
    def chosen(self, ys, topk_ids):
        return super().chosen(ys, topk_ids).to(torch.bfloat16)


class SquareOfTokens(Gathered):
    """Sequences as long as they are many, and the experts' results of the token at the mirrored place."""

    def forward(self, x):
        return super().forward(x[:16])

    def experts(self, x, topk_ids, topk_weights):
        topk_ids, topk_weights = topk_ids.view(4, 4, -1), topk_weights.view(4, 4, -1)
        ys = torch.stack([expert(x).view(4, 4, -1) for expert in self.mlps], dim=2)
        chosen = ys.transpose(0, 1).gather(2, topk_ids[..., None].expand(-1, -1, -1, HIDDEN))
        return (chosen * topk_weights[..., None]).sum(dim=2).view(16, -1)


class Unweighted(Gathered):
    def combine(self, chosen, topk_weights):
        return chosen.sum(dim=1)


class Mean(Gathered):
    def combine(self, chosen, topk_weights):
        return (chosen * topk_weights[..., None]).mean(dim=1)


class Largest(Gathered):
    def combine(self, chosen, topk_weights):
        return (chosen * topk_weights[..., None]).amax(dim=1)


class NextExpert(Gathered):
    def results(self, x):
        return super().results(x).roll(1, dims=1)


class ResultsEscape(Gathered):
    def experts(self, x, topk_ids, topk_weights):
        ys = self.results(x)
        chosen = self.chosen(ys, topk_ids)
        return self.combine(chosen, topk_weights) + ys.square().mean()


SAMPLES = (
    Sample(name="gathered", build=Gathered),
    Sample(name="indexed", build=Indexed),
    Sample(name="indexed_experts_first", build=ExpertsFirst, brief=True),
    Sample(name="gathered_experts_last", build=ExpertsLast, brief=True),
    Sample(name="taken_along", build=Along),
    Sample(name="picked_times_weights", build=Product, brief=True),
    Sample(name="picked_in_fp32", build=InFloat, brief=True),
    Sample(name="scored_by_product", build=ScoredByProduct, brief=True),
)
STACKED = (
    Sample(name="gathered_of_stack", build=Stacked),
    Sample(name="indexed_of_stack", build=StackedIndexed, brief=True),
)
NEAR_MISSES = (
    NearMiss(name="picked_same_twice", build=SameTwice, code="SPELLING"),
    NearMiss(name="last_for_small", build=LastForSmall, code="SPELLING"),
    NearMiss(name="ids_modulo", build=IdsModulo, code="SPELLING"),
    NearMiss(name="picked_of_other_tokens", build=OtherTokens, code="SPELLING"),
    NearMiss(name="picked_of_first_token", build=FirstToken, code="SPELLING"),
    NearMiss(name="two_per_feature", build=TwoPerFeature, code="SPELLING"),
    NearMiss(name="half_of_features", build=HalfOfFeatures, code="SPELLING"),
    NearMiss(name="picked_of_first_tokens", build=FirstTokens, code="SPELLING"),
    NearMiss(name="indexed_of_first_tokens", build=FirstTokensIndexed, code="SPELLING"),
    NearMiss(name="one_more_expert", build=OneMoreExpert, code="SPELLING"),
    NearMiss(name="weights_of_first_token", build=WeightsOfFirstToken, code="SPELLING"),
    NearMiss(name="weights_per_feature", build=WeightsPerFeature, code="SPELLING"),
    NearMiss(name="picked_summed_over_tokens", build=SummedOverTokens, code="SPELLING"),
    NearMiss(name="picked_rounded", build=Rounded, code="SPELLING"),
    NearMiss(name="square_of_tokens", build=SquareOfTokens, code="SPELLING"),
    NearMiss(name="picked_unweighted", build=Unweighted, code="SPELLING"),
    NearMiss(name="picked_mean", build=Mean, code="SPELLING"),
    NearMiss(name="picked_largest", build=Largest, code="SPELLING"),
    NearMiss(name="picked_next_expert", build=NextExpert, code="SPELLING"),
    NearMiss(name="results_escape", build=ResultsEscape, code="ESCAPES"),
)
