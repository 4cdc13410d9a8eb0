import pytest
import torch
from moe_oracle import LAYOUTS, assert_accurate, make_weights, random_routing

from moe_inductor.kernels.configs import DecodePlan, GemmConfig, GemvConfig, GroupedPlan
from moe_inductor.ops import cuda

GEMV = GemvConfig(block_n=16, block_k=32)
DECODE = DecodePlan(GEMV, GEMV)


def grouped(block_m=16, block_n=32, block_k=32, **options):
    config = GemmConfig(block_m, block_n, block_k, **options)
    return GroupedPlan(config, config)


PLANS = {
    "decode": DECODE,
    "grouped": grouped(),
    "grouped_group_m": grouped(group_m=4),
    "persistent": grouped(group_m=2, persistent=True),
}
BOX = {
    "box": grouped(weights_by_tma=True),
    "box_persistent": grouped(block_n=16, group_m=2, weights_by_tma=True, persistent=True),
}


def run(plan, x, topk_ids, topk_weights, weights, monkeypatch, out_dtype=torch.float32):
    monkeypatch.setattr(cuda, "choose_plan", lambda problem: plan)
    return cuda.fused_experts(
        x,
        topk_ids,
        topk_weights,
        weights.gate_up_proj,
        weights.up_proj,
        weights.down_proj,
        "silu",
        out_dtype,
    )


def check(plan, layout, T, E, k, H, I, monkeypatch):
    weights = make_weights(layout, E, H, I, torch.float32)
    x = torch.randn(T, H)
    topk_weights, topk_ids = random_routing(T, E, k)
    got = run(plan, x, topk_ids, topk_weights, weights, monkeypatch)
    assert_accurate(got, x, topk_ids, topk_weights, weights)


@pytest.mark.parametrize(
    ("plan", "layout"),
    [(plan, layout) for plan in ("decode", "grouped") for layout in LAYOUTS]
    + [("persistent", "stacked"), ("grouped_group_m", "per_expert")],
)
def test_layouts(plan, layout, monkeypatch, poisoned_workspaces):
    check(PLANS[plan], layout, 4, 3, 2, 40, 24, monkeypatch)


@pytest.mark.parametrize("plan", ["decode", "grouped"])
@pytest.mark.parametrize(
    ("H", "I"), [(1, 1), (15, 63), (16, 127), (17, 15), (63, 17), (65, 16), (127, 65)]
)
def test_ragged_sizes(plan, H, I, monkeypatch, poisoned_workspaces):
    """Regression vllm#42436: a ragged K tail."""
    layout = "stacked" if H % 2 else "per_expert_separate"
    check(PLANS[plan], layout, 3, 2, 1, H, I, monkeypatch)


@pytest.mark.parametrize("plan", BOX)
@pytest.mark.parametrize(("H", "I"), [(64, 32), (16, 4), (72, 44)])
def test_tma_boxes(plan, H, I, monkeypatch, poisoned_workspaces):
    for layout in ("stacked", "per_expert"):
        check(BOX[plan], layout, 4, 3, 2, H, I, monkeypatch)


@pytest.mark.parametrize("plan", ["decode", "grouped"])
@pytest.mark.parametrize("E", [1, 3, 257])
def test_expert_counts(plan, E, monkeypatch, poisoned_workspaces):
    check(PLANS[plan], "stacked", 3, E, min(E, 2), 16, 16, monkeypatch)


@pytest.mark.parametrize("plan", ["decode", "grouped"])
@pytest.mark.parametrize("k", [1, 3, 19])
def test_experts_per_token(plan, k, monkeypatch, poisoned_workspaces):
    check(PLANS[plan], "stacked", 2, 19, k, 16, 16, monkeypatch)


@pytest.mark.parametrize("T", [1, 15, 17])
def test_tokens_around_the_tile(T, monkeypatch, poisoned_workspaces):
    check(PLANS["grouped"], "stacked", T, 2, 2, 32, 16, monkeypatch)


@pytest.mark.parametrize("plan", PLANS)
def test_ids_outside_contribute_nothing(plan, monkeypatch, poisoned_workspaces):
    """Expert 0 is NaN and no token's: nothing of it may leak through a clamped id."""
    weights = make_weights("stacked", 4, 32, 32, torch.float32)
    x = torch.randn(6, 32)
    topk_weights = torch.rand(6, 3)
    topk_ids = torch.tensor([1, 2, 3, -1, 4, 1, -5, 9, 2**33, 3, 3, 2, 2, -1, 1, 1, 2, 3]).view(
        6, 3
    )
    weights.gate_up_proj[0][0] = weights.down_proj[0][0] = float("nan")
    got = run(PLANS[plan], x, topk_ids, topk_weights, weights, monkeypatch)
    assert_accurate(got, x, topk_ids, topk_weights, weights)
    assert torch.equal(got[2], torch.zeros(32))


@pytest.mark.parametrize("plan", ["decode", "grouped"])
def test_strided_inputs_other_dtypes_and_inputs_unchanged(plan, monkeypatch):
    weights = make_weights("stacked", 4, 32, 16, torch.float32)
    wide = torch.randn(6, 80)
    topk_weights, topk_ids = random_routing(6, 4, 2)
    for x in (wide[:, 5:37], wide[:, ::2][:, :32], wide[:1, :32].expand(6, 32)):
        before = x.clone()
        for ids, w in (
            (topk_ids.int(), topk_weights),
            (topk_ids.T.contiguous().T, topk_weights.double()),
        ):
            got = run(PLANS[plan], x, ids, w, weights, monkeypatch, torch.float16)
            assert got.dtype == torch.float16
            wanted = run(PLANS[plan], x.contiguous(), topk_ids, topk_weights, weights, monkeypatch)
            torch.testing.assert_close(got, wanted.half())
        assert torch.equal(x, before)


def test_empty(monkeypatch):
    weights = make_weights("stacked", 4, 32, 16, torch.float32)
    for plan in PLANS.values():
        ids = torch.zeros(0, 2, dtype=torch.int64)
        got = run(plan, torch.randn(0, 32), ids, torch.rand(0, 2), weights, monkeypatch)
        assert got.shape == (0, 32)
        ids = torch.zeros(3, 0, dtype=torch.int64)
        got = run(plan, torch.randn(3, 32), ids, torch.rand(3, 0), weights, monkeypatch)
        assert torch.equal(got, torch.zeros(3, 32))


def test_shipped_plans():
    """No patched plan: what configs.py chooses, over its regimes."""
    weights = make_weights("stacked", 4, 64, 64, torch.float32)
    for T in (1, 3, 40):
        x = torch.randn(T, 64)
        topk_weights, topk_ids = random_routing(T, 4, 2)
        got = cuda.fused_experts(
            x, topk_ids, topk_weights, weights.gate_up_proj, [], weights.down_proj, "silu", x.dtype
        )
        assert_accurate(got, x, topk_ids, topk_weights, weights)
