"""gpt-fast's mixtral-moe: every token gathers the weights of its experts, and einsums apply them.

x1 = silu(einsum("ti,taoi->tao", x, w1[ids]))
x3 = einsum("ti,taoi->tao", x, w3[ids])
out = einsum("tai,ta->ti", einsum("tao,taio->tai", x1 * x3, w2[ids]), weights)
"""

import torch
from moe_inductor.patterns import _blocks
from moe_inductor.patterns._blocks import HIDDEN, INTERMEDIATE, NUM_EXPERTS
from torch import nn
from torch.nn import functional as F

from moe_inductor.match.api import ExpertsSpelling, NearMiss, Sample


def reference(x, topk_ids, topk_weights, experts, *, combine):
    def linear(rows, weight, bias):
        equation = "ti,taoi->tao" if rows.dim() == 2 else "tao,taio->tai"
        made = torch.einsum(equation, rows, weight[topk_ids])
        return made if bias is None else made + bias[topk_ids]

    y, weights = experts(x, linear), topk_weights.to(x.dtype)
    if combine == "sum":
        return (y * weights[..., None]).sum(dim=1)
    return torch.einsum("tai,ta->ti", y, weights)


class Einsum(_blocks.Block):
    """As gpt-fast writes it: three weights, of which the last is stored [E, H, I]."""

    def __init__(self):
        super().__init__()
        self.w1, self.w3 = (
            nn.Parameter(torch.randn(NUM_EXPERTS, INTERMEDIATE, HIDDEN) * HIDDEN**-0.5)
            for _ in range(2)
        )
        self.w2 = nn.Parameter(torch.randn(NUM_EXPERTS, HIDDEN, INTERMEDIATE) * HIDDEN**-0.5)

    def route(self, logits):
        topk_weights, topk_ids = torch.topk(F.softmax(logits, dim=-1), self.k, dim=-1)
        return topk_weights / topk_weights.sum(dim=-1, keepdim=True), topk_ids

    def hidden(self, x, w1, w3):
        return F.silu(torch.einsum("ti,taoi->tao", x, w1)) * torch.einsum("ti,taoi->tao", x, w3)

    def down(self, hidden, w2):
        return torch.einsum("tao,taio->tai", hidden, w2)

    def combine(self, y, topk_weights):
        return torch.einsum("tai,ta->ti", y, topk_weights)

    def experts(self, x, topk_ids, topk_weights):
        hidden = self.hidden(x, self.w1[topk_ids], self.w3[topk_ids])
        return self.combine(self.down(hidden, self.w2[topk_ids]), topk_weights)


class Biased(Einsum):
    biased = True

    def experts(self, x, topk_ids, topk_weights):
        first = torch.einsum("ti,taoi->tao", x, self.gate_up_proj[topk_ids])
        hidden = self.act(first + self.gate_up_bias[topk_ids])
        y = self.down(hidden, self.down_proj[topk_ids]) + self.down_bias[topk_ids]
        return self.combine(y, topk_weights)


class TopOne(Einsum):
    k = 1


class Stacked(Einsum):
    """Gate and up in one weight."""

    def experts(self, x, topk_ids, topk_weights):
        first = torch.einsum("ti,taoi->tao", x, self.gate_up_proj[topk_ids])
        return self.combine(self.down(self.act(first), self.down_proj[topk_ids]), topk_weights)


class ProductSummed(Einsum):
    def combine(self, y, topk_weights):
        return (y * topk_weights.unsqueeze(-1)).sum(dim=1)


# -- near misses ------------------------------------------------------------------------------------------------------


class OtherIdsForDown(Einsum):
    def experts(self, x, topk_ids, topk_weights):
        hidden = self.hidden(x, self.w1[topk_ids], self.w3[topk_ids])
        return self.combine(self.down(hidden, self.w2[topk_ids.flip(-1)]), topk_weights)


class OtherIdsForUp(Einsum):
    def experts(self, x, topk_ids, topk_weights):
        hidden = self.hidden(x, self.w1[topk_ids], self.w3[topk_ids.flip(-1)])
        return self.combine(self.down(hidden, self.w2[topk_ids]), topk_weights)


class Unweighted(Einsum):
    def combine(self, y, topk_weights):
        return torch.einsum("tai->ti", y)


class WeightsSummed(Einsum):
    """Every expert's result times the sum of the weights."""

    def combine(self, y, topk_weights):
        return torch.einsum("tai,tb->ti", y, topk_weights)


class WeightsReversed(Einsum):
    def combine(self, y, topk_weights):
        return torch.einsum("tai,ta->ti", y.flip(1), topk_weights)


class SummedOverTokens(Einsum):
    """Of the wrong dimension, and spread over the tokens again."""

    def combine(self, y, topk_weights):
        product = y * topk_weights.unsqueeze(-1)
        return product.sum(dim=0).sum(dim=0).expand(y.shape[0], -1).clone()


class NotSummed(Einsum):
    def combine(self, y, topk_weights):
        return torch.einsum("tai,ta->tai", y, topk_weights).amax(dim=1)


class TokensMixed(Einsum):
    """The hidden states of the next token."""

    def down(self, hidden, w2):
        return super().down(hidden.roll(1, dims=0), w2)


class SlotsMixed(Einsum):
    def down(self, hidden, w2):
        return super().down(hidden.flip(1), w2)


class PostNorm(Einsum):
    def combine(self, y, topk_weights):
        return super().combine(F.rms_norm(y, (HIDDEN,)), topk_weights)


class Mish(Einsum):
    def hidden(self, x, w1, w3):
        return F.mish(torch.einsum("ti,taoi->tao", x, w1)) * torch.einsum("ti,taoi->tao", x, w3)


class BiasOfOthers(Biased):
    def down(self, hidden, w2):
        return super().down(hidden, w2) + self.down_bias[0]


class HiddenEscapes(Einsum):
    def hidden(self, x, w1, w3):
        self.kept = super().hidden(x, w1, w3)
        return self.kept

    def forward(self, x):
        return super().forward(x), self.kept.square().mean()


class SlotsAddedFirst(Einsum):
    """The hidden states of a token's experts added up, for each of them."""

    def down(self, hidden, w2):
        return torch.einsum("tbo,taio->tai", hidden, w2)


class WeightsAddedFirst(Einsum):
    """Every expert with the last projections of all of the token's experts."""

    def down(self, hidden, w2):
        return torch.einsum("tao,tbio->tai", hidden, w2)


class TokensAdded(Einsum):
    """The hidden states of all tokens added up."""

    def down(self, hidden, w2):
        return torch.einsum("sao,taio->tai", hidden, w2)


class GateFromFirstSlot(Einsum):
    """The gate of a token's first expert for all of its experts."""

    def hidden(self, x, w1, w3):
        return super().hidden(x, w1[:, :1].expand_as(w1), w3)


class WeightOfFirstSlot(Einsum):
    def combine(self, y, topk_weights):
        return torch.einsum("tai,t->ti", y, topk_weights[:, 0])


class WeightsOfTokens(Einsum):
    """Weights of all tokens for the results of each."""

    def combine(self, y, topk_weights):
        return torch.einsum("tai,sa->ti", y, topk_weights)


class SlotsMultiplied(Einsum):
    def combine(self, y, topk_weights):
        return (y * topk_weights.unsqueeze(-1)).prod(dim=1)


class Residual(Einsum):
    """What an expert reads added to what it gives, under the routing weight."""

    def experts(self, x, topk_ids, topk_weights):
        hidden = self.hidden(x, self.w1[topk_ids], self.w3[topk_ids])
        y = self.down(hidden, self.w2[topk_ids]) + x.unsqueeze(1)
        return self.combine(y, topk_weights)


class WeightsSquared(Einsum):
    def combine(self, y, topk_weights):
        return torch.einsum("tai,ta,ta->ti", y, topk_weights, topk_weights)


class WeightsOfOtherSlots(Einsum):
    def combine(self, y, topk_weights):
        return super().combine(y, topk_weights.flip(-1))


class WeightsOfNext(Einsum):
    """The weights of the next token."""

    def combine(self, y, topk_weights):
        return super().combine(y, topk_weights.roll(1, 0))


class MeanOverSlots(Einsum):
    def combine(self, y, topk_weights):
        return (y * topk_weights.unsqueeze(-1)).mean(dim=1)


class ReadsNext(Einsum):
    """Gate and up of another token."""

    def hidden(self, x, w1, w3):
        return super().hidden(x, w1.roll(1, 0), w3.roll(1, 0))


class DetachedExperts(Einsum):
    def combine(self, y, topk_weights):
        return super().combine(y.detach(), topk_weights)


GATHERED_EINSUM = ExpertsSpelling(
    name="gathered_einsum",
    source="gpt-fast, mixtral-moe/model.py; torchao",
    reference=reference,
    facts={"combine": ("einsum", "sum")},
    anchor="aten::bmm",
    samples=(
        Sample(name="einsum", build=Einsum),
        Sample(name="product_summed", build=ProductSummed, brief=True),
        Sample(name="einsum_biased", build=Biased, brief=True),
        Sample(name="einsum_top_one", build=TopOne, brief=True),
        Sample(name="einsum_stacked", build=Stacked, brief=True),
    ),
    near_misses=(
        NearMiss(name="summed_over_tokens", build=SummedOverTokens, code="SPELLING"),
        NearMiss(name="other_ids_for_down", build=OtherIdsForDown, code="INPUTS_DIFFER"),
        NearMiss(name="other_ids_for_up", build=OtherIdsForUp, code="INPUTS_DIFFER"),
        NearMiss(name="unweighted", build=Unweighted, code="SPELLING"),
        NearMiss(name="weights_summed", build=WeightsSummed, code="SPELLING"),
        NearMiss(name="weights_reversed", build=WeightsReversed, code="SPELLING"),
        NearMiss(name="largest_of_experts", build=NotSummed, code="SPELLING"),
        NearMiss(name="tokens_mixed", build=TokensMixed, code="ACTIVATION"),
        NearMiss(name="slots_mixed", build=SlotsMixed, code="ACTIVATION"),
        NearMiss(name="norm_after_expert", build=PostNorm, code="SPELLING"),
        NearMiss(name="mish", build=Mish, code="ACTIVATION"),
        NearMiss(name="bias_twice", build=BiasOfOthers, code="SPELLING"),
        NearMiss(name="hidden_escapes", build=HiddenEscapes, code="ESCAPES"),
        NearMiss(name="slots_added_first", build=SlotsAddedFirst, code="SPELLING"),
        NearMiss(name="weights_added_first", build=WeightsAddedFirst, code="SPELLING"),
        NearMiss(name="tokens_added", build=TokensAdded, code="SPELLING"),
        NearMiss(name="gate_from_first_slot", build=GateFromFirstSlot, code="SPELLING"),
        NearMiss(name="weight_of_first_slot", build=WeightOfFirstSlot, code="SPELLING"),
        NearMiss(name="weights_of_tokens", build=WeightsOfTokens, code="SPELLING"),
        NearMiss(name="slots_multiplied", build=SlotsMultiplied, code="SPELLING"),
        NearMiss(name="residual_in_expert", build=Residual, code="SPELLING"),
        NearMiss(name="weights_squared", build=WeightsSquared, code="SPELLING"),
        NearMiss(name="weights_of_other_slots", build=WeightsOfOtherSlots, code="ROUTER"),
        NearMiss(name="weights_of_next_token", build=WeightsOfNext, code="ROUTER"),
        NearMiss(name="mean_over_slots", build=MeanOverSlots, code="SPELLING"),
        NearMiss(name="reads_next", build=ReadsNext, code="SPELLING"),
        NearMiss(name="detached_experts", build=DetachedExperts, code="SPELLING"),
        *(
            NearMiss(name=f"einsum_{name}", build=block, code=code)
            for name, block, code in _blocks.near_variants(Stacked)
        ),
    ),
)
