"""A small MoE block in plain PyTorch, from which patterns derive their samples and near misses.

A subclass overrides the one method in which it differs.  Sizes are small and all different: E=4, k=2, H=32, I=48.
"""

import torch
from torch import nn
from torch.nn import functional as F

NUM_EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 4, 2, 32, 48


class MLP(nn.Module):
    """One expert with its own parameters: ``w2(act(w1 x) * w3 x)``."""

    def __init__(self, activation=F.silu):
        super().__init__()
        self.w1, self.w3 = (nn.Linear(HIDDEN, INTERMEDIATE, bias=False) for _ in range(2))
        self.w2 = nn.Linear(INTERMEDIATE, HIDDEN, bias=False)
        self.activation = activation

    def forward(self, x):
        return self.w2(self.activation(self.w1(x)) * self.w3(x))


class Plain(nn.Module):
    """One expert without a gate, with biases: ``fc2(act(fc1 x))``."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(HIDDEN, INTERMEDIATE), nn.Linear(INTERMEDIATE, HIDDEN)

    def forward(self, x):
        return self.fc2(F.relu(self.fc1(x)))


class Block(nn.Module):
    """softmax -> top-k -> renormalise, then ``self.experts(x, topk_ids, topk_weights)``; weights are stacked.

    gated: the first projection has 2I rows.  transposed: weights are ``[E, in, out]``.  biased: with biases.
    weight_on_input: the routing weight scales what the expert reads; for the subclasses to look at.
    """

    k = TOP_K
    gated = True
    transposed = False
    biased = False
    weight_on_input = False

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(HIDDEN, NUM_EXPERTS, bias=False)
        rows = (2 if self.gated else 1) * INTERMEDIATE
        self.gate_up_proj, self.gate_up_bias = self.projection(rows, HIDDEN)
        self.down_proj, self.down_bias = self.projection(HIDDEN, INTERMEDIATE)

    def projection(self, outer, inner):
        shape = (inner, outer) if self.transposed else (outer, inner)
        weight = nn.Parameter(torch.randn(NUM_EXPERTS, *shape) * inner**-0.5)
        bias = nn.Parameter(0.5 * torch.randn(NUM_EXPERTS, outer)) if self.biased else None
        return weight, bias

    def act(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def route(self, logits):
        scores = F.softmax(logits, dim=-1, dtype=torch.float32)
        topk_weights, topk_ids = torch.topk(scores, self.k, dim=-1)
        topk_weights = topk_weights / topk_weights.sum(dim=-1, keepdim=True)
        return topk_weights.to(logits.dtype), topk_ids

    def experts(self, x, topk_ids, topk_weights):
        raise NotImplementedError

    def forward(self, x):
        topk_weights, topk_ids = self.route(self.gate(x))
        return self.experts(x, topk_ids, topk_weights)


def _halves(function):
    """``act`` of a block whose first projection gives gate columns, then up columns."""
    return lambda self, gate_up: function(*gate_up.chunk(2, dim=-1))


def _columns(function):
    """``act`` of a block whose first projection gives gate, up, gate, up, ..."""
    return lambda self, gate_up: function(gate_up[..., ::2], gate_up[..., 1::2])


def _apart(sizes, dim):
    """``act`` of a block whose first projection's columns are told apart by a view."""
    return lambda self, gate_up: _silu_gated(*gate_up.unflatten(-1, sizes).unbind(dim))


def _silu_gated(gate, up):
    return F.silu(gate) * up


def _alpha_swiglu(gate, up, alpha=1.702, limit=1.5):
    gate = gate.clamp(min=None, max=limit)
    up = up.clamp(min=-limit, max=limit)
    return (up + 1) * (gate * torch.sigmoid(gate * alpha))


def _softcapped(gate, up):
    dtype = gate.dtype
    gate, up = gate.float(), up.float()
    made = (2.0 * torch.tanh(gate / 2.0)) * torch.sigmoid(gate) * (3.0 * torch.tanh(up / 3.0))
    return made.to(dtype)


def _gelu_new(x):
    return 0.5 * x * (1.0 + torch.tanh((2.0 / torch.pi) ** 0.5 * (x + 0.044715 * x.pow(3.0))))


# What experts compute between their projections, and how they are stored.  None of it belongs to a spelling: every
# pattern gets each of these, mixed into its own block, as a sample.
VARIANTS = {
    "gelu": {"act": _halves(lambda g, u: F.gelu(g) * u)},
    "gelu_tanh": {"act": _halves(lambda g, u: F.gelu(g, approximate="tanh") * u)},  # gemma4
    "gelu_new": {"act": _halves(lambda g, u: _gelu_new(g) * u)},
    "relu": {"act": _halves(lambda g, u: F.relu(g) * u)},
    "quick_gelu": {"act": _halves(lambda g, u: g * torch.sigmoid(1.702 * g) * u)},
    "up_first": {
        "act": lambda self, up_gate: up_gate.chunk(2, -1)[0] * F.silu(up_gate.chunk(2, -1)[1])
    },
    "interleaved": {"act": _columns(lambda g, u: F.silu(g) * u)},
    "interleaved_by_view": {"act": _apart((-1, 2), -1)},
    "halves_by_view": {"act": _apart((2, -1), -2)},
    "clamp_then_silu": {  # deepseek_v4, glm5_next
        "act": _halves(lambda g, u: F.silu(g.clamp(max=0.5)) * u.clamp(min=-0.5, max=0.5))
    },
    "silu_then_clamp": {  # step3p7
        "act": _halves(lambda g, u: F.silu(g).clamp(max=0.5) * u.clamp(min=-0.5, max=0.5))
    },
    "gate_up_in_fp32": {  # beam
        "act": _halves(lambda g, u: (F.silu(g.float()) * u.float()).to(g.dtype))
    },
    "softcapped": {"act": _halves(_softcapped)},  # inkling2
    "biased": {"biased": True},
    "transposed": {"transposed": True},
    "gpt_oss": {"act": _columns(_alpha_swiglu), "transposed": True, "biased": True},
    "plain_relu_squared": {
        "act": lambda self, x: torch.square(F.relu(x)),
        "gated": False,
    },  # nemotron_h
    "plain_relu_power": {"act": lambda self, x: F.relu(x) ** 2, "gated": False},
    "plain_gelu_biased": {"act": lambda self, x: F.gelu(x), "gated": False, "biased": True},
    "weight_on_input": {"weight_on_input": True},  # llama4
}


def _thirds(gate_up):
    return F.silu(gate_up[..., :48]) * gate_up[..., 24:72]


def _other_columns(gate_up):
    return F.silu(gate_up[..., 1::2]) * gate_up[..., 1::2].flip(-1)


def _same_column_twice(gate_up):
    first, _ = gate_up.unflatten(-1, (-1, 2)).unbind(-1)
    return F.silu(first) * first


def _every_fourth(gate_up):
    """Of four columns two are gates, of which the first belongs to the last."""
    gate, other, up, last = gate_up.unflatten(-1, (-1, 4)).unbind(-1)
    return torch.cat((F.silu(gate) * last, F.silu(other) * up), dim=-1)


def _rows_mixed(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up.flip(0)


# Experts that compute something else than a function of each element's gate and up, each with its reason.
NEAR_VARIANTS = {
    "mish": (_halves(lambda g, u: F.mish(g) * u), "ACTIVATION"),
    "hardswish": (_halves(lambda g, u: F.hardswish(g) * u), "ACTIVATION"),
    "softmax": (_halves(lambda g, u: g.softmax(-1) * u), "ACTIVATION"),
    "normalised": (_halves(lambda g, u: F.rms_norm(F.silu(g) * u, (48,))), "ACTIVATION"),
    "scaled_by_maximum": (_halves(lambda g, u: F.silu(g) * u / u.abs().amax()), "ACTIVATION"),
    "cumulated": (_halves(lambda g, u: F.silu(g).cumsum(-1) * u), "ACTIVATION"),
    "columns_reversed": (_halves(lambda g, u: F.silu(g) * u.flip(-1)), "ACTIVATION"),
    "rounded": (_halves(lambda g, u: F.silu(g) * u.round()), "ACTIVATION"),
    "integers": (_halves(lambda g, u: F.silu(g) * u.int()), "ACTIVATION"),
    "masked": (_halves(lambda g, u: torch.where(g > 0, g, 0.0) * u), "ACTIVATION"),
    "rows_mixed": (lambda self, x: _rows_mixed(x), "ACTIVATION"),
    "other_halves": (lambda self, x: _thirds(x), "LAYOUT"),
    "same_column_twice": (lambda self, x: _same_column_twice(x), "LAYOUT"),
    "every_fourth": (lambda self, x: _every_fourth(x), "ACTIVATION"),
    "odd_columns_only": (lambda self, x: _other_columns(x), "ACTIVATION"),
    "third_power": (_halves(lambda g, u: F.relu(g) ** 1.5 * u), "ACTIVATION"),
}


def variants(block):
    """(name, class) of ``block`` with each variant."""
    return [(name, type(block.__name__, (block,), facts)) for name, facts in VARIANTS.items()]


def near_variants(block):
    """(name, class, code) of ``block`` with each near variant."""
    return [
        (name, type(block.__name__, (block,), {"act": act}), code)
        for name, (act, code) in NEAR_VARIANTS.items()
    ]
