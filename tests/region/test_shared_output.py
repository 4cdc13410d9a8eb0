"""Blocks whose number of tokens depends on the data, and which write into one tensor (Ernie 4.5 VL)."""

from __future__ import annotations

import copy

import pytest
import torch
from moe_inductor.patterns.hf_batched_mm import Batched

from moe_inductor.reasons import Code
from tests.oracle import assert_within_fp64_rule
from tests.patterns.conftest import rewritten  # noqa: F401  (a fixture)


class Modalities(torch.nn.Module):
    """Experts of their own for text and for images; which token is which is data."""

    def __init__(self):
        super().__init__()
        self.text, self.image = Batched(), Batched()

    def forward(self, x, is_image):
        out = torch.zeros_like(x)
        wide = is_image[:, None].expand(-1, x.shape[-1])
        out[~wide] = self.text(x[~wide].view(-1, x.shape[-1])).flatten()
        out[wide] = self.image(x[wide].view(-1, x.shape[-1])).flatten()
        return out


class Overwrites(Modalities):
    """The first block's tokens are changed between its router and its experts."""

    def forward(self, x, is_image):
        x = x.clone()
        weights, ids = self.text.route(self.text.gate(x))
        x[is_image] = 0.0
        return self.text.experts(x, ids, weights)


IS_IMAGE = torch.tensor([True, False, False, True, False, True, False, False, True, True, False])


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_blocks_that_share_their_output_are_fused(training, rewritten):  # noqa: F811
    torch.manual_seed(0)
    module = Modalities()
    exact = copy.deepcopy(module).double()
    compiled = rewritten(module)
    x = torch.randn(11, 32)

    def step(run, module, x):
        module.zero_grad()
        x = x.clone().requires_grad_(training)
        with torch.set_grad_enabled(training):
            out = run(x, IS_IMAGE)
        if not training:
            return [out]
        out.square().sum().backward()
        return [out.detach(), x.grad, *(p.grad for p in module.parameters())]

    ours, eager = step(compiled, module, x), step(module, module, x)
    truth = step(exact, exact, x.double())
    assert [b.fused for b in compiled.blocks] == [True, True], [b.reason for b in compiled.blocks]
    for i, triple in enumerate(zip(ours, eager, truth, strict=True)):
        assert_within_fp64_rule(*triple, what=f"tensor {i}")


def test_tokens_changed_between_router_and_experts(rewritten):  # noqa: F811
    module = Overwrites()
    compiled = rewritten(module)
    x = torch.randn(11, 32)
    with torch.no_grad():
        assert torch.equal(compiled(x, IS_IMAGE), module(x, IS_IMAGE))
    (block,) = compiled.blocks
    assert not block.fused
    assert block.reason.code is Code.MUTATION
