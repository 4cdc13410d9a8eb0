import pytest
import torch
from moe_oracle import LAYOUTS, assert_accurate, make_weights, random_routing

from moe_inductor.kernels import configs, down
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
        interleaved=weights.interleaved,
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


@pytest.mark.parametrize("layout", LAYOUTS)
def test_plans_of_an_h200(layout, monkeypatch, poisoned_workspaces):
    """All its tiles, and what it reads by TMA.  Sizes are no multiples of a tile, and half a row of 2 I is none of 16
    bytes.  In fp16: the interpreter rounds to bf16 otherwise than a GPU."""
    monkeypatch.setattr(cuda, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(configs, "DECODE_REPEATED_BYTES", 0)
    plans = []

    def choose(problem):
        plans.append(configs.choose_plan(problem))
        return plans[-1]

    monkeypatch.setattr(cuda, "choose_plan", choose)
    E, k = 3, 2
    cases = (1, 72, 36), (5, 72, 36), (20, 72, 40), (40, 72, 36), (90, 72, 40), (200, 72, 36)
    for T, H, I in cases:
        weights = make_weights(layout, E, H, I, torch.float16)
        x = torch.randn(T, H, dtype=torch.float16)
        topk_weights, topk_ids = random_routing(T, E, k)
        got = cuda.fused_experts(
            x, topk_ids, topk_weights, weights.gate_up_proj, weights.up_proj, weights.down_proj,
            "silu", x.dtype, interleaved=weights.interleaved,
        )  # fmt: skip
        assert_accurate(got, x, topk_ids, topk_weights, weights)
    sizes = [getattr(plan.gate_up, "block_m", 1) for plan in plans]
    assert sizes == [1, 16, 32, 64, 64, 128]
    aligned = [I % 8 == 0 for _, _, I in cases[1:]]
    transposed, never = "transposed" in layout, "unaligned" in layout
    gate = [not transposed or "interleaved" in layout or fits for fits in aligned]
    down = [transposed or fits for fits in aligned]
    never_gate = never or "mixed" in layout
    assert [p.gate_up.weights_by_tma for p in plans[1:]] == [g and not never_gate for g in gate]
    assert [p.down.weights_by_tma for p in plans[1:]] == [d and not never for d in down]


@pytest.mark.parametrize("persistent", [False, True])
def test_every_tile_is_counted(persistent, monkeypatch, poisoned_workspaces):
    """Where down runs beside gate_up, it waits for so many of each row block."""
    config = GemmConfig(16, 16, 32, group_m=2, weights_by_tma=True, persistent=persistent)
    weights = make_weights("stacked", 4, 32, 40, torch.float32)
    x = torch.randn(30, 32)
    topk_weights, topk_ids = random_routing(30, 4, 2)
    aligned = []
    align = cuda.align
    monkeypatch.setattr(cuda, "align", lambda *args: aligned.append(align(*args)) or aligned[0])
    waits = set()

    def wait(finished_ptr, m, num_tiles, EARLY):
        waits.add((m.handle.data.item(), num_tiles.handle.data.item()))
        return m

    monkeypatch.setattr(down, "wait_until_finished", wait)
    plan = GroupedPlan(config, config, overlap=True)
    got = run(plan, x, topk_ids, topk_weights, weights, monkeypatch)
    assert_accurate(got, x, topk_ids, topk_weights, weights)
    blocks = int(aligned[0].num_tokens_post_padded) // 16
    assert aligned[0].finished[:blocks].tolist() == [3] * blocks  # 40 columns
    assert waits == {(m, 3) for m in range(blocks)}


@pytest.mark.parametrize("plan", BOX)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "unaligned" not in name])
def test_nothing_beside_the_weights_is_read(plan, layout, monkeypatch, poisoned_workspaces):
    """NaN around every matrix, and in another token: one times a zero of padding would be seen."""
    if "mixed" in layout:
        pytest.skip("not read by TMA")
    E, H, I = 3, 40, 24
    weights = make_weights(layout, E, H, I, torch.float32)
    for name in ("gate_up_proj", "up_proj", "down_proj"):
        setattr(weights, name, [_in_nan(w) for w in getattr(weights, name)])
    x = torch.randn(5, H)
    x[2] = float("nan")
    topk_weights, topk_ids = random_routing(5, E, 2)
    got = run(BOX[plan], x, topk_ids, topk_weights, weights, monkeypatch)
    assert got[2].isnan().all()
    others = torch.tensor([0, 1, 3, 4])
    assert_accurate(got[others], x[others], topk_ids[others], topk_weights[others], weights)


def _in_nan(weight):
    """A copy in the middle of NaN, with the same order of dimensions."""
    order = sorted(range(weight.dim()), key=weight.stride, reverse=True)
    size = weight.numel()
    memory = torch.full((3 * size,), float("nan"))
    shape = [weight.shape[d] for d in order]
    inner = memory[size : 2 * size].view(shape).copy_(weight.permute(order))
    return inner.permute([order.index(d) for d in range(weight.dim())])
