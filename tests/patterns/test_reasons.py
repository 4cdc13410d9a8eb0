"""What a refusal says, where the code alone would not help the author of a model."""

from __future__ import annotations

import pytest
import torch
from moe_inductor.patterns import dense_experts, expert_loop, sorted_experts

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


class Counts(expert_loop.Loop):
    """The passes are counted, in Python."""

    def experts(self, x, topk_ids, topk_weights):
        out, mask, passes = self.start(x), self.mask(topk_ids), 0
        for e in mask.sum(dim=(1, 2)).nonzero().squeeze(-1):
            slot, token = self.where(mask, e)
            self.add(out, token, self.expert(e, x[token]) * topk_weights[token, slot, None])
            passes += 1
        return out / passes


class Pairs(expert_loop.Loop):
    """Results wait in a list of pairs."""

    def experts(self, x, topk_ids, topk_weights):
        out, pairs = self.start(x), []
        for e in topk_ids.unique():
            token, slot = torch.where(topk_ids == e)
            pairs.append((token, self.expert(e, x[token]) * topk_weights[token, slot, None]))
        for token, y in pairs:
            self.add(out, token, y)
        return out


class Slices(sorted_experts.Slices):
    """``outputs, start = [], 0``, and a count of the experts that have tokens."""

    def loop(self, rows, counts):
        outputs, start, used = [], 0, 0
        for e, count in enumerate(counts):
            if count == 0:
                continue
            used += 1
            outputs.append(self.mlps[e](rows[start : start + count]))
            start += count
        return torch.cat(outputs) / used


class Layers(torch.nn.Module):
    def __init__(self, block):
        super().__init__()
        self.layers = torch.nn.ModuleList(block() for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.mark.parametrize("whole", [False, True], ids=["block", "layers"])
@pytest.mark.parametrize(
    ("block", "words"),
    [
        (Counts, ("`passes`", "for e in mask.sum(dim=(1, 2)).nonzero().squeeze(-1):")),
        (Pairs, ("(list) is changed", "for e in topk_ids.unique():")),
        (Slices, ("`used`", "if count == 0:")),
    ],
)
def test_a_loop_that_was_not_captured_is_told_once_with_its_statement(
    rewritten, caplog, block, words, whole
):
    """Stock capture makes several frames of it, one inside of the other, and each is given up for the same loop."""
    module, x = Layers(block) if whole else block(), torch.randn(T, 32)
    with caplog.at_level("INFO", "moe_inductor"):
        torch.testing.assert_close(rewritten(module)(x), module(x))
    (line,) = [r.getMessage() for r in caplog.records if " MoE block" in r.getMessage()]
    assert "only the router was captured: " in line
    assert all(word in line for word in (*words, " at test_reasons.py:"))
