"""The unit (``moe_inductor/unit.py``) on fp32 tiles: the function between an expert's two GEMMs, as an epilogue.

The unit arrives as text, a compile-time constant.  ``evaluate`` calls itself on the parts of the text while Triton
compiles, so what is left in the kernel is straight-line arithmetic; parts that occur twice are computed once by the
compiler.  Casts are the identity: everything is fp32 here.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def head(text):
    """The function that ``text`` calls, the variable that it is, or "" for a constant."""
    if text[-1] == ")":
        return text.partition("(")[0]
    return text if text in ("g", "u") else ""


@triton.constexpr_function
def argument(text, position):
    """The text of one argument of a call; "None" where there are fewer."""
    depth, start = 0, text.find("(") + 1
    for end in range(start, len(text)):
        if depth == 0 and (text[end] == "," or end == len(text) - 1):
            if position == 0:
                return text[start:end]
            start, position = end + 1, position - 1
        depth += (text[end] == "(") - (text[end] == ")")
    return "None"


@triton.constexpr_function
def number(text, default=0.0):
    return default if text == "None" else float(text)


@triton.constexpr_function
def whole(text):
    """A small whole exponent, or 0."""
    return int(float(text)) if float(text) in (1.0, 2.0, 3.0, 4.0) else 0


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    """By its Taylor series where the difference of exponentials would cancel."""
    s = x * x
    series = x * (1 + s * (-1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * (62 / 2835)))))
    return tl.where(s < 0.0625, series, 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0)


@triton.jit
def evaluate(g, u, UNIT: tl.constexpr):
    """``UNIT`` for fp32 tiles of gate and up; ``u`` is not looked at by a unit without a gate."""
    CALL: tl.constexpr = head(UNIT)
    FIRST: tl.constexpr = argument(UNIT, 0)
    SECOND: tl.constexpr = argument(UNIT, 1)
    THIRD: tl.constexpr = argument(UNIT, 2)
    if CALL == "g":
        value = g
    elif CALL == "u":
        value = u
    elif CALL == "":
        value = number(UNIT)
    elif CALL == "mul":
        value = evaluate(g, u, FIRST) * evaluate(g, u, SECOND)
    elif CALL == "div":
        value = evaluate(g, u, FIRST) / evaluate(g, u, SECOND)
    elif CALL == "add":
        value = evaluate(g, u, FIRST) + number(THIRD, 1.0) * evaluate(g, u, SECOND)
    elif CALL == "sub":
        value = evaluate(g, u, FIRST) - number(THIRD, 1.0) * evaluate(g, u, SECOND)
    else:
        value = _of_one(evaluate(g, u, FIRST), CALL, SECOND, THIRD)
    return value


@triton.jit
def _of_one(x, CALL: tl.constexpr, SECOND: tl.constexpr, THIRD: tl.constexpr):
    if CALL == "silu":
        value = x / (1.0 + tl.exp(-x))
    elif CALL == "gelu":
        value = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif CALL == "gelu_tanh":
        value = x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif CALL == "relu":
        value = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif CALL == "sigmoid":
        value = sigmoid(x)
    elif CALL == "tanh":
        value = tanh(x)
    elif CALL == "erf":
        value = tl.erf(x)
    elif CALL == "exp":
        value = tl.exp(x)
    elif CALL == "neg":
        value = -x
    elif CALL == "square":
        value = x * x
    elif CALL == "pow":
        value = _power(x, SECOND)
    elif CALL == "clamp":
        value = x
        if SECOND != "None":
            value = tl.maximum(value, number(SECOND), propagate_nan=tl.PropagateNan.ALL)
        if THIRD != "None":
            value = tl.minimum(value, number(THIRD), propagate_nan=tl.PropagateNan.ALL)
    else:
        CAST: tl.constexpr = CALL == "f32" or CALL == "bf16" or CALL == "f16"
        tl.static_assert(CAST, "unknown function of a unit")
        value = x
    return value


@triton.jit
def _power(x, EXPONENT: tl.constexpr):
    TIMES: tl.constexpr = whole(EXPONENT)
    tl.static_assert(TIMES > 0, "a power of a unit must be 1, 2, 3 or 4")
    value = x
    for _ in tl.static_range(TIMES - 1):
        value = value * x
    return value
