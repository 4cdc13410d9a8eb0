"""Loops over a hit list in which Python sees nothing and tensors do: what a pass without tokens would change.

Only the proof stands between these and a wrong result, so the whole backend is asked, and stock capture has to be what
is left: the same bits as eager, in the output and in whatever the loop has changed.
"""

from __future__ import annotations

import copy

import pytest
import torch
from moe_inductor.patterns._blocks import HIDDEN, NUM_EXPERTS
from moe_inductor.patterns.hit_list import HitLoop

from tests.without_inductor import WithoutInductor


class Visits(HitLoop):
    """The loop, with a place for something to go wrong before and after the expert."""

    def experts(self, x, topk_ids, topk_weights):
        out, mask = self.start(x), self.mask(topk_ids)
        for row in self.hits(mask, topk_ids):
            e = row[0]
            x = self.before(e, x, mask, out)
            slot, token = self.where(self.looked_up(mask, topk_ids), e)
            y = self.expert(e, x[token]) * topk_weights[token, slot, None]
            self.add(out, token, self.after(e, y, out))
        return out

    def before(self, e, x, mask, out):
        return x

    def looked_up(self, mask, topk_ids):
        return mask

    def after(self, e, y, out):
        return y


class WeightChanged(Visits):
    """An expert that is visited loses some of its weight."""

    def before(self, e, x, mask, out):
        self.down_proj[e].mul_(0.5)
        return x


class NextWeightChanged(Visits):
    """By the one before it."""

    def before(self, e, x, mask, out):
        self.down_proj[(e + 1) % NUM_EXPERTS].mul_(0.5)
        return x


class WeightsChanged(Visits):
    def after(self, e, y, out):
        self.gate_up_proj.add_(0.125)
        return y


class MaskAltered(Visits):
    """An expert takes the next one's tokens away."""

    def before(self, e, x, mask, out):
        mask[(e + 1) % NUM_EXPERTS].zero_()
        return x


class MaskTurned(Visits):
    def after(self, e, y, out):
        self.seen.bitwise_xor_(1)
        return y

    def mask(self, topk_ids):
        self.seen = super().mask(topk_ids).contiguous()
        return self.seen


class TwoMasks(Visits):
    """The hit list is of one mask, the rows are those of another."""

    def looked_up(self, mask, topk_ids):
        return self.mask((topk_ids + 1) % NUM_EXPERTS)


class InputPerExpert(Visits):
    def before(self, e, x, mask, out):
        return x * 0.5


class InputChanged(Visits):
    def after(self, e, y, out):
        self.given.mul_(0.5)
        return y

    def start(self, x):
        self.given = x
        return super().start(x)


class SumHalved(Visits):
    def before(self, e, x, mask, out):
        out.mul_(0.5)
        return x


class SumRead(Visits):
    def after(self, e, y, out):
        return y + out.mean()


class MeanOfNoRows(Visits):
    """NaN for an expert without tokens, and the next expert sees it."""

    def after(self, e, y, out):
        self.level.copy_(y.mean())
        return y

    def start(self, x):
        self.level = x.new_zeros(())
        return super().start(x)

    def before(self, e, x, mask, out):
        return x + self.level


class CountsVisits(Visits):
    def __init__(self):
        super().__init__()
        self.visits = torch.nn.Buffer(torch.zeros((), dtype=torch.int64))

    def before(self, e, x, mask, out):
        self.visits.add_(1)
        return x


BLOCKS = [
    WeightChanged,
    NextWeightChanged,
    WeightsChanged,
    MaskAltered,
    MaskTurned,
    TwoMasks,
    InputPerExpert,
    InputChanged,
    SumHalved,
    SumRead,
    MeanOfNoRows,
    CountsVisits,
]


@pytest.mark.parametrize("block", [Visits, *BLOCKS], ids=lambda block: block.__name__)
def test_as_eager(block: type[Visits]) -> None:
    eager = block()
    ours, backend = copy.deepcopy(eager), WithoutInductor()
    backend.install()
    x = torch.randn(1, HIDDEN)  # two of four experts have no token
    with torch.no_grad():
        expected, result = eager(x.clone()), torch.compile(ours, backend=backend)(x.clone())
    fused = [found.fused for report in backend.reports for found in report.blocks]
    if block is Visits:
        assert fused == [True]
        torch.testing.assert_close(result, expected)
        return
    assert True not in fused
    assert torch.equal(result, expected)
    for mine, theirs in zip(ours.state_dict().values(), eager.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)
