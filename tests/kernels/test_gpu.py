"""On a CUDA device: every plan against fp64 in every dtype, CUDA graphs, determinism, large offsets."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from moe_oracle import LAYOUTS, assert_accurate, make_weights, random_routing

from moe_inductor.kernels import configs
from moe_inductor.kernels.configs import DecodePlan, GemmConfig, GroupedPlan, Problem, choose_plan
from moe_inductor.kernels.weights import Projection, Stored
from moe_inductor.ops import cuda
from moe_inductor.unit import parse

pytestmark = pytest.mark.gpu

bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def call(x, topk_ids, topk_weights, weights, out_dtype=None):
    return cuda.fused_experts(
        x,
        topk_ids,
        topk_weights,
        weights.gate_up_proj,
        weights.up_proj,
        weights.down_proj,
        "silu",
        out_dtype or x.dtype,
        interleaved=weights.interleaved,
    )


def check(T, E, k, H, I, dtype=bf16, layout="stacked"):
    weights = make_weights(layout, E, H, I, dtype, "cuda")
    x = torch.randn(T, H, device="cuda", dtype=dtype)
    topk_weights, topk_ids = random_routing(T, E, k, "cuda")
    assert_accurate(call(x, topk_ids, topk_weights, weights), x, topk_ids, topk_weights, weights)


# H, I: tiles differ for small, deep and large experts.
SMALL, DEEP, LARGE = (512, 512), (1024, 4096), (2560, 4096)


def shipped_plans(dtype, layout, size):
    """Every distinct plan that configs.py can choose on this device, with a T that chooses it."""
    plans = {}
    weights = make_weights(layout, 8, *size, dtype, "cuda")
    gate, down = (Stored.of(w) for w in (weights.gate_up_proj, weights.down_proj))
    up = Projection.of(Stored.of(weights.up_proj)) if weights.up_proj else None
    read = Projection.of(gate, None, weights.interleaved), up, Projection.of(down), parse("silu")
    for T in (1, 2, 8, 40, 100, 200, 300, 500, 1000, 2000, 5000):
        problem = cuda.problem_of(T, 2, *read, torch.cuda.get_device_capability())
        plans.setdefault(repr(choose_plan(problem)), T)
    return list(plans.values())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [bf16, fp16, fp32])
@pytest.mark.parametrize("size", [SMALL, DEEP, LARGE])
def test_shipped_plans(dtype, layout, size):
    for T in shipped_plans(dtype, layout, size):
        check(T, 8, 2, *size, dtype, layout)


@pytest.mark.parametrize("dtype", [bf16, fp32])
@pytest.mark.parametrize(
    ("H", "I"),
    [(1, 1), (15, 63), (16, 127), (17, 511), (63, 17), (65, 16), (127, 65), (511, 15), (200, 328)],
)
def test_ragged_sizes(H, I, dtype):
    for T in (1, 40, 700):
        for layout in ("stacked", "per_expert_separate"):
            check(T, 3, 2, H, I, dtype, layout)


@pytest.mark.parametrize("E", [1, 3, 8, 128, 256, 257])
def test_expert_counts_and_k(E):
    for k in sorted({1, 2, 3, 5, 8, 17, E}):
        if k <= E:
            for T in (1, 2, 17):
                check(T, E, k, 64, 128)
    check(3000, E, min(E, 8), 64, 128)


@pytest.mark.parametrize("T", [15, 16, 17, 31, 33, 63, 65, 127, 128, 129, 511, 513, 2049])
def test_tokens_around_tiles(T):
    check(T, 7, 3, 128, 192)


def routing_to(expert, T, k, E):
    ids = (torch.arange(k, device="cuda") + expert).expand(T, k) % E
    return torch.rand(T, k, device="cuda"), ids.contiguous()


@pytest.mark.parametrize("T", [1, 5, 100, 1500])
def test_all_tokens_to_few_experts(T):
    weights = make_weights("stacked", 16, 256, 128, bf16, "cuda")
    x = torch.randn(T, 256, device="cuda", dtype=bf16)
    topk_weights, topk_ids = routing_to(13, T, 4, 16)
    got = call(x, topk_ids, topk_weights, weights)
    assert_accurate(got, x, topk_ids, topk_weights, weights)


@pytest.mark.parametrize("T", [1, 5, 100, 1500])
def test_ids_outside_and_poisoned_memory(T):
    """Unused experts hold NaN, every workspace starts as NaN: neither may be seen."""
    weights = make_weights("stacked", 8, 256, 128, bf16, "cuda")
    weights.gate_up_proj[0][0] = weights.down_proj[0][0] = float("nan")
    x = torch.randn(T, 256, device="cuda", dtype=bf16)
    topk_weights, topk_ids = routing_to(1, T, 3, 7)
    topk_ids = torch.where(topk_ids == 0, 8, topk_ids)
    topk_ids[:, 1] = torch.where(torch.arange(T, device="cuda") % 3 == 0, -(2**40), topk_ids[:, 1])
    clean = call(x, topk_ids, topk_weights, weights)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        poisoned = call(x, topk_ids, topk_weights, weights)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(clean, poisoned)
    assert_accurate(clean, x, topk_ids, topk_weights, weights)


@pytest.mark.parametrize("layout", ["stacked", "per_expert", "per_expert_transposed"])
def test_down_waits_for_gate_up(layout, monkeypatch):
    """Tiles so small that all of down is placed while gate_up, which has much to read, has just begun."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("where down runs beside gate_up")
    tile = GemmConfig(16, 16, 64, num_stages=2, weights_by_tma=True)
    for persistent in (False, True):
        plan = GroupedPlan(
            dataclasses.replace(tile, persistent=persistent),
            dataclasses.replace(tile, persistent=persistent),
            overlap=True,
        )
        monkeypatch.setattr(cuda, "choose_plan", lambda problem, plan=plan: plan)
        weights = make_weights(layout, 4, 8192, 72, bf16, "cuda")
        x = torch.randn(60, 8192, device="cuda", dtype=bf16)
        topk_weights, topk_ids = random_routing(60, 4, 2, "cuda")
        torch.use_deterministic_algorithms(True, warn_only=True)  # workspaces are NaN
        try:
            outs = [call(x, topk_ids, topk_weights, weights) for _ in range(20)]
        finally:
            torch.use_deterministic_algorithms(False)
        assert_accurate(outs[0], x, topk_ids, topk_weights, weights)
        assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize("layout", ["stacked", "per_expert"])
@pytest.mark.parametrize("T", [1, 3, 64, 1024])
def test_cuda_graph_replays_with_other_routing(T, layout):
    """Regression Megatron#1598, onnxruntime#29584."""
    E, k, H, I = 32, 4, 256, 512
    weights = make_weights(layout, E, H, I, bf16, "cuda")
    x = torch.randn(T, H, device="cuda", dtype=bf16)
    logits = torch.randn(T, E, device="cuda", dtype=bf16)

    def block():
        topk_weights, topk_ids = cuda.topk_routing(logits, k, True, bf16)
        return call(x, topk_ids, topk_weights, weights)

    block()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = block()
    for attempt in range(3):
        x.normal_()
        logits.normal_()
        if attempt == 2:
            logits[:, :k] += 100  # most experts empty
        graph.replay()
        replayed = out.clone()
        assert torch.equal(replayed, block())
        topk_weights, topk_ids = cuda.topk_routing(logits, k, True, bf16)
        assert_accurate(replayed, x, topk_ids, topk_weights, weights)


@pytest.mark.parametrize("layout", ["stacked", "per_expert_separate"])
def test_through_the_ops(layout):
    """What a rewritten model calls."""
    from moe_inductor.ops.experts import fused_experts
    from moe_inductor.ops.routing import topk_routing

    weights = make_weights(layout, 16, 256, 512, bf16, "cuda")
    for T in (0, 1, 40, 1500):
        x = torch.randn(T, 256, device="cuda", dtype=bf16)
        logits = torch.randn(T, 16, device="cuda", dtype=bf16)
        topk_weights, topk_ids = topk_routing(logits, 4, True, bf16)
        got = fused_experts(
            x,
            topk_ids,
            topk_weights,
            weights.gate_up_proj,
            weights.up_proj,
            weights.down_proj,
            "silu",
            bf16,
        )
        assert torch.equal(got, call(x, topk_ids, topk_weights, weights))
        if T:
            assert_accurate(got, x, topk_ids, topk_weights, weights)


def test_pointer_table_first_seen_during_capture():
    weights = make_weights("per_expert", 4, 64, 64, bf16, "cuda")
    x = torch.randn(3, 64, device="cuda", dtype=bf16)
    topk_weights, topk_ids = random_routing(3, 4, 2, "cuda")
    other = make_weights("per_expert", 4, 64, 64, bf16, "cuda")
    call(x, topk_ids, topk_weights, other)  # compiles; the tables of ``weights`` do not exist yet
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(x, topk_ids, topk_weights, weights)
    graph.replay()
    assert torch.equal(out, call(x, topk_ids, topk_weights, weights))


def test_no_host_sync():
    weights = make_weights("per_expert", 8, 64, 64, bf16, "cuda")
    blocks = []
    for T in (1, 50, 1500):
        x = torch.randn(T, 64, device="cuda", dtype=bf16)
        logits = torch.randn(T, 8, device="cuda")
        blocks.append((x, logits))
    for synchronise in ("default", "error"):
        torch.cuda.set_sync_debug_mode(synchronise)
        try:
            for x, logits in blocks:
                topk_weights, topk_ids = cuda.topk_routing(logits, 2, True, bf16)
                call(x, topk_ids, topk_weights, weights)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("T", [1, 8, 300, 2500])
def test_hundred_runs_are_bitwise_equal(T):
    weights = make_weights("stacked", 16, 512, 256, bf16, "cuda")
    x = torch.randn(T, 512, device="cuda", dtype=bf16)
    logits = torch.randn(T, 16, device="cuda", dtype=bf16)
    first = None
    for _ in range(100):
        topk_weights, topk_ids = cuda.topk_routing(logits, 4, True, bf16)
        out = call(x, topk_ids, topk_weights, weights)
        first = out if first is None else first
        assert torch.equal(out, first)


def test_two_streams():
    """Regression vllm#56098: workspaces shared between streams."""
    weights = make_weights("stacked", 16, 512, 256, bf16, "cuda")
    xs = [torch.randn(200, 512, device="cuda", dtype=bf16) for _ in range(2)]
    routing = [random_routing(200, 16, 4, "cuda") for _ in range(2)]
    wanted = [call(x, ids, w, weights) for x, (w, ids) in zip(xs, routing, strict=True)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    for _ in range(20):
        got = []
        for x, (w, ids), stream in zip(xs, routing, streams, strict=True):
            with torch.cuda.stream(stream):
                got.append(call(x, ids, w, weights))
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("T", [1, 20, 1200])
def test_weight_offsets_beyond_2_31(T):
    """Regression sglang#4727, vllm#34279: E * 2I * H elements pass 2**31; only the last experts are used."""
    E, H, I = 160, 4096, 2048  # 2.7e9 elements of gate_up, 1.3e9 of down
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB of free memory")
    gate_up = torch.zeros(E, 2 * I, H, device="cuda", dtype=bf16)
    down = torch.zeros(2 * E, H, I, device="cuda", dtype=bf16)[E:]
    small = make_weights("stacked", 2, H, I, bf16, "cuda")
    gate_up[-2:] = small.gate_up_proj[0]
    down[-2:] = small.down_proj[0]
    x = torch.randn(T, H, device="cuda", dtype=bf16)
    topk_weights, topk_ids = random_routing(T, 2, 2, "cuda")
    for gate_up_proj, down_proj in (
        ([gate_up], [down]),
        (list(gate_up.unbind(0)), list(down.unbind(0))),
    ):
        got = cuda.fused_experts(
            x, topk_ids + E - 2, topk_weights, gate_up_proj, [], down_proj, "silu", bf16
        )
        assert_accurate(got, x, topk_ids, topk_weights, small)


def test_row_offsets_beyond_2_31():
    """Regression sonic-moe#52: T * k * H, T * H and rows * I elements pass 2**31."""
    T, E, k, H, I = 300_000, 4, 2, 8192, 8192
    if torch.cuda.mem_get_info()[0] < 60e9:
        pytest.skip("needs 60 GB of free memory")
    weights = make_weights("stacked", E, H, I, bf16, "cuda")
    x = torch.randn(1, H, device="cuda", dtype=bf16).expand(T, H).contiguous()
    x[-3:] = torch.randn(3, H, device="cuda", dtype=bf16)
    topk_weights, topk_ids = random_routing(T, E, k, "cuda")
    got = call(x, topk_ids, topk_weights, weights)
    rows = torch.tensor([0, 1, T // 2, T - 3, T - 2, T - 1], device="cuda")
    assert_accurate(got[rows], x[rows], topk_ids[rows], topk_weights[rows], weights)


def test_routing_matches_torch():
    for T, E, k in ((1, 8, 2), (300, 128, 8), (77, 257, 5), (9, 1025, 17), (5, 2048, 2048)):
        for dtype in (bf16, fp32):
            logits = torch.randn(T, E, device="cuda", dtype=dtype)
            for renormalise in (False, True):
                weights, ids = cuda.topk_routing(logits, k, renormalise, fp32)
                order = torch.sort(logits.float(), dim=-1, descending=True, stable=True)
                assert torch.equal(ids, order.indices[:, :k])
                wanted = logits.double().softmax(-1).gather(1, ids)
                if renormalise:
                    wanted = wanted / wanted.sum(-1, keepdim=True)
                torch.testing.assert_close(weights.double(), wanted, rtol=2e-5, atol=1e-9)


def test_routing_nan_and_inf():
    logits = torch.randn(64, 129, device="cuda")
    clean = logits.clone()
    logits[0], logits[1, 3], logits[2, 2] = float("nan"), float("nan"), float("inf")
    logits[3] = float("-inf")
    weights, ids = cuda.topk_routing(logits, 8, True, fp32)
    assert ids.min() >= 0
    assert ids.max() < 129
    assert all(len(set(row)) == 8 for row in ids.tolist())
    assert weights[:4].isnan().all()
    clean_weights, clean_ids = cuda.topk_routing(clean, 8, True, fp32)
    assert torch.equal(weights[4:], clean_weights[4:])
    assert torch.equal(ids[4:], clean_ids[4:])


def test_every_regime_is_reached():
    """The sweep above covers both plans; a change of configs.py that loses one should be noticed."""
    problem = Problem(1, 64, 8, 2048, 1024, bf16, torch.cuda.get_device_capability())
    assert isinstance(choose_plan(problem), DecodePlan)
    assert isinstance(choose_plan(dataclasses.replace(problem, T=4096)), GroupedPlan)
    assert configs.GemmConfig(16, 16, 16).precision == "ieee"
