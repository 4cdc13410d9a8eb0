"""Rules about products of tokens with the weights of all experts, in whatever order an einsum has its letters.

The uniform spelling is ``bmm(rows [E, T, in], weight [E, in, out])``, and what is computed from it element by element
is computed in that order as well: a permute or a view moves behind it, until the sum over the experts takes it away.
That sum is ``sum(y [E, T, H] * scores [E, T, 1], 0)``, which an einsum writes as a product with the scores.

The terms of a sum have no order, and a score is taken out of the last projection: ``(h s) W = (h W) s``.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch import fx

from moe_inductor.region.axes import Atom, Axes, axes_of, laid_out
from moe_inductor.region.nodes import (
    STATES,
    STORED,
    is_one,
    is_tensor,
    node_arg,
    role_of,
    same_sizes,
    uncast,
    value,
)
from moe_inductor.region.normalise import Emitter, arithmetic, cast, rule
from moe_inductor.region.sparse import matrix_of

aten = torch.ops.aten

_PRODUCTS = (aten.bmm.default, aten.mm.default)
_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default)
_UNARY = (
    aten.silu.default, aten.gelu.default, aten.relu.default, aten.sigmoid.default, aten.tanh.default, aten.erf.default,
    aten.exp.default, aten.neg.default, aten.square.default, aten.pow.Tensor_Scalar, aten.clamp.default,
    aten._to_copy.default, aten.mul.Scalar, aten.div.Scalar, aten.add.Scalar, aten.sub.Scalar,
)  # fmt: skip
_BINARY = (aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor)
_ELEMENTWISE = frozenset((*_UNARY, *_BINARY))


def is_of_experts(node: fx.Node) -> bool:
    """Is it [E, T, ..], what each expert has computed for each token, or ``x`` repeated for every expert?"""
    if not is_tensor(node) or value(node).dim() != 3 or not value(node).dtype.is_floating_point:
        return False
    if node.target is aten.bmm.default:
        axes = axes_of(node_arg(node, 1))
        return axes is not None and _is_stack(axes.base) and axes.dims[0] == axes.of(0)
    if node.target is aten.expand.default:
        return same_sizes(value(node).shape[1:], value(node_arg(node, 0)).shape)
    if node.target is aten.slice.Tensor:
        return bool(node.args[1] == 2) and is_of_experts(node_arg(node, 0))
    return node.target in _ELEMENTWISE and any(
        same_sizes(value(a).shape, value(node).shape) and is_of_experts(a)
        for a in node.all_input_nodes
    )


def _is_stack(node: fx.Node) -> bool:
    """One matrix per expert, as the model stores them.  Hidden states [B, S, H] only look like it."""
    while node.target is aten._to_copy.default:
        node = node_arg(node, 0)
    if role_of(node) == STATES:
        return False
    stored = node.op in ("placeholder", "get_attr") or node.target is aten.stack.default
    return stored and value(node).dim() == 3


def _laid(node: Any) -> Axes | None:
    """How ``node`` is a view of what experts have computed, if it is one."""
    if not isinstance(node, fx.Node) or not is_tensor(node):
        return None
    axes = axes_of(node)
    if axes is None or axes.base is node or not is_of_experts(axes.base):
        return None
    return axes if len(axes.of(0)) == len(axes.of(2)) == 1 else None


def _again(axes: Axes, base: fx.Node) -> Axes:
    """``axes`` of another tensor that has the base's E and T; its last dimension may have another size."""
    size = value(base).shape[-1]
    new = {a: Atom(a.dim, size) if a.dim == 2 else a for a in axes.order}
    return Axes(
        base,
        tuple(new[a] for a in axes.order),
        tuple(tuple(new[a] for a in dim) for dim in axes.dims),
    )


# -- products with weights -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class _Operand:
    """Of a matrix product: the atoms of its dimensions."""

    axes: Axes
    batch: tuple[Atom, ...]
    free: tuple[Atom, ...]
    contracted: tuple[Atom, ...]


def _operands(args: tuple) -> tuple[_Operand, _Operand] | None:
    a, b = (axes_of(n) for n in args[:2])
    if a is None or b is None:
        return None
    batch = [(), *a.dims][-3], [(), *b.dims][-3]
    return (
        _Operand(a, batch[0], a.dims[-2], a.dims[-1]),
        _Operand(b, batch[1], b.dims[-1], b.dims[-2]),
    )


@rule(*_PRODUCTS, first=True)
def _product(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """A product of rows with a stack of matrices, summed over the experts or not, whatever stands first in it
    = a view of bmm(rows [E, T, in], weight [E, in, out])"""
    operands = _operands(args)
    if operands is None:
        return None
    for i, weight in ((1, operands[1]), (0, operands[0])):  # of two inputs, rows tend to come first
        base = weight.axes.base
        if _is_stack(base) and len(weight.axes.order) == 3:
            return _applied(out, node, operands[1 - i], weight, rows_first=i == 1)
    for i, y in enumerate(operands):
        if is_of_experts(y.axes.base):
            return _combined(out, node, y, operands[1 - i], y_first=i == 0)
    return None


def _applied(
    out: Emitter, node: fx.Node, rows: _Operand, weight: _Operand, rows_first: bool
) -> fx.Node | None:
    (e,), origin = weight.axes.of(0), node.meta.get("stack_trace")
    inner = [a for a in weight.contracted if a is not e]
    outer = [a for a in (*weight.batch, *weight.free) if a is not e]
    if len(inner) != 1 or len(outer) != 1 or outer[0] in weight.batch:
        return None
    ours, of_experts = rows.axes, is_of_experts(rows.axes.base)
    if role_of(ours.base) == STORED:
        return None
    features = ours.of(value(ours.base).dim() - 1)
    experts = ours.of(0) if of_experts else ()
    if features != tuple(a for a in rows.contracted if a not in experts):
        return None
    if not same_sizes([f.size for f in features], [inner[0].size]):
        return None
    if of_experts:
        if len(experts) != 1 or not _same_place(rows, weight, experts[0], e):
            return None
        base, score = _without_score(ours.base)
    elif e in weight.free and not rows.batch and value(ours.base).dtype.is_floating_point:
        base, score = _for_every_expert(out, ours.base, e, origin), None
    else:
        return None
    matrix = _turned(out, weight.axes.base, (0, inner[0].dim, outer[0].dim), origin)
    made = _bmm(out, base, matrix, origin)
    if score is not None:
        made = arithmetic(out, aten.mul.Tensor, made, score, value(made), origin)
    tokens = [a for a in ours.order if a not in features and a not in experts]
    new = {a: Atom(1, a.size) for a in tokens}
    new[outer[0]] = Atom(2, outer[0].size)
    new |= dict.fromkeys((e, *experts), Atom(0, e.size))
    order = (new[e], *(new[a] for a in tokens), new[outer[0]])
    batch = tuple(new[a] for a in weight.batch or rows.batch)
    free = [tuple(new[a] for a in part.free) for part in (rows, weight)]
    dims = (batch, *(free if rows_first else free[::-1]))[-value(node).dim() :]
    if e in weight.contracted:
        return _summed(out, Axes(made, order, (*dims, (new[e],))), len(dims), origin)
    return laid_out(out, Axes(made, order, dims), origin)


def _same_place(a: _Operand, b: _Operand, mine: Atom, theirs: Atom) -> bool:
    """Is an atom of one operand, in what both have in common, that of the other?"""
    for ours, others in ((a.batch, b.batch), (a.contracted, b.contracted)):
        if mine in ours and theirs in others:
            sizes = [[x.size for x in part] for part in (ours, others)]
            return ours.index(mine) == others.index(theirs) and same_sizes(*sizes)
    return False


def _for_every_expert(out: Emitter, x: fx.Node, e: Atom, origin: str | None) -> fx.Node:
    """``x [.., H]`` as [E, T, H]; a cast comes last."""
    inner = uncast(x)
    flat = value(inner).reshape(-1, value(inner).shape[-1])
    made = flat.expand(e.size, *flat.shape)
    rows = out.view(inner, flat, origin)
    rows = out.emit(aten.expand.default, (rows, out.sizes(made)), {}, made, origin)
    return cast(out, rows, torch.empty_like(made, dtype=value(x).dtype), origin)


def _turned(out: Emitter, stack: fx.Node, dims: tuple[int, ...], origin: str | None) -> fx.Node:
    """The stored matrices, permuted; a cast comes last."""
    inner = uncast(stack)
    turned = out.permute(inner, list(dims), value(inner).permute(dims), origin)
    made = torch.empty_like(value(turned), dtype=value(stack).dtype)
    return cast(out, turned, made, origin)


def _bmm(out: Emitter, rows: fx.Node, matrix: fx.Node, origin: str | None) -> fx.Node:
    made = torch.bmm(value(rows), value(matrix))
    return out.emit(aten.bmm.default, (rows, matrix), {}, made, origin)


def _without_score(hidden: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """(h, s) where ``hidden`` is h s, for a score of each token and expert, and h is what the expert has computed."""
    if hidden.target is not aten.mul.Tensor or len(hidden.args) != 2:
        return hidden, None
    h, s = hidden.args
    if not isinstance(h, fx.Node) or not isinstance(s, fx.Node):
        return hidden, None
    if h.target is aten.expand.default or not is_of_experts(h) or not _is_score(s):
        return hidden, None
    return (h, s) if value(h).dtype == value(s).dtype == value(hidden).dtype else (hidden, None)


def _is_score(node: fx.Node) -> bool:
    """A routing matrix as [E, T, 1]."""
    axes = axes_of(node)
    return (
        axes is not None
        and value(node).dim() == 3
        and is_one(value(node).shape[-1])
        and matrix_of(axes.base) is not None
        and axes.dims[0] == axes.of(value(axes.base).dim() - 1)
    )


# -- what is computed element by element -----------------------------------------------------------------------------


@rule(*_UNARY, first=True)
def _unary(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """f(view(y)) = view(f(y)) for a function of each element"""
    axes = _laid(args[0])
    if axes is None or any(isinstance(a, fx.Node) for a in args[1:]):
        return None
    made, origin = value(node), node.meta.get("stack_trace")
    val = torch.empty_like(value(axes.base), dtype=made.dtype)
    base = out.apply(node.target, (axes.base, *args[1:]), kwargs, val, origin)
    return laid_out(out, _again(axes, base), origin)


@rule(*_BINARY, first=True)
def _binary(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """f(view(y), view(z)) = view(f(y, z)), and the same for what is broadcast to y"""
    if kwargs or len(args) != 2 or not isinstance(args[0], fx.Node):
        return None
    made, origin = value(node), node.meta.get("stack_trace")
    if not isinstance(args[1], fx.Node):
        return _unary(out, node, args, kwargs)
    if not all(isinstance(value(a), torch.Tensor) for a in args):
        return None  # a number that depends on data
    axes = next(
        (
            axes
            for a in args
            if same_sizes(value(a).shape, made.shape) and (axes := _laid(a)) is not None
        ),
        None,
    )
    if axes is None:
        return None
    operands = [_brought(out, a, axes, origin) for a in args]
    if any(a is None for a in operands):
        return None
    val = torch.empty_like(value(axes.base), dtype=made.dtype)
    base = out.apply(node.target, tuple(operands), {}, val, origin)
    return laid_out(out, _again(axes, base), origin)


def _brought(out: Emitter, node: fx.Node, axes: Axes, origin: str | None) -> fx.Node | None:
    """``node``, which is broadcast to the view ``axes``, as what is broadcast to its base [E, T, F]."""
    mine, rank = axes_of(node), len(axes.dims)
    if value(node).dim() == 0 or mine is None:
        return node if mine is not None else None
    missing: tuple = ((),) * (rank - len(mine.dims))
    mine = dataclasses.replace(mine, dims=(*missing, *mine.dims))
    atoms = [a for dim in axes.dims for a in dim]
    # One dimension for every atom: 1 where it is broadcast.
    sizes = [a.size if mine.dims[d] else 1 for d, dim in enumerate(axes.dims) for a in dim]
    split = mine.viewed(sizes)
    if split is None:
        return None
    split = split.permuted([atoms.index(a) for a in axes.order])
    dims: list[tuple[Atom, ...]] = [(), (), ()]
    for atom, part in zip(axes.order, split.dims, strict=True):
        if bool(part) is not bool(split.dims[axes.order.index(axes.of(atom.dim)[0])]):
            return None  # for some of the tokens' dimensions, not for all
        dims[atom.dim] += part
    return laid_out(out, dataclasses.replace(split, dims=tuple(dims)), origin)


@rule(aten.slice.Tensor, first=True)
def _sliced(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """slice(view(y [E, T, F]), the dimension that is F, ..) = view(slice(y, 2, ..))"""
    axes = _laid(args[0])
    if axes is None or len(args) < 2 or axes.dims[args[1]] != axes.of(2) or not axes.of(2):
        return None
    return _slice(out, axes, list(args[2:]), node)


@rule(operator.getitem, first=True)
def _part(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """split(view(y), n, d)[i] is a slice as well."""
    pack, position = args
    if not isinstance(pack, fx.Node) or pack.target not in _SPLITS or pack.kwargs:
        return None
    axes = _laid(pack.args[0])
    if axes is None:
        return None
    dim: Any = pack.args[2] if len(pack.args) > 2 else 0
    dim %= len(axes.dims)
    lengths = [part.shape[dim] for part in value(pack)]
    if axes.dims[dim] != axes.of(2) or not all(isinstance(n, int) for n in lengths):
        return None
    start = sum(lengths[:position])
    return _slice(out, axes, [start, start + lengths[position]], node)


def _slice(out: Emitter, axes: Axes, bounds: list[Any], node: fx.Node) -> fx.Node:
    made, origin = value(node), node.meta.get("stack_trace")
    size = next(made.shape[i] for i, dim in enumerate(axes.dims) if dim == axes.of(2))
    val = value(axes.base).new_empty((*value(axes.base).shape[:2], size))
    base = out.apply(aten.slice.Tensor, (axes.base, 2, *bounds), {}, val, origin)
    return laid_out(out, _again(axes, base), origin)


# -- the sum over the experts -----------------------------------------------------------------------------------------


@rule(aten.sum.dim_IntList, first=True)
def _sum(out: Emitter, node: fx.Node, args: tuple[Any, ...], kwargs: dict) -> Any:
    """sum(view(y), the dimension that is E) = view(sum(y, 0))"""
    axes = _laid(args[0])
    if axes is None or kwargs or len(args) != 2 or len(args[1]) != 1:
        return None
    dim = args[1][0] % len(axes.dims)
    if axes.dims[dim] != axes.of(0) or not axes.of(0):
        return None
    return _summed(out, axes, dim, node.meta.get("stack_trace"))


def _summed(out: Emitter, axes: Axes, dim: int, origin: str | None) -> fx.Node:
    """``axes`` without its dimension ``dim``, the experts, which are added up."""
    base = out.emit(aten.sum.dim_IntList, (axes.base, [0]), {}, value(axes.base).sum(0), origin)
    new = {a: Atom(a.dim - 1, a.size) for a in axes.order if a.dim}
    rest = [d for i, d in enumerate(axes.dims) if i != dim]
    order = tuple(new[a] for a in axes.order if a.dim)
    return laid_out(out, Axes(base, order, tuple(tuple(new[a] for a in d) for d in rest)), origin)


def _combined(
    out: Emitter, node: fx.Node, y: _Operand, scores: _Operand, y_first: bool
) -> fx.Node | None:
    """bmm(scores [T, 1, E], y [T, E, H]) = sum(y [E, T, H] * scores [E, T, 1], 0)"""
    axes, origin = y.axes, node.meta.get("stack_trace")
    if y.contracted != axes.of(0) or not axes.of(0) or scores.free or y.free != axes.of(2):
        return None
    if {*y.batch} != {*axes.of(1)}:
        return None
    # Both as [T, E, H], where the scores are broadcast.
    whole = dataclasses.replace(axes, dims=(y.batch, y.contracted, y.free))
    column = dataclasses.replace(scores.axes, dims=(scores.batch, scores.contracted, ()))
    score = _brought(out, laid_out(out, column, origin), whole, origin)
    if score is None:
        return None
    product = arithmetic(out, aten.mul.Tensor, axes.base, score, value(axes.base), origin)
    dims = (y.batch, y.free, ()) if y_first else (y.batch, (), y.free)
    new = _again(dataclasses.replace(axes, dims=(*dims, y.contracted)), product)
    return _summed(out, new, len(dims), origin)
