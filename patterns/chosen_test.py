"""The question whether an expert got any token, asked of a tensor before the expert is run.

for e in range(num_experts):
    if not expert_mask[e].any():        # or: if expert_mask[e].sum() == 0, if (topk_ids == e).sum() > 0, ...
        continue
    ...
"""

import torch
from moe_inductor.patterns._blocks import NUM_EXPERTS
from moe_inductor.patterns.expert_loop import Loop

from moe_inductor.match.api import ChosenSpelling, NearMiss, Sample


def reference(topk_ids, e, *, asks, of):
    hit = topk_ids == e
    if of == "tokens":
        hit = hit.any(dim=-1)
    if asks == "any":
        return hit.any()
    if asks == "not any":
        return torch.logical_not(hit.any())
    count = hit.sum()
    return {"count": count, "> 0": count > 0, "!= 0": count != 0, "== 0": count == 0}[asks]


class AnyLoop(Loop):
    """A test of the expert's part of the mask."""

    def has_tokens(self, mask, e):
        return mask[e].any()

    def experts(self, x, topk_ids, topk_weights):
        out, mask = self.start(x), self.mask(topk_ids)
        for e in range(NUM_EXPERTS):
            if self.has_tokens(mask, e):
                slot, token = self.where(mask, e)
                y = self.expert(e, x[token]) * self.weight(topk_weights, token, slot)
                self.add(out, token, y)
        return out


class Continue(AnyLoop):
    def experts(self, x, topk_ids, topk_weights):
        out, mask = self.start(x), self.mask(topk_ids)
        for e in range(NUM_EXPERTS):
            if not mask[e].any():
                continue
            slot, token = self.where(mask, e)
            self.add(out, token, self.expert(e, x[token]) * topk_weights[token, slot, None])
        return out


class InvertedAny(AnyLoop):
    def experts(self, x, topk_ids, topk_weights):
        out, mask = self.start(x), self.mask(topk_ids)
        for e in range(NUM_EXPERTS):
            if torch.logical_not(torch.any(mask[e])):
                continue
            slot, token = self.where(mask, e)
            self.add(out, token, self.expert(e, x[token]) * topk_weights[token, slot, None])
        return out


class CountIsZero(AnyLoop):
    def experts(self, x, topk_ids, topk_weights):
        out = self.start(x)
        for e in range(NUM_EXPERTS):
            if (topk_ids == e).sum() == 0:
                continue
            token, slot = torch.where(topk_ids == e)
            out = out.index_add(
                0, token, self.expert(e, x[token]) * topk_weights[token, slot, None]
            )
        return out


class Count(AnyLoop):
    def has_tokens(self, mask, e):
        return mask[e].sum()


class Positive(AnyLoop):
    def has_tokens(self, mask, e):
        return mask[e].sum() > 0


class Unequal(AnyLoop):
    def has_tokens(self, mask, e):
        return mask[e].sum() != 0


class Tokens(AnyLoop):
    """How many tokens chose it, rather than how many choices were of it."""

    def has_tokens(self, mask, e):
        return mask[e].any(dim=0).sum() > 0


class CountedBefore(AnyLoop):
    """DeepSeek-V3's inference code: how often each expert was chosen is counted before, and read into Python."""

    def counts(self, topk_ids):
        return torch.bincount(topk_ids.flatten(), minlength=NUM_EXPERTS).tolist()

    def count(self, counts, e):
        return counts[e]

    def experts(self, x, topk_ids, topk_weights):
        out, counts = torch.zeros_like(x), self.counts(topk_ids)
        for e in range(NUM_EXPERTS):
            if self.count(counts, e) == 0:
                continue
            token, slot = torch.where(topk_ids == e)
            out[token] += self.expert(e, x[token]) * topk_weights[token, slot, None]
        return out


class CountedInTensor(CountedBefore):
    def counts(self, topk_ids):
        return torch.nn.functional.one_hot(topk_ids.flatten(), NUM_EXPERTS).sum(dim=0)


# -- near misses ------------------------------------------------------------------------------------------------------


class NextCount(CountedBefore):
    def count(self, counts, e):
        return counts[(e + 1) % NUM_EXPERTS]


class LastCountOther(CountedBefore):
    """Only the last pass is wrong."""

    def count(self, counts, e):
        return counts[0 if e == NUM_EXPERTS - 1 else e]


class CountOfFirst(CountedInTensor):
    def counts(self, topk_ids):
        return super().counts(topk_ids[:, :1])


class AsOftenAsTheNext(CountedInTensor):
    """An expert that was chosen as often as the next is left out."""

    def count(self, counts, e):
        return counts[e] - counts[(e + 1) % NUM_EXPERTS]


class NextExpert(AnyLoop):
    def has_tokens(self, mask, e):
        return mask[(e + 1) % NUM_EXPERTS].any()


class FirstTokens(AnyLoop):
    def has_tokens(self, mask, e):
        return mask[e][:, :1].any()


class FirstSlot(AnyLoop):
    def has_tokens(self, mask, e):
        return mask[e][0].any()


class AlwaysFirst(AnyLoop):
    def has_tokens(self, mask, e):
        return mask[0].any()


class LastOther(AnyLoop):
    """All passes ask about themselves but the last, which is compared with the first ones and not traced."""

    def has_tokens(self, mask, e):
        return mask[0 if e == 3 else e].any()


class AllExperts(AnyLoop):
    def has_tokens(self, mask, e):
        return mask.any()


class AnythingHere(AnyLoop):
    def has_tokens(self, mask, e):
        return self.gate.weight.argmax() > 0


class NotChosen(AnyLoop):
    """The test is the wrong way round: with no tokens, an expert adds nothing."""

    def has_tokens(self, mask, e):
        return torch.logical_not(mask[e].any())


class Stops(AnyLoop):
    """``break`` instead of ``continue``: experts after the first one without tokens are left out."""

    def experts(self, x, topk_ids, topk_weights):
        out, mask = self.start(x), self.mask(topk_ids)
        for e in range(NUM_EXPERTS):
            if not mask[e].any():
                break
            slot, token = self.where(mask, e)
            self.add(out, token, self.expert(e, x[token]) * topk_weights[token, slot, None])
        return out


class AndNext(AnyLoop):
    """Experts that no token chose together with the next one are left out."""

    def has_tokens(self, mask, e):
        return (mask[e] & mask[(e + 1) % NUM_EXPERTS]).any()


class LaterIds(AnyLoop):
    """Whether there is an expert after this one."""

    def experts(self, x, topk_ids, topk_weights):
        self.ids = topk_ids
        return super().experts(x, topk_ids, topk_weights)

    def has_tokens(self, mask, e):
        return (self.ids > e).any()


class SumOfIds(LaterIds):
    """Ids are summed where hits should be: expert 0 never has tokens."""

    def has_tokens(self, mask, e):
        return (self.ids * (self.ids == e)).sum() > 0


class LastSlot(LaterIds):
    def has_tokens(self, mask, e):
        return (self.ids[:, -1] == e).any()


class EveryOtherToken(AnyLoop):
    def has_tokens(self, mask, e):
        return mask[e, :, ::2].sum() > 0


class OddCount(AnyLoop):
    """Counted modulo two."""

    def has_tokens(self, mask, e):
        return mask[e].sum() % 2 != 0


class OneToken(AnyLoop):
    """Experts with more than one token are left out."""

    def has_tokens(self, mask, e):
        return mask[e].sum() == 1


class CountOfBytes(AnyLoop):
    """A count in eight bits is zero for every 256 tokens."""

    def has_tokens(self, mask, e):
        return mask[e].sum(dtype=torch.uint8) > 0


class BestScore(AnyLoop):
    """Whether anybody likes the expert, chosen or not."""

    def forward(self, x):
        self.logits = self.gate(x)
        return super().forward(x)

    def has_tokens(self, mask, e):
        return self.logits[:, e].max() > 0


class OtherRows(AnyLoop):
    """The test is about this expert, the rows are those of the next one, and so is the expert that runs."""

    def where(self, mask, e):
        return super().where(mask, (e + 1) % NUM_EXPERTS)

    def expert(self, e, rows):
        return super().expert((e + 1) % NUM_EXPERTS, rows)


class CountsTests(AnyLoop):
    """Something else depends on the test."""

    def experts(self, x, topk_ids, topk_weights):
        out, mask, used = self.start(x), self.mask(topk_ids), torch.zeros(())
        for e in range(NUM_EXPERTS):
            if mask[e].any():
                used = used + 1
                slot, token = self.where(mask, e)
                self.add(out, token, self.expert(e, x[token]) * topk_weights[token, slot, None])
        return out / used


class ElseAdds(AnyLoop):
    """An expert without tokens is paid for."""

    def experts(self, x, topk_ids, topk_weights):
        out, mask = self.start(x), self.mask(topk_ids)
        for e in range(NUM_EXPERTS):
            if mask[e].any():
                slot, token = self.where(mask, e)
                self.add(out, token, self.expert(e, x[token]) * topk_weights[token, slot, None])
            else:
                out.add_(0.5)
        return out


class Two(AnyLoop):
    """Both additions depend on the first expert's test."""

    def experts(self, x, topk_ids, topk_weights):
        out, mask = self.start(x), self.mask(topk_ids)
        for e in range(0, NUM_EXPERTS, 2):
            if mask[e].any():
                slot, token = self.where(mask, e)
                self.add(out, token, self.expert(e, x[token]) * topk_weights[token, slot, None])
                slot, token = self.where(mask, e + 1)
                self.add(out, token, self.expert(e + 1, x[token]) * topk_weights[token, slot, None])
        return out


class MoreThanOne(AnyLoop):
    """Experts with a single token are left out."""

    def has_tokens(self, mask, e):
        return mask[e].sum() > 1


class AllTokens(AnyLoop):
    """Only experts that every token chose."""

    def has_tokens(self, mask, e):
        return mask[e].all()


class Heavy(AnyLoop):
    """Experts of little weight are left out."""

    def experts(self, x, topk_ids, topk_weights):
        self.weights = topk_weights
        return super().experts(x, topk_ids, topk_weights)

    def has_tokens(self, mask, e):
        return (mask[e] * self.weights.T).sum() > 0.4


CHOSEN_TEST = ChosenSpelling(
    name="chosen_test",
    source="transformers 4.57 nllb_moe, switch_transformers; nanoMoE and many re-implementations",
    reference=reference,
    truth=lambda facts: facts["asks"] not in ("not any", "== 0"),
    facts={
        "asks": ("any", "not any", "count", "> 0", "!= 0", "== 0"),
        "of": ("pairs", "tokens"),
    },
    samples=(
        Sample(name="any", build=AnyLoop),
        Sample(name="continue", build=Continue),
        Sample(name="inverted_any", build=InvertedAny),
        Sample(name="count_is_zero", build=CountIsZero),
        Sample(name="count", build=Count),
        Sample(name="positive", build=Positive),
        Sample(name="unequal", build=Unequal),
        Sample(name="tokens", build=Tokens, brief=True),
        Sample(name="counted_before", build=CountedBefore),
        Sample(name="counted_in_tensor", build=CountedInTensor, brief=True),
    ),
    near_misses=(
        NearMiss(name="next_count", build=NextCount, code="ASSUMPTION"),
        NearMiss(name="last_count_other", build=LastCountOther, code="ASSUMPTION"),
        NearMiss(name="count_of_first_choices", build=CountOfFirst, code="ASSUMPTION"),
        NearMiss(name="as_often_as_the_next", build=AsOftenAsTheNext, code="ASSUMPTION"),
        NearMiss(name="next_expert", build=NextExpert, code="ASSUMPTION"),
        NearMiss(name="first_tokens", build=FirstTokens, code="ASSUMPTION"),
        NearMiss(name="first_slot", build=FirstSlot, code="ASSUMPTION"),
        NearMiss(name="always_first", build=AlwaysFirst, code="ASSUMPTION"),
        NearMiss(name="last_other", build=LastOther, code="ASSUMPTION"),
        NearMiss(name="all_experts", build=AllExperts, code="ASSUMPTION"),
        NearMiss(name="anything", build=AnythingHere, code="ASSUMPTION"),
        NearMiss(name="two", build=Two, code="ASSUMPTION"),
        NearMiss(name="more_than_one", build=MoreThanOne, code="CONTROL_FLOW"),
        NearMiss(name="all_tokens", build=AllTokens, code="CONTROL_FLOW"),
        NearMiss(name="heavy", build=Heavy, code="CONTROL_FLOW"),
        NearMiss(name="not_chosen", build=NotChosen, code="CONTROL_FLOW"),
        NearMiss(name="stops", build=Stops, code="CONTROL_FLOW"),
        NearMiss(name="and_next", build=AndNext, code="ASSUMPTION"),
        NearMiss(name="later_ids", build=LaterIds, code="ASSUMPTION"),
        NearMiss(name="sum_of_ids", build=SumOfIds, code="ASSUMPTION"),
        NearMiss(name="last_slot", build=LastSlot, code="ASSUMPTION"),
        NearMiss(name="every_other_token", build=EveryOtherToken, code="ASSUMPTION"),
        NearMiss(name="odd_count", build=OddCount, code="ASSUMPTION"),
        NearMiss(name="one_token", build=OneToken, code="CONTROL_FLOW"),
        NearMiss(name="count_of_bytes", build=CountOfBytes, code="ASSUMPTION"),
        NearMiss(name="best_score", build=BestScore, code="CONTROL_FLOW"),
        NearMiss(name="tests_another", build=OtherRows, code="ASSUMPTION"),
        NearMiss(name="counts_tests", build=CountsTests, code="ASSUMPTION"),
        NearMiss(name="else_adds", build=ElseAdds, code="CONTROL_FLOW"),
    ),
)
