"""What a refusal says, where the code alone would not help the author of a model."""

from __future__ import annotations

import pytest
import torch
from moe_inductor.patterns import dense_experts, expert_loop

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


@pytest.mark.parametrize(
    "block", [dense_experts.GShard, dense_experts.GShardCapacity, dense_experts.GShardOneSlot]
)
def test_tokens_that_masks_send_to_slots_are_named(rewritten, block):
    compiled = rewritten(block())
    compiled(torch.randn(T, 32))
    (found,) = compiled.blocks
    assert "tokens are sent to slots of the experts by products with masks" in found.reason.message
    assert found.reason.location.startswith("dense_experts.py:")


def test_a_dense_block_has_no_slots(rewritten):
    compiled = rewritten(dense_experts.EinsumUnweighted())
    compiled(torch.randn(T, 32))
    assert all("slots" not in found.reason.message for found in compiled.blocks)
