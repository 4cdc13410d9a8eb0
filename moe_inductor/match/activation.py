"""What an expert does between its two GEMMs, read once for all spellings, as an expression of ``unit.py``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from moe_inductor.description import Layout
from moe_inductor.reasons import Code, Refusal
from moe_inductor.region.nodes import location, name_of, value
from moe_inductor.unit import CASTS, MAX_CALLS, Tree, build

aten = torch.ops.aten

# ATen op -> function of ``unit.py``.
FUNCTIONS: dict[object, str] = {
    aten.silu.default: "silu",
    aten.relu.default: "relu",
    aten.sigmoid.default: "sigmoid",
    aten.tanh.default: "tanh",
    aten.erf.default: "erf",
    aten.exp.default: "exp",
    aten.neg.default: "neg",
    aten.square.default: "square",
    aten.pow.Tensor_Scalar: "pow",
    aten.clamp.default: "clamp",
    aten.mul.Tensor: "mul",
    aten.mul.Scalar: "mul",
    aten.div.Tensor: "div",
    aten.div.Scalar: "div",
    aten.add.Tensor: "add",
    aten.add.Scalar: "add",
    aten.sub.Tensor: "sub",
    aten.sub.Scalar: "sub",
}
# What only a first projection, or a cut through one, can be: this one was not recognised.
_RESULTS = {
    aten.mm.default,
    aten.bmm.default,
    aten.view.default,
    aten.slice.Tensor,
    aten.index.Tensor,
}
_CASTS = {dtype: name for name, dtype in CASTS.items()}

# What a first projection has bound, or None where a node is not the result of one.
ReadProjection = Callable[[fx.Node], dict[str, Any] | None]


@dataclasses.dataclass(frozen=True)
class Gated:
    """``hidden = unit(projections)``.

    activation: the unit.  projections: one, or gate and up when ``layout`` is "separate".
    dtype: of what the first projections compute.
    """

    activation: str
    layout: Layout
    projections: tuple[dict[str, Any], ...]
    dtype: torch.dtype

    def same_function(self, other: Gated) -> bool:
        return (self.activation, self.layout) == (other.activation, other.layout)


@dataclasses.dataclass(frozen=True)
class _Part:
    """A projection's result, or the piece of it that a slice takes: (dim, start, end, step)."""

    source: fx.Node
    piece: tuple[Any, ...] = ()


def read_activation(hidden: fx.Node, read_projection: ReadProjection) -> Gated:
    """``hidden [rows, I]`` -> Gated.  Raises Refusal (ACTIVATION, LAYOUT)."""
    projections: dict[fx.Node, dict[str, Any] | None] = {}
    parts: dict[_Part, str] = {}
    trees: dict[fx.Node, Tree] = {}
    calls: dict[fx.Node, int] = {}  # in the text, where shared parts count each time

    def is_projection(node: fx.Node) -> bool:
        if node not in projections:
            projections[node] = read_projection(node)
        return projections[node] is not None

    def part(node: fx.Node) -> _Part | None:
        if is_projection(node):
            return _Part(node)
        source = node.args[0] if node.target is aten.slice.Tensor else None
        if isinstance(source, fx.Node) and is_projection(source):
            return _Part(source, tuple(node.args[1:]))
        return None

    def read(node: fx.Node) -> Tree:
        if node not in trees:
            found = part(node)
            if found is not None:
                trees[node] = parts.setdefault(found, f"part {len(parts)}")
            else:
                name, constants = _function(node, hidden)
                args = [read(a) if isinstance(a, fx.Node) else a for a in node.args]
                trees[node] = (name, *args, *constants)
                calls[node] = 1 + sum(calls.get(a, 0) for a in node.all_input_nodes)
                if calls[node] > MAX_CALLS:
                    raise Refusal(Code.ACTIVATION, "activation: too large", location(hidden))
        return trees[node]

    tree = read(hidden)
    layout, names = _layout(list(parts), hidden)
    tree = _renamed(tree, {parts[p]: name for p, name in names.items()})
    try:
        unit = build(tree)
    except ValueError as error:
        raise Refusal(Code.ACTIVATION, f"activation: {error}", location(hidden)) from error
    sources = dict.fromkeys(p.source for p in sorted(names, key=names.__getitem__))
    bound = [projections[source] for source in sources]
    dtypes = {value(source).dtype for source in sources}
    if len(dtypes) > 1:
        raise Refusal(Code.DTYPE, "gate and up differ in dtype", location(hidden))
    return Gated(unit.short, layout, tuple(b for b in bound if b is not None), dtypes.pop())


def _function(node: fx.Node, hidden: fx.Node) -> tuple[str, list[Any]]:
    """Name of the function that ``node`` calls, and the constants that are not among its positional arguments."""
    where = location(node) or location(hidden)
    if node.op == "call_function" and node.target is aten._to_copy.default:
        if set(node.kwargs) == {"dtype"} and node.kwargs["dtype"] in _CASTS:
            return _CASTS[node.kwargs["dtype"]], []
    elif node.target is aten.gelu.default:
        kind = node.kwargs.get("approximate", "none")
        return {"none": "gelu", "tanh": "gelu_tanh"}[str(kind)], []
    elif node.target in FUNCTIONS and not node.kwargs:
        return FUNCTIONS[node.target], []
    if node.target in _RESULTS:
        raise Refusal(
            Code.SPELLING, "the experts' first projection does not read its own tokens", where
        )
    raise Refusal(
        Code.ACTIVATION,
        f"`{name_of(node)}` between the two projections of an expert is not supported",
        where,
    )


def _layout(parts: list[_Part], hidden: fx.Node) -> tuple[Layout, dict[_Part, str]]:
    """Which part is gate (``g``) and which is up (``u``)."""
    whole = [p for p in parts if not p.piece]
    if len(whole) == len(parts) == 1:
        return "plain", {whole[0]: "g"}
    if len(whole) == len(parts) == 2:
        return "separate", {whole[0]: "g", whole[1]: "u"}
    if len(parts) == 2 and not whole and parts[0].source is parts[1].source:
        found = value(parts[0].source)
        last, width = found.dim() - 1, found.shape[-1]
        layouts: dict[Layout, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
            "concatenated": ((last, 0, width // 2), (last, width // 2, width)),
            "interleaved": ((last, 0, width, 2), (last, 1, width, 2)),
        }
        for layout, pieces in layouts.items():
            if width % 2 == 0 and {p.piece for p in parts} == set(pieces):
                return layout, {p: "gu"[pieces.index(p.piece)] for p in parts}
    raise Refusal(
        Code.LAYOUT,
        "gate and up are neither two projections nor the halves nor the alternate columns of one",
        location(hidden),
    )


def _renamed(tree: Tree, names: dict[str, str]) -> Tree:
    if isinstance(tree, tuple):
        return (tree[0], *(_renamed(a, names) for a in tree[1:]))
    return names.get(tree, tree) if isinstance(tree, str) else tree
