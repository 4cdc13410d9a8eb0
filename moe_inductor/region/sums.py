"""A tensor of masks, element by element: a sum of products with one letter for each axis, as of an einsum.

    combine[t, e, c] = sum_j  weight[t, j] * kept[t, j] * (ids[t, j] == e) * (slot[t, j] == c)

Models write that with one-hot masks, products, sums, einsums, gathers and scatters, in any order of the dimensions.  A
``Sum`` is what is left of it (``region/masks.py`` reads it): terms, each a product of *factors*, over *atoms*
(``region/axes.py``), some of which are summed over.  A factor is a tensor that is not looked into, or a *hit*: is its
element the position along an atom?
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import fx

from moe_inductor.region.axes import Atom, same_extent
from moe_inductor.region.distinct import are_distinct
from moe_inductor.region.nodes import value

Letters = tuple[Atom, ...]
Dims = tuple[Letters, ...]
Renaming = Mapping[Atom, Letters]


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
        if hit is not None and hit in new:
            if len(new[hit]) != 1:
                raise Unread
            (hit,) = new[hit]
        return Factor(self.node, tuple(map(lambda dim: _renamed(dim, new), self.dims)), hit)


@dataclasses.dataclass(frozen=True)
class Term:
    """``times`` the product of ``factors``, for each of which its atoms are free or ``summed``."""

    times: float
    factors: tuple[Factor, ...]
    summed: Letters = ()

    @property
    def letters(self) -> Letters:
        return tuple(a for f in self.factors for a in (*f.letters, *([f.hit] if f.hit else ())))

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
            tuple(_renamed(dim, new) for dim in self.dims),
            tuple(t.renamed(new) for t in self.terms),
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
