"""What speculative capture took for granted.  Each of these has to become part of what is proved."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch


@dataclasses.dataclass(frozen=True)
class Visited:
    """``for e in rows`` was traced for ``e = 0 .. bound - 1`` instead of for the values of ``rows``.

    Right only if ``rows`` holds distinct values out of those, and an iteration whose value is not
    in ``rows`` changes nothing.
    """

    rows: torch.fx.Node
    bound: int
    location: str


@dataclasses.dataclass(frozen=True)
class NonEmpty:
    """A test of the data-dependent size ``symbol`` was answered as for a size of at least 1.

    Right only if what was skipped for size 0 otherwise changes nothing at size 0.
    """

    symbol: Any  # sympy.Symbol
    location: str


Assumption = Visited | NonEmpty
