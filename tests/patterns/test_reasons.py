"""What a refusal says, where the code alone would not help the author of a model."""

from __future__ import annotations

import torch
from moe_inductor.patterns import expert_loop

T = 11


class WrittenNorm(expert_loop.Loop):
    """muse_spark: a norm between the experts and their routing weights, as its authors write norms."""

    def expert(self, e, rows):
        y = super().expert(e, rows)
        return y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)


def test_a_norm_after_the_experts_is_named(rewritten):
    compiled = rewritten(WrittenNorm())
    compiled(torch.randn(T, 32))
    (block,) = compiled.blocks[:1]
    assert "a norm stands between the experts and the sum over them" in block.reason.message
    assert block.reason.location.startswith("test_reasons.py:")


def test_a_router_that_is_an_input_is_named(rewritten):
    compiled = rewritten(expert_loop.ChoosesTwice())
    compiled(torch.randn(T, 32, requires_grad=True))
    (block,) = compiled.blocks
    assert block.fused
    assert not block.router_fused
    assert "()" not in block.router_reason.message
