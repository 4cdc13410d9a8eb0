"""Experts whose tokens are sent to slots ``[E, C]`` by products with masks (GShard, nanoMoE): they become pairs.

    rows = einsum("tec,th->ech", dispatch, x)
    out = einsum("tec,ech->th", combine, experts(rows))

    combine[t, e, c] = sum_j w[t, j] kept[t, j] (ids[t, j] == e) (slot[t, j] == c)
    dispatch[t, e, c] = the same without w

If no two (token, choice) pairs that are kept have one slot of one expert, the row of a slot is that of its token, or
zero, and so

    out[t] = sum_j w[t, j] expert(ids[t, j])(x[t])        over the pairs that are kept, with 0 <= slot < C

What is beyond the capacity adds exactly nothing here, where eager adds zero times what is in the slot.

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
from typing import Any, NoReturn

import torch
from torch import fx

from moe_inductor.reasons import Code, Refusal
from moe_inductor.region.axes import Atom, axes_of, same_extent
from moe_inductor.region.masks import EXACT, Reader
from moe_inductor.region.nodes import location, node_arg, same_sizes, value
from moe_inductor.region.sums import Dims, Factor, Letters, Sum, Term, Unread, fitted

aten = torch.ops.aten

_SPELLING = "tokens are sent to slots of the experts by products with masks (GShard): "
_SHARED = _SPELLING + "that no two of them have the same slot is not proved"


def may_be_slots(operand: fx.Node) -> bool:
    """Is it a view of what experts have computed, [E, C, ..], or of what each of them has?"""
    axes = axes_of(operand)
    if axes is None or value(axes.base).dim() != 3 or not value(axes.base).dtype.is_floating_point:
        return False
    return axes.base.op == "call_function" and axes.base.target is not aten.view.default


def _refuse(words: str, node: fx.Node, code: Code = Code.PROOF) -> NoReturn:
    raise Refusal(code, words, location(node))


# -- what is sent where ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Sent:
    """One term: pairs of tokens and choices that are sent to slots, and weighted there.

    ids, slots: hits of ``e`` and ``c``.  kept: masks that are 1 where a weight counts; sent: those of the rows.
    choice: the atom of the choices, if there are several in the term.
    form: what the slot is, a sum of numbers.  fits: there are as many slots as pairs.
    """

    ids: Factor
    slots: Factor
    kept: tuple[Factor, ...]
    sent: tuple[Factor, ...]
    weights: tuple[Factor, ...]
    choice: Atom | None
    form: frozenset[Term] = frozenset()
    fits: bool = False

    @property
    def choices(self) -> Letters:
        return () if self.choice is None else (self.choice,)

    @property
    def known(self) -> set[Factor]:
        """Masks that are 1 where a row is sent."""
        return {self.ids, *self.sent}


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """made: what the product gives, over the tokens' atoms and ``h``.  y: what the experts give, over e, slots and h.
    rows: what they read, a node; x: the tokens, over the tokens' atoms and others.  counts: reads numbers of tokens.
    """

    made: Sum
    tokens: Letters
    y: Factor
    rows: fx.Node
    x: Factor
    e: Atom
    c: Atom
    terms: tuple[Sent, ...]
    counts: Reader

    @property
    def batch(self) -> Letters:
        """Tokens with other atoms of these never meet."""
        return tuple(a for a in self.y.dims[1] if a is not self.c)


def block_of(read: Reader, one: fx.Node, other: fx.Node) -> Block | None:
    """What the product of two matrices is, if one is what experts made of slots, which are shown to differ.

    Raises Refusal (PROOF, SPELLING, INPUTS_DIFFER)."""
    try:
        made = read.matmul(one, other)
    except Unread:
        return None
    if made is None:
        return None
    leaves = [f for t in made.terms for f in t.numbers]
    found = {f.node: rows for f in leaves if (rows := _rows_of(read, f.node)) is not None}
    if len(found) != 1:
        return None
    ((given, rows),) = found.items()
    ys = {f for f in leaves if f.node is given}
    where = given
    if len(ys) != 1 or value(given).dim() != 3:
        return None
    (y,) = ys
    e, h = (dims[0] if len(dims) == 1 else None for dims in (y.dims[0], y.dims[2]))
    terms = [_split(t, y, e) for t in made.terms]
    if e is None or h is None or h not in made.letters or not all(terms):
        _refuse(_SPELLING + "what they are weighted by is not read", where, Code.SPELLING)
    slots = {t.slots.hit for t in terms}  # type: ignore[union-attr]
    (c,) = slots if len(slots) == 1 else (None,)
    free = set(made.letters) | {e, c}
    if c is None or not set(y.letters) <= free or c not in y.dims[1]:
        _refuse(_SPELLING + "what they are weighted by is not read", where, Code.SPELLING)
    tokens = tuple(a for a in made.letters if a is not h)
    x, sent = _sent(read, rows, y, tokens, [t for t in terms if t is not None])
    return _proved(Block(made, tokens, y, rows, x, e, c, sent, Reader(counts=True)))


def _rows_of(read: Reader, given: fx.Node) -> fx.Node | None:
    """The sum of tokens that experts read to make ``given``."""
    todo, seen, found = [given], {given}, None
    while todo and len(seen) < 256:
        node = todo.pop()
        if isinstance(value(node), torch.Tensor) and _are_tokens(read(node)):
            if found not in (None, node):
                return None
            found = node
            continue
        for arg in node.all_input_nodes:
            if arg not in seen and arg.op == "call_function":
                seen.add(arg)
                todo.append(arg)
    return found


def _are_tokens(found: Sum) -> bool:
    """Is it tokens where masks are 1?  These have an atom that is not of the pairs."""
    for term in found.terms:
        hits = [f for f in term.factors if f.hit is not None]
        pairs = {a for f in hits for a in (*f.letters, f.hit)}
        if not hits or len(term.numbers) != 1 or pairs.issuperset(term.numbers[0].letters):
            return False
    return True


def _split(term: Term, y: Factor, e: Atom | None) -> Sent | None:
    """A term of the product, without what experts give."""
    if e is None or term.times != 1:
        return None
    ids, others = term.hits(e), [f for f in term.factors if f.hit not in (None, e)]
    choices = [a for a in term.summed if a not in y.letters]
    if len(ids) != 1 or len(others) != 1 or len(choices) > 1:
        return None
    masks = tuple(f for f in term.masks if f.hit is None)
    weights = tuple(f for f in term.numbers if f != y)
    if len(term.numbers) != len(weights) + 1:
        return None
    return Sent(ids[0], others[0], masks, (), weights, choices[0] if choices else None)


def _sent(
    read: Reader, rows: fx.Node, y: Factor, tokens: Letters, terms: Sequence[Sent]
) -> tuple[Factor, tuple[Sent, ...]]:
    """The tokens, and ``terms`` with the masks of what is sent.  Raises Refusal."""
    try:
        own = read(rows)
        made = own.over((*y.dims[:2], *own.dims[2:]))
    except (Unread, ValueError):  # other dimensions, or not as many
        _refuse(_SPELLING + "the slots that are read are others than those that are weighted", rows)
    if len(made.terms) != len(terms):
        _refuse(_SPELLING + "not as many choices are sent as are weighted", rows)
    found, xs = [], set()
    for one in terms:
        placed = [p for t in made.terms if (p := _placed(t, one, y)) is not None]
        if len(placed) != 1:
            _refuse(
                _SPELLING + "the slots that are read are others than those that are weighted", rows
            )
        (term,) = placed
        sent = tuple(f for f in term.masks if f.hit is None)
        if not set(sent) <= set(one.kept):
            words = "tokens are sent to the experts under other conditions than they are weighted"
            _refuse(_SPELLING + words, rows)
        (x,) = term.numbers
        hits = {f for f in term.masks if f.hit is not None}
        pairs = {*tokens, *one.choices}
        rest = tuple(a for a in x.letters if a not in tokens)
        if (
            term.times != 1
            or hits != {one.ids, one.slots}
            or set(term.summed) != pairs - set(y.letters)
            or set(x.letters) != {*tokens, *rest}
            or rest != made.dims[2]
        ):
            _refuse(_SPELLING + "what is sent is not the tokens as they are", rows, Code.SPELLING)
        xs.add(x)
        found.append(dataclasses.replace(one, sent=sent))
    if len(xs) != 1:
        _refuse("", rows, Code.INPUTS_DIFFER)
    return xs.pop(), tuple(found)


def _placed(term: Term, one: Sent, y: Factor) -> Term | None:
    """``term`` of the rows over the atoms of ``one``, if it is about the same ids and slots."""
    new: dict[Atom, Letters] = {}
    for mine in (one.ids, one.slots):
        theirs = [f for f in term.factors if f.hit is mine.hit and f.node is mine.node]
        if len(theirs) != 1:
            return None
        try:
            for ours, others in zip(theirs[0].dims, mine.dims, strict=True):
                one_way, other_way = fitted(ours, others)
                if any(len(parts) > 1 for parts in other_way.values()):
                    return None
                if any(new.setdefault(a, parts) != parts for a, parts in one_way.items()):
                    return None
        except Unread:
            return None
    if any(new.get(a, (a,)) != (a,) for a in y.letters):
        return None  # of another sequence
    return term.renamed(new)


# -- slots differ ------------------------------------------------------------------------------------------------------


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
        _refuse(_SHARED, where)
    places = [t for t in form if t.numbers]
    constant = sum(t.times for t in form if not t.factors)
    counts = tuple(t for t in form if t.factors and not t.numbers)
    if len(places) != 1 or len(places[0].factors) != 1 or places[0].times != 1 or places[0].summed:
        _refuse(_SHARED, where)
    (place,) = places[0].factors
    found = _cumulated(read, place)
    if found is None:
        _refuse(_SHARED, where)
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
        _refuse(_SHARED, where)
    start = constant + (1 if inclusive else 0)
    if start < 0 or any(t.times != 1 for t in counts):
        _refuse(_SPELLING + "slots may be negative", where)
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


def _proved(block: Block) -> Block:
    """No two pairs that are sent have the same slot of an expert.  Raises Refusal(PROOF)."""
    found = [_slots_of(block, one) for one in block.terms]
    for i, one in enumerate(found):
        for j in range(i):
            ways = ((found[j], block.terms[j], one), (one, block.terms[i], found[j]))
            if not any(_apart(block.counts, *way) for way in ways):
                words = "that second choices get other slots than first ones is not proved"
                _refuse(_SPELLING + words, block.terms[i].slots.node)
    parts = zip(block.terms, found, strict=True)
    terms = tuple(
        dataclasses.replace(one, form=slots.form, fits=slots.fit([block.c])) for one, slots in parts
    )
    return dataclasses.replace(block, terms=terms)
