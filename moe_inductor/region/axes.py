"""Which dimension of a view is which of the tensor that is viewed.

An einsum is permutes and views around one matrix product, and which ones is decided by the order of its letters.
``Axes`` follows them back: every dimension of the result is a product of *atoms*, and every atom is a dimension of the
tensor that it all started from, or a factor of one (``T = B S``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import fx

from moe_inductor.region.nodes import node_arg, unbacked, value
from moe_inductor.region.normalise import Emitter

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True, eq=False)
class Atom:
    """A dimension of the base, or a factor of it.  size: int or SymInt, never 1."""

    dim: int
    size: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Axes:
    """A view of ``base``.  order: all atoms as ``base`` has them.  dims: those of each dimension of the view."""

    base: fx.Node
    order: tuple[Atom, ...]
    dims: tuple[tuple[Atom, ...], ...]

    def of(self, dim: int) -> tuple[Atom, ...]:
        """The atoms that are dimension ``dim`` of the base."""
        return tuple(a for a in self.order if a.dim == dim)

    def permuted(self, dims: Sequence[int]) -> Axes:
        return dataclasses.replace(self, dims=tuple(self.dims[d] for d in dims))

    def viewed(self, shape: Sequence[Any]) -> Axes | None:
        """As a tensor of this shape; None where a dimension of it is no product of atoms or of factors of them."""
        left, order, dims = [a for dim in self.dims for a in dim], list(self.order), []
        exprs = [_expr(size) for size in shape]
        for i, wanted in enumerate(exprs):
            taken: list[Atom] = []
            while wanted != 1:
                if not left:
                    return None
                atom = left.pop(0)
                rest = _quotient(wanted, _expr(atom.size))
                if rest is None:  # only a factor of this atom is meant
                    parts = _factors(atom, shape[i], wanted, shape[i + 1 :])
                    if parts is None or taken:
                        return None
                    at = order.index(atom)
                    order[at : at + 1] = parts
                    atom, *more = parts
                    left = [*more, *left]
                    rest = sympy.Integer(1)
                taken.append(atom)
                wanted = rest
            dims.append(tuple(taken))
        return None if left else Axes(self.base, tuple(order), tuple(dims))


def _expr(size: Any) -> sympy.Expr:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def _quotient(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr | None:
    """a / b where that is a whole number, whatever the symbols are."""
    ratio = sympy.cancel(a / b)
    return ratio if sympy.fraction(ratio)[1] == 1 and ratio != 0 else None


def same_extent(a: Sequence[Atom], b: Sequence[Atom]) -> bool:
    """Have two products of dimensions the same size, whatever the symbols are?"""
    return bool(_extent(a) == _extent(b))


def _extent(atoms: Sequence[Atom]) -> sympy.Expr:
    return sympy.expand(sympy.Mul(*(_expr(a.size) for a in atoms)))


def _factors(atom: Atom, size: Any, wanted: sympy.Expr, later: Sequence[Any]) -> list[Atom] | None:
    """``atom`` as its first factor of ``size`` and the rest, which is the product of the first of ``later``."""
    rest = _quotient(_expr(atom.size), wanted)
    if rest is None:
        return None
    for other in later:
        quotient = _quotient(rest, _expr(other))
        if quotient is None:
            return None
        if quotient == 1:
            return [Atom(atom.dim, size), Atom(atom.dim, other)]
        if _expr(other) != 1:
            return None
    return None


def axes_of(node: fx.Node) -> Axes | None:
    """How ``node`` is a view of something; at least of itself.  None for sizes that depend on data."""
    shape = value(node).shape
    if unbacked(value(node)):
        return None
    if node.op == "call_function" and node.target in (aten.view.default, aten.permute.default):
        inner = axes_of(node_arg(node, 0))
        if inner is None:
            return None
        viewed = (
            inner.viewed(shape)
            if node.target is aten.view.default
            else inner.permuted(node.args[1])  # type: ignore[arg-type]
        )
        if viewed is not None:
            return viewed
    atoms = [Atom(dim, size) for dim, size in enumerate(shape) if _expr(size) != 1]
    dims = tuple(tuple(a for a in atoms if a.dim == dim) for dim in range(len(shape)))
    return Axes(node, tuple(atoms), dims)


def laid_out(out: Emitter, axes: Axes, origin: str | None) -> fx.Node:
    """The view that ``axes`` says, spelled in one way: its base in the fewest dimensions, permuted, and viewed."""
    wanted = [a for dim in axes.dims for a in dim]
    groups: list[list[Atom]] = []  # what stays together
    for atom in axes.order:
        at = wanted.index(atom)
        if groups and at and wanted[at - 1] is groups[-1][-1]:
            groups[-1].append(atom)
        else:
            groups.append([atom])
    base, found = axes.base, value(axes.base)
    flat = found.reshape([_product(g) for g in groups])
    split = out.apply(aten.view.default, (base, out.sizes(flat)), {}, flat, origin)
    places = sorted(range(len(groups)), key=lambda i: wanted.index(groups[i][0]))
    turned = flat.permute(places)
    made = turned.reshape([_product(d) for d in axes.dims])
    return out.view(out.permute(split, places, turned, origin), made, origin)


def _product(atoms: Sequence[Atom]) -> Any:
    size: Any = 1
    for atom in atoms:
        size = size * atom.size
    return size
