"""``batch_invariant``: a token's bits, computed alone, with a few others and with many."""

from __future__ import annotations

import pytest
import torch

from moe_inductor import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

SIZES = {"even": (512, 384), "ragged": (200, 72)}
TOKENS, E, K = 1500, 8, 2


def weights(layout: str, H: int, I: int, dtype: torch.dtype) -> tuple[list, list]:
    gate_up = torch.randn(E, 2 * I, H, device="cuda", dtype=dtype) / H**0.5
    down = torch.randn(E, H, I, device="cuda", dtype=dtype) / I**0.5
    if layout == "per_expert":
        return list(gate_up.unbind()), list(down.unbind())
    if layout == "transposed":
        return [gate_up.mT.contiguous().mT], [down.mT.contiguous().mT]
    return [gate_up], [down]


@pytest.mark.parametrize("layout", ["stacked", "per_expert", "transposed"])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_bits_of_a_token(layout, sizes, dtype):
    torch.manual_seed(0)
    H, I = SIZES[sizes]
    x = torch.randn(TOKENS, H, device="cuda", dtype=dtype)
    logits = torch.randn(TOKENS, E, device="cuda", dtype=dtype)
    gate_up, down = weights(layout, H, I, dtype)

    def block(rows: slice) -> torch.Tensor:
        topk_weights, topk_ids = ops.topk_routing(logits[rows], K, True, dtype)
        return ops.fused_experts(
            x[rows], topk_ids, topk_weights, gate_up, [], down, "silu", dtype, batch_invariant=True
        )

    whole = block(slice(None))
    for first, count in ((7, 1), (8, 2), (100, 3), (200, 17), (400, 70), (600, 333), (1000, 500)):
        rows = slice(first, first + count)
        for _ in range(3):  # through the JIT, written down, and repeated
            assert torch.equal(block(rows), whole[rows]), count
