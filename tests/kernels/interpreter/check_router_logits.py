import pytest
import torch

from moe_inductor.kernels.configs import RouterRows, RouterTiles, router_plan
from moe_inductor.ops import cuda
from moe_inductor.ops.block import Block
from moe_inductor.ops.check import Call, Routing
from tests.router_product import logits_by


@pytest.mark.parametrize(
    ("T", "E", "H"), [(1, 8, 64), (2, 3, 33), (3, 5, 100), (9, 7, 520), (17, 1, 1)]
)
@pytest.mark.parametrize("biased", [False, True])
def test_against_linear(T, E, H, biased, poisoned_workspaces):
    x = torch.randn(T, 2 * H)[:, :H]  # rows further apart than H
    weight = torch.randn(E, H)
    bias = torch.randn(E) if biased else None
    wanted = torch.nn.functional.linear(
        x.double(), weight.double(), None if bias is None else bias.double()
    )
    for plan in (
        router_plan(T, E, H, x.dtype),
        RouterRows(1, 64),
        RouterRows(4, 32),
        RouterRows(8, 512),
        RouterTiles(16, 16, 1, 32),
        RouterTiles(16, 32, 3, 64),
        RouterTiles(32, 16, 16, 16),
    ):
        got = logits_by(plan, x, weight, bias)
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("T", "E", "H", "dtype"),
    [(1, 6, 48, torch.float32), (5, 6, 48, torch.float32), (33, 20, 2000, torch.float16)],
)
@pytest.mark.parametrize("stored", ["", "dense", "strided", "expanded", "one for all"])
def test_block_is_its_parts(T, E, H, dtype, stored, poisoned_workspaces):
    """stored: how the router's bias is, if it has one."""
    k, I = 2, 32
    router_bias = {
        "dense": 3 * torch.randn(E),
        "strided": (3 * torch.randn(2 * E))[::2],
        "expanded": torch.randn(1).expand(E),
        "one for all": torch.randn(1),
    }.get(stored)
    x, router = torch.randn(T, H), torch.randn(E, H)
    gate_up_proj = [torch.randn(E, 2 * I, H) / H**0.5]
    down_proj = [torch.randn(E, H, I) / I**0.5]
    logits = torch.nn.functional.linear(x, router, router_bias)
    routing = Routing(
        logits, k, True, torch.float32, score="sigmoid", weight="sigmoid", bias=torch.randn(E)
    )
    topk_weights, topk_ids = cuda.topk_routing(*routing)
    experts = Call(x, topk_ids, topk_weights, gate_up_proj, [], down_proj, "silu", torch.float32)
    whole = cuda.fused_moe(*Block.of(x, router, router_bias, routing, experts))
    torch.testing.assert_close(whole, cuda.fused_experts(*experts), rtol=1e-5, atol=1e-5)
