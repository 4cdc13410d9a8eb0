"""``rows[:C] if len(rows) > C else rows``, or ``if len(rows) > C: rows = rows[:C]``: an expert's capacity.

It is ``rows[:C]`` for any number of rows, so the test needs no answer and nothing is assumed.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from moe_inductor import _compat
from moe_inductor.capture.assumptions import Pass
from moe_inductor.capture.purity import Impure
from moe_inductor.region.nodes import mutated

_WORDS = "a capacity that is not `rows[:C]` of more than C rows, and else `rows`"


def merge(first: Any, rows: Any, count: int) -> Any:
    """``first`` of more than ``count`` rows, ``rows`` of others.  Raises Impure where that is not ``first`` of both."""
    if not all(type(v) is _compat.TensorVariable for v in (first, rows)):
        raise Impure(_WORDS)
    if not _are_first_rows(first.as_proxy().node, rows.as_proxy().node, count):
        raise Impure(_WORDS)
    return first


def check(one: Pass, count: int) -> None:
    """Raises Impure where what is done for more than ``count`` rows changes something for others as well."""
    changed = [(after, one.before.get(name)) for name, after in one.after.items()]
    same = all(
        after is before or (isinstance(before, fx.Node) and _are_first_rows(after, before, count))
        for after, before in changed
    )
    if not same or one.appended or any(mutated(node) for node in one.nodes):
        raise Impure(_WORDS)


def _are_first_rows(first: fx.Node, rows: fx.Node, count: int) -> bool:
    """Is ``first`` ``rows[:n]``, with n of at least ``count``?"""
    if first.target is not operator.getitem or first.args[0] is not rows:
        return False
    cut = first.args[1]
    if not isinstance(cut, slice) or cut.start not in (None, 0) or cut.step is not None:
        return False
    return type(cut.stop) is int and cut.stop >= count
