"""Experts that are added in place to a tensor that others know as well: all of them see the sum, when it is due."""

from __future__ import annotations

import copy

import pytest
import torch
from moe_inductor.patterns._blocks import HIDDEN
from moe_inductor.patterns.expert_loop import Loop

from tests.oracle import assert_within_fp64_rule
from tests.patterns.conftest import rewritten  # noqa: F401  (a fixture)


class Given(Loop):
    """The caller's tensor."""

    def forward(self, x, given):
        weights, ids = self.route(self.gate(x))
        self.base = given
        return self.experts(x, ids, weights) * 2.0 + given

    def start(self, x):
        return self.base


class GivenInThreeDimensions(Given):
    def start(self, x):
        return self.base.view(1, -1, HIDDEN).view(-1, HIDDEN)

    def forward(self, x, given):
        return super().forward(x, given.view(-1, HIDDEN))


class TwoBlocks(torch.nn.Module):
    """One after the other; each adds to what the one before has left."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([Given(), Given()])

    def forward(self, x, given):
        out = given * 0.5
        for block in self.blocks:
            out = out + block(x, out)
        return out


class Parts(Given):
    """A part of the tensor that is taken before and read after; then somebody else writes to it."""

    def forward(self, x, given):
        self.base = given * 0.5
        part, before = self.base[3:], self.base.sum()
        weights, ids = self.route(self.gate(x))
        self.experts(x, ids, weights)
        after = part.sum()
        self.base.add_(1.0)
        return self.base * before * after


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("block", [Given, GivenInThreeDimensions, TwoBlocks, Parts])
def test_all_names_of_the_base_see_the_sum(block, training, rewritten):  # noqa: F811
    torch.manual_seed(0)
    module = block()
    exact = copy.deepcopy(module).double()
    compiled = rewritten(module)
    x, given = torch.randn(29, HIDDEN), torch.randn(29, HIDDEN)

    def step(run, module, dtype):
        module.zero_grad()
        tokens, base = x.to(dtype, copy=True).requires_grad_(training), given.to(dtype, copy=True)
        with torch.set_grad_enabled(training):
            out = run(tokens, base)
        made = [out.detach(), base.detach()]
        if training:
            out.square().mean().backward()
            made += [tokens.grad, *(p.grad for p in module.parameters())]
        return made

    ours, eager = step(compiled, module, x.dtype), step(module, module, x.dtype)
    truth = step(exact, exact, torch.float64)
    assert compiled.blocks[-1].fused, compiled.blocks[-1].why_not()
    for i, triple in enumerate(zip(ours, eager, truth, strict=True)):
        assert_within_fp64_rule(*triple, what=f"tensor {i}")
