"""What speculative capture took for granted.  Each of these has to become part of what is proved."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch


@dataclasses.dataclass(eq=False)
class Pass:
    """One time through code that was traced only because of an assumption.

    nodes: what it computed, in order, still in the graph or not.
    before, after: the nodes of the locals that outlive it, by name.  What is computed here can reach
    the rest of the program through these locals and through tensors that are changed in place, and
    in no other way: ``capture.purity`` has seen to it.
    """

    nodes: list[torch.fx.Node] = dataclasses.field(default_factory=list)
    before: dict[str, torch.fx.Node] = dataclasses.field(default_factory=dict)
    after: dict[str, torch.fx.Node] = dataclasses.field(default_factory=dict)


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
class NonEmpty:
    """A test of the data-dependent size ``symbol`` was answered as for a size of at least 1.

    Right only if what was skipped for size 0 otherwise, the one pass, changes nothing at size 0.
    """

    symbol: Any  # sympy.Symbol
    location: str
    passes: list[Pass] = dataclasses.field(default_factory=list)


Assumption = Visited | NonEmpty
