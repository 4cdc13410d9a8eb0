"""On a CUDA device: units, layouts, biases and the routing weight on the input, forward and backward, against fp64."""

import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from moe_inductor import ops
from moe_inductor.kernels import configs
from tests.oracle import assert_within_fp64_rule
from tests.units import GATED, PLAIN

pytestmark = pytest.mark.gpu

E, H, I, K = 6, 256, 192, 2
LAYOUTS = ("concatenated", "interleaved", "separate", "plain")
TOKENS = (1, 8, 40, 100, 900)  # decode, then tiles of 16, 32, 64 and 128 rows


@pytest.fixture(autouse=True)
def _several_tokens_are_grouped(monkeypatch):
    monkeypatch.setattr(configs, "DECODE_REPEATED_BYTES", 0)


def draw(layout, biased, tokens, dtype, seed=0):
    generator = torch.Generator().manual_seed(tokens + 1000 * seed)

    def normal(*shape, scale=1.0):
        made = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        return made.to("cuda", dtype)

    rows = 2 * I if layout in ("concatenated", "interleaved") else I
    inputs = {"x": normal(tokens, H), "w": normal(tokens, K).sigmoid()}
    inputs |= {
        "gate_up": normal(E, rows, H, scale=H**-0.5),
        "down": normal(E, H, I, scale=I**-0.5),
    }
    if layout == "separate":
        inputs["up"] = normal(E, I, H, scale=H**-0.5)
    for name in ("gate_up", "up", "down"):
        if biased and name in inputs:
            inputs[f"{name}_bias"] = normal(*inputs[name].shape[:2], scale=0.5)
    ids = torch.rand(tokens, E, generator=generator).topk(K).indices.cuda()
    return inputs, ids


def written_out(inputs, ids, unit, layout, on_input):
    x, w = inputs["x"], inputs["w"]
    out = torch.zeros_like(x)
    for e in range(E):
        token, slot = torch.where(ids == e)
        weight = w[token, slot, None]

        def linear(name, rows, e=e):
            y = rows @ inputs[name][e].T
            return y + inputs[f"{name}_bias"][e] if f"{name}_bias" in inputs else y

        rows = x[token] * weight if on_input else x[token]
        first = linear("gate_up", rows)
        if layout == "plain":
            hidden = unit(first)
        elif layout == "separate":
            hidden = unit(first, linear("up", rows))
        elif layout == "interleaved":
            hidden = unit(first[:, ::2], first[:, 1::2])
        else:
            hidden = unit(*first.chunk(2, -1))
        y = linear("down", hidden.to(x.dtype))
        out = out.index_add(0, token, (y if on_input else y * weight).to(out.dtype))
    return out


def fused(inputs, ids, text, layout, on_input, storage):
    def pick(name):
        if name not in inputs:
            return []
        tensor = inputs[name]
        if storage == "per_expert":
            return list(tensor.unbind(0))
        if storage == "transposed" and tensor.dim() == 3:
            tensor = tensor.mT.contiguous().mT
        return [tensor]

    weights = [pick(n) for n in ("gate_up", "up", "down")]
    biases = [pick(f"{n}_bias") for n in ("gate_up", "up", "down")]
    facts = layout == "interleaved", on_input
    x, w = inputs["x"], inputs["w"]
    return ops.fused_experts(x, ids, w, *weights, text, x.dtype, *biases, *facts)


def step(run, inputs):
    leaves = {n: t.detach().clone().requires_grad_() for n, t in inputs.items()}
    out = run(leaves)
    out.backward(torch.ones_like(out))
    return {"out": out.detach()} | {f"d {n}": t.grad for n, t in leaves.items()}


def check(name, layout, biased, on_input, dtype, tokens, storage="stacked"):
    text, unit = (PLAIN if layout == "plain" else GATED)[name]
    all_ours, all_eager, all_truth = [], [], []
    # One token has two routing weights: how two numbers round is luck, so those of several draws are taken together.
    for seed in range(12 if tokens == 1 else 1):
        inputs, ids = draw(layout, biased, tokens, dtype, seed)
        exact = {n: t.double() for n, t in inputs.items()}
        eagerly = lambda t, ids=ids: written_out(t, ids, unit, layout, on_input)  # noqa: E731
        all_ours.append(
            step(lambda t, ids=ids: fused(t, ids, text, layout, on_input, storage), inputs)
        )
        all_eager.append(step(eagerly, inputs))
        all_truth.append(step(eagerly, exact))
    for what in all_truth[0]:
        draws = slice(None) if what == "d w" else slice(1)
        ours, eager, wanted = (
            torch.cat([one[what] for one in every[draws]])
            for every in (all_ours, all_eager, all_truth)
        )
        scale = wanted.square().mean().sqrt().clamp(min=1.0)
        assert_within_fp64_rule(ours / scale, eager / scale, wanted / scale, what)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", [*GATED, *(f"plain {name}" for name in PLAIN)])
def test_units(name, dtype):
    layout = "plain" if name.startswith("plain ") else "concatenated"
    for tokens in TOKENS:
        check(name.removeprefix("plain "), layout, False, False, dtype, tokens)


@pytest.mark.parametrize("storage", ["stacked", "transposed", "per_expert"])
@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, biased, on_input, storage):
    name = "relu^2" if layout == "plain" else "gpt-oss"
    for tokens in TOKENS:
        check(name, layout, biased, on_input, torch.bfloat16, tokens, storage)


def test_runs_are_equal():
    inputs, ids = draw("interleaved", True, 100, torch.bfloat16)
    run = lambda: fused(inputs, ids, GATED["gpt-oss"][0], "interleaved", False, "stacked")  # noqa: E731
    first = run()
    assert all(torch.equal(run(), first) for _ in range(20))
