"""Small calls, one per regime: what ``test_sanitizer.py`` runs under compute-sanitizer, a process for each of CASES.

With ``PYTORCH_NO_CUDA_MEMORY_CACHING=1`` each tensor is an allocation of its own, so that a byte too far is seen.
"""

from __future__ import annotations

import itertools
import sys

import torch

from moe_inductor.kernels import configs
from moe_inductor.kernels.configs import RouterTiles, router_plan
from moe_inductor.kernels.router_pieces import router_pieces
from moe_inductor.kernels.routing import topk_routing as _topk_routing
from moe_inductor.ops import cuda
from moe_inductor.ops.block import Block
from moe_inductor.ops.check import Call, Routing
from tests.oracle import assert_within_fp64_rule as check
from tests.oracle import reference_experts, reference_experts_fp64, storages, unit_scale_inputs
from tests.router_product import logits_by

E, K = 4, 2
# Decode, then rows per expert of 4, 12, 32, 80, 128, 256, then more slots than one launch aligns.
TOKENS = (1, 8, 24, 64, 160, 256, 512, 1100)
BY_TMA, BY_POINTERS = (72, 40), (70, 36)  # how [out, in] is read; neither is a multiple of a tile
CASES = (
    *itertools.product((BY_TMA, BY_POINTERS), ("stacked", "per expert, own memory")),
    *itertools.product((BY_TMA,), ("stacked, two", "stacked, transposed", "per expert, two")),
)


def run(tokens: int, hidden: int, intermediate: int, storage: str) -> None:
    data = unit_scale_inputs(
        tokens, E, K, hidden, intermediate, dtype=torch.bfloat16, device="cuda"
    )
    weights = storages(data)[storage]
    topk_weights, topk_ids = cuda.topk_routing(data.router_logits, K, True, torch.bfloat16)
    x = data.hidden_states
    out = cuda.fused_experts(x, topk_ids, topk_weights, *weights, "silu", torch.bfloat16)
    stacked = (data.gate_up_proj, [], data.down_proj)
    eager = reference_experts(x, topk_ids, topk_weights, *stacked)
    check(out, eager, reference_experts_fp64(x, topk_ids, topk_weights, *stacked))

    router = torch.randn(E, hidden, device="cuda", dtype=torch.bfloat16)
    plan = router_plan(tokens, E, hidden, router.dtype)
    assert plan is not None
    tiles = RouterTiles(16, 16, 4, block_h=16)  # small blocks are not worth it, but must be right
    sums = router_pieces(x, router, tiles)
    routed = _topk_routing(sums, K, True, torch.bfloat16, first=False, logits_dtype=torch.bfloat16)
    wanted = cuda.topk_routing(logits_by(tiles, x, router), K, True, torch.bfloat16)
    assert all(map(torch.equal, routed, wanted))
    routing = Routing(logits_by(plan, x, router), K, True, torch.bfloat16)
    topk_weights, topk_ids = cuda.topk_routing(*routing)
    experts = Call(x, topk_ids, topk_weights, *weights, "silu", torch.bfloat16)
    whole = cuda.fused_moe(*Block.of(x, router, None, routing, experts))
    assert torch.equal(whole, cuda.fused_experts(*experts))


def main(case: int) -> None:
    hidden_and_intermediate, storage = CASES[case]
    configs.DECODE_REPEATED_BYTES = 0  # else up to 24 tokens of so small experts would be decoded
    for tokens in TOKENS:
        run(tokens, *hidden_and_intermediate, storage)
    torch.cuda.synchronize()
    print("all right")


if __name__ == "__main__":
    main(int(sys.argv[1]))
