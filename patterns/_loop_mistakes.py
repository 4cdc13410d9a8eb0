"""What can go wrong in the pass of any loop over experts: near misses for the ways to list experts and to test them.

The list and the test are right in all of these; an expert's rows, weights or sum are not.
"""

from moe_inductor.patterns._blocks import NUM_EXPERTS
from torch.nn import functional as F

from moe_inductor.match.api import NearMiss


def loop_mistakes(block, **codes):
    """Near misses of ``block``, a subclass of ``expert_loop.Loop`` that calls all of its methods: those named by
    ``codes``, each with its reason, which depends on how the loop is captured.
    """

    class ExpertOfNext(block):
        def expert(self, e, rows):
            return super().expert((e + 1) % NUM_EXPERTS, rows)

    class DownOfNext(block):
        def expert(self, e, rows):
            hidden = self.act(F.linear(rows, self.gate_up_proj[e]))
            return F.linear(hidden, self.down_proj.roll(1, 0)[e])

    class GivenToOthers(block):
        """The expert's tokens get what is another's of them."""

        def expert(self, e, rows):
            return super().expert(e, rows).flip(0)

    class WrittenOver(block):
        """Of a token's experts the last one stays."""

        def add(self, out, token, y):
            out.index_copy_(0, token, y)

    class HalvedEachPass(block):
        def add(self, out, token, y):
            super().add(out, token, y)
            out.mul_(0.5)

    class WeightOfOtherSlot(block):
        def weight(self, topk_weights, token, slot):
            return topk_weights[token, 1 - slot, None]

    class WeightOfOtherToken(block):
        def weight(self, topk_weights, token, slot):
            return topk_weights[token.flip(0), slot, None]

    class NormalisedByExpert(block):
        """Weights of an expert's tokens are made to sum up to one."""

        def weight(self, topk_weights, token, slot):
            return super().weight(topk_weights, token, slot).softmax(0)

    made = {
        "expert_of_next": ExpertOfNext,
        "down_of_next": DownOfNext,
        "given_to_others": GivenToOthers,
        "written_over": WrittenOver,
        "halved_each_pass": HalvedEachPass,
        "weight_of_other_slot": WeightOfOtherSlot,
        "weight_of_other_token": WeightOfOtherToken,
        "normalised_by_expert": NormalisedByExpert,
    }
    return tuple(NearMiss(name=name, build=made[name], code=code) for name, code in codes.items())
