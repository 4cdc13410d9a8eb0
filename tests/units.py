"""The units of real models: as text, and as their authors write them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Written = Callable[..., Tensor]


def _alpha_swiglu(g: Tensor, u: Tensor) -> Tensor:
    g, u = g.clamp(min=None, max=7.0), u.clamp(min=-7.0, max=7.0)
    return (u + 1) * (g * torch.sigmoid(g * 1.702))


def _softcapped(g: Tensor, u: Tensor) -> Tensor:
    g, u = g.float(), u.float()
    return (20.0 * torch.tanh(g / 20.0)) * torch.sigmoid(g) * (30.0 * torch.tanh(u / 30.0))


def _gelu_python(x: Tensor) -> Tensor:
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


def _gelu_new(x: Tensor) -> Tensor:
    inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))
    return 0.5 * x * (1.0 + torch.tanh(inner))


_CLAMPED = "clamp(g,None,7.0)"
GATED: dict[str, tuple[str, Written]] = {
    "silu": ("silu", lambda g, u: F.silu(g) * u),
    "silu, up first": ("mul(silu(u),g)", lambda g, u: g * F.silu(u)),
    "gelu": ("gelu", lambda g, u: F.gelu(g) * u),
    "gelu_tanh": ("gelu_tanh", lambda g, u: F.gelu(g, approximate="tanh") * u),
    "relu": ("relu", lambda g, u: F.relu(g) * u),
    "relu^2": ("mul(square(relu(g)),u)", lambda g, u: torch.square(F.relu(g)) * u),
    "quick_gelu": (
        "mul(mul(g,sigmoid(mul(g,1.702))),u)",
        lambda g, u: g * torch.sigmoid(1.702 * g) * u,
    ),
    "gpt-oss": (
        f"mul(add(clamp(u,-7.0,7.0),1),mul({_CLAMPED},sigmoid(mul({_CLAMPED},1.702))))",
        _alpha_swiglu,
    ),
    "clamp, silu": (
        "mul(silu(clamp(g,None,0.5)),clamp(u,-0.5,0.5))",
        lambda g, u: F.silu(g.clamp(max=0.5)) * u.clamp(min=-0.5, max=0.5),
    ),
    "silu, clamp": (
        "mul(clamp(silu(g),None,0.5),clamp(u,-0.5,0.5))",
        lambda g, u: F.silu(g).clamp(max=0.5) * u.clamp(min=-0.5, max=0.5),
    ),
    "in fp32": ("mul(silu(f32(g)),f32(u))", lambda g, u: F.silu(g.float()) * u.float()),
    "softcapped": (
        "mul(mul(mul(tanh(div(f32(g),20.0)),20.0),sigmoid(f32(g))),mul(tanh(div(f32(u),30.0)),30.0))",
        _softcapped,
    ),
}
PLAIN: dict[str, tuple[str, Written]] = {
    "silu": ("silu(g)", F.silu),
    "gelu": ("gelu(g)", F.gelu),
    "relu": ("relu(g)", F.relu),
    "relu^2": ("square(relu(g))", lambda g: torch.square(F.relu(g))),
    "relu**2": ("pow(relu(g),2)", lambda g: F.relu(g) ** 2),
    "linear": ("g", lambda g: g),
    "gelu, python": ("mul(mul(g,0.5),add(erf(div(g,1.4142135623730951)),1.0))", _gelu_python),
    "gelu, new": (
        "mul(mul(g,0.5),add(tanh(mul(add(g,mul(pow(g,3.0),0.044715)),0.7978845608028654)),1.0))",
        _gelu_new,
    ),
    "minus exp": ("sub(neg(exp(g)),g,0.5)", lambda g: -torch.exp(g) - 0.5 * g),
}
