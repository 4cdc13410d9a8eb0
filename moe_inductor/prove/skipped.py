"""Passes that the model skips for an expert without tokens, in experts on sorted rows.

Such a pass was traced as if the expert had tokens.  It fills lists, moves an offset on, and writes rows.  With a count
of zero all of that has to be nothing: pieces without rows, an offset that stays, no row written.  Sizes and offsets are
sums of counts here (``region/counts.py``), so this is seen by putting zero for the count that was tested.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from moe_inductor._compat import statically_known_true
from moe_inductor.capture.assumptions import Assumption, Kept, NonEmpty, Padded, Pass, Tested
from moe_inductor.match.bind import Bound
from moe_inductor.reasons import Code, Refusal
from moe_inductor.region.canonical import Canonical
from moe_inductor.region.counts import Atom, Form, Numbers, counted, plus, single
from moe_inductor.region.nodes import is_integral, mutated, name_of, storages, value

aten = torch.ops.aten

_COMPARISONS = {
    getattr(getattr(aten, name), overload): getattr(operator, name)
    for name in ("eq", "ne", "gt", "ge", "lt", "le")
    for overload in ("Scalar", "Tensor")
}

_ADDS = ("index_add", "scatter_add", "scatter_reduce")
# Which argument has the rows that are written.
_WRITTEN = {"setitem": 2, **{f"{name}_": 3 for name in _ADDS}}


def prove_skipped(
    canonical: Canonical,
    bound: Bound,
    tests: Sequence[tuple[Tested | NonEmpty, fx.Node | None]],
    kept: Sequence[Kept],
) -> None:
    """tests: each with the Dynamo node of the tensor that was tested, None where it was a number.

    Raises Refusal(ASSUMPTION) with the test for which a skipped pass would have changed something.
    """
    counts: dict[int, Atom] = {}
    for test, tested in tests:
        atom = counted_by(canonical, test, tested)
        if atom is None:
            words = "it does not ask whether an expert was chosen"
            raise Refusal(Code.ASSUMPTION, words, _where(test))
        for one in test.passes:
            _changes_nothing(canonical, one, atom, test)
            counts.setdefault(id(one), atom)
    dtypes = [[value(n).dtype for n in one.appended] for test, _ in tests for one in test.passes]
    if any(len(set(column)) > 1 for column in zip(*(d for d in dtypes if d), strict=False)):
        where = _where(tests[0][0])
        raise Refusal(Code.ASSUMPTION, "experts give results of different dtypes", where)
    for each in kept:
        _is_never_empty(bound, each, [counts.get(id(one)) for one in each.passes])


def prove_padded(canonical: Canonical, bound: Bound, loop: Padded) -> None:
    """The passes that the model does not make, since nobody chose their expert or a later one, change nothing.

    Raises Refusal(ASSUMPTION).
    """
    numbers, held = canonical.emitter.numbers, canonical.held_in(loop.padded)
    experts = bound.moe.experts.num_experts
    for e, one in enumerate(loop.passes):
        last = numbers.element(held, e) if held is not None else {}
        before = numbers.element(held, e - 1) if held is not None and e else {}
        # The elements are counts, or cumulated counts.
        atom = _as_count(last) or _as_count(plus(last, before, -1))
        if atom is None or atom[1] != e or counted(atom[0]) != (bound.topk_ids, experts):  # type: ignore[arg-type]
            words = "loop over counts: they are not known to be how often each expert was chosen"
            raise Refusal(Code.ASSUMPTION, words, _where(loop))
        _changes_nothing(canonical, one, atom, loop)
    if len(loop.passes) != experts:
        words = f"loop over counts of {loop.length} experts, {experts} are there"
        raise Refusal(Code.ASSUMPTION, words, _where(loop))


def counted_by(
    canonical: Canonical, test: Tested | NonEmpty, tested: fx.Node | None
) -> Atom | None:
    """The count that is tested for being zero."""
    numbers = canonical.emitter.numbers
    if isinstance(test, NonEmpty):
        signs = (1, -1) if isinstance(test.number, sympy.Abs) else (1,)
        form = _number_of(canonical, test.number)
        return _as_count(form, signs)
    asked = canonical.held_in(tested)
    if asked is None:
        return None
    if asked.target not in _COMPARISONS:
        form, asks = _form(numbers, asked), lambda n: n != 0
        return _as_count(form) if _only_for_more(asks, test.truth) else None
    compare = _COMPARISONS[asked.target]
    left, right = (_constant(canonical, n) for n in asked.args)
    if isinstance(left, fx.Node) and isinstance(right, fx.Node):
        forms = [_form(numbers, n) for n in (left, right)]
        if forms[0] is None or forms[1] is None:
            return None
        apart = plus(forms[0], forms[1], -1)
        ways = {1: lambda n: compare(n, 0), -1: lambda n: compare(0, n)}
        return _as_count(apart, [s for s, asks in ways.items() if _only_for_more(asks, test.truth)])
    # Between a number and 0 or 1, what holds for 1 and 2 holds from there on.
    if type(right) is not int or right not in (0, 1) or not isinstance(left, fx.Node):
        return None
    asks = lambda n: compare(n, right)  # noqa: E731
    return _as_count(_form(numbers, left)) if _only_for_more(asks, test.truth) else None


def _only_for_more(asks: Callable[[int], Any], truth: bool) -> bool:
    """Is the answer ``truth`` for every number from 1 on, and not for 0?"""
    return all(bool(asks(n)) is truth for n in (1, 2)) and bool(asks(0)) is not truth


def _form(numbers: Numbers, number: fx.Node) -> Form | None:
    """Of a tensor of one integer."""
    return numbers.scalar(number) if is_integral(number) and not value(number).dim() else None


def _number_of(canonical: Canonical, number: Any) -> Form | None:
    """What a number of the Dynamo graph, a symbol or ``b - a`` of two, is in the normal form, up to its sign."""
    (inner,) = number.args if isinstance(number, sympy.Abs) else (number,)
    found: Form = {}
    for symbol, times in inner.as_coefficients_dict().items():
        form = _symbol_of(canonical, symbol)
        if form is None:
            return None
        found = plus(found, form, int(times))
    return found


def _symbol_of(canonical: Canonical, symbol: Any) -> Form | None:
    numbers = canonical.emitter.numbers
    for node in canonical.region.nodes:
        found = value(node)
        if (
            isinstance(found, torch.SymInt)
            and found.node.expr == symbol
            and name_of(node) == "item"
        ):
            return _read(canonical, node.all_input_nodes[0])
        if isinstance(found, torch.Tensor) and found.dim() and _is(found.shape[0], symbol):
            held = canonical.held_in(node)
            return None if held is None else numbers.form(value(held).shape[0])
    return None


def _read(canonical: Canonical, tensor: fx.Node) -> Form | None:
    """A Dynamo node of one integer; ``tolist()`` takes elements whose values are not recorded."""
    numbers, held = canonical.emitter.numbers, canonical.held_in(tensor)
    if held is not None:
        return numbers.scalar(held)
    if name_of(tensor) == "getitem" and type(tensor.args[1]) is int:
        held = canonical.held_in(tensor.all_input_nodes[0])
        if held is not None and value(held).dim() == 1 and tensor.args[1] >= 0:
            return numbers.element(held, tensor.args[1])
    return None


def _constant(canonical: Canonical, item: Any) -> Any:
    """The number in a tensor that is a constant of the trace."""
    if isinstance(item, fx.Node) and item.op == "get_attr":
        found = getattr(canonical.module, str(item.target), None)
        if isinstance(found, torch.Tensor) and not found.dim() and is_integral(item):
            return int(found.item())
    return item


def _is(size: Any, symbol: Any) -> bool:
    return isinstance(size, torch.SymInt) and size.node.expr == symbol


def _as_count(form: Form | None, signs: Sequence[int] = (1,)) -> Atom | None:
    """The count that ``form`` is, or its negative where -1 is among ``signs``."""
    for sign in signs:
        if form is None:
            break
        atom = single(plus({}, form, sign))
        # A count is never negative.
        if atom is not None and isinstance(atom[0], fx.Node) and counted(atom[0]) is not None:
            return atom
    return None


def _changes_nothing(canonical: Canonical, one: Pass, atom: Atom, test: Assumption) -> None:
    """With zero for the count at ``atom``."""

    def refuse(what: str) -> None:
        raise Refusal(Code.ASSUMPTION, f"{what} although its expert has no tokens", _where(test))

    for piece in one.appended:
        if not _is_none(_rows(canonical, piece), atom):
            refuse("a piece with rows is put on a list")
    for name, after in one.after.items():
        before = one.before.get(name)
        if after is before or _adds_none(canonical, after, before, atom):
            continue
        forms = [_offset(canonical, n) for n in (after, before)]
        if forms[0] is None or forms[1] is None:
            refuse(f"`{name}` may change")
        elif not _is_none(plus(forms[0], forms[1], -1), atom, or_constant_zero=True):
            refuse(f"`{name}` changes")
    nodes = set(one.nodes)
    older = {s for n in one.nodes for a in n.all_input_nodes if a not in nodes for s in storages(a)}
    for node in one.nodes:
        for target in mutated(node):
            if target in nodes and not storages(target) & older:
                continue
            last = _WRITTEN.get(name_of(node), len(node.args))
            written = node.args[last] if last < len(node.args) else None
            rows = _rows(canonical, written) if isinstance(written, fx.Node) else None
            if not _is_none(rows, atom):
                refuse("rows are written")


def _adds_none(canonical: Canonical, after: Any, before: Any, atom: Atom) -> bool:
    """Is ``after`` a sum of ``before`` and of rows of which there are none?"""
    while isinstance(after, fx.Node) and after is not before:
        args: list[Any] = [*after.args]
        rows = args[3] if name_of(after).rstrip("_") in _ADDS and len(args) > 3 else None
        if not isinstance(rows, fx.Node) or not _is_none(_rows(canonical, rows), atom):
            return False
        after = args[0]
    return after is before


def _rows(canonical: Canonical, node: fx.Node) -> Form | None:
    held = canonical.held_in(node)
    if held is None or not value(held).dim():
        return None
    return canonical.emitter.numbers.form(value(held).shape[0])


def _offset(canonical: Canonical, item: Any) -> Form | None:
    if type(item) is int:
        return {None: item} if item else {}
    held = canonical.held_in(item) if isinstance(item, fx.Node) else None
    if held is None or not is_integral(held) or value(held).dim():
        return None
    return canonical.emitter.numbers.scalar(held)


def _is_none(form: Form | None, atom: Atom, *, or_constant_zero: bool = False) -> bool:
    """Is the number zero where the count is?"""
    if form is None:
        return False
    return set(form) == {atom} or (or_constant_zero and not form)


def _is_never_empty(bound: Bound, kept: Kept, atoms: Sequence[Atom | None]) -> None:
    """Each pair was sent to one of the experts whose pieces are on the list, and there are pairs."""
    experts = {(a[0], a[1]) for a in atoms if a is not None}
    counts = {a[0] for a in experts}
    every = {(c, e) for c in counts for e in range(bound.moe.experts.num_experts)}
    of_block = all(counted(c) == (bound.topk_ids, bound.moe.experts.num_experts) for c in counts)
    some = statically_known_true(value(bound.topk_ids).numel() >= 1)
    if len(counts) != 1 or experts != every or not of_block or not some:
        raise Refusal(Code.ASSUMPTION, "a list may be empty that was taken not to be", _where(kept))


def _where(assumption: Assumption) -> str:
    return os.path.basename(assumption.location)
