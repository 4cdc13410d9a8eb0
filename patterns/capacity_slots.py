"""Tokens sent to slots of the experts by products with masks, as many as an expert has room for.

    rows = torch.einsum("tec,th->ech", combine.bool().type_as(x), x)
    out = torch.einsum("tec,ech->th", combine, experts(rows))

``combine [T, E, C]`` holds the weight of a token where it has a slot of an expert.  Slots are counted by a cumulated sum
of one-hot masks, and what is beyond the capacity ``C`` is dropped.  That no two tokens share a slot is shown, and the
masks are gone in the normal form (``region/slots.py``), so the reference says what is left: each pair's row through its
own expert, the id of a pair that was dropped being -1, and one product with the weights.

A pair that was dropped adds nothing, to the result or to a gradient.  In eager it adds zero times what is in its
expert's slots, so an infinity there is a NaN in the results of all tokens in eager, and of its own token here.
"""

import torch
from moe_inductor.patterns import _blocks
from moe_inductor.patterns._blocks import HIDDEN, NUM_EXPERTS
from torch.nn import functional as F

from moe_inductor.match.api import ExpertsSpelling, NearMiss, Sample, linear_of_pairs


def reference(x, topk_ids, topk_weights, experts):
    T, k = topk_ids.shape
    ids = topk_ids.reshape(-1)
    rows = x.unsqueeze(1).expand(T, k, -1).reshape(T * k, -1)

    def linear(operand, weight, bias):
        return linear_of_pairs(operand, ids, weight, bias)

    y = experts(rows, linear).view(T, k, -1)
    return torch.bmm(topk_weights.unsqueeze(1).to(y.dtype), y).squeeze(1)


class Slots(_blocks.Block):
    """nanoMoE: ranks among all choices, first choices first, and one product for what experts read."""

    capacity = 9
    transposed = True

    def route(self, logits):
        topk_logits, topk_ids = torch.topk(logits, self.k, dim=-1)
        scores = torch.full_like(logits, float("-inf")).scatter_(-1, topk_ids, topk_logits)
        return F.softmax(scores, dim=-1), topk_ids

    def kept(self, mask, rank):
        return mask * torch.lt(rank, self.capacity)

    def masks(self, scores, topk_ids):
        mask = F.one_hot(topk_ids, NUM_EXPERTS).permute(1, 0, 2)
        rank = torch.cumsum(mask.reshape(-1, NUM_EXPERTS), dim=0) - 1
        rank = rank.reshape(self.k, -1, NUM_EXPERTS)
        mask = self.kept(mask, rank)
        slots = F.one_hot(torch.sum(mask * rank, dim=-1), self.capacity)
        weights = mask * scores[None, :]
        combine = torch.sum(weights.unsqueeze(3) * slots.unsqueeze(2), dim=0)
        return combine.bool(), combine

    def send(self, sent, x):
        return sent.permute(1, 2, 0).type_as(x) @ x

    def mlp(self, rows):
        first = torch.bmm(rows, self.gate_up_proj)
        if self.biased:
            first = first + self.gate_up_bias[:, None]
        y = torch.bmm(self.act(first), self.down_proj)
        return y + self.down_bias[:, None] if self.biased else y

    def combine(self, weights, y):
        return weights.view(-1, NUM_EXPERTS * self.capacity) @ y.view(-1, HIDDEN)

    def experts(self, x, topk_ids, scores):
        sent, weights = self.masks(scores, topk_ids)
        return self.combine(weights, self.mlp(self.send(sent, x)))


class Gates(Slots):
    """GShard and DeepSpeed: two choices, of which the second is counted behind all first ones."""

    def scores(self, logits):
        return F.softmax(logits.float(), dim=1)

    def choices(self, logits):
        first = torch.argmax(self.scores(logits), dim=1)
        mask = F.one_hot(first, NUM_EXPERTS).bool()
        return first, torch.argmax(logits.float().masked_fill(mask, float("-inf")), dim=1)

    def route(self, logits):
        return None, torch.stack(self.choices(logits), dim=1)

    def forward(self, x):
        sent, weights = self.masks(self.gate(x))
        return self.combine(weights.type_as(x), self.mlp(self.send(sent, x)))

    def before(self, mask):
        """The place of each token among those of its expert."""
        return torch.cumsum(mask, dim=0) - 1

    def offset(self, first, kept):
        """Where the places of second choices begin."""
        return torch.sum(first, dim=0, keepdim=True)

    def slot(self, place, mask):
        return torch.sum(place * mask, dim=1)

    def fits(self, mask, place):
        return mask * torch.lt(place, self.capacity)

    def weigh(self, gates, masks):
        given = [torch.einsum("se,se->s", gates, m.float()) for m in masks]
        total = torch.clamp(sum(given[1:], given[0]), min=torch.finfo(gates.dtype).eps)
        return [g / total for g in given]

    def placed(self, gate, mask, slot):
        gates = torch.einsum("s,se->se", gate, mask.float())
        return torch.einsum("se,sc->sec", gates, F.one_hot(slot, self.capacity).float())

    def masks(self, logits):
        first, second = (F.one_hot(c, NUM_EXPERTS) for c in self.choices(logits))
        places = [self.before(first), self.before(second)]
        kept = self.fits(first, places[0])
        places[1] = places[1] + self.offset(first, kept)
        masks = [kept, self.fits(second, places[1])]
        gates = self.weigh(self.scores(logits), masks)
        slots = [self.slot(p, m) for p, m in zip(places, masks, strict=True)]
        one, two = (self.placed(*each) for each in zip(gates, masks, slots, strict=True))
        return self.dispatched(one + two), one + two

    def dispatched(self, combine):
        return combine.bool()

    def send(self, sent, x):
        return torch.einsum("sec,sm->ecm", sent.type_as(x), x)

    def combine(self, weights, y):
        return torch.einsum("sec,ecm->sm", weights, y)


class Groups(Slots):
    """mixture-of-experts and mesh-tensorflow: sequences [B, S, H], of which each has slots of its own."""

    def choose(self, gates):
        first = gates.topk(k=1, dim=-1)
        left = gates * (1.0 - F.one_hot(first.indices.squeeze(-1), NUM_EXPERTS).float())
        return [[t.squeeze(-1) for t in found] for found in (first, left.topk(k=1, dim=-1))]

    def route(self, logits):
        return None, torch.stack([index for _, index in self.choose(self.scores(logits))], dim=-1)

    def scores(self, logits):
        return logits.float().softmax(-1)

    def forward(self, x):
        x = x[: x.shape[0] // 5 * 5].view(5, -1, HIDDEN)
        sent, weights = (m.type_as(x) for m in self.masks(self.gate(x)))
        rows = torch.einsum("bnd,bnec->ebcd", x, sent)
        shape = rows.shape
        y = self.mlp(rows.reshape(NUM_EXPERTS, -1, HIDDEN)).reshape(shape)
        return torch.einsum("ebcd,bnec->bnd", y, weights).flatten(0, 1)

    def before(self, mask):
        return F.pad(mask, (0, 0, 1, 0)).cumsum(-2)[..., :-1, :]

    def masks(self, logits):
        (gate1, index1), (gate2, index2) = self.choose(self.scores(logits))
        mask1, mask2 = (F.one_hot(index, NUM_EXPERTS).float() for index in (index1, index2))
        total = gate1 + gate2 + 1e-9
        gate1, gate2 = gate1 / total, gate2 / total
        mask2 *= (gate2 > 0.2).float().unsqueeze(-1)
        place1 = self.before(mask1) * mask1
        mask1 *= (place1 < float(self.capacity)).float()
        count = mask1.sum(dim=-2, keepdim=True)
        flat1 = mask1.sum(dim=-1)
        place1 = place1.sum(dim=-1)
        gate1 *= flat1
        place2 = self.before(mask2) + count
        place2 *= mask2
        mask2 *= (place2 < float(self.capacity)).float()
        flat2 = mask2.sum(dim=-1)
        place2 = place2.sum(dim=-1)
        gate2 *= flat2
        numbers = torch.arange(self.capacity, device=logits.device)

        def one(gate, flat, index, place):
            slots = (place.long()[..., None] == numbers).float()
            masks = gate[..., None, None] * flat[..., None, None]
            return masks * F.one_hot(index, NUM_EXPERTS)[..., None] * slots[..., None, :]

        combine = one(gate1, flat1, index1, place1) + one(gate2, flat2, index2, place2)
        return combine.bool().to(combine), combine


CAPACITY_SLOTS = ExpertsSpelling(
    name="capacity_slots",
    source="GShard (arXiv 2006.16668), DeepSpeed's gates, mixture-of-experts (lucidrains), nanoMoE",
    reference=reference,
    anchor="moe_inductor_region::pair_linear",
    samples=(
        Sample(name="ranks", build=Slots),
        Sample(name="two_gates", build=Gates),
        Sample(name="sequences", build=Groups),
    ),
    near_misses=(),
)
