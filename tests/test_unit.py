"""The language of units: text, evaluation, derivatives."""

import pytest
import torch

from moe_inductor.unit import FUNCTIONS, parse
from tests.units import GATED, PLAIN

UNITS = [(text, written, True) for text, written in GATED.values()]
UNITS += [(text, written, False) for text, written in PLAIN.values()]
IDS = [*GATED, *(f"plain {name}" for name in PLAIN)]


def tensors(gated, dtype):
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(9, 7, generator=generator, dtype=torch.float64) * 3 for _ in range(2)]
    return [t.to(dtype) for t in made][: 2 if gated else 1]


def call(unit, inputs):
    return unit(inputs[0], inputs[1] if len(inputs) > 1 else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("text", "written", "gated"), UNITS, ids=IDS)
def test_value_is_what_the_authors_wrote(text, written, gated, dtype):
    unit, inputs = parse(text), tensors(gated, dtype)
    assert unit.gated == gated
    wanted = written(*inputs)
    got = call(unit, inputs)
    assert got.dtype == wanted.dtype
    torch.testing.assert_close(got, wanted)
    # The same into memory of the caller, which may be a strided half of something.
    wide = torch.stack([t.clone() for t in inputs], -1)
    out = torch.empty(9, 7, dtype=dtype)
    gate, up = wide[..., 0], wide[..., 1] if gated else None
    assert unit.into(gate, up, out) is out
    torch.testing.assert_close(out, wanted.to(dtype))


@pytest.mark.parametrize(("text", "written", "gated"), UNITS, ids=IDS)
def test_derivative_is_autograds(text, written, gated):
    unit, inputs = parse(text), tensors(gated, torch.float64)
    leaves = [t.clone().requires_grad_() for t in inputs]
    # Without the casts, which are the identity here.
    bare = parse(unit.text.replace("f32(g)", "g").replace("f32(u)", "u"))
    value = call(bare, leaves)
    upstream = torch.randn(value.shape, dtype=torch.float64)
    wanted = torch.autograd.grad(value, leaves, upstream)
    seen = []
    got, *gradients = unit.backward(
        inputs[0], inputs[1] if gated else None, lambda v: seen.append(v) or upstream
    )
    torch.testing.assert_close(got, value.detach())
    assert seen[0] is got
    for mine, theirs in zip(gradients, wanted, strict=False):
        torch.testing.assert_close(mine, theirs)
    assert gated or gradients[1] is None


def test_every_function_is_in_some_unit():
    used = {step.function for text, _, _ in UNITS for step in parse(text).steps}
    assert set(FUNCTIONS) <= used | {"sub", "neg"}


@pytest.mark.parametrize(
    "text",
    [
        "mul(g,u",
        "mish(g)",
        "mul(g)",
        "mul(g,u,g,u)",
        "clamp(g)",
        "clamp(g,u)",
        "clamp(1.0,None,2.0)",
        "x",
        "silu(x)",
        "silu(g).t()",
        "silu(x=g)",
        "g+u",
        "pow(g,2.5)",
        "pow(g,u)",
        "silu(True)",
        "",
        "1.0",
        "add(g,'u')",
        "mul(g,nan)",
        "__import__('os')",
        "mul(1.0,g)",
        "square(" * 70 + "g" + ")" * 70,
    ],
)
def test_what_is_not_a_unit(text):
    with pytest.raises(ValueError, match=r"unit|variable|constant|call|large"):
        parse(text)


def test_text_is_canonical():
    unit = parse("mul( silu(g) , u )")
    assert unit.text == "mul(silu(g),u)"
    assert unit.short == "silu"
    assert parse(unit.short) == unit
    assert parse("square(relu(g))").short == "square(relu(g))"
    assert parse("clamp(g,-inf,inf)").text == "clamp(g,-inf,inf)"
    assert parse(parse("clamp(g,-1e-07,None)").text).text == "clamp(g,-1e-07,None)"


def test_constants_keep_their_type():
    """add(u,1) and add(u,1.0) are different texts; the proof compares them."""
    assert parse("add(g,1)").text != parse("add(g,1.0)").text
    assert len(parse("mul(add(g,1),add(g,1.0))").steps) == 3


def test_shared_parts_are_computed_once():
    assert [s.function for s in parse(GATED["gpt-oss"][0]).steps].count("clamp") == 2


def test_parts_that_do_not_count_have_zero_gradient():
    g, u = tensors(True, torch.float64)
    _, dg, du = parse("silu(u)").backward(g, u, torch.ones_like)
    assert torch.equal(dg, torch.zeros_like(g))
    assert du.abs().sum() > 0
