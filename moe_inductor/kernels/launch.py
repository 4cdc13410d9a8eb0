"""Launching kernels, and repeating the launches of a call for a fraction of what they cost the first time.

Triton's JIT looks at every argument of every launch (20 to 50 us a kernel, measured on an H200's host), and the code
around it computes strides, tiles and workspaces.  All of that depends on a few facts about the inputs: shapes,
strides, dtypes, device, and what Triton specialises a pointer on, its address modulo 16.  So a call is written down
once as a *program* (``program.py``), one generated function that launches the same compiled kernels with the same
numbers and fresh addresses; a later call with the same facts runs the program.

All of the facts are compared, so a program is never reused where the host code or the JIT would have decided otherwise.
What cannot be repeated (an argument that is neither an input, a result nor ``scratch``; launch hooks; AMD, where Triton
looks at storage sizes too) runs as before.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
import triton

from .early import starts_early
from .program import Program, Step, facts


class _Recording(threading.local):
    steps: list[Step] | None = None
    scratch: list[torch.Tensor]


_RECORDING = _Recording()


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Any,
    early: bool = True,
    first: bool = False,
    **meta: Any,
) -> None:
    """Launch a Triton kernel through its JIT, and write it down if somebody records.

    early: start before the kernel before has ended, where the GPU can, and let the next one do so (``early.py``).
    first: of these two, only let the next one do so.
    """
    if "EARLY" in kernel.arg_names:
        meta["EARLY"] = early and starts_early(args[0])
        if meta["EARLY"] and not first:
            meta["launch_pdl"] = True
    compiled = kernel[grid](*args, **meta)
    if _RECORDING.steps is not None:
        _RECORDING.steps.append(Step(compiled, kernel, grid, args, meta))


def fresh(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Uninitialised memory for a result of the call."""
    return torch.empty(shape, dtype=dtype, device=device)


def scratch(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Uninitialised memory that only the launches of this call see.  A program takes all of it in one piece."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    if _RECORDING.steps is not None:
        _RECORDING.scratch.append(tensor)
    return tensor


@contextlib.contextmanager
def _recording() -> Iterator[_Recording]:
    outer = _RECORDING.steps, getattr(_RECORDING, "scratch", [])
    _RECORDING.steps, _RECORDING.scratch = [], []
    try:
        yield _RECORDING
    finally:
        _RECORDING.steps, _RECORDING.scratch = outer


class Programs:
    """Programs by what they do; one is written the second time that its facts come up."""

    def __init__(self, limit: int = 1024) -> None:
        # By what a call does, and the shape and strides of its first input, which differ most between calls: a list is
        # gone through.
        self._programs: dict[Hashable, list[Program]] = {}
        # By all facts: has a program been written, or can none be?
        self._seen: dict[Hashable, bool] = {}
        self._limit = limit

    def __len__(self) -> int:
        return sum(map(len, self._programs.values()))

    def clear(self) -> None:
        self._programs.clear()
        self._seen.clear()

    def run(
        self,
        what: Hashable,
        inputs: Sequence[torch.Tensor | None],
        call: Callable[..., Any],
        *arguments: Any,
    ) -> Sequence[torch.Tensor]:
        """``call(*arguments)``, some new tensors, or the program that does the same.

        ``call`` may work on tensors through ``launch`` alone.

        what: everything beside the facts of ``inputs`` that the launches depend on.
        inputs: the tensors on the current device that the launches may read; None where one is absent, not the first.
        """
        first = inputs[0]
        assert first is not None
        key = (what, first.shape, first.stride())
        programs = self._programs.get(key)
        if programs is not None and not _hooked():
            for program in programs:
                results = program.run(*inputs)
                if results is not None:
                    return results
        kind = (key, *(None if tensor is None else facts(tensor) for tensor in inputs))
        settled = self._seen.get(kind)
        if settled is None:
            if len(self._seen) >= self._limit:
                self.clear()  # many token counts: start over
            self._seen[kind] = False
        elif not settled:
            with _recording() as recording:
                results = call(*arguments)
                steps, memory = recording.steps or [], recording.scratch
            program = Program.of(inputs, results, memory, steps)
            if program is not None:
                self._programs.setdefault(key, []).append(program)
            self._seen[kind] = True
            return results
        return call(*arguments)


def repeatable(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda and torch.version.hip is None


def _hooked() -> bool:
    """Does somebody (Proton) listen to Triton's launches?"""
    runtime = triton.knobs.runtime
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        if hook is not None and getattr(hook, "calls", True):
            return True
    return False
