"""What speculative capture took for granted.  Each of these has to become part of what is proved."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch


@dataclasses.dataclass(eq=False)
class Pass:
    """One time through code that was traced only because of an assumption.

    nodes: what it computed, in order, still in the graph or not.
    before, after: the locals that outlive it, by name: a node, or a number that is 0 or the like
    before the first pass has made it a tensor (it is only ever used to slice and to add).
    appended: what it appended to lists that serve ``torch.cat(pieces, dim=0)`` and nothing else.

    What is computed here can reach the rest of the program through these locals, through these
    pieces and through tensors that are changed in place, and in no other way: ``capture.purity`` has
    seen to it.  A pass that is skipped leaves ``before`` as it is and appends nothing, so a pass
    "changes nothing" if after equals before, every piece has no rows (and, as cat promotes, the dtype
    of the others), and nothing is written.
    """

    nodes: list[torch.fx.Node] = dataclasses.field(default_factory=list)
    before: dict[str, torch.fx.Node | int] = dataclasses.field(default_factory=dict)
    after: dict[str, torch.fx.Node] = dataclasses.field(default_factory=dict)
    appended: list[torch.fx.Node] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, eq=False)
class Visited:
    """``for e in rows`` was traced for ``e = 0 .. bound - 1`` instead of for the values of ``rows``.

    Right only if ``rows`` holds distinct values out of those, in ascending order, and a pass whose
    value is not in ``rows`` changes nothing.  ``passes[e]`` is the pass for ``e``.  ``marker`` keeps
    ``rows`` in the graph (``capture.marker``).
    """

    marker: torch.fx.Node
    bound: int
    location: str
    passes: list[Pass] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, eq=False)
class Rolled:
    """``for e in rows`` was traced once, for an ``e`` that stands for each of ``0 .. count - 1``.

    index: the node ``expert_index(rows, count)`` whose value is ``e``.  The op raises if it is run.
    passes: the one pass for ``e``, and, if ``last``, a second one that was traced for the number
    ``count``: the row after the experts that some models have, for tokens of other devices.

    What is already known: Python would have done the same for every ``e`` (it only ever knew the
    range), no local outlives a pass, nothing is appended to a list, and no object is changed.  So the
    pass is what eager executes for each row, if one puts the row's value for ``index``, and passes can
    only meet in tensors that are older than the loop.

    Right only if ``rows`` holds distinct values out of those (and ``count``, if ``last``), in ascending
    order; a pass whose value is not in ``rows`` changes nothing; and the only thing that a pass does to
    older tensors is to add to them (``index_add_`` or the like), with addends that do not read what a
    pass has written.  Then the loop is the sum of these additions over ``e``.  Other writes (a mask
    that is altered, a sum that is scaled) would make the second pass another function than the first.
    """

    index: torch.fx.Node
    count: int
    last: bool
    location: str
    passes: list[Pass] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, eq=False)
class RolledModules:
    """Like ``Rolled``, for experts that are modules of a list: traced twice, with the first two experts.

    indices: the nodes ``expert_index(rows, count)`` of the two passes.
    passes: one with expert 0, one with expert 1, and a third for the number ``count`` if ``last``.
    experts: the inputs of expert ``e``: ``experts[e][p]`` stands where ``experts[0][p]`` does in the
    first pass.  The one node in ``kept`` reads them all, so that Dynamo lets them be; it raises if it is run.

    What is already known, besides what is known for ``Rolled``: the second pass is the first with
    ``indices[1]`` for ``indices[0]`` and the inputs of expert 1 for those of expert 0 (an input of expert 0
    that the model reads in each pass is therefore not in the list); every other expert would give the
    first pass with its own inputs, because whatever Dynamo read of expert 0 is the same there; and guards
    see to it that this stays so.  So the first pass is what eager executes for each row, if one puts the
    row's value for the index and that expert's inputs for those of expert 0.

    Right only if what is said for ``Rolled`` holds for the first pass.  The second pass is not needed for
    that: it is there because it was traced, and has to go with the first.
    """

    indices: list[torch.fx.Node]
    count: int
    last: bool
    location: str
    passes: list[Pass] = dataclasses.field(default_factory=list)
    experts: list[list[torch.fx.Node]] = dataclasses.field(default_factory=list)
    kept: list[torch.fx.Node] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, eq=False)
class NonEmpty:
    """A test of the data-dependent ``number`` was answered as for a number of at least 1.

    ``number`` is a size, what ``item()`` or ``tolist()`` made of a tensor, or how far apart two of these
    are: ``b - a`` for ``b > a``, ``Abs(b - a)`` for ``a != b``.  Right only if it cannot be negative, and
    what would have been skipped for 0, the one pass, changes nothing at 0.  (Locals that are numbers are
    not in the pass: that they do not change at 0 is already known.)
    """

    number: Any  # sympy.Expr
    location: str
    passes: list[Pass] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, eq=False)
class Tested:
    """``if value`` on a 0-d tensor was answered with ``truth``, as if there were something.

    ``value`` is the node that Python would have asked for its truth: ``mask.any()``, ``count == 0``,
    ``count``, where ``count`` is a 0-d integer tensor.  Right only if, wherever ``bool(value)`` is
    not ``truth``, the one pass changes nothing.  ``marker`` keeps ``value`` in the graph.
    """

    marker: torch.fx.Node
    truth: bool
    location: str
    passes: list[Pass] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, eq=False)
class Kept:
    """``if pieces`` on a list that speculated passes appended to was answered with True.

    Right only if, whatever the data, at least one of ``passes``, those that appended to it, is not
    skipped.
    """

    passes: list[Pass]
    location: str


@dataclasses.dataclass(frozen=True, eq=False)
class Length:
    """The data-dependent length of ``rows``, the result of ``bincount``, was taken to be ``length``.

    The graph goes on with that number wherever the model reads the length.  Right only if
    every counted value is below ``length``, which is the ``minlength`` of the call.  ``marker`` keeps
    ``rows`` in the graph, and is the only node of the one pass: all that is traced later depends on
    the length.
    """

    marker: torch.fx.Node
    length: int
    location: str

    @property
    def passes(self) -> list[Pass]:
        return [Pass(nodes=[self.marker])]


@dataclasses.dataclass(frozen=True, eq=False)
class Padded:
    """``for n in counts`` was traced ``length`` times, where ``counts`` has as many elements as the largest id says.

    padded: the node ``padded(counts, length)`` (``capture.padded``), whose elements the passes read.  It raises if it
    is run.  ``passes[e]`` is the pass for the e-th.

    Right only if no counted id is ``length`` or larger, and pass e changes nothing where no id is e.
    """

    padded: torch.fx.Node
    length: int
    location: str
    passes: list[Pass] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, eq=False)
class Forked:
    """``if mask.any(): A else: B`` was traced both ways, and what they make was merged.

    test: the node that Python would have asked.  truth: its answer where A is executed.
    zeros: what has nothing but zeros in it where B is executed.  ways: what A and what B computed.
    merged: nodes ``where(test, .., ..)`` of tensors that A and B make, of equal shape, strides and dtype.

    What is already known: both ways reach the rest of the program only through what was merged and through
    tensors that are changed in place, and no object is changed.

    The graph is right as it stands, but for a way that cannot be executed for the data of the other.
    What A makes may stand for the ``where`` if it is what B makes whenever ``zeros`` is all zeros.  Both must be
    tensors of their own then, as a later change in place would otherwise tell them apart.
    """

    test: torch.fx.Node
    truth: bool
    zeros: torch.fx.Node
    location: str
    ways: list[Pass] = dataclasses.field(default_factory=list)
    merged: list[torch.fx.Node] = dataclasses.field(default_factory=list)

    @property
    def passes(self) -> list[Pass]:
        """None is skipped."""
        return []

    def made(self) -> list[tuple[torch.fx.Node, torch.fx.Node]]:
        """What A and what B makes, as the graph is now."""
        pairs = [(where.args[1], where.args[2]) for where in self.merged]
        return [(a, b) if self.truth else (b, a) for a, b in pairs]  # type: ignore[misc]


Assumption = Visited | Rolled | RolledModules | NonEmpty | Tested | Kept | Length | Padded | Forked
