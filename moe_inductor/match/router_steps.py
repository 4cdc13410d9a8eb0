"""The steps of a router that belong to no spelling: each is read from the graph here and written in PyTorch here.

``read`` follows a chain of steps from a node down to where it starts, and ``run`` computes the chain again for the
proof: what was read with a constant too much or too little is then found to be something else.  Constants are what the
graph has; nothing is guessed.

    logits -> [scores] -> scores -> [bias, groups] -> choice -> (top-k: the spelling) -> [finish] -> topk_weights
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from moe_inductor.region.nodes import node_arg, value

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Cast:
    dtype: torch.dtype

    def __call__(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)


@dataclasses.dataclass(frozen=True)
class Softmax:
    """Over the last dimension.  widened: from half precision straight into fp32, as CUDA has it."""

    widened: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        return torch.softmax(x, dim=-1, dtype=torch.float32 if self.widened else None)


@dataclasses.dataclass(frozen=True)
class Elementwise:
    name: Literal["sigmoid", "softplus", "sqrt"]

    def __call__(self, x: Tensor) -> Tensor:
        function = {"sigmoid": torch.sigmoid, "softplus": F.softplus, "sqrt": torch.sqrt}
        return function[self.name](x)


@dataclasses.dataclass(frozen=True)
class Scaled:
    by: float
    divided: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        return x / self.by if self.divided else x * self.by


@dataclasses.dataclass(frozen=True)
class Renormalised:
    """Divided by the sum over the chosen, plus epsilon or at least minimum.  norm: written as the 1-norm."""

    norm: float | None = None
    epsilon: float | None = None
    minimum: float | None = None

    def __call__(self, x: Tensor) -> Tensor:
        total = x.sum(dim=-1, keepdim=True)
        if self.norm is not None:
            total = torch.norm(x, p=self.norm, dim=-1, keepdim=True)
        if self.epsilon is not None:
            total = total + self.epsilon
        if self.minimum is not None:
            total = torch.clamp(total, min=self.minimum)
        return x / total


@dataclasses.dataclass(frozen=True, eq=False)
class Corrected:
    """A bias [E] is added; the proof is given another tensor for it, with the same metadata."""

    bias: fx.Node

    def __call__(self, x: Tensor, bias: Tensor) -> Tensor:
        return x + bias


@dataclasses.dataclass(frozen=True)
class Limited:
    """All but the ``kept`` best of ``count`` groups of experts are filled.  sorted: as the best are listed."""

    count: int
    kept: int
    score: Literal["max", "amax", "top2"]
    fill: float
    sorted: bool

    def __call__(self, x: Tensor) -> Tensor:
        grouped = x.view(x.shape[0], self.count, x.shape[1] // self.count)
        if self.score == "top2":
            rating = grouped.topk(2, dim=-1)[0].sum(dim=-1)
        elif self.score == "max":
            rating = grouped.max(dim=-1).values
        else:
            rating = grouped.amax(dim=-1)
        index = torch.topk(rating, k=self.kept, dim=-1, sorted=self.sorted)[1]
        mask = torch.zeros_like(rating).scatter(1, index, 1).unsqueeze(-1).expand_as(grouped)
        return x.masked_fill(~mask.reshape(x.shape).bool(), self.fill)


Step = Cast | Softmax | Elementwise | Scaled | Renormalised | Corrected | Limited
Reader = Callable[[fx.Node], tuple[Step, fx.Node] | None]


def read(node: fx.Node, readers: Sequence[Reader]) -> tuple[tuple[Step, ...], fx.Node]:
    """The steps that lead to ``node``, first to last, and where they start."""
    for reader in readers if node.op == "call_function" else ():
        found = reader(node)
        if found is not None:
            step, source = found
            before, start = read(source, readers)
            return (*before, step), start
    return (), node


def run(steps: Sequence[Step], x: Tensor, bias: Tensor | None = None) -> Tensor:
    for step in steps:
        if isinstance(step, Corrected):
            assert bias is not None
            x = step(x, bias)
        else:
            x = step(x)
    return x


# -- readers -----------------------------------------------------------------------------------------------------------


def _cast(node: fx.Node) -> tuple[Step, fx.Node] | None:
    if node.target is not aten._to_copy.default or set(node.kwargs) != {"dtype"}:
        return None
    source = node_arg(node, 0)
    if not (value(source).dtype.is_floating_point and value(node).dtype.is_floating_point):
        return None
    return Cast(value(node).dtype), source


def _widening(node: fx.Node) -> tuple[Step, fx.Node] | None:
    """A cast that loses nothing, so that what reads its result may as well read its source."""
    found = _cast(node)
    if found is None:
        return None
    narrow, wide = value(found[1]).dtype, value(node).dtype
    return found if torch.promote_types(narrow, wide) == wide else None


def _softmax(node: fx.Node) -> tuple[Step, fx.Node] | None:
    if node.target is not aten._softmax.default:
        return None
    return Softmax(widened=bool(node.args[2])), node_arg(node, 0)


def _elementwise(node: fx.Node) -> tuple[Step, fx.Node] | None:
    names: dict[Any, Any] = {
        aten.sigmoid.default: "sigmoid",
        aten.softplus.default: "softplus",
        aten.sqrt.default: "sqrt",
    }
    return (Elementwise(names[node.target]), node_arg(node, 0)) if node.target in names else None


def _scaled(node: fx.Node) -> tuple[Step, fx.Node] | None:
    if node.target not in (aten.mul.Tensor, aten.div.Tensor) or len(node.args) != 2:
        return None
    source, by = node.args
    if not isinstance(source, fx.Node) or type(by) not in (int, float):
        return None
    return Scaled(by, node.target is aten.div.Tensor), source  # type: ignore[arg-type]


def _renormalised(node: fx.Node) -> tuple[Step, fx.Node] | None:
    if node.target is not aten.div.Tensor or len(node.args) != 2:
        return None
    source, total = node.args
    if not isinstance(source, fx.Node) or not isinstance(total, fx.Node):
        return None
    facts: dict[str, Any] = {}
    if total.target in (aten.clamp.default, aten.clamp_min.default) and len(total.args) == 2:
        total, facts["minimum"] = total.args
    elif total.target is aten.add.Tensor and len(total.args) == 2:
        total, facts["epsilon"] = total.args
    if not isinstance(total, fx.Node) or any(type(c) not in (int, float) for c in facts.values()):
        return None
    if total.target is aten.linalg_vector_norm.default:
        facts["norm"] = total.args[1] if len(total.args) > 1 else 2
    elif total.target is not aten.sum.dim_IntList:
        return None
    return Renormalised(**facts), source


def _corrected(node: fx.Node) -> tuple[Step, fx.Node] | None:
    if node.target is not aten.add.Tensor or len(node.args) != 2:
        return None
    for source, bias in (node.args, node.args[::-1]):
        if isinstance(source, fx.Node) and isinstance(bias, fx.Node):
            bias = _vector(bias)
            if value(bias).dim() == 1 and value(source).dim() == 2:
                return Corrected(bias), source
    return None


def _vector(bias: fx.Node) -> fx.Node:
    """The [E] that a bias is before it is viewed and promoted to the dtype of the scores."""
    found = bias
    while True:
        if value(bias).dim() == 1:
            found = bias
        widened = _widening(bias)
        if widened is None and bias.target is not aten.view.default:
            return found
        bias = node_arg(bias, 0)


def _limited(node: fx.Node) -> tuple[Step, fx.Node] | None:
    if node.target is not aten.masked_fill.Scalar:
        return None
    source, mask, fill = node.args
    scatter = _above(mask, aten.scatter.src)  # a number that is scattered is a full tensor of it
    index = node_arg(scatter, 2) if scatter is not None else None
    topk = index.args[0] if index is not None and index.args else None
    if not isinstance(topk, fx.Node) or topk.target is not aten.topk.default:
        return None
    rating, kept = topk.args[:2]
    assert isinstance(rating, fx.Node)
    score: Any = "top2"
    if rating.target is aten.amax.default:
        score = "amax"
    elif rating.target is not aten.sum.dim_IntList:
        score = "max"
    ordered = bool(topk.args[4]) if len(topk.args) > 4 else True
    return Limited(value(rating).shape[-1], kept, score, fill, ordered), source  # type: ignore[arg-type, return-value]


def _above(node: Any, target: Any) -> fx.Node | None:
    """The nearest node of that kind among what ``node`` is computed from, along first arguments."""
    while isinstance(node, fx.Node):
        if node.target is target:
            return node
        node = node.args[0] if node.args else None
    return None


SCORES: tuple[Reader, ...] = (_widening, _softmax, _elementwise)
CHOICE: tuple[Reader, ...] = (_widening, _corrected, _limited)
FINISH: tuple[Reader, ...] = (_cast, _softmax, _elementwise, _scaled, _renormalised)
