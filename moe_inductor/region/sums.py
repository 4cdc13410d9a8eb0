"""What a tensor of masks is, element by element: a sum of products with one letter for each axis, as of an einsum.

    combine[t, e, c] = sum_j  weight[t, j] * kept[t, j] * (ids[t, j] == e) * (slot[t, j] == c)

Models write that with one-hot masks, products, sums, einsums, gathers and scatters, in any order of the dimensions.  A
``Sum`` is what is left of it: terms, each a product of *factors*, over *atoms* (``region/axes.py``), some of which are
summed over.  A factor is a tensor that is not looked into, or a *hit*: is its element the position along an atom?
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from moe_inductor.region.axes import Atom, Axes, axes_of, same_extent
from moe_inductor.region.counts import fill_of
from moe_inductor.region.nodes import is_integral, node_arg, same_sizes, value, written
from moe_inductor.region.rows import are_distinct
from moe_inductor.region.sparse import matrix_of

aten = torch.ops.aten

Letters = tuple[Atom, ...]
Dims = tuple[Letters, ...]
Renaming = Mapping[Atom, Letters]

# Floating-point types that hold every number of tokens exactly, up to 2^24 of them.
EXACT = (torch.float32, torch.float64)
_MOST = 64  # terms of a sum


@dataclasses.dataclass(frozen=True)
class Factor:
    """``node[dims]``; with ``hit``, 1 where that is the position along ``hit`` and 0 elsewhere.

    dims: the atoms of each dimension of ``node``, which is no view, none for a dimension of size 1.
    """

    node: fx.Node
    dims: Dims
    hit: Atom | None = None

    @property
    def letters(self) -> Letters:
        return tuple(a for dim in self.dims for a in dim)

    @property
    def is_mask(self) -> bool:
        """Is it 0 or 1?"""
        return self.hit is not None or value(self.node).dtype == torch.bool

    def renamed(self, new: Renaming) -> Factor:
        hit = self.hit
        if hit in new:
            (hit,) = new[hit] if len(new[hit]) == 1 else (None,)
            if hit is None:
                raise Unread
        return Factor(self.node, tuple(map(lambda dim: _renamed(dim, new), self.dims)), hit)


@dataclasses.dataclass(frozen=True)
class Term:
    """``times`` the product of ``factors``, for each of which its atoms are free or ``summed``."""

    times: float
    factors: tuple[Factor, ...]
    summed: Letters = ()

    @property
    def masks(self) -> tuple[Factor, ...]:
        return tuple(f for f in self.factors if f.is_mask)

    @property
    def numbers(self) -> tuple[Factor, ...]:
        return tuple(f for f in self.factors if not f.is_mask)

    def hits(self, atom: Atom) -> list[Factor]:
        return [f for f in self.factors if f.hit is atom]

    def renamed(self, new: Renaming) -> Term:
        factors = dict.fromkeys(f.renamed(new) for f in self.factors if f.is_mask)
        numbers = [f.renamed(new) for f in self.numbers]
        return Term(self.times, (*factors, *numbers), _renamed(self.summed, new))

    def merged(self) -> Term:
        """Of two hits of one atom by distinct ids, only those of the same choice are left:
        sum_i (ids[t, j] == e) (ids[t, i] == e) f[t, i] = (ids[t, j] == e) f[t, j]
        sum_d (ids[t] == d) (ids[t] == e) f[t, d] = (ids[t] == e) f[t, e]"""
        for atom in self.summed:
            new = self._same_as(atom)
            if new is not None:
                rest = tuple(a for a in self.summed if a is not atom)
                return dataclasses.replace(self, summed=rest).renamed({atom: (new,)}).merged()
        return self

    def _same_as(self, atom: Atom) -> Atom | None:
        """The other atom which a summed one must be equal to, for the product not to be zero."""
        hits = [f for f in self.factors if f.hit is not None]
        for a in hits:
            for b in hits:
                if a is b or a.node is not b.node or not a.letters:
                    continue
                if a.hit is atom and a.dims == b.dims:
                    return b.hit
                if a.hit is b.hit and a.letters[:-1] == b.letters[:-1]:
                    last, other = a.letters[-1], b.letters[-1]
                    if last is atom and other is not atom and _are_choices(a):
                        return other
        return None


@dataclasses.dataclass(frozen=True)
class Sum:
    """dims: the atoms of each dimension; in ``terms`` these are free."""

    dims: Dims
    terms: tuple[Term, ...]

    @property
    def letters(self) -> Letters:
        return tuple(a for dim in self.dims for a in dim)

    @property
    def has_hits(self) -> bool:
        return any(f.hit is not None for t in self.terms for f in t.factors)

    def renamed(self, new: Renaming) -> Sum:
        return Sum(
            tuple(_renamed(dim, new) for dim in self.dims), tuple(t.renamed(new) for t in self.terms)
        )

    def over(self, dims: Dims) -> Sum:
        """The same with these atoms for the dimensions.  Raises Unread where they do not fit."""
        new: dict[Atom, Letters] = {}
        for mine, theirs in zip(self.dims, dims, strict=True):
            ours, others = fitted(mine, theirs)
            if any(len(parts) > 1 for parts in others.values()):
                raise Unread
            new |= ours
        return self.renamed(new)


class Unread(Exception):
    """Something is not of this form."""


def fitted(a: Letters, b: Letters) -> tuple[dict[Atom, Letters], dict[Atom, Letters]]:
    """Renamings of two ways to write one dimension, after which these are the same.  Raises Unread."""
    left, right = list(a), list(b)
    new_a: dict[Atom, Letters] = {}
    new_b: dict[Atom, Letters] = {}
    while left and right:
        one, other = left.pop(0), right.pop(0)
        if same_extent([one], [other]):
            new_a[one] = (other,)
            continue
        for wide, narrow, rest, new in ((one, other, right, new_a), (other, one, left, new_b)):
            parts = [narrow]
            for n in range(len(rest)):
                parts.append(rest[n])
                if same_extent([wide], parts):
                    break
            else:
                continue
            del rest[: len(parts) - 1]
            new[wide] = tuple(parts)
            if new is new_b:  # both sides get the atoms of the first
                new_a.update({p: (p,) for p in parts})
            break
        else:
            raise Unread
    if left or right:
        raise Unread
    return new_a, new_b


def _renamed(letters: Letters, new: Renaming) -> Letters:
    return tuple(b for a in letters for b in new.get(a, (a,)))


def _are_choices(ids: Factor) -> bool:
    """Are those along the last axis positions that differ from each other?"""
    dims = ids.dims
    return len(dims[-1]) == 1 and ids.hit is not None and are_distinct(ids.node, ids.hit.size)


# -- reading ----------------------------------------------------------------------------------------------------------


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
    if not isinstance(ids, fx.Node) or not isinstance(given, fx.Node) or fill_of(base) != 0:
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
    if node.kwargs or len(node.args) not in (2, 3):
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
    left = (
        () if d in dims else dim for d, dim in enumerate(found.dims) if keeps or d not in dims
    )
    terms = (dataclasses.replace(t, summed=(*t.summed, *atoms)) for t in found.terms)
    return Sum(tuple(left), tuple(terms))


@_reads(aten.bmm.default, aten.mm.default)
def _product(read: Reader, node: fx.Node) -> Sum | None:
    a, b = (read(node_arg(node, i)) for i in range(2))
    if not (a.has_hits or b.has_hits):
        return None
    *batch, rows, inner = a.dims
    left = Sum((*batch, rows, inner, ()), a.terms)
    *batch, inner, columns = b.dims
    right = Sum((*batch, (), inner, columns), b.terms)
    made = read.product(left, right)
    return _summed(made, [len(made.dims) - 2])


# -- what is known of a term ------------------------------------------------------------------------------------------


def is_positive(read: Reader, term: Term) -> bool:
    """Is the product positive where its masks are 1?"""
    known = set(term.masks)
    return term.times > 0 and all(_is_positive(read, f, known) for f in term.numbers)


def _is_positive(read: Reader, factor: Factor, known: set[Factor]) -> bool:
    """Up to underflow, and there no gradient passes.

    known: masks that are 1."""
    node = factor.node
    if node.target is aten.div.Tensor and len(node.args) == 2:
        over, under = (n for n in node.args)
        if not isinstance(over, fx.Node) or not isinstance(under, fx.Node):
            return False
        shape = value(node).shape
        if not same_sizes(value(over).shape, shape) or not positive(under):
            return False
        return positive(over) or _is_part(read, over, factor.dims, known)
    return positive(node) or _is_part(read, node, factor.dims, known)


def _is_part(read: Reader, node: fx.Node, dims: Dims, known: set[Factor]) -> bool:
    """Is it one term of which all masks are 1, and the rest is positive?"""
    try:
        found = read(node).over(dims)
    except Unread:
        return False
    if len(found.terms) != 1 or not found.has_hits:
        return False
    (term,) = found.terms
    # What is summed over has one place where the mask is 1, and that is known.
    joined = Term(1, (*known, *term.factors), term.summed).merged()
    return (
        not joined.summed
        and term.times > 0
        and set(joined.masks) <= known
        and all(positive(f.node) for f in joined.numbers)
    )


_KEEPS_SIGN = frozenset(
    {
        aten.view.default, aten.permute.default, aten.expand.default, aten._to_copy.default, aten.gather.default,
        aten.select.int, aten.slice.Tensor, aten.sum.dim_IntList, aten.detach.default,
    }
)  # fmt: skip


def positive(node: Any) -> bool:
    """Is every element positive, up to underflow?"""
    if isinstance(node, (int, float)):
        return node > 0
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    target = node.target
    if target in (aten._softmax.default, aten.sigmoid.default, aten.exp.default):
        return True
    if target is aten.full.default:
        return positive(node.args[1])
    if target in _KEEPS_SIGN:
        return value(node).dtype.is_floating_point and positive(node.args[0])
    if target is operator.getitem:
        return node.args[1] == 0 and _are_positive(node_arg(node, 0))
    if target in (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar):
        return len(node.args) == 2 and all(map(positive, node.args))
    if target in (aten.add.Tensor, aten.add.Scalar):
        return len(node.args) == 2 and all(map(positive, node.args))
    if target is aten.clamp.default:
        least = node.args[1]
        return isinstance(least, (int, float)) and least > 0 and len(node.args) == 2
    return False


def _are_positive(pack: fx.Node) -> bool:
    """The values of a top-k: of positive scores, or of those that are left of E when others have been set to 0."""
    if pack.target not in (aten.topk.default, aten.max.dim, aten.sort.default):
        return False
    scores = node_arg(pack, 0)
    if positive(scores):
        return True
    if pack.target is not aten.topk.default or scores.target is not aten.mul.Tensor:
        return False
    own, kept = scores.args
    if not isinstance(kept, fx.Node) or kept.target is not aten.rsub.Scalar or kept.args[1] != 1:
        return False
    gone, k = matrix_of(kept.args[0]), pack.args[1]
    shape = value(scores).shape
    if gone is None or gone.fill != 0 or gone.scores != 1 or not positive(own):
        return False
    if len(pack.args) > 2 and pack.args[2] != len(shape) - 1 or pack.args[3:]:
        return False
    taken, experts = value(gone.ids).shape[-1], shape[-1]
    if not all(isinstance(n, int) for n in (k, taken, experts)):
        return False
    return bool(taken + k <= experts)


def letters_of(factors: Iterable[Factor]) -> set[Atom]:
    return {a for f in factors for a in f.letters}
