"""Tokens sent to slots of the experts by products with masks, as many as an expert has room for.

    rows = torch.einsum("tec,th->ech", combine.bool().type_as(x), x)
    out = torch.einsum("tec,ech->th", combine, experts(rows))

``combine [T, E, C]`` holds the weight of a token where it has a slot of an expert.  Slots are counted by a cumulated
sum of one-hot masks, and what is beyond the capacity ``C`` is dropped.  That no two tokens share a slot is shown, and
the masks are gone in the normal form (``region/slot_pairs.py``).  So the reference says what is left: each pair's row
through its own expert and one product with the weights, where a pair that was dropped has the id -1 and weighs zero.

A pair that was dropped adds nothing, to the result or to a gradient.  In eager it adds zero times what is in the slots
of all experts: an infinity there is a NaN in the results of all tokens in eager, and in those of its own token here.
"""

import torch
from moe_inductor.patterns import _blocks
from moe_inductor.patterns._blocks import HIDDEN, NUM_EXPERTS
from torch import nn
from torch.nn import functional as F

from moe_inductor.match.api import ExpertsSpelling, NearMiss, Sample, linear_of_pairs


def reference(x, topk_ids, topk_weights, experts):
    T, k = topk_ids.shape
    ids = topk_ids.reshape(-1)
    rows = x.unsqueeze(1).expand(T, k, -1).reshape(T * k, -1)

    def linear(operand, weight, bias):
        return linear_of_pairs(operand, ids, weight, bias)

    y = experts(rows, linear).view(T, k, -1)
    weights = topk_weights.masked_fill(topk_ids < 0, 0)
    return torch.bmm(weights.unsqueeze(1).to(y.dtype), y).squeeze(1)


class Slots(_blocks.Block):
    """nanoMoE: ranks among all choices, first choices first, and one product for what experts read."""

    capacity = 9
    transposed = True

    def room(self, tokens):
        """As many slots as an expert has for so many tokens."""
        room = int(self.k * 0.7 * tokens / NUM_EXPERTS)
        return max(room + room % 2, 4)

    def route(self, logits):
        topk_logits, topk_ids = torch.topk(logits, self.k, dim=-1)
        scores = torch.full_like(logits, float("-inf")).scatter_(-1, topk_ids, topk_logits)
        return F.softmax(scores, dim=-1), topk_ids

    def masks(self, scores, topk_ids):
        capacity = self.room(len(scores))
        mask = F.one_hot(topk_ids, NUM_EXPERTS).permute(1, 0, 2)
        rank = torch.cumsum(mask.reshape(-1, NUM_EXPERTS), dim=0) - 1
        rank = rank.reshape(self.k, -1, NUM_EXPERTS)
        mask *= torch.lt(rank, capacity)
        slots = F.one_hot(torch.sum(mask * rank, dim=-1), capacity)
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
        return weights.view(weights.shape[0], -1) @ y.view(-1, HIDDEN)

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

    def offset(self, masks, kept):
        """Where the places of second choices begin."""
        return torch.sum(masks[0], dim=0, keepdim=True)

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
        places[1] = places[1] + self.offset([first, second], kept)
        masks = [kept, self.fits(second, places[1])]
        gates = self.weigh(self.scores(logits), masks)
        slots = [self.slot(p, m) for p, m in zip(places, masks, strict=True)]
        one, two = (self.placed(*each) for each in zip(gates, masks, slots, strict=True))
        self.sent = [first, second], slots, [one, two]
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

    def both(self, first, second):
        return first + second

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

        first, second = one(gate1, flat1, index1, place1), one(gate2, flat2, index2, place2)
        combine = self.both(first, second)
        return combine.bool().to(combine), combine


class OneGate(Gates):
    """Switch and DeepSpeed's top-1: the weight is a score of all, and a mask times a number."""

    k = 1

    def route(self, logits):
        return None, torch.argmax(self.scores(logits), dim=1, keepdim=True)

    def before(self, mask):
        return torch.cumsum(mask, dim=0) - mask

    def masks(self, logits):
        gates = self.scores(logits)
        mask = F.one_hot(torch.argmax(gates, dim=1), NUM_EXPERTS).float()
        place = self.before(mask) * mask
        mask = mask * (place < self.capacity)
        slots = F.one_hot((place * mask).sum(dim=1).long(), self.capacity).float()
        sent = mask.unsqueeze(-1) * slots.unsqueeze(1)
        return sent, sent * (gates * mask).sum(dim=1)[:, None, None]


class Chosen(Gates):
    """Scores of all experts, of which those that were not chosen are zero, and so is a mask of them."""

    def route(self, logits):
        weights, topk_ids = torch.topk(self.scores(logits), self.k, dim=-1)
        return weights, topk_ids

    def chosen(self, weights, topk_ids):
        zeros = weights.new_zeros(weights.shape[0], NUM_EXPERTS)
        return zeros.scatter(1, topk_ids, weights)

    def masks(self, logits):
        scores = self.chosen(*self.route(logits))
        chosen = scores > 0
        slots = (chosen.cumsum(0) - 1) * chosen
        kept = F.one_hot(slots, len(slots)) * (chosen & (slots < self.capacity)).unsqueeze(-1)
        return kept, scores.unsqueeze(-1) * kept


class Everybody(Gates):
    """As many slots as there are pairs, and both masks written as einsums."""

    def route(self, logits):
        return torch.topk(self.scores(logits), self.k, dim=-1)

    def masks(self, logits):
        weights, topk_ids = self.route(logits)
        chosen = F.one_hot(topk_ids, NUM_EXPERTS)
        in_order = chosen.transpose(0, 1).reshape(-1, NUM_EXPERTS)
        slots = ((in_order.cumsum(0) - 1) * in_order).sum(-1).view(self.k, -1).t()
        chosen, slots = chosen.float(), F.one_hot(slots, self.k * len(slots)).float()
        sent = torch.einsum("tke,tkc->tec", chosen, slots)
        return sent, torch.einsum("tk,tke,tkc->tec", weights, chosen, slots)


class Each(Gates):
    """Experts in a ModuleList, each with the slots that are its own."""

    def __init__(self):
        super().__init__()
        self.mlps = nn.ModuleList(_blocks.MLP() for _ in range(NUM_EXPERTS))

    def mlp(self, rows):
        return torch.stack([mlp(rows[e]) for e, mlp in enumerate(self.mlps)])


class Chunks(Each):
    """DeepSpeed: a chunk of one expert keeps its dimension."""

    def mlp(self, rows):
        chunks = rows.chunk(NUM_EXPERTS, dim=0)
        return torch.cat([m(c) for m, c in zip(self.mlps, chunks, strict=True)], dim=0)


# -- near misses ------------------------------------------------------------------------------------------------------


class CountedOverExperts(Gates):
    """The place of an expert among those of its token."""

    def before(self, mask):
        return torch.cumsum(mask, dim=1) - 1


class CountedTwice(Gates):
    """Half of the places are left out."""

    def before(self, mask):
        return torch.cumsum(2 * mask, dim=0) - 1


class ScoresCounted(Gates):
    """Places are made of numbers that are neither 0 nor 1."""

    def before(self, mask):
        return torch.cumsum(mask * 0.6, dim=0).long()


class CountedInHalf(Gates):
    """In this type a hundred tokens more are no more."""

    def before(self, mask):
        return torch.cumsum(mask.bfloat16(), dim=0).long() - 1


class TwoByTwo(Gates):
    """Two tokens in one slot."""

    def before(self, mask):
        return (torch.cumsum(mask, dim=0) - 1) // 2


class OtherExpert(Gates):
    """The place that a token would have with another expert."""

    def before(self, mask):
        return super().before(mask).roll(1, dims=1).clamp(min=0)


class OtherToken(Gates):
    def before(self, mask):
        return super().before(mask).roll(1, dims=0).clamp(min=0)


class MaskOfSecond(Gates):
    """Tokens that chose either are counted, and those of the second choice of an expert not by themselves."""

    def masks(self, logits):
        self.first = F.one_hot(self.choices(logits)[0], NUM_EXPERTS)
        return super().masks(logits)

    def before(self, mask):
        return super().before(self.first)


class NoOffset(Gates):
    def offset(self, masks, kept):
        return 0


class MeanOffset(Gates):
    def offset(self, masks, kept):
        return torch.mean(masks[0].float(), dim=0, keepdim=True).long()


class OffsetOfSecond(Gates):
    def offset(self, masks, kept):
        return torch.sum(masks[1], dim=0, keepdim=True)


class OffsetLessOne(Gates):
    def offset(self, masks, kept):
        return super().offset(masks, kept) - 1


class OffsetOfAll(Gates):
    """As many as all experts together have: nothing is shared, but that is another fact."""

    def offset(self, masks, kept):
        return torch.sum(masks[0], dim=1, keepdim=True)


class OffsetOfFewer(Gates):
    """Not all that are kept."""

    def offset(self, masks, kept):
        return torch.sum(kept * torch.lt(self.before(masks[0]), self.capacity - 2), 0, keepdim=True)


class OffsetOfSome(Gates):
    """First choices are dropped here and there, and counted after that: slots are taken beyond as many."""

    def fits(self, mask, place):
        return super().fits(mask, place) * (place % 3 > 0)

    def offset(self, masks, kept):
        return torch.sum(kept, dim=0, keepdim=True)


class OffsetOfToken(Gates):
    """Some tokens stand one place behind, where the next ones are."""

    def before(self, mask):
        return super().before(mask) + (torch.cumsum(mask, dim=1) > 0).sum(1, keepdim=True) % 2


class PlaceOfScore(OneGate):
    """Tokens of which the expert is sure stand one place behind, where the next ones are."""

    def before(self, mask):
        return super().before(mask) + self.sure.unsqueeze(1)

    def masks(self, logits):
        self.sure = self.scores(logits).amax(dim=1) > 0.4
        return super().masks(logits)


class OffsetOfSent(Gates):
    """First choices are dropped here and there, and those are counted as if they were beyond the capacity."""

    def masks(self, logits):
        self.some = (self.scores(logits)[:, :1] < 0.25).long()
        return super().masks(logits)

    def fits(self, mask, place):
        if hasattr(self, "kept"):
            return super().fits(mask, place)
        behind = place * self.some + 99 - 99 * self.some
        self.kept = mask * torch.lt(behind, self.capacity)
        return self.kept * self.some

    def offset(self, masks, kept):
        made = torch.sum(self.kept, dim=0, keepdim=True)
        return made

    def slot(self, place, mask):
        made = super().slot(place, mask)
        if hasattr(self, "kept"):
            del self.kept
        return made


class Clamped(Gates):
    """All that are beyond the capacity share the last slot."""

    def fits(self, mask, place):
        return mask

    def slot(self, place, mask):
        return super().slot(place, mask).clamp(max=self.capacity - 1)


class Around(Clamped):
    """Slots are used again."""

    def slot(self, place, mask):
        return Gates.slot(self, place, mask) % self.capacity


class SentAnyway(Gates):
    """Tokens beyond the capacity weigh nothing, and are sent to the first slot."""

    def dispatched(self, combine):
        (one, two), slots, _ = self.sent
        first, second = (F.one_hot(s, self.capacity).unsqueeze(1) for s in slots)
        return one.unsqueeze(-1) * first + two.unsqueeze(-1) * second


class FirstOnly(Gates):
    """Second choices are weighted, and never sent."""

    def dispatched(self, combine):
        return self.sent[2][0].bool()


class Scaled(Gates):
    """What is sent is weighted as well."""

    def dispatched(self, combine):
        return combine


class SlotsReversed(Gates):
    """Read from other slots than written to."""

    def dispatched(self, combine):
        return combine.bool().flip(2)


class ExpertsReversed(Gates):
    def dispatched(self, combine):
        return combine.bool().flip(1)


class OtherSlots(Gates):
    """The weights of a token are those of the one before."""

    def masks(self, logits):
        sent, weights = super().masks(logits)
        return sent, weights.roll(1, dims=0)


class MayBeZero(Gates):
    """Where the parameter is zero nobody is sent, and its gradient is what an expert makes of zeros."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def weigh(self, gates, masks):
        return [gate * self.scale for gate in super().weigh(gates, masks)]


class NotPositive(Gates):
    """Tokens with negative weights are not sent."""

    def weigh(self, gates, masks):
        return [gate - 0.4 for gate in super().weigh(gates, masks)]

    def dispatched(self, combine):
        return combine > 0


class Sequences(Groups):
    """Sequences count by themselves, and have their slots in common."""

    def forward(self, x):
        x = x[: x.shape[0] // 5 * 5].view(5, -1, HIDDEN)
        sent, weights = (m.type_as(x) for m in self.masks(self.gate(x)))
        y = self.mlp(torch.einsum("bnd,bnec->ecd", x, sent))
        return torch.einsum("ecd,bnec->bnd", y, weights).flatten(0, 1)


class SequencesOfOne(Sequences):
    """First choices alone."""

    def both(self, first, second):
        return first


class SomeCounted(OneGate):
    """Tokens that are not counted have the place of the next one that is."""

    def before(self, mask):
        counted = mask * self.sure.unsqueeze(1)
        return torch.cumsum(counted, dim=0) - counted

    def masks(self, logits):
        self.sure = self.scores(logits).amax(dim=1) > 0.4
        return super().masks(logits)


class SameTwice(Chosen):
    """Of an expert that a token has twice, one slot is counted, and two are meant."""

    def route(self, logits):
        weights, topk_ids = super().route(logits)
        return weights, topk_ids // 2 * 2

    def chosen(self, weights, topk_ids):
        hot = F.one_hot(topk_ids, NUM_EXPERTS)
        return (hot * weights.unsqueeze(-1)).sum(1)


class SlotsMixed(Slots):
    """Slots of an expert read each other."""

    def act(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).cumsum(1) * up


class SlotsScored(Slots):
    """Each slot has a bias of its own."""

    def __init__(self):
        super().__init__()
        self.places = nn.Parameter(torch.randn(NUM_EXPERTS, 999, HIDDEN))

    def mlp(self, rows):
        return super().mlp(rows + self.places[:, : rows.shape[1]])


class SlotsOfOthers(Slots):
    """Expert e reads the slots of expert e + 1."""

    def mlp(self, rows):
        return super().mlp(rows.roll(-1, dims=0))


class PostNorm(Slots):
    def mlp(self, rows):
        return F.rms_norm(super().mlp(rows), (HIDDEN,))


class EachReversed(Each):
    """Expert e reads the slots of the last but e."""

    def mlp(self, rows):
        last = NUM_EXPERTS - 1
        return torch.stack([mlp(rows[last - e]) for e, mlp in enumerate(self.mlps)])


class HiddenEscapes(Slots):
    """Somebody else reads what the experts have computed."""

    def mlp(self, rows):
        self.made = super().mlp(rows)
        return self.made

    def forward(self, x):
        return super().forward(x), self.made.float().square().mean()


CAPACITY_SLOTS = ExpertsSpelling(
    name="capacity_slots",
    source="GShard (arXiv 2006.16668), DeepSpeed's gates, mixture-of-experts (lucidrains), nanoMoE",
    reference=reference,
    anchor="moe_inductor_region::pair_linear",
    samples=(
        Sample(name="ranks", build=Slots),
        Sample(name="two_gates", build=Gates),
        Sample(name="sequences", build=Groups),
        Sample(name="one_gate", build=OneGate),
        Sample(name="chosen", build=Chosen, brief=True),
        Sample(name="everybody", build=Everybody, brief=True),
        Sample(name="module_list", build=Each, brief=True),
        Sample(name="chunks", build=Chunks, brief=True),
        *(
            Sample(name=name, build=block, brief=True)
            for name, block in _blocks.variants(Slots)
            if name in ("gpt_oss", "plain_gelu_biased")
        ),
    ),
    near_misses=(
        *(
            NearMiss(name=n, build=b, code=c)
            for n, b, c in _blocks.near_variants(Slots)
            if n in ("mish", "rows_mixed", "other_halves", "columns_reversed")
        ),
        NearMiss(name="counted_over_experts", build=CountedOverExperts, code="PROOF"),
        NearMiss(name="counted_twice", build=CountedTwice, code="PROOF"),
        NearMiss(name="scores_counted", build=ScoresCounted, code="PROOF"),
        NearMiss(name="counted_in_bfloat16", build=CountedInHalf, code="PROOF"),
        NearMiss(name="two_tokens_in_a_slot", build=TwoByTwo, code="PROOF"),
        NearMiss(name="place_with_other_expert", build=OtherExpert, code="PROOF"),
        NearMiss(name="place_of_other_token", build=OtherToken, code="PROOF"),
        NearMiss(name="place_of_first_choice", build=MaskOfSecond, code="PROOF"),
        NearMiss(name="no_offset", build=NoOffset, code="PROOF"),
        NearMiss(name="mean_offset", build=MeanOffset, code="PROOF"),
        NearMiss(name="offset_of_second", build=OffsetOfSecond, code="PROOF"),
        NearMiss(name="offset_less_one", build=OffsetLessOne, code="PROOF"),
        NearMiss(name="offset_of_all", build=OffsetOfAll, code="PROOF"),
        NearMiss(name="offset_of_fewer", build=OffsetOfFewer, code="PROOF"),
        NearMiss(name="offset_of_some", build=OffsetOfSome, code="PROOF"),
        NearMiss(name="offset_of_token", build=OffsetOfToken, code="PROOF"),
        NearMiss(name="place_of_score", build=PlaceOfScore, code="PROOF"),
        NearMiss(name="offset_of_sent", build=OffsetOfSent, code="PROOF"),
        NearMiss(name="clamped", build=Clamped, code="PROOF"),
        NearMiss(name="around", build=Around, code="PROOF"),
        NearMiss(name="sent_anyway", build=SentAnyway, code="PROOF"),
        NearMiss(name="first_only", build=FirstOnly, code="PROOF"),
        NearMiss(name="sent_scaled", build=Scaled, code="SPELLING"),
        NearMiss(name="slots_reversed", build=SlotsReversed, code="SPELLING"),
        NearMiss(name="experts_reversed", build=ExpertsReversed, code="SPELLING"),
        NearMiss(name="weights_of_other_token", build=OtherSlots, code="SPELLING"),
        NearMiss(name="may_be_zero", build=MayBeZero, code="SPELLING"),
        NearMiss(name="not_positive", build=NotPositive, code="SPELLING"),
        NearMiss(name="sequences_share_slots", build=Sequences, code="PROOF"),
        NearMiss(name="sequences_of_one_share_slots", build=SequencesOfOne, code="PROOF"),
        NearMiss(name="some_counted", build=SomeCounted, code="PROOF"),
        NearMiss(name="same_expert_twice", build=SameTwice, code="SPELLING"),
        NearMiss(name="slots_mixed", build=SlotsMixed, code="ACTIVATION"),
        NearMiss(name="slots_scored", build=SlotsScored, code="SPELLING"),
        NearMiss(name="slots_of_others", build=SlotsOfOthers, code="SPELLING"),
        NearMiss(name="norm_after_expert", build=PostNorm, code="SPELLING"),
        NearMiss(name="list_reversed", build=EachReversed, code="EXPERT_WEIGHTS"),
        NearMiss(name="hidden_escapes", build=HiddenEscapes, code="ESCAPES"),
    ),
)
