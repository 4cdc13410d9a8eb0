"""Experts other than SwiGLU without biases: units, layouts, biases, routing weight on the input; both directions."""

import pytest
import torch
from oracle import assert_within_fp64_rule
from units import GATED, PLAIN

from moe_inductor import ops
from moe_inductor.ops.check import Call

E, H, I, K = 5, 24, 16, 2
LAYOUTS = ("concatenated", "interleaved", "separate", "plain")


def draw(layout, biased, tokens, dtype, seed=0):
    """x, weights of the router, and the weights and biases of all experts, stacked."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        made = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        return made.to(dtype)

    rows = 2 * I if layout in ("concatenated", "interleaved") else I
    inputs = {
        "x": normal(tokens, H),
        "w": torch.rand(tokens, K, generator=generator, dtype=torch.float64).to(dtype),
        "gate_up": normal(E, rows, H, scale=H**-0.5),
        "down": normal(E, H, I, scale=I**-0.5),
    }
    if layout == "separate":
        inputs["up"] = normal(E, I, H, scale=H**-0.5)
    if biased:
        inputs |= {
            f"{n}_bias": normal(*inputs[n].shape[:2], scale=0.5)
            for n in ("gate_up", "up", "down")
            if n in inputs
        }
    return inputs


def written_out(inputs, ids, unit, layout, on_input):
    """The loop over experts as models write it, in the dtype of its inputs."""
    x, w = inputs["x"], inputs["w"]
    out = torch.zeros_like(x)
    for e in range(E):
        token, slot = torch.where(ids == e)
        weight = w[token, slot, None]
        rows = x[token] * weight if on_input else x[token]

        def linear(name, rows, e=e):
            y = rows @ inputs[name][e].T
            return y + inputs[f"{name}_bias"][e] if f"{name}_bias" in inputs else y

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


def fused(inputs, ids, text, layout, on_input, per_expert=False):
    def pick(name):
        if name not in inputs:
            return []
        return list(inputs[name].unbind(0)) if per_expert else [inputs[name]]

    return ops.fused_experts(
        inputs["x"],
        ids,
        inputs["w"],
        pick("gate_up"),
        pick("up"),
        pick("down"),
        text,
        inputs["x"].dtype,
        pick("gate_up_bias"),
        pick("up_bias"),
        pick("down_bias"),
        layout == "interleaved",
        on_input,
    )


def step(run, inputs):
    leaves = {n: t.detach().clone().requires_grad_() for n, t in inputs.items()}
    out = run(leaves)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(out.shape, generator=generator).bfloat16().to(out.dtype)
    (out * upstream).sum().backward()
    return {"out": out.detach()} | {f"d {n}": t.grad for n, t in leaves.items()}


def check(name, layout, biased, on_input, dtype, tokens, per_expert=False):
    text, unit = (PLAIN if layout == "plain" else GATED)[name]
    inputs = draw(layout, biased, tokens, dtype)
    ids = torch.rand(tokens, E, generator=torch.Generator().manual_seed(2)).topk(K).indices
    ids[ids == 3] = 1  # an expert without tokens, and another one twice for some
    ours = step(lambda t: fused(t, ids, text, layout, on_input, per_expert), inputs)
    eager = step(lambda t: written_out(t, ids, unit, layout, on_input), inputs)
    exact = {n: t.double() for n, t in inputs.items()}
    truth = step(lambda t: written_out(t, ids, unit, layout, on_input), exact)
    for what, wanted in truth.items():
        assert ours[what].dtype == eager[what].dtype
        assert_within_fp64_rule(ours[what], eager[what], wanted, what)
    for what in ours:
        if what not in ("out", "d x", "d w"):
            assert not ours[what][3].any(), f"{what} of an expert without tokens"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", GATED)
def test_gated_units(name, dtype):
    check(name, "concatenated", False, False, dtype, 17)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PLAIN)
def test_plain_units(name, dtype):
    check(name, "plain", False, False, dtype, 17)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("per_expert", [False, True])
@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, biased, on_input, per_expert, dtype):
    name = "relu^2" if layout == "plain" else "gpt-oss"
    for tokens in (1, 7, 90):
        check(name, layout, biased, on_input, dtype, tokens, per_expert)


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(layout, on_input):
    text = "gelu(g)" if layout == "plain" else "silu"
    inputs = draw(layout, True, 3, torch.float64)
    ids = torch.tensor([[0, 1], [2, 0], [4, 2]])
    leaves = [t.requires_grad_() for t in inputs.values()]

    def run(*tensors):
        return fused(dict(zip(inputs, tensors, strict=True)), ids, text, layout, on_input)

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


def test_only_some_gradients():
    """Each gradient alone is the gradient among all."""
    for layout, on_input in (("concatenated", True), ("interleaved", False), ("separate", False)):
        inputs = draw(layout, True, 9, torch.float32)
        ids = torch.rand(9, E).topk(K).indices
        full = step(lambda t: fused(t, ids, "silu", layout, on_input), inputs)  # noqa: B023
        for name in inputs:
            leaves = {n: t.clone().requires_grad_(n == name) for n, t in inputs.items()}
            out = fused(leaves, ids, "silu", layout, on_input)
            generator = torch.Generator().manual_seed(1)
            upstream = torch.randn(out.shape, generator=generator).bfloat16().float()
            (out * upstream).sum().backward()
            assert torch.equal(leaves[name].grad, full[f"d {name}"]), (layout, name)


def test_ids_outside_contribute_nothing():
    """Neither a product nor a bias."""
    for on_input in (False, True):
        inputs = draw("interleaved", True, 6, torch.float32)
        ids = torch.tensor([[-1, 1], [0, 9], [-1, -1], [2, 0], [5, 4], [1, 2]])
        out = fused(inputs, ids, GATED["gpt-oss"][0], "interleaved", on_input)
        assert torch.equal(out[2], torch.zeros(H))
        wanted = written_out(inputs, ids, GATED["gpt-oss"][1], "interleaved", on_input)
        torch.testing.assert_close(out, wanted)


def test_many_experts_of_bf16():
    """The grouped GEMM of torch, which the CPU takes from 16 experts on, knows no biases."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 32, generator=generator).bfloat16()
    first = (torch.randn(20, 64, 32, generator=generator) / 6).bfloat16()
    down = (torch.randn(20, 32, 32, generator=generator) / 6).bfloat16()
    bias = torch.randn(20, 64, generator=generator).bfloat16()
    ids, w = torch.arange(128).view(64, 2) % 20, torch.rand(64, 2, generator=generator).bfloat16()
    for interleaved in (False, True):
        for biases in ((), (bias,)):
            run = [
                ops.fused_experts(
                    x.to(d),
                    ids,
                    w.to(d),
                    [first.to(d)],
                    [],
                    [down.to(d)],
                    "silu",
                    d,
                    [b.to(d) for b in biases],
                    interleaved=interleaved,
                )
                for d in (torch.bfloat16, torch.float64)
            ]
            error = (run[0].double() - run[1]).square().mean().sqrt()
            assert error < 0.02 * run[1].square().mean().sqrt()


def good(**changes):
    inputs = draw("concatenated", True, 4, torch.float32)
    ids = torch.zeros(4, K, dtype=torch.int64)
    call = Call(
        inputs["x"],
        ids,
        inputs["w"],
        [inputs["gate_up"]],
        [],
        [inputs["down"]],
        "silu",
        torch.float32,
        [inputs["gate_up_bias"]],
        [],
        [inputs["down_bias"]],
    )
    return call._replace(**changes)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"activation": "mish(g)"}, ValueError, "activation"),
        ({"activation": "relu(g)"}, ValueError, "sizes"),
        ({"interleaved": True, "activation": "relu(g)"}, ValueError, "no gate"),
        ({"gate_up_bias": [torch.zeros(E, I)]}, ValueError, r"gate_up_bias is \[5, 16\]"),
        ({"gate_up_bias": [torch.zeros(2 * I)]}, ValueError, "gate_up_bias"),
        ({"down_bias": [torch.zeros(E, H)] * 2}, ValueError, "2 down_bias for 1"),
        ({"down_bias": [torch.zeros(E, H).bfloat16()]}, TypeError, "down_bias is torch.bfloat16"),
        ({"up_bias": [torch.zeros(E, I)]}, ValueError, "1 up_bias for 0"),
    ],
)
def test_wrong_arguments(changes, error, words):
    assert torch.isfinite(ops.fused_experts(*good())).all()
    with pytest.raises(error, match=words):
        ops.fused_experts(*good(**changes))


def test_one_wrong_bias_in_a_list():
    call = good()
    lists = {
        name: list(getattr(call, name)[0])
        for name in ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias")
    }
    assert torch.isfinite(ops.fused_experts(*good(**lists))).all()
    lists["down_bias"][0] = torch.zeros(H + 1)
    with pytest.raises(ValueError, match=r"down_bias of expert 0 is \[25\]|down_bias"):
        ops.fused_experts(*good(**lists))
    lists["down_bias"] = list(call.down_bias[0])
    lists["gate_up_bias"][0], lists["gate_up_bias"][1] = torch.zeros(2 * I), torch.zeros(3)
    ids = torch.ones(4, K, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"gate_up_bias of expert 1 is \[3\]"):
        ops.fused_experts(*good(**lists)._replace(topk_ids=ids))
