"""Passes of an unrolled loop that are not traced: only where they are provably like the two that are.

Every near miss here is all right in its first two passes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from moe_inductor.prove import assumptions
from tests.oracle import assert_within_fp64_rule
from tests.without_inductor import WithoutInductor

E, K, H, I, T = 6, 2, 32, 48, 9
IDENTITIES = 5


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3 = (nn.Linear(H, I, bias=False) for _ in range(2))
        self.w2 = nn.Linear(I, H, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Loop(nn.Module):
    """One method per thing that can go wrong in a late pass."""

    classes = E

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(H, self.classes, bias=False)
        self.mlps = nn.ModuleList(Mlp() for _ in range(E))
        self.w13 = nn.Parameter(torch.randn(E, 2 * I, H) * H**-0.5)
        self.w2 = nn.Parameter(torch.randn(E, H, I) * I**-0.5)

    def mask(self, mask: torch.Tensor, e: int) -> torch.Tensor:
        return mask[e]

    def expert(self, e: int, rows: torch.Tensor) -> torch.Tensor:
        return self.mlps[e](rows)

    def weighted(self, e: int, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return y * weights

    def add(self, e: int, out: torch.Tensor, token: torch.Tensor, y: torch.Tensor) -> Any:
        return out.index_add_(0, token, y)

    def after(self, e: int, out: torch.Tensor, y: torch.Tensor) -> None:
        pass

    def forward(self, x: torch.Tensor) -> Any:
        weights, ids = torch.topk(F.softmax(self.gate(x), dim=-1), K, dim=-1)
        out, mask = torch.zeros_like(x), F.one_hot(ids, self.classes).permute(2, 1, 0)
        for e in range(self.classes):
            slot, token = torch.where(self.mask(mask, e))
            y = self.weighted(e, self.expert(e, x[token]), weights[token, slot, None])
            out = self.add(e, out, token, y)
            self.after(e, out, y)
        return self.result(out)

    def result(self, out: torch.Tensor) -> Any:
        return out


class Stacked(Loop):
    def expert(self, e, rows):
        gate, up = F.linear(rows, self.w13[e]).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.w2[e])


class OutOfPlace(Loop):
    def add(self, e, out, token, y):
        return out.index_add(0, token, y)

    def result(self, out):
        return out.view(3, 3, H) * 2


class Tied(Loop):
    """Two experts share a projection in every pass alike."""

    def __init__(self):
        super().__init__()
        for e in range(3, E):
            self.mlps[e].w2.weight = self.mlps[e - 1].w2.weight


class ThenIdentities(Loop):
    """longcat_flash: the experts, and then some that give their input as it is."""

    classes = E + IDENTITIES

    def expert(self, e, rows):
        return super().expert(e, rows) if e < E else rows

    def add(self, e, out, token, y):
        out.index_add_(0, token, y)
        return out


class StackedThenIdentities(ThenIdentities, Stacked):
    pass


class HalfOfThemScaled(Loop):
    def weighted(self, e, y, weights):
        return y * weights * (0.5 if e >= E // 2 else 1.0)


class HalfOfThemGelu(Loop):
    def expert(self, e, rows):
        mlp = self.mlps[e]
        act = F.gelu if e >= E // 2 else F.silu
        return mlp.w2(act(mlp.w1(rows)) * mlp.w3(rows))


class OneIdentityScaled(ThenIdentities):
    def expert(self, e, rows):
        return super().expert(e, rows) * (2.0 if e == self.classes - 1 else 1.0)


class LateIdentitiesOfOthers(ThenIdentities):
    """The last ones give what belongs to the one before."""

    def mask(self, mask, e):
        return mask[e - 1] if e > E + 1 else mask[e]


class OneOtherActivation(Loop):
    def expert(self, e, rows):
        mlp = self.mlps[e]
        act = F.gelu if e == 4 else F.silu
        return mlp.w2(act(mlp.w1(rows)) * mlp.w3(rows))


class OneScaled(Loop):
    def weighted(self, e, y, weights):
        return y * weights * (0.5 if e == 5 else 1.0)


class AllScaledByNumber(Loop):
    """The expert's number is used as a number."""

    def weighted(self, e, y, weights):
        return y * weights * e


class OneAddsTwice(Loop):
    def add(self, e, out, token, y):
        return out.index_add_(0, token, y, alpha=2 if e == 3 else 1)


class OneOtherRows(Loop):
    def mask(self, mask, e):
        return mask[2] if e == 3 else mask[e]


class LateRowsAllTheSame(Loop):
    def mask(self, mask, e):
        return mask[min(e, 1)]


class OneOtherStackRow(Stacked):
    def expert(self, e, rows):
        return super().expert(3 if e == 4 else e, rows)


class OneOtherDown(Stacked):
    def expert(self, e, rows):
        gate, up = F.linear(rows, self.w13[e]).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.w2[5 - e if e > 3 else e])


class OneExchanged(Loop):
    """Gate and up of one expert are exchanged: same shapes, other places."""

    def expert(self, e, rows):
        mlp = self.mlps[e]
        gate, up = (mlp.w3, mlp.w1) if e == 4 else (mlp.w1, mlp.w3)
        return mlp.w2(F.silu(gate(rows)) * up(rows))


class GateIsUpOfOne(Loop):
    """One expert has one matrix in the places of two, so the holes are filled, but the names would clash."""

    def __init__(self):
        super().__init__()
        self.mlps[1].w3.weight = self.mlps[1].w1.weight


class PartialSum(Loop):
    def forward(self, x):
        self.norm = 0.0
        out = super().forward(x)
        return out + self.norm

    def after(self, e, out, y):
        if e == 3:
            self.norm = out.sum()


class LateOutput(Loop):
    def forward(self, x):
        self.kept = None
        out = super().forward(x)
        return out, self.kept

    def after(self, e, out, y):
        if e == 4:
            self.kept = y.sum()


class LateWrite(Loop):
    """After one pass the sum is changed in another way."""

    def after(self, e, out, y):
        if e == 4:
            out.mul_(0.5)


def compile_and_compare(module: nn.Module, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list]:
    monkeypatch.setenv("MOE_INDUCTOR_RAISE", "1")
    folds = []
    fold = assumptions.fold

    def spy(*args):
        folds.append(fold(*args))
        return folds[-1]

    monkeypatch.setattr(assumptions, "fold", spy)
    torch._dynamo.reset()
    backend = WithoutInductor()
    backend.install()
    x = torch.randn(T, H)
    results = []
    compiled = torch.compile(module, backend=backend)
    for run, dtype in (
        (compiled, torch.float32),
        (module, torch.float32),
        (module, torch.float64),
    ):
        module.to(dtype).zero_grad()
        data = x.clone().to(dtype).requires_grad_()
        output = run(data)
        output = output if isinstance(output, tuple) else (output,)
        sum(o.square().sum() for o in output if o is not None).backward()
        grads = [p.grad for p in (data, *module.parameters()) if p.grad is not None]
        results.append([o.detach().clone() for o in (*output, *grads) if o is not None])
        results[-1] = [t.reshape(-1, t.shape[-1]) if t.dim() > 1 else t for t in results[-1]]
    for i, (ours, eager, exact) in enumerate(zip(*results, strict=True)):
        assert_within_fp64_rule(ours, eager, exact, what=f"tensor {i}")
    return next(b for r in backend.reports for b in r.blocks), folds


@pytest.mark.parametrize("loop", [Loop, Stacked, OutOfPlace, Tied])
def test_two_passes_stand_for_all(loop, monkeypatch):
    torch.manual_seed(0)
    block, (fold,) = compile_and_compare(loop(), monkeypatch)
    assert fold is not None
    assert fold.runs == (tuple(range(E)),)
    assert block.fused, block.why_not()
    assert block.moe.experts.num_experts == E


@pytest.mark.parametrize("loop", [ThenIdentities, StackedThenIdentities])
def test_each_run_of_passes_is_folded_by_itself(loop, monkeypatch):
    torch.manual_seed(0)
    block, (fold,) = compile_and_compare(loop(), monkeypatch)
    assert fold is not None
    assert fold.runs == (tuple(range(E)), tuple(range(E, E + IDENTITIES)))
    assert len(fold.nodes) < block.nodes_before / 2
    assert block.fused, block.why_not()
    assert (block.moe.experts.num_experts, block.moe.experts.identities) == (E, IDENTITIES)


MISSES = [
    HalfOfThemScaled,
    HalfOfThemGelu,
    OneIdentityScaled,
    LateIdentitiesOfOthers,
    OneOtherActivation,
    OneScaled,
    AllScaledByNumber,
    OneAddsTwice,
    OneOtherRows,
    LateRowsAllTheSame,
    OneOtherStackRow,
    OneOtherDown,
    PartialSum,
    LateOutput,
    LateWrite,
]


@pytest.mark.parametrize("loop", MISSES)
def test_a_late_pass_that_differs_is_never_taken_for_the_others(loop, monkeypatch):
    torch.manual_seed(0)
    block, _ = compile_and_compare(loop(), monkeypatch)
    assert not block.fused


@pytest.mark.parametrize("loop", [OneExchanged, GateIsUpOfOne])
def test_other_tensors_in_the_same_places_are_bound_as_they_stand(loop, monkeypatch):
    """Fused or not, what counts is that the result is the model's: checked in the comparison."""
    torch.manual_seed(0)
    compile_and_compare(loop(), monkeypatch)


class Rolled(Loop):
    """A hit list over modules: traced for two experts."""

    def forward(self, x):
        weights, ids = torch.topk(F.softmax(self.gate(x), dim=-1), K, dim=-1)
        out, mask = torch.zeros_like(x), F.one_hot(ids, E).permute(2, 1, 0)
        for e in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero().squeeze(-1):
            slot, token = torch.where(mask[e])
            out.index_add_(0, token, self.expert(e, x[token]) * weights[token, slot, None])
        return out


class RolledStacked(Stacked, Rolled):
    pass


@pytest.mark.parametrize("loop", [Loop, Rolled, RolledStacked])
def test_layers_are_blocks_of_their_own(loop, monkeypatch):
    """The second layer reads nothing but the first: still two blocks, whose loops fold separately."""
    monkeypatch.setenv("MOE_INDUCTOR_RAISE", "1")
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(loop(), loop())
    backend = WithoutInductor()
    backend.install()
    x = torch.randn(T, H)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=backend)(x), model(x))
    (report,) = backend.reports
    assert [b.fused for b in report.blocks] == [True, True], report.summary()
