"""Masks read as sums: what one-hot masks, their products, sums, einsums, gathers and scatters are at each element.

A rule says what one operator makes of the sums of its operands.  What has no rule is not looked into.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from moe_inductor.region.axes import Atom, Axes, axes_of
from moe_inductor.region.counts import fill_of
from moe_inductor.region.distinct import are_distinct
from moe_inductor.region.nodes import (
    STATES,
    is_integral,
    node_arg,
    role_of,
    same_sizes,
    value,
    written,
)
from moe_inductor.region.positive import is_positive
from moe_inductor.region.sums import Dims, Factor, Letters, Sum, Term, Unread, fitted

aten = torch.ops.aten

# Floating-point types that hold every number of tokens exactly, up to 2^24 of them.
EXACT = (torch.float32, torch.float64)
_MOST = 64  # terms of a sum


class Reader:
    """Sums of normal-form nodes.

    counts: the tensors hold numbers of tokens, which casts between integers and exact floating-point types keep.
    """

    def __init__(self, *, counts: bool = False) -> None:
        self.counts = counts
        self._read: dict[fx.Node, Sum] = {}
        self._names: dict[tuple[int, str], Atom] = {}

    def __call__(self, node: fx.Node) -> Sum:
        if node not in self._read:
            self._read[node] = self._of(node)
        return self._read[node]

    def _of(self, node: fx.Node) -> Sum:
        rule = _RULES.get(node.target) if node.op == "call_function" else None
        try:
            found = rule(self, node) if rule is not None else None
        except Unread:
            found = None
        if found is None or len(found.terms) > _MOST:
            found = whole(node)
        return Sum(found.dims, tuple(t.merged() for t in found.terms))

    def named(self, term: Term) -> Term:
        """With the same atoms for what is summed over as in an equal term."""
        letters = dict.fromkeys(a for f in term.factors for a in f.letters if a in term.summed)
        new: dict[Atom, Letters] = {}
        for i, atom in enumerate(letters):
            name = self._names.setdefault((i, written(atom.size)), Atom(i, atom.size))
            new[atom] = (name,)
        summed = tuple(b for parts in new.values() for b in parts)
        return dataclasses.replace(term.renamed(new), summed=summed)

    def leaves(self, *parts: Sum) -> bool:
        """What is made of scores alone is a score."""
        masks = (f for s in parts for t in s.terms for f in t.masks)
        return not self.counts and not any(masks)

    def product(self, a: Sum, b: Sum) -> Sum:
        """Element by element, where what is missing or of size 1 is broadcast."""
        a, b = _aligned(a, b)
        terms = tuple(_times(s, t) for s in a.terms for t in b.terms)
        return Sum(_broadcast(a.dims, b.dims), terms)

    def matmul(self, one: fx.Node, other: fx.Node) -> Sum | None:
        """The product of two matrices, or of batches of them, if there are hits in it.  Raises Unread."""
        a, b = self(one), self(other)
        if not (a.has_hits or b.has_hits):
            return None
        *batch, rows, inner = a.dims
        left = Sum((*batch, rows, inner, ()), a.terms)
        *batch, inner, columns = b.dims
        right = Sum((*batch, (), inner, columns), b.terms)
        made = self.product(left, right)
        made = _summed(made, [len(made.dims) - 2])
        return Sum(made.dims, tuple(t.merged() for t in made.terms))

    def added(self, a: Sum, b: Sum, times: float = 1) -> Sum:
        a, b = _aligned(a, b)
        scaled = (dataclasses.replace(t, times=times * t.times) for t in b.terms)
        terms = tuple(t for t in (*a.terms, *scaled) if t.times)
        return Sum(_broadcast(a.dims, b.dims), terms)


def whole(node: fx.Node) -> Sum:
    """``node``, which is not looked into; views are."""
    axes = axes_of(node)
    if axes is None:
        raise Unread
    base = tuple(axes.of(d) for d in range(value(axes.base).dim()))
    return Sum(axes.dims, (Term(1, (Factor(axes.base, base),)),))


def _tokens(view: fx.Node) -> Sum | None:
    """Hidden states [B, S, H] as [T, H], with dimensions of size 1 or without: one atom for T, as in the masks."""
    base, sizes = node_arg(view, 0), value(view).shape
    wide = [d for d, size in enumerate(sizes) if not same_sizes([size], [1])]
    if (
        role_of(base) != STATES
        or len(wide) != 2
        or not same_sizes(sizes[-1:], value(base).shape[-1:])
    ):
        return None
    rows, features = (Atom(i, sizes[d]) for i, d in enumerate(wide))
    dims: list[Letters] = [()] * len(sizes)
    dims[wide[0]], dims[wide[1]] = (rows,), (features,)
    return Sum(tuple(dims), (Term(1, (Factor(base, ((rows,), (features,))),)),))


def number(times: float, rank: int = 0) -> Sum:
    return Sum(((),) * rank, (Term(times, ()),))


def _times(s: Term, t: Term) -> Term:
    new = {a: (Atom(a.dim, a.size),) for a in t.summed if a in s.summed}
    t = t.renamed(new)
    masks = dict.fromkeys((*s.masks, *t.masks))
    factors = (*masks, *s.numbers, *t.numbers)
    return Term(s.times * t.times, factors, (*s.summed, *t.summed))


def _fresh(found: Sum) -> Sum:
    """With atoms of its own."""
    atoms = dict.fromkeys((*found.letters, *(a for t in found.terms for a in t.summed)))
    return found.renamed({a: (Atom(i, a.size),) for i, a in enumerate(atoms)})


def _aligned(a: Sum, b: Sum) -> tuple[Sum, Sum]:
    """With as many dimensions, and the same atoms where neither is broadcast."""
    a, b = _fresh(a), _fresh(b)
    rank = max(len(a.dims), len(b.dims))
    a, b = (Sum((*((),) * (rank - len(s.dims)), *s.dims), s.terms) for s in (a, b))
    new_a: dict[Atom, Letters] = {}
    new_b: dict[Atom, Letters] = {}
    for mine, theirs in zip(a.dims, b.dims, strict=True):
        if mine and theirs:
            ours, others = fitted(theirs, mine)
            new_b |= ours
            new_a |= others
    return a.renamed(new_a), b.renamed(new_b)


def _broadcast(a: Dims, b: Dims) -> Dims:
    return tuple(x or y for x, y in zip(a, b, strict=True))


_Rule = Callable[[Reader, fx.Node], "Sum | None"]
_RULES: dict[Any, _Rule] = {}


def _reads(*targets: Any) -> Callable[[_Rule], _Rule]:
    def register(fn: _Rule) -> _Rule:
        _RULES.update(dict.fromkeys(targets, fn))
        return fn

    return register


@_reads(aten.view.default)
def _view(read: Reader, node: fx.Node) -> Sum | None:
    tokens = _tokens(node)
    if tokens is not None:
        return tokens
    found = _fresh(read(node_arg(node, 0)))
    axes = Axes(node, found.letters, found.dims).viewed(value(node).shape)
    if axes is None:
        return None
    return dataclasses.replace(
        found.renamed({a: axes.of(a.dim) for a in found.letters}), dims=axes.dims
    )


@_reads(aten.permute.default)
def _permute(read: Reader, node: fx.Node) -> Sum:
    found, order = read(node_arg(node, 0)), node.args[1]
    return Sum(tuple(found.dims[d] for d in order), found.terms)  # type: ignore[union-attr]


@_reads(aten.expand.default)
def _expand(read: Reader, node: fx.Node) -> Sum:
    found, shape = _fresh(read(node_arg(node, 0))), value(node).shape
    dims: list[Letters] = [*((),) * (len(shape) - len(found.dims)), *found.dims]
    for d, size in enumerate(shape):
        if not dims[d] and not same_sizes([size], [1]):
            dims[d] = (Atom(-1 - d, size),)
    return Sum(tuple(dims), found.terms)


@_reads(aten._to_copy.default)
def _cast(read: Reader, node: fx.Node) -> Sum | None:
    source, made = node_arg(node, 0), value(node).dtype
    before = value(source).dtype
    found = read(source)
    if made == torch.bool:
        return _nonzero(read, found)
    if before == torch.bool or _is_small(found):
        return found
    if not before.is_floating_point:
        return found if made in (torch.int32, torch.int64) or made in EXACT else None
    if not made.is_floating_point:
        exact = read.counts and before in EXACT and made in (torch.int32, torch.int64)
        return found if exact else None
    # Weights and tokens are rounded as the model does, or less often.
    return found if found.has_hits else None


def _is_small(found: Sum) -> bool:
    """Sums of so few masks that every floating-point type holds them."""
    most: Any = 0
    for term in found.terms:
        sizes = [a.size for a in term.summed]
        if term.times != 1 or term.numbers or not all(isinstance(n, int) for n in sizes):
            return False
        most += math.prod(sizes)
    return bool(most <= 256)


@_reads(aten.ne.Scalar, aten.gt.Scalar)
def _compared(read: Reader, node: fx.Node) -> Sum | None:
    """p > 0 and p != 0, where p is not negative"""
    if node.args[1] != 0:
        return None
    return _nonzero(read, read(node_arg(node, 0)))


def _nonzero(read: Reader, found: Sum) -> Sum | None:
    """bool(w (ids == e) (slot == c)) = (ids == e) (slot == c) for positive w

    Of a sum of such terms that is their sum if no two are 1 in one place, which is for the reader to see to."""
    if not found.has_hits or not all(is_positive(read, t) for t in found.terms):
        return None
    terms = (Term(1, t.masks, t.summed) for t in found.terms)
    return Sum(found.dims, tuple(terms))


@_reads(aten.eq.Tensor)
def _one_hot(read: Reader, node: fx.Node) -> Sum | None:
    """ids [.., 1] == arange(n)"""
    ids, numbers = node.args
    if not isinstance(ids, fx.Node) or not isinstance(numbers, fx.Node):
        return None
    rank, row = value(node).dim(), numbers
    if row.target is aten.view.default:
        row = node_arg(row, 0)
    size = value(node).shape[-1]
    if row.target is not aten.arange.default or len(row.args) != 1 or value(row).dim() != 1:
        return None
    if not same_sizes([size, value(ids).shape[-1]], [value(row).shape[0], 1]):
        return None
    if value(ids).dim() != rank or not same_sizes(value(ids).shape[:-1], value(node).shape[:-1]):
        return None
    if same_sizes([size], [1]) or not is_integral(ids):
        return None
    found = _hits(ids, size)
    return Sum((*found.dims[:-2], found.dims[-1]), found.terms)


def _hits(ids: fx.Node, size: Any) -> Sum:
    """ids [.., k] == arange(size), [.., k, size]"""
    at, places = whole(ids), Atom(-1, size)
    (factor,) = at.terms[0].factors
    return Sum((*at.dims, (places,)), (Term(1, (Factor(factor.node, factor.dims, places),)),))


@_reads(aten.scatter.src)
def _scatter(read: Reader, node: fx.Node) -> Sum | None:
    """scatter(zeros, -1, ids, w)[.., e] = sum_j w[.., j] (ids[.., j] == e) for distinct ids"""
    base, dim, ids, given = node.args
    if not isinstance(base, fx.Node) or not isinstance(ids, fx.Node) or fill_of(base) != 0:
        return None
    if not isinstance(given, fx.Node):
        return None
    shape = value(node).shape
    one = same_sizes(value(ids).shape[-1:], [1])  # whatever it is, once
    if dim != len(shape) - 1 or not (one or are_distinct(ids, shape[-1])):
        return None
    if not same_sizes(value(ids).shape[:-1], shape[:-1]):
        return None
    hits, scores = _hits(ids, shape[-1]), read(given)
    fill = fill_of(given)
    if isinstance(fill, (bool, int, float)):
        scores = number(fill, len(shape))
    made = read.product(hits, Sum((*scores.dims, ()), scores.terms))
    return _summed(made, [len(made.dims) - 2])


@_reads(aten.gather.default)
def _gather(read: Reader, node: fx.Node) -> Sum | None:
    """gather(p, -1, ids)[.., j] = sum_e p[.., e] (ids[.., j] == e)"""
    base, dim, ids = node.args
    if not isinstance(base, fx.Node) or not isinstance(ids, fx.Node):
        return None
    shape = value(base).shape
    if dim != len(shape) - 1 or not same_sizes(value(ids).shape[:-1], shape[:-1]):
        return None
    if not are_distinct(ids, shape[-1]) or same_sizes(shape[-1:], [1]):
        return None
    hits, found = _hits(ids, shape[-1]), read(base)
    made = read.product(hits, Sum((*found.dims[:-1], (), found.dims[-1]), found.terms))
    return _summed(made, [len(made.dims) - 1])


@_reads(aten.mul.Tensor, aten.mul.Scalar, aten.bitwise_and.Tensor, aten.logical_and.default)
def _mul(read: Reader, node: fx.Node) -> Sum | None:
    if node.kwargs or len(node.args) != 2:
        return None
    is_and = node.target in (aten.bitwise_and.Tensor, aten.logical_and.default)
    if is_and and any(value(n).dtype != torch.bool for n in node.all_input_nodes):
        return None
    a, b = (_operand(read, n) for n in node.args)
    if a is None or b is None or read.leaves(a, b):
        return None
    return read.product(a, b)


@_reads(aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar)
def _add(read: Reader, node: fx.Node) -> Sum | None:
    if node.kwargs or len(node.args) != 2 or value(node).dtype == torch.bool:
        return None
    a, b = (_operand(read, n) for n in node.args)
    if a is None or b is None or read.leaves(a, b):
        return None
    minus = node.target in (aten.sub.Tensor, aten.sub.Scalar)
    return read.added(a, b, -1 if minus else 1)


def _operand(read: Reader, item: Any) -> Sum | None:
    if isinstance(item, fx.Node):
        return read(item)
    return number(item) if isinstance(item, (bool, int, float)) else None


@_reads(aten.sum.dim_IntList)
def _sum(read: Reader, node: fx.Node) -> Sum | None:
    if node.kwargs or len(node.args) not in (2, 3) or not node.args[1]:
        return None
    dims, keeps = node.args[1], node.args[2:] == (True,)
    return _summed(read(node_arg(node, 0)), dims, keeps)  # type: ignore[arg-type]


def _summed(found: Sum, dims: Sequence[int], keeps: bool = False) -> Sum:
    dims = [d % len(found.dims) for d in dims]
    atoms = [a for d in dims for a in found.dims[d]]
    for term in found.terms:
        read = {b for f in term.factors for b in (*f.letters, f.hit)}
        if not read.issuperset(atoms):
            raise Unread  # as many times as there are positions
    left = (() if d in dims else dim for d, dim in enumerate(found.dims) if keeps or d not in dims)
    terms = (dataclasses.replace(t, summed=(*t.summed, *atoms)) for t in found.terms)
    return Sum(tuple(left), tuple(terms))


@_reads(aten.bmm.default, aten.mm.default)
def _product(read: Reader, node: fx.Node) -> Sum | None:
    return read.matmul(node_arg(node, 0), node_arg(node, 1))
