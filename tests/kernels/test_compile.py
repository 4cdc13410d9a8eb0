"""Compile what a real call would launch, for GPUs that are not here: tensor cores, spills, shared memory.

The launches are recorded on meta tensors, so the shapes can be those of real models.
"""

import dataclasses
import pathlib
import re
import subprocess
import tempfile
from unittest import mock

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402

from benchmarks.compiled import Launch, assembled, recording  # noqa: E402
from moe_inductor.kernels import configs, gate_up  # noqa: E402
from moe_inductor.ops import cuda  # noqa: E402
from moe_inductor.ops.block import Block  # noqa: E402
from moe_inductor.ops.check import Call, Routing  # noqa: E402
from tests.routers import ROUTERS, call  # noqa: E402
from tests.units import GATED  # noqa: E402

QWEN3 = dict(E=128, k=8, H=2048, I=768)
MIXTRAL = dict(E=8, k=2, H=4096, I=14336)


@pytest.fixture
def record():
    def run(
        capability,
        T,
        E,
        k,
        H,
        I,
        dtype=torch.bfloat16,
        layout="stacked",
        unit="silu",
        rows=2,
        transposed=False,
        separate=False,
        biased=False,
        **facts,
    ):
        with torch.device("meta"):
            first = [(E, I, H)] * 2 if separate else [(E, rows * I, H)]
            shapes = *first, (E, H, I)
            weights = [
                torch.empty(e, b, a, dtype=dtype).mT
                if transposed
                else torch.empty(e, a, b, dtype=dtype)
                for e, a, b in shapes
            ]
            biases = [[torch.empty(e, a, dtype=dtype)] if biased else [] for e, a, _ in shapes]
            x, logits = torch.empty(T, H, dtype=dtype), torch.empty(T, E, dtype=dtype)
        gate_up_proj, *up_proj, down_proj = [
            [w] if layout == "stacked" else list(w.unbind(0)) for w in weights
        ]
        with recording(capability) as launches:
            topk_weights, topk_ids = cuda.topk_routing(logits, k, True, dtype)
            cuda.fused_experts(
                x,
                topk_ids,
                topk_weights,
                gate_up_proj,
                up_proj[0] if up_proj else [],
                down_proj,
                unit,
                dtype,
                gate_up_bias=biases[0],
                down_bias=biases[-1],
                **facts,
            )
        return launches

    return run


@pytest.fixture
def record_block():
    """Like ``record``, the router's product included."""

    def run(capability, T, E, k, H, I, dtype=torch.bfloat16, bias=False):
        with torch.device("meta"):
            x, router = torch.empty(T, H, dtype=dtype), torch.empty(E, H, dtype=dtype)
            gate_up_proj = [torch.empty(E, 2 * I, H, dtype=dtype)]
            down_proj = [torch.empty(E, H, I, dtype=dtype)]
            router_bias = torch.empty(E, dtype=dtype) if bias else None
        routing = Routing(x, k, True, dtype)
        experts = Call(x, x, x, gate_up_proj, [], down_proj, "silu", dtype)
        with recording(capability) as launches:
            cuda.fused_moe(*Block.of(x, router, router_bias, routing, experts))
        return launches

    return run


def compile_for(target, *launch):
    return Launch(*launch).compile(target)


def spilled_bytes(compiled):
    """None if no ptxas of this Triton takes the PTX."""
    found = assembled(compiled)
    return None if found is None else found["spilled"]


@pytest.mark.parametrize("layout", ["stacked", "per_expert"])
@pytest.mark.parametrize("shape", ["QWEN3", "MIXTRAL"])
@pytest.mark.parametrize("T", [1, 8, 128, 4096])
def test_sm90(T, shape, layout, record):
    if layout == "per_expert" and shape == "MIXTRAL":
        pytest.skip("the same kernels as QWEN3's")
    for kernel, args, meta, _ in record((9, 0), T, **globals()[shape], layout=layout):
        compiled = compile_for(GPUTarget("cuda", 90, 32), kernel, args, meta)
        assert compiled.metadata.shared <= 227 * 1024
        assert not spilled_bytes(compiled), (kernel, meta)
        ptx = compiled.asm["ptx"]
        if meta.get("BLOCK_M", 0) >= 64 and "BLOCK_K" in meta:
            assert "wgmma.mma_async" in ptx
        if "USE_BOX" in meta:
            assert meta["USE_BOX"]
            assert "cp.async.bulk.tensor" in ptx
        elif "FROM_TABLE" in meta:
            assert "cp.async.cg.shared.global" in ptx or "v4.b32" in ptx  # 16-byte loads


def test_gate_up_box_splits_in_registers(record):
    """One wgmma of N = 256 per step, and no trip of the accumulator through shared memory."""
    launches = record((9, 0), 8192, **MIXTRAL)
    (launch,) = [launch for launch in launches if launch[0] is gate_up._gate_up]
    ptx = compile_for(GPUTarget("cuda", 90, 32), *launch).asm["ptx"]
    assert "m64n256k16" in ptx
    assert "ld.shared" not in ptx


STORAGES = {
    "separate": dict(separate=True),
    "interleaved": dict(interleaved=True),
    "[in, out]": dict(transposed=True),
    "[in, out], interleaved": dict(transposed=True, interleaved=True),
    "[in, out], separate": dict(transposed=True, separate=True),
}


@pytest.mark.parametrize("layout", ["stacked", "per_expert"])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("T", [8, 128, 512, 4096])
def test_every_storage_comes_by_tma(T, storage, layout, record):
    """And its products are not made one at a time, as ptxas decides when it does not understand a pipeline."""
    for launch in record((9, 0), T, **QWEN3, layout=layout, **STORAGES[storage]):
        if "USE_BOX" not in launch.meta:
            continue
        compiled = launch.compile(GPUTarget("cuda", 90, 32))
        assert not spilled_bytes(compiled), launch.meta
        assert "cp.async.bulk.tensor" in compiled.asm["ptx"]
        if launch.meta["BLOCK_M"] >= 64:
            products, waits = products_and_waits(compiled)
            assert products >= 4
            assert waits < products, launch.meta


def products_and_waits(compiled):
    """wgmma instructions of the machine code, and how often it waits for them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        nvdisasm = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
        done = subprocess.run([nvdisasm, "-c", file.name], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.count("HGMMA"), done.stdout.count("WARPGROUP.DEPBAR")


GPT_OSS = dict(E=32, k=4, H=2880, I=2880, unit=GATED["gpt-oss"][0], biased=True, interleaved=True)
NEMOTRON = dict(E=128, k=6, H=2688, I=1856, unit="square(relu(g))", rows=1)
GPT_OSS_SIZE = dict(E=32, k=4, H=2880, I=2880)
LLAMA4 = dict(E=16, k=1, H=5120, I=8192, weight_on_input=True)
VARIANTS = {
    "gpt_oss": GPT_OSS | {"transposed": True},
    "gpt_oss, rows": GPT_OSS,
    "nemotron": NEMOTRON,
    "llama4": LLAMA4 | {"transposed": True},
    "gelu": QWEN3 | {"unit": "gelu"},
    "gelu_tanh, fp32": QWEN3 | {"unit": "mul(gelu_tanh(f32(g)),f32(u))"},
}


@pytest.mark.parametrize("T", [1, 64, 4096])
@pytest.mark.parametrize("variant", VARIANTS)
def test_sm90_variants(variant, T, record):
    for kernel, args, meta, _ in record((9, 0), T, **VARIANTS[variant]):
        compiled = compile_for(GPUTarget("cuda", 90, 32), kernel, args, meta)
        assert compiled.metadata.shared <= 227 * 1024
        assert not spilled_bytes(compiled), (kernel, meta)
        if variant in ("nemotron", "gelu") and T == 4096 and "LAYOUT" in meta:
            assert "cp.async.bulk.tensor" in compiled.asm["ptx"]


@pytest.mark.parametrize("target", [GPUTarget("cuda", 80, 32), GPUTarget("hip", "gfx942", 64)])
@pytest.mark.parametrize("T", [1, 4096])
def test_variants_on_other_gpus(target, T, record):
    for name in ("gpt_oss", "nemotron", "gelu"):
        for kernel, args, meta, _ in record((0, 0), T, **VARIANTS[name]):
            assert compile_for(target, kernel, args, meta)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("T", [1, 64, 4096])
def test_sm90_other_dtypes(T, dtype, record):
    for kernel, args, meta, _ in record((9, 0), T, **MIXTRAL, dtype=dtype):
        compiled = compile_for(GPUTarget("cuda", 90, 32), kernel, args, meta)
        assert compiled.metadata.shared <= 227 * 1024
        assert not spilled_bytes(compiled), (kernel, meta)
        assert "tf32" not in compiled.asm["ptx"]


@pytest.mark.parametrize(
    ("target", "capability", "shared_kb"),
    [
        (GPUTarget("cuda", 80, 32), (8, 0), 163),
        (GPUTarget("cuda", 89, 32), (8, 9), 99),
        (GPUTarget("cuda", 100, 32), (10, 0), 227),
        (GPUTarget("cuda", 120, 32), (12, 0), 99),
        (GPUTarget("hip", "gfx942", 64), (0, 0), 64),
    ],
    ids=lambda value: str(getattr(value, "arch", "")),
)
@pytest.mark.parametrize("T", [1, 16, 4096])
def test_other_gpus(target, capability, shared_kb, T, record):
    for kernel, args, meta, _ in record(capability, T, **MIXTRAL):
        compiled = compile_for(target, kernel, args, meta)
        assert compiled.metadata.shared <= shared_kb * 1024


@pytest.mark.parametrize("T", [1, 64, 512, 4096])
@pytest.mark.parametrize("layout", ["stacked", "per expert"])
def test_early_kernels_touch_no_memory_before_they_have_waited(T, layout, record, record_block):
    """What a kernel reads may be written by the one before, what it writes may be read by that one (early.py)."""
    memory = re.compile(
        r"\b(ld\.global|st\.global|cp\.async|cp\.reduce|atom|red\.|prefetch|tensormap)"
    )
    launches = record((9, 0), T, **QWEN3, layout=layout) + record_block((9, 0), T, **QWEN3)
    early = [launch for launch in launches if launch.meta["EARLY"]]
    assert len(early) >= 6
    for launch in early:
        lines = launch.compile(GPUTarget("cuda", 90, 32)).asm["ptx"].splitlines()
        if launch.meta.get("GATE_UP_BLOCK_N"):
            # It waits for each row block on its own, and reads but what is older before.
            first = next(i for i, line in enumerate(lines) if "ld.acquire.gpu" in line)
            before = [line for line in lines[:first] if memory.search(line)]
            assert all("ld.global" in line for line in before)
            continue
        (waits,) = [i for i, line in enumerate(lines) if "griddepcontrol.wait" in line]
        touched = [i for i, line in enumerate(lines) if memory.search(line)]
        assert touched, launch.kernel
        assert waits < min(touched), (launch.kernel, lines[min(touched)])
        lets = [i for i, line in enumerate(lines) if "griddepcontrol.launch_dependents" in line]
        assert all(waits < i for i in lets)


# gpt-oss' T with what down is: programs of one tile, or walking the tiles, where a pipeline could read too early.
@pytest.mark.parametrize(("T", "walks"), [(8, False), (64, True), (512, False), (1024, True)])
@pytest.mark.parametrize("layout", ["stacked", "per_expert"])
@pytest.mark.parametrize("storage", ["concatenated", "[in, out]"])
def test_down_beside_gate_up(T, walks, layout, storage, record):
    """It reads by TMA after it has seen that rows are finished, and both GEMMs are pipelined as they are without."""
    pair, firsts, plan = {}, {}, None
    for overlap in (True, False):

        def choose(problem, overlap=overlap):
            nonlocal plan
            plan = configs.choose_plan(problem)
            assert plan.overlap
            return dataclasses.replace(plan, overlap=overlap)

        facts = GPT_OSS_SIZE | {"layout": layout} | STORAGES.get(storage, {})
        with mock.patch.object(cuda, "choose_plan", choose):
            launches = [one for one in record((9, 0), T, **facts) if "BLOCK_K" in one.meta]
        pair[overlap] = [one.compile(GPUTarget("cuda", 90, 32)) for one in launches]
        firsts[overlap] = [one.meta for one in launches]
    assert firsts[True][1]["GATE_UP_BLOCK_N"] == firsts[True][0]["BLOCK_N"]
    assert firsts[True][1]["PERSISTENT"] == walks
    gate_up_ptx, down_ptx = (compiled.asm["ptx"] for compiled in pair[True])

    before, *counted = re.split(r"red\.release\.gpu[^\n]*", gate_up_ptx)
    assert counted
    order = "griddepcontrol.wait", "fence.acq_rel.gpu", "griddepcontrol.launch_dependents"
    assert sorted(order, key=before.index) == list(order)
    for stored in (before, *counted[:-1]):
        # Every thread has stored, then one of them counts.
        assert "bar.sync" in stored[stored.rindex("st.global") :]
        assert re.search(r"bar\.sync\s+0;\s+@%?\w+\s+$", stored)

    assert down_ptx.index("ld.acquire.gpu") < down_ptx.index("fence.proxy.async.global")
    assert down_ptx.index("fence.proxy.async.global") < down_ptx.index("cp.async.bulk.tensor")
    assert down_ptx.rindex("griddepcontrol.wait") > down_ptx.rindex("st.global")
    assert ("griddepcontrol.launch_dependents" in down_ptx) == plan.down.early
    assert not any("red.release" in compiled.asm["ptx"] for compiled in pair[False])
    for beside, alone in zip(pair[True], pair[False], strict=True):
        assert beside.metadata.shared == alone.metadata.shared > 64 * 1024


@pytest.mark.parametrize(("T", "late"), [(8, False), (512, True)])
def test_gate_up_waits_as_launches_do_where_it_is_late(T, late, record):
    """Though it lets down start."""
    launches = record((9, 0), T, **GPT_OSS_SIZE)
    (one,) = [launch for launch in launches if launch.kernel is gate_up._gate_up]
    assert one.meta["EARLY"]
    assert one.first == late


TARGETS = [
    (GPUTarget("cuda", 80, 32), (8, 0)),
    (GPUTarget("cuda", 90, 32), (9, 0)),
    (GPUTarget("cuda", 100, 32), (10, 0)),
    (GPUTarget("hip", "gfx942", 64), (0, 0)),
]


@pytest.mark.parametrize(
    ("target", "capability"), TARGETS, ids=lambda v: str(getattr(v, "arch", ""))
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_router_product(target, capability, dtype, record_block):
    tiles = dtype != torch.float32
    for T, sizes in (
        (1, QWEN3),
        (4, QWEN3),
        (30, QWEN3),
        (1, MIXTRAL),
        (3, QWEN3 | {"H": 2000}),
        *(((300, QWEN3), (60, QWEN3 | {"H": 2000})) if tiles else ()),
    ):
        launches = record_block(capability, T, **sizes, dtype=dtype, bias=T == 4)
        first, second, third = launches[:3]
        names = [launch.kernel.__name__ for launch in (first, second)]
        in_tiles = tiles and T >= 8
        assert names == ["_router_pieces" if in_tiles else "_router_logits", "_route"]
        compiled = compile_for(target, *first)
        if target.backend == "cuda":
            assert target.arch > 90 or not spilled_bytes(compiled)
            ptx = compiled.asm["ptx"]
            assert "v4.b32" in ptx or "cp.async.cg.shared.global" in ptx  # 16-byte loads
            assert ("mma" in ptx) == in_tiles
        early = capability >= (9, 0)
        assert [launch.meta["EARLY"] for launch in (first, second, third)] == [early] * 3


def test_a_large_router_product_is_the_librarys(record_block):
    launches = record_block((9, 0), 4096, **QWEN3)
    assert launches[0].kernel.__name__ == "_route"


# E, k and groups as released.
RELEASED = {
    "deepseek_v3": (256, 8, {"groups": 8, "kept_groups": 4}),
    "deepseek_v2, groups": (160, 6, {"groups": 8, "kept_groups": 3}),
    "deepseek_v4": (384, 6, {}),
    "ernie4_5": (64, 6, {}),
    "gpt_oss": (128, 4, {}),
    "kolibri1": (48, 4, {}),
    "lfm2, epsilon counts": (32, 4, {}),
}


@pytest.mark.parametrize(
    "target",
    [GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32), GPUTarget("cuda", 100, 32)],
    ids=lambda t: str(t.arch),
)
@pytest.mark.parametrize("name", RELEASED)
def test_routers(name, target):
    E, k, sizes = RELEASED[name]
    with torch.device("meta"):
        logits, bias = torch.empty(64, E, dtype=torch.bfloat16), torch.empty(E)
    args, facts = call(logits, bias, ROUTERS[name] | sizes, k)
    with recording(divmod(target.arch, 10)) as launches:
        cuda.topk_routing(*args, **facts, score_dtype=torch.bfloat16)
    (launch,) = launches
    compiled = compile_for(target, *launch)
    assert not spilled_bytes(compiled)


def test_softmax_needs_no_more_than_it_did(record):
    """A softmax router compares logits, and computes an exp for each weight, not for each expert."""
    kernel, args, meta, _ = record((9, 0), 64, **QWEN3)[0]
    ptx = compile_for(GPUTarget("cuda", 90, 32), kernel, args, meta).asm["ptx"]
    assert ptx.count("ex2.approx") <= 2
