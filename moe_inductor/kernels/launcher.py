"""What Triton's launcher comes to: one call of a C function.

``CudaLauncher.__call__`` is Python around it, which defines functions, asks for scratch memory that our kernels have
none of and packs 40 arguments anew: 1.2 us a launch with Triton 3.6, more with later ones.  A program that repeats a
launch calls the C function itself.

What it has to be called with differs between Triton's versions.  So it is not written here but watched: the launcher is
called once with a recorder in the place of the function.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

SCRATCH = ("global_scratch_size", "profile_scratch_size")


def call_of(
    launcher: Callable[..., Any], arguments: Sequence[Any]
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A function and arguments, in tuples of tuples, whose call is that of ``launcher`` with ``arguments``.

    Of the arguments, any may be an object that stands for another, since a launcher hands them on as they are.  Where
    it does more than that, where it is unlike those that we know or has memory to allocate, it is the function itself.
    """
    as_it_is = launcher, tuple(arguments)
    function = getattr(launcher, "launch", None)
    if not callable(function) or any(getattr(launcher, size, 1) for size in SCRATCH):
        return as_it_is
    calls: list[tuple[Any, ...]] = []
    watched = copy.copy(launcher)
    watched.launch = lambda *given: calls.append(given)  # type: ignore[attr-defined]
    try:
        watched(*arguments)
    except Exception:  # a launcher that looks at its arguments
        return as_it_is
    if len(calls) != 1 or not _holds(calls[0], arguments):
        return as_it_is
    return function, calls[0]


def _holds(call: tuple[Any, ...], arguments: Sequence[Any]) -> bool:
    """Are all arguments in the call, in their order?"""
    left = iter(_flat(call))
    return all(any(one is argument for one in left) for argument in _flat(arguments))


def _flat(values: Sequence[Any]) -> list[Any]:
    return [one for v in values for one in (_flat(v) if isinstance(v, tuple) else [v])]
