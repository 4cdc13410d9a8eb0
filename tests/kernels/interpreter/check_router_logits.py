import pytest
import torch

from moe_inductor.kernels.configs import RouterRows, RouterTiles, router_plan
from moe_inductor.ops import cuda
from moe_inductor.ops.block import Block
from moe_inductor.ops.check import Call, Routing
from tests.router_product import logits_by


@pytest.mark.parametrize(
    ("T", "E", "H"), [(1, 8, 64), (2, 3, 33), (3, 5, 100), (4, 2, 80), (9, 7, 520), (17, 1, 1)]
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
        RouterTiles(16, 16, 3, 16),  # of 80: pieces of 32, 32 and 16
    ):
        got = logits_by(plan, x, weight, bias)
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("stored", ["", "dense", "strided", "expanded", "one for all"])
def test_block_is_its_parts(T, stored, poisoned_workspaces):
    """stored: how the router's bias is, if it has one."""
    E, k, H, I = 6, 2, 48, 32
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


@pytest.mark.parametrize(("T", "E", "H"), [(9, 132, 1100), (70, 40, 1088), (8, 84, 2176)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    "facts", [{"weight": "logits"}, {"score": "sigmoid", "weight": "sigmoid", "groups": 4}]
)
def test_pieces_are_added_up(T, E, H, biased, facts, monkeypatch, poisoned_workspaces):
    """What a block's experts are given is the routing of the logits that the pieces make, bit by bit.

    In fp16, since the interpreter neither multiplies nor rounds bf16 as a GPU does.  Weights that are logits, and a
    bias that is large, show how often they were rounded.
    """
    x = torch.randn(T, 2 * H).half()[:, :H]
    router = (torch.randn(E, H) / H**0.5).half()
    router_bias = 30 * torch.randn(E).half() if biased else None
    if "groups" in facts:
        facts = facts | {"kept_groups": 2, "bias": torch.randn(E)}
    plan = router_plan(T, E, H, x.dtype)
    assert isinstance(plan, RouterTiles)
    routing = Routing(x, 3, False, torch.float32, **facts)
    experts = Call(x, x, x, [torch.randn(E, 8, 8)], [], [torch.randn(E, 8, 4)], "silu", x.dtype)
    given = []
    monkeypatch.setattr(cuda, "_fused_experts", lambda *args: given.extend(args[1:3]) or [x])
    cuda.fused_moe(*Block.of(x, router, router_bias, routing, experts))
    logits = logits_by(plan, x, router, router_bias)
    topk_weights, topk_ids = cuda.topk_routing(logits, *routing[1:])
    ids, weights = given
    assert torch.equal(ids, topk_ids)
    assert torch.equal(weights, topk_weights)
