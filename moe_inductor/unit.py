"""The unit: the elementwise function that an expert computes between its two GEMMs.

A unit is an expression over ``g`` and ``u``, the gate and the up half of the first projection, or over ``g`` alone
where there is no gate.  It is carried as text:

    mul(silu(g),u)                                                        SwiGLU
    square(relu(g))                                                       relu^2 without a gate
    mul(add(clamp(u,-7.0,7.0),1),mul(clamp(g,None,7.0),sigmoid(mul(clamp(g,None,7.0),1.702))))        gpt-oss

One text is read from the model's graph (``match/activation.py``), written back into PyTorch for the proof
(``prove/reference.py``), handed to the op, and evaluated there, on the CPU by torch, on a GPU by ``kernels/unit.py``.
Nothing else says what the function is, and every constant, its type included, is part of the text.

A bare name ``f`` is short for ``mul(f(g),u)``, the usual gated unit.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

VARIABLES = ("g", "u")
CASTS = {
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f64": torch.float64,
}
# Larger than any activation that was seen; an expression is text, so shared parts count each time.
MAX_CALLS = 64

# A variable, a constant, or (function, argument, ...).
Tree = Any


class Function(NamedTuple):
    """tensors: how many of the arguments are tensors, at most; what follows are constants.

    forward(*args, out=None).  backward(gradient, result, *args): gradients of the arguments, None for constants.
    """

    tensors: int
    arguments: tuple[int, int]
    forward: Callable[..., Tensor]
    backward: Callable[..., tuple[Any, ...]]


def _silu(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    if out is None or out is x:
        return F.silu(x, inplace=out is x)
    return torch.ops.aten.silu.out(x, out=out)


def _relu(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    if out is None or out is x:
        return F.relu(x, inplace=out is x)
    return torch.ops.aten.relu.out(x, out=out)


def _gelu(kind: str) -> Function:
    def forward(x: Tensor, *, out: Tensor | None = None) -> Tensor:
        if out is None:
            return torch.ops.aten.gelu(x, approximate=kind)
        return torch.ops.aten.gelu.out(x, approximate=kind, out=out)

    def backward(gradient: Tensor, result: Tensor, x: Tensor) -> tuple[Any, ...]:
        return (torch.ops.aten.gelu_backward(gradient, x, approximate=kind),)

    return Function(1, (1, 1), forward, backward)


def _add(a: Any, b: Any, alpha: Any = 1, *, out: Tensor | None = None) -> Tensor:
    return torch.add(a, b, alpha=alpha, out=out)


def _sub(a: Any, b: Any, alpha: Any = 1, *, out: Tensor | None = None) -> Tensor:
    return torch.sub(a, b, alpha=alpha, out=out)


def _clamp(x: Tensor, low: Any = None, high: Any = None, *, out: Tensor | None = None) -> Tensor:
    return torch.clamp(x, low, high, out=out)


def _clamp_backward(
    gradient: Tensor, result: Tensor, x: Tensor, low: Any = None, high: Any = None
) -> tuple[Any, ...]:
    inside = torch.ones_like(x, dtype=torch.bool)
    if low is not None:
        inside &= _ABOVE(x, low)
    if high is not None:
        inside &= _BELOW(x, high)
    return (gradient * inside,)


def _bounds_have_gradients() -> bool:
    """Does ``clamp`` hand on the gradient of an element that is its bound?  Up to torch 2.13 it does, in 2.15 not."""
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.ones((), requires_grad=True)
        (gradient,) = torch.autograd.grad(x.clamp(max=1.0), x)
    return bool(gradient)


# Asked once, here: within an op nothing has gradients.
_ABOVE, _BELOW = (torch.ge, torch.le) if _bounds_have_gradients() else (torch.gt, torch.lt)


def _product_backward(gradient: Tensor, result: Tensor, a: Any, b: Any) -> tuple[Any, ...]:
    return gradient * b, gradient * a if isinstance(b, Tensor) else None


def _quotient_backward(gradient: Tensor, result: Tensor, a: Any, b: Any) -> tuple[Any, ...]:
    share = gradient / b
    return share, -share * result if isinstance(b, Tensor) else None


def _one(forward: Callable[..., Tensor], slope: Callable[[Tensor, Tensor], Any]) -> Function:
    """A function of one tensor with derivative ``slope(x, result)``."""
    return Function(1, (1, 1), forward, lambda gradient, y, x: (gradient * slope(x, y),))


# Derivatives as in any table of them; tests/test_unit.py compares each with autograd in fp64.
FUNCTIONS: dict[str, Function] = {
    "silu": Function(
        1, (1, 1), _silu, lambda gradient, y, x: (torch.ops.aten.silu_backward(gradient, x),)
    ),
    "gelu": _gelu("none"),
    "gelu_tanh": _gelu("tanh"),
    "relu": _one(_relu, lambda x, y: y > 0),
    "sigmoid": _one(torch.sigmoid, lambda x, y: y * (1 - y)),
    "tanh": _one(torch.tanh, lambda x, y: 1 - y * y),
    "erf": _one(torch.erf, lambda x, y: torch.exp(-x * x) * (2 / math.sqrt(math.pi))),
    "exp": _one(torch.exp, lambda x, y: y),
    "neg": _one(torch.neg, lambda x, y: -1),
    "square": _one(torch.square, lambda x, y: 2 * x),
    "pow": Function(
        1, (2, 2), torch.pow, lambda gradient, y, x, n: (gradient * (n * x ** (n - 1)), None)
    ),
    "clamp": Function(1, (2, 3), _clamp, _clamp_backward),
    "mul": Function(2, (2, 2), torch.mul, _product_backward),
    "div": Function(2, (2, 2), torch.div, _quotient_backward),
    "add": Function(
        2, (2, 3), _add, lambda gradient, y, a, b, alpha=1: (gradient, gradient * alpha)
    ),
    "sub": Function(
        2, (2, 3), _sub, lambda gradient, y, a, b, alpha=1: (gradient, gradient * -alpha)
    ),
}


class _Step(NamedTuple):
    """One call; ``int`` arguments wrapped in ``_Ref`` are results: 0 is g, 1 is u, 2 + i is step i."""

    function: str
    args: tuple[Any, ...]
    # Results that nobody reads after this step.
    last: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Ref:
    result: int


@dataclasses.dataclass(frozen=True)
class Unit:
    """A parsed unit.  text: its one spelling.  steps: the calls in order, each subexpression once."""

    text: str
    steps: tuple[_Step, ...]
    result: int

    @property
    def gated(self) -> bool:
        return any(isinstance(a, _Ref) and a.result == 1 for s in self.steps for a in s.args)

    @property
    def short(self) -> str:
        """The bare name where there is one."""
        name = self.text.removeprefix("mul(").removesuffix("(g),u)")
        return name if self.text == f"mul({name}(g),u)" else self.text

    @property
    def casts(self) -> frozenset[torch.dtype]:
        return frozenset(CASTS[s.function] for s in self.steps if s.function in CASTS)

    def __call__(self, gate: Tensor, up: Tensor | None) -> Tensor:
        """The unit as written, casts included, every step in a tensor of its own."""
        results: list[Any] = [gate, up]
        for step in self.steps:
            args = [results[a.result] if isinstance(a, _Ref) else a for a in step.args]
            if step.function in CASTS:
                results.append(args[0].to(CASTS[step.function]))
            else:
                results.append(FUNCTIONS[step.function].forward(*args))
        return results[self.result]

    def into(self, gate: Tensor, up: Tensor | None, out: Tensor) -> Tensor:
        """The unit, written to ``out``; ``gate`` and ``up`` are scratch memory afterwards.  No gradients."""
        if self.casts or not self.steps or out.dtype != gate.dtype:
            return out.copy_(self(gate, up))
        return self._in_place(gate, up, out)

    @functools.cached_property
    def _in_place(self) -> Callable[[Tensor, Tensor | None, Tensor], Tensor]:
        """The steps as Python source, each into the memory of an operand that it is the last to read: going over them
        in a loop costs as much again as the calls of torch, once per layer."""
        names = ["g", "u", *(f"r{i}" for i in range(len(self.steps)))]
        lines = ["def in_place(g, u, out):"]
        for i, step in enumerate(self.steps):
            args = [names[a.result] if isinstance(a, _Ref) else repr(a) for a in step.args]
            place = names[step.last[0]] if step.last else "None"
            place = "out" if 2 + i == self.result else place
            lines.append(f"    r{i} = {step.function}({', '.join(args)}, out={place})")
        lines.append("    return out")
        functions: dict[str, Any] = {name: f.forward for name, f in FUNCTIONS.items()}
        functions["inf"] = math.inf
        exec("\n".join(lines), functions)  # the text is made of names of FUNCTIONS and of numbers
        return functions["in_place"]

    def backward(
        self, gate: Tensor, up: Tensor | None, gradient: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Value and gradients of gate and up, all in the dtype of ``gate``: a cast is the identity here.

        gradient: gives the gradient of the value, once the value is known.
        """
        results: list[Any] = [gate, up]
        bound = []
        for step in self.steps:
            args = [results[a.result] if isinstance(a, _Ref) else a for a in step.args]
            bound.append(args)
            if step.function in CASTS:
                results.append(args[0])
            else:
                results.append(FUNCTIONS[step.function].forward(*args))
        sums: list[Tensor | None] = [None] * len(results)
        sums[self.result] = gradient(results[self.result])
        for number in reversed(range(len(self.steps))):
            step, above = self.steps[number], sums[2 + number]
            if above is None:
                continue
            if step.function in CASTS:
                parts: tuple[Any, ...] = (above,)
            else:
                function = FUNCTIONS[step.function]
                parts = function.backward(above, results[2 + number], *bound[number])
            for argument, part in zip(step.args, parts, strict=False):
                if isinstance(argument, _Ref):
                    before = sums[argument.result]
                    sums[argument.result] = part if before is None else before + part
        dgate, dup = sums[:2]
        dgate = torch.zeros_like(gate) if dgate is None else dgate
        if up is not None and dup is None:
            dup = torch.zeros_like(up)
        return results[self.result], dgate, dup


@functools.lru_cache(maxsize=256)
def parse(text: str) -> Unit:
    """Raises ValueError for text that is not a unit."""
    if text.isidentifier() and text in FUNCTIONS:
        text = f"mul({text}(g),u)"
    try:
        tree = _read(ast.parse(text, mode="eval").body)
    except SyntaxError as error:
        raise ValueError(f"not a unit: {text!r}") from error
    return build(tree)


def build(tree: Tree) -> Unit:
    """The unit of a tree.  Raises ValueError for one that is not in the vocabulary, or too large."""
    if not _is_tensor(tree):
        raise ValueError(f"not a unit: {tree!r}")
    text = _write(tree)
    numbers: dict[Tree, int] = {name: i for i, name in enumerate(VARIABLES)}
    calls: list[tuple[str, tuple[Any, ...]]] = []

    def number(tree: Tree) -> int:
        key = _key(tree)
        if key not in numbers:
            args = tuple(_Ref(number(a)) if _is_tensor(a) else a for a in tree[1:])
            calls.append((tree[0], args))
            numbers[key] = len(calls) + 1
        return numbers[key]

    result = number(tree)
    last: dict[int, int] = {}
    for i, (_, args) in enumerate(calls):
        last |= {a.result: i for a in args if isinstance(a, _Ref)}
    steps = tuple(
        _Step(name, args, tuple(sorted(r for r, at in last.items() if at == i and r != result)))
        for i, (name, args) in enumerate(calls)
    )
    return Unit(text, steps, result)


def _is_tensor(tree: Tree) -> bool:
    return isinstance(tree, tuple) or tree in VARIABLES


def _key(tree: Tree) -> Any:
    """1 and 1.0 and True are different constants."""
    if isinstance(tree, tuple):
        return tuple(map(_key, tree))
    return tree if isinstance(tree, str) else (type(tree).__name__, repr(tree))


def _write(tree: Tree) -> str:
    calls = 0

    def write(tree: Tree) -> str:
        nonlocal calls
        if isinstance(tree, str):
            if tree not in VARIABLES:
                raise ValueError(f"not a variable: {tree}")
            return tree
        if not isinstance(tree, tuple):
            if not (tree is None or type(tree) in (int, float)) or tree != tree:
                raise ValueError(f"not a constant: {tree!r}")
            return repr(tree)
        name, *args = tree
        calls += 1
        if calls > MAX_CALLS:
            raise ValueError("too large an expression")
        tensors, (least, most) = (
            (1, (1, 1))
            if name in CASTS
            else FUNCTIONS[name][:2]
            if (name in FUNCTIONS)
            else (0, (0, -1))
        )
        good = least <= len(args) <= most and _is_tensor(args[0])
        good = good and (name != "pow" or args[1] in (1, 2, 3, 4))  # what the GPU kernels have
        if not good or any(_is_tensor(a) for a in args[tensors:]):
            raise ValueError(f"not a call of the vocabulary: {name} with {len(args)} arguments")
        return f"{name}({','.join(map(write, args))})"

    return write(tree)


def _read(node: ast.expr) -> Tree:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        return (node.func.id, *map(_read, node.args))
    if isinstance(node, ast.Name):
        return math.inf if node.id == "inf" else node.id
    if isinstance(node, ast.Constant) and not isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _read(node.operand)
        if type(value) in (int, float):
            return -value
    raise ValueError(f"not a unit: {ast.unparse(node)}")
