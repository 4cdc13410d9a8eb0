"""Experts whose tokens are sent to slots ``[E, C]`` by products with masks (GShard, nanoMoE): they become pairs.

    rows = einsum("tec,th->ech", dispatch, x)
    out = einsum("tec,ech->th", combine, experts(rows))

    combine[t, e, c] = sum_j w[t, j] kept[t, j] (ids[t, j] == e) (slot[t, j] == c)
    dispatch[t, e, c] = the same without w

If no two (token, choice) pairs that are kept have one slot of one expert, the row of a slot is that of its token, or
zero, and so

    out[t] = sum_j w[t, j] expert(ids[t, j])(x[t])        over the pairs that are kept, with 0 <= slot < C

What is beyond the capacity adds exactly nothing here, where eager adds zero times what is in the slot.

That they have none is shown in ``slot_proof.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import fx

from moe_inductor.reasons import Code, Refusal
from moe_inductor.region.axes import Atom, axes_of
from moe_inductor.region.masks import Reader
from moe_inductor.region.nodes import location, value
from moe_inductor.region.sums import Factor, Letters, Sum, Term, Unread, fitted

aten = torch.ops.aten

SPELLING = "tokens are sent to slots of the experts by products with masks (GShard): "


def may_be_slots(operand: fx.Node) -> bool:
    """Is it a view of what experts have computed, [E, C, ..], or of what each of them has?"""
    axes = axes_of(operand)
    if axes is None or value(axes.base).dim() != 3 or not value(axes.base).dtype.is_floating_point:
        return False
    return axes.base.op == "call_function" and axes.base.target is not aten.view.default


def refuse(words: str, node: fx.Node, code: Code = Code.PROOF) -> NoReturn:
    raise Refusal(code, words, location(node))


@dataclasses.dataclass(frozen=True, eq=False)
class Sent:
    """One term: pairs of tokens and choices that are sent to slots, and weighted there.

    ids, slots: hits of ``e`` and ``c``.  kept: masks that are 1 where a weight counts; sent: those of the rows.
    choice: the atom of the choices, if there are several in the term.
    form, fits: of the proof.  What the slot is, a sum of numbers; and are there as many slots as pairs?
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
    """What the product of two matrices is, if one is what experts made of slots; that these differ is to be shown.

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
    if all(f.hit in (None, e) for t in made.terms for f in t.factors):
        return None  # weighted by routing scores: every expert has all tokens
    terms = [_split(t, y, e) for t in made.terms]
    if e is None or h is None or h not in made.letters or not all(terms):
        refuse(SPELLING + "what they are weighted by is not read", where, Code.SPELLING)
    slots = {t.slots.hit for t in terms}  # type: ignore[union-attr]
    (c,) = slots if len(slots) == 1 else (None,)
    free = set(made.letters) | {e, c}
    if c is None or not set(y.letters) <= free or c not in y.dims[1]:
        refuse(SPELLING + "what they are weighted by is not read", where, Code.SPELLING)
    tokens = tuple(a for a in made.letters if a is not h)
    x, sent = _sent(read, rows, y, tokens, [t for t in terms if t is not None])
    return Block(made, tokens, y, rows, x, e, c, sent, Reader(counts=True))


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
        refuse(SPELLING + "the slots that are read are others than those that are weighted", rows)
    if len(made.terms) != len(terms):
        refuse(SPELLING + "not as many choices are sent as are weighted", rows)
    found, xs = [], set()
    for one in terms:
        placed = [p for t in made.terms if (p := _placed(t, one, y)) is not None]
        if len(placed) != 1:
            refuse(
                SPELLING + "the slots that are read are others than those that are weighted", rows
            )
        (term,) = placed
        sent = tuple(f for f in term.masks if f.hit is None)
        if not set(sent) <= set(one.kept):
            words = "tokens are sent to the experts under other conditions than they are weighted"
            refuse(SPELLING + words, rows)
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
            refuse(SPELLING + "what is sent is not the tokens as they are", rows, Code.SPELLING)
        xs.add(x)
        found.append(dataclasses.replace(one, sent=sent))
    if len(xs) != 1:
        refuse("", rows, Code.INPUTS_DIFFER)
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
