"""No two pairs that are sent have the same slot of an expert (``slots.py``).

Slots differ because they are counted.  ``F = cumsum(m, over the pairs)`` of a mask m [pairs, E], which is 1 for some of
the pairs at their own expert and 0 for all else, is larger at each pair with m = 1 than at all that stand before it and
have the same expert, so it is another number for each of them.  That is so for any order of the pairs, with any number
added that is the same for all pairs of an expert, and for fewer of them.

Second choices that are counted by themselves begin where the first end: behind as many as there are, or behind those of
which the slot is below the capacity.  The latter are as many as fit, since slots of first choices are 0, 1, 2, ...
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from moe_inductor.region.axes import Atom, same_extent
from moe_inductor.region.masks import EXACT, Reader
from moe_inductor.region.nodes import node_arg, same_sizes, value
from moe_inductor.region.slots import SPELLING, Block, Sent, refuse
from moe_inductor.region.sums import Dims, Factor, Letters, Term, Unread, fitted

aten = torch.ops.aten

_SHARED = SPELLING + "that no two of them have the same slot is not proved"


@dataclasses.dataclass(frozen=True, eq=False)
class _Slots:
    """``slot = F - 1 + start + counts``, of pairs that are sent.

    mask: the term m that F cumulates, over ``counted``, atoms of the pairs.  counts: the same for all pairs of an
    expert.  member: the pairs where m is 1, be they sent or not.
    """

    form: frozenset[Term]
    mask: Term
    counted: Letters
    start: float
    counts: tuple[Term, ...]
    member: Sent

    def fit(self, places: Sequence[Atom]) -> bool:
        """Is there a place for every pair, whoever chooses what?"""
        pairs = (*self.counted, *self.mask.summed)
        return not self.start and not self.counts and same_extent(places, pairs)


def _slots_of(block: Block, one: Sent) -> _Slots:
    """Shows that pairs of one term that are sent have slots of their own.  Raises Refusal."""
    read = block.counts
    form = _form(read, one.slots.node, one.slots.dims, one)
    where = one.slots.node
    if form is None:
        refuse(_SHARED, where)
    places = [t for t in form if t.numbers]
    constant = sum(t.times for t in form if not t.factors)
    counts = tuple(t for t in form if t.factors and not t.numbers)
    if len(places) != 1 or len(places[0].factors) != 1 or places[0].times != 1 or places[0].summed:
        refuse(_SHARED, where)
    (place,) = places[0].factors
    found = _cumulated(read, place)
    if found is None:
        refuse(_SHARED, where)
    mask, dim, inclusive = found
    counted = place.dims[dim]
    others = [d for i, d in enumerate(place.dims) if i != dim]
    groups = [a for d in others for a in d if a is not block.e]
    hits = mask.hits(block.e)
    joined = Term(1, (one.ids, *mask.factors), mask.summed).merged()
    ours = (
        (block.e,) in others
        and set(groups) <= set(block.batch)
        and len(hits) == 1
        and hits[0].node is one.ids.node
        and not joined.summed
        and set(joined.masks) <= one.known
    )
    pair = {*block.tokens, *one.choices}
    told_apart = {*counted, *groups}
    if mask.summed:  # over the choices of a token, of which no two have one expert
        told_apart |= set(one.choices)
    of_expert = {block.e, *block.batch}
    same = all(set(t.letters) - set(t.summed) <= of_expert for t in counts)
    if not ours or not same or not pair <= told_apart:
        refuse(_SHARED, where)
    start = constant + (1 if inclusive else 0)
    if start < 0 or any(t.times != 1 for t in counts):
        refuse(SPELLING + "slots may be negative", where)
    member = dataclasses.replace(one, sent=tuple(f for f in joined.masks if f != one.ids))
    return _Slots(form, mask, counted, start, counts, member)


def _form(read: Reader, node: fx.Node, dims: Dims, one: Sent) -> frozenset[Term] | None:
    """A number of each pair, as a sum, where the pair is sent; at its own expert, if it is one of each expert."""
    try:
        found = read(node).over(dims)
    except Unread:
        return None
    totals: dict[Term, float] = {}
    for term in found.terms:
        joined = Term(1, (one.ids, *term.factors), term.summed).merged()
        masks = sorted(set(joined.masks) - one.known, key=lambda f: f.node.name)
        name = read.named(Term(1, (*masks, *joined.numbers), joined.summed))
        totals[name] = totals.get(name, 0) + term.times
    return frozenset(dataclasses.replace(t, times=n) for t, n in totals.items() if n)


def _cumulated(read: Reader, place: Factor) -> tuple[Term, int, bool] | None:
    """(m, dimension, does it count the element itself) where ``place`` is a cumulated sum of masks m."""
    node, inclusive, padded = place.node, True, None
    if node.target is aten.slice.Tensor and len(node.args) == 4:
        node, inclusive, padded = node_arg(node, 0), False, node.args[1:]
    if node.target is not aten.cumsum.default or value(node).dtype not in _COUNTS:
        return None
    source, dim = node_arg(node, 0), node.args[1]
    if not isinstance(dim, int):
        return None
    dim %= value(node).dim()
    if padded is not None:
        pads = source.args[1] if source.target is aten.constant_pad_nd.default else None
        rank, size = value(node).dim(), value(place.node).shape[dim]
        wanted = [0] * (2 * rank)
        wanted[2 * (rank - 1 - dim)] = 1
        if (
            not isinstance(pads, (list, tuple))
            or list(pads) != wanted[: len(pads)]
            or 1 not in pads
        ):
            return None
        if (source.args[2:] or (0,))[0] != 0 or list(padded[:2]) != [dim, 0]:
            return None
        source = node_arg(source, 0)
        if not same_sizes(value(source).shape, value(place.node).shape) or size is None:
            return None
    try:
        made = read(source).over(place.dims)
    except Unread:
        return None
    if len(made.terms) != 1 or made.terms[0].times != 1 or made.terms[0].numbers:
        return None
    return made.terms[0], dim, inclusive


_COUNTS = (torch.int32, torch.int64, *EXACT)


def _apart(read: Reader, first: _Slots, mine: Sent, later: _Slots) -> bool:
    """Do all slots of the later pairs come after those of the first?"""
    left = list(later.counts)
    for count in first.counts:
        if count not in left:
            return False
        left.remove(count)
    return later.start >= first.start and any(_counts(read, c, first, mine) for c in left)


def _counts(read: Reader, count: Term, slots: _Slots, one: Sent) -> bool:
    """Is ``count`` how many pairs there are, or how many of them have a slot below a number, as those that are sent?"""
    (hit, *more) = [f for f in slots.mask.factors if f.hit is not None]
    own = [f for f in count.factors if f.hit is hit.hit and f.node is hit.node]
    if more or len(own) != 1:
        return False
    new: dict[Atom, Letters] = {}
    try:
        for theirs, ours in zip(own[0].dims, hit.dims, strict=True):
            one_way, other_way = fitted(theirs, ours)
            if any(len(parts) > 1 for parts in other_way.values()):
                return False
            new |= one_way
    except Unread:
        return False
    if any(a not in count.summed and parts != (a,) for a, parts in new.items()):
        return False  # of another group
    placed = count.renamed(new)
    if set(placed.summed) != {*slots.counted, *slots.mask.summed} or placed.numbers:
        return False
    missing = set(slots.mask.masks) - set(placed.masks)
    further = set(placed.masks) - set(slots.mask.masks)
    # It has to be the slot of whoever is counted.
    return not missing and all(
        f in one.known and _bound(read, f, slots.form, slots.member) is not None for f in further
    )


def _bound(read: Reader, mask: Factor, form: frozenset[Term], one: Sent) -> Any:
    """C where ``mask`` is ``slot < C``; None where it is something else."""
    node = mask.node
    if node.target is not aten.lt.Scalar or len(node.args) != 2:
        return None
    same = _form(read, node_arg(node, 0), mask.dims, one) == form
    return node.args[1] if same else None


def capacity_below(block: Block, mask: Factor, one: Sent) -> Any:
    """C where ``mask`` is ``slot < C`` of the slots of ``one``; None where it is something else."""
    return _bound(block.counts, mask, one.form, one)


def prove_apart(block: Block) -> Block:
    """``block`` with form and fits, of which no two pairs that are sent share a slot.  Raises Refusal(PROOF)."""
    found = [_slots_of(block, one) for one in block.terms]
    for i, one in enumerate(found):
        for j in range(i):
            ways = ((found[j], block.terms[j], one), (one, block.terms[i], found[j]))
            if not any(_apart(block.counts, *way) for way in ways):
                words = "that second choices get other slots than first ones is not proved"
                refuse(SPELLING + words, block.terms[i].slots.node)
    parts = zip(block.terms, found, strict=True)
    terms = tuple(
        dataclasses.replace(one, form=slots.form, fits=slots.fit([block.c])) for one, slots in parts
    )
    return dataclasses.replace(block, terms=terms)
