"""Units, layouts, biases and the routing weight on the input, in every kind of kernel."""

import pytest
import torch
import triton
import triton.language as tl

from moe_inductor.kernels.configs import DecodePlan, GemmConfig, GemvConfig, GroupedPlan
from moe_inductor.kernels.unit import evaluate
from moe_inductor.ops import cuda
from moe_inductor.unit import parse
from tests.units import GATED, PLAIN

GEMV = GemvConfig(block_n=16, block_k=32)


def grouped(**options):
    config = GemmConfig(16, 32, 32, **options)
    return GroupedPlan(config, config)


PLANS = {"decode": DecodePlan(GEMV, GEMV), "grouped": grouped()}
BOX = {
    "box": grouped(weights_by_tma=True),
    "box_persistent": grouped(group_m=2, weights_by_tma=True, persistent=True),
}
LAYOUTS = ("concatenated", "interleaved", "separate", "plain")


@triton.jit
def _evaluate(g_ptr, u_ptr, out_ptr, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    value = evaluate(tl.load(g_ptr + offsets), tl.load(u_ptr + offsets), UNIT)
    tl.store(out_ptr + offsets, value)


UNITS = [text for text, _ in (*GATED.values(), *PLAIN.values())]


@pytest.mark.parametrize("text", [*UNITS, "bf16(mul(silu(f32(g)),u))", "clamp(g,-inf,1e-05)"])
def test_units_on_tiles(text):
    unit = parse(text)
    g, u = torch.randn(64) * 3, torch.randn(64) * 3
    g[0], g[1], g[2] = float("nan"), 0.0, -40.0
    out = torch.empty(64)
    _evaluate[(1,)](g, u, out, unit.text, 64)
    exact = parse(unit.text.replace("bf16(", "f64(").replace("f32(", "f64("))
    wanted = exact(g.double(), u.double()).double()
    assert torch.equal(out.isnan(), wanted.isnan())
    torch.testing.assert_close(out.double(), wanted, rtol=2e-6, atol=2e-6, equal_nan=True)


def variant(
    layout, biased, on_input, T, H, I, per_expert=False, plan=None, monkeypatch=None,
    transposed=False,
):  # fmt: skip
    E, k = 3, 2
    rows = 2 * I if layout in ("concatenated", "interleaved") else I
    text, written = (PLAIN["relu^2"]) if layout == "plain" else GATED["gpt-oss"]
    x, first, down = torch.randn(T, H), torch.randn(E, rows, H) / H**0.5, torch.randn(E, H, I)
    up = torch.randn(E, I, H) / H**0.5 if layout == "separate" else None
    down /= I**0.5
    biases = [
        torch.randn(*w.shape[:2]) if w is not None and biased else None for w in (first, up, down)
    ]
    ids, w = torch.rand(T, E).topk(k).indices, torch.rand(T, k)
    ids[0, 0] = -1

    def arguments(tensor):
        if tensor is None:
            return []
        if transposed and tensor.dim() == 3:
            tensor = tensor.mT.contiguous().mT
        return [t.clone() for t in tensor.unbind(0)] if per_expert else [tensor]

    monkeypatch.setattr(cuda, "choose_plan", lambda problem: plan)
    weights = [arguments(t) for t in (first, up, down)]
    got = cuda.fused_experts(
        x,
        ids,
        w,
        *weights,
        text,
        torch.float32,
        *[arguments(t) for t in biases],
        layout == "interleaved",
        on_input,
    )
    wanted = torch.zeros(T, H, dtype=torch.float64)
    for e in range(E):
        token, slot = torch.where(ids == e)
        weight = w[token, slot, None].double()

        def linear(number, rows, e=e):
            matrix = (first, up, down)[number][e].double()
            bias = biases[number]
            return rows @ matrix.T + (0 if bias is None else bias[e].double())

        row = x[token].double() * (weight if on_input else 1)
        inner = linear(0, row)
        if layout == "plain":
            hidden = written(inner)
        elif layout == "separate":
            hidden = written(inner, linear(1, row))
        elif layout == "interleaved":
            hidden = written(inner[:, ::2], inner[:, 1::2])
        else:
            hidden = written(*inner.chunk(2, -1))
        wanted.index_add_(0, token, linear(2, hidden) * (1 if on_input else weight))
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("plan", ["decode", "grouped"])
def test_pointers(plan, layout, biased, on_input, monkeypatch, poisoned_workspaces):
    # Either storage with every two of the others.
    per_expert = (LAYOUTS.index(layout) + biased + on_input) % 2 == 0
    variant(layout, biased, on_input, 4, 20, 37, per_expert, PLANS[plan], monkeypatch)


@pytest.mark.parametrize("per_expert", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("plan", BOX)
def test_tma_boxes(plan, layout, transposed, per_expert, monkeypatch, poisoned_workspaces):
    sizes = (
        5,
        32,
        44,
    )  # no multiples of the tiles; 2 I columns after each other would hide a box that is too wide
    variant(layout, True, False, *sizes, per_expert, BOX[plan], monkeypatch, transposed)


@pytest.mark.parametrize("plan", ["decode", "grouped"])
def test_transposed_and_interleaved(plan, monkeypatch):
    """gpt-oss: [E, H, 2I], gate and up in alternate columns."""
    E, H, I = 2, 24, 17
    stored, down = torch.randn(E, H, 2 * I) / H**0.5, torch.randn(E, I, H) / I**0.5
    x, ids, w = torch.randn(3, H), torch.tensor([[0], [1], [0]]), torch.rand(3, 1)
    monkeypatch.setattr(cuda, "choose_plan", lambda problem: PLANS[plan])
    got = cuda.fused_experts(
        x, ids, w, [stored.mT], [], [down.mT], "silu", x.dtype, interleaved=True
    )
    first = torch.stack([x[t].double() @ stored[ids[t, 0]].double() for t in range(3)])
    hidden = torch.nn.functional.silu(first[:, ::2]) * first[:, 1::2]
    y = torch.stack([hidden[t] @ down[ids[t, 0]].double() for t in range(3)])
    torch.testing.assert_close(got.double(), y * w, rtol=1e-5, atol=1e-5)
