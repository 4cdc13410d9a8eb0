"""What Triton's launcher comes to: one call of a function, in C or next to it.

``CudaLauncher.__call__`` is Python around it, which defines functions, asks for scratch memory that our kernels have
none of and packs 40 arguments anew: 1.2 us a launch with Triton 3.6, more with later ones.  A program that repeats a
launch calls the function itself.

What it has to be called with differs between Triton's versions.  So it is not written here but watched: the launcher is
called once with a recorder in the place of the function.  What a launcher does beside that call cannot be watched, so
only those are passed by that somebody has read.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import triton

# Triton's minors whose launcher was read: without scratch memory and GSan it calls the function and does nothing else.
READ = ("3.6", "3.7", "3.8", "3.9")
MORE = ("global_scratch_size", "profile_scratch_size", "gsan_enabled")  # absent: older than GSan


def call_of(
    launcher: Callable[..., Any], arguments: Sequence[Any]
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A function and arguments, in tuples of tuples, whose call is that of ``launcher`` with ``arguments``.

    Of the arguments, any may be an object that stands for another, since a launcher hands them on as they are.  A
    launcher of which it is not known that it does nothing else is the function itself.
    """
    as_it_is = launcher, tuple(arguments)
    function = getattr(launcher, "launch", None)
    version = ".".join(triton.__version__.split(".")[:2])
    if function is None or version not in READ or any(getattr(launcher, m, 0) for m in MORE):
        return as_it_is
    calls: list[tuple[Any, ...]] = []
    watched = copy.copy(launcher)
    watched.launch = lambda *given: calls.append(given)  # type: ignore[attr-defined]
    watched(*arguments)
    if len(calls) != 1 or not _holds(calls[0], arguments):
        return as_it_is
    return function, calls[0]


def _holds(call: tuple[Any, ...], arguments: Sequence[Any]) -> bool:
    """Are all arguments in the call, in their order?"""
    left = iter(_flat(call))
    return all(any(one is argument for one in left) for argument in _flat(arguments))


def _flat(values: Sequence[Any]) -> list[Any]:
    return [one for v in values for one in (_flat(v) if isinstance(v, tuple) else [v])]
