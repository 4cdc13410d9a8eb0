"""Launching kernels, and repeating the launches of a call for a fraction of what they cost the first time.

Triton's JIT looks at every argument of every launch (20 to 50 us a kernel, measured on an H200's host), and the code
around it computes strides, tiles and workspaces.  All of that depends on a few facts about the inputs: shapes,
strides, dtypes, device, and what Triton specialises a pointer on, its address modulo 16.  So a call is written down
once as a *program*, one generated function ``(stream, addresses...)`` that launches the same compiled kernels with the
same numbers and fresh addresses; a later call with the same facts runs the program.

A key is the whole of the facts, so a program is never reused where the host code or the JIT would have decided
otherwise.  What cannot be repeated (an argument that is neither an input, a result nor ``scratch``; launch hooks; AMD,
where Triton looks at storage sizes too) runs as before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_inductor._compat import empty_on

from .early import starts_early

ALIGNMENT = 16  # what Triton specialises addresses on
SCRATCH_ALIGNMENT = 256


@dataclasses.dataclass
class _Step:
    compiled: Any  # triton's CompiledKernel
    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    meta: dict[str, Any]

    def values(self) -> list[Any]:
        """The arguments as a compiled kernel takes them: every parameter in order, compile-time ones too."""
        named = dict(zip(self.kernel.arg_names, self.args, strict=False)) | self.meta
        return [named[name] for name in self.kernel.arg_names]


class _Recording(threading.local):
    steps: list[_Step] | None = None
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
        _RECORDING.steps.append(_Step(compiled, kernel, grid, args, meta))


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


class _Address:
    """Stands for the tensor of a TensorDescriptor, of which a launcher asks the address alone."""

    __slots__ = ("address",)

    def __init__(self, address: int) -> None:
        self.address = address

    def data_ptr(self) -> int:
        return self.address


def _rebased(descriptor: TensorDescriptor, address: int) -> TensorDescriptor:
    moved = object.__new__(TensorDescriptor)  # its checks were made when the program was written
    moved.__dict__.update(descriptor.__dict__)
    moved.base = _Address(address)  # pyright: ignore[reportAttributeAccessIssue]
    return moved


class Program:
    """The launches of one call, to be run on other addresses.

    ``run(stream, *addresses)`` is generated: one line per launch, its arguments constants or
    ``address_i + offset``.  The addresses are those of the inputs, the results and the scratch memory, in this order.
    """

    def __init__(
        self,
        inputs: Sequence[torch.Tensor | None],
        results: Sequence[torch.Tensor],
        scratch: Sequence[torch.Tensor],
        steps: Sequence[_Step],
    ) -> None:
        self.results = [(tuple(r.shape), r.stride(), r.dtype) for r in results]
        self.device = results[0].device
        self.empty = empty_on(self.device)
        self.current_stream = triton.runtime.driver.active.get_current_stream
        places: dict[int, str] = {}
        # Inputs that were one tensor: what the launches know is the first one's address.
        self.same: list[tuple[int, int]] = []
        for index, tensor in enumerate([*inputs, *results]):
            if tensor is None:
                continue
            place = places.setdefault(id(tensor), f"address_{index}")
            if place != f"address_{index}":
                self.same.append((int(place.removeprefix("address_")), index))
        last = len(inputs) + len(results)
        self.scratch_bytes = 0
        for tensor in scratch:
            places[id(tensor)] = f"address_{last} + {self.scratch_bytes}"
            size = math.prod(tensor.shape) * tensor.dtype.itemsize
            self.scratch_bytes += -(-size // SCRATCH_ALIGNMENT) * SCRATCH_ALIGNMENT
        self.run = _generate(steps, places, last + bool(self.scratch_bytes))

    @staticmethod
    def of(
        inputs: Sequence[torch.Tensor | None],
        results: Sequence[torch.Tensor],
        scratch: Sequence[torch.Tensor],
        steps: Sequence[_Step],
    ) -> Program | None:
        """None where the launches cannot be repeated."""
        if not all(hasattr(step.compiled, "packed_metadata") for step in steps):
            return None
        used = set()
        for value in (value for step in steps for value in step.values()):
            tensor = value.base if isinstance(value, TensorDescriptor) else value
            if isinstance(tensor, torch.Tensor):
                used.add(id(tensor))
        fresh = (*results, *scratch)
        if used - {id(tensor) for tensor in (*inputs, *fresh)}:
            return None  # a tensor made by an operator, which the program would not run
        if not all(id(tensor) in used or tensor.numel() == 0 for tensor in results):
            return None
        return Program(inputs, results, scratch, steps) if all(map(_is_plain, fresh)) else None

    def __call__(self, addresses: Sequence[int]) -> list[torch.Tensor] | None:
        """The results; None, and nothing launched, where an allocator does not align what it gives, or where inputs
        are two tensors that were one when this was written down."""
        for first, second in self.same:
            if addresses[first] != addresses[second]:
                return None
        results = [self.empty(*like) for like in self.results]
        fresh = [tensor.data_ptr() for tensor in results]
        if self.scratch_bytes:
            memory = self.empty((self.scratch_bytes,), (1,), torch.uint8)
            fresh.append(memory.data_ptr())
        for address in fresh:
            if address % ALIGNMENT:
                return None
        self.run(self.current_stream(self.device.index), *addresses, *fresh)
        return results


def _is_plain(tensor: torch.Tensor) -> bool:
    touched = not tensor.is_inference() and tensor._version > 0  # by an operator in place
    return tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0 and not touched


def _generate(
    steps: Sequence[_Step], places: dict[int, str], num_addresses: int
) -> Callable[..., None]:
    names: dict[str, Any] = {"rebased": _rebased}

    def constant(value: Any) -> str:
        name = f"constant_{len(names)}"
        names[name] = value
        return name

    def argument(value: Any) -> str:
        if isinstance(value, torch.Tensor):
            return places[id(value)]
        if isinstance(value, TensorDescriptor):
            place = places[id(value.base)]
            return f"rebased({constant(_rebased(value, 0))}, {place})"
        return constant(value)

    lines = []
    for step in steps:
        compiled = step.compiled
        head = [*step.grid, 1, 1][:3]
        call = [
            *(str(int(size)) for size in head),
            "stream",
            constant(compiled.function),
            constant(compiled.packed_metadata),
            "None, None, None",  # for launch hooks, of which there are none
            *(argument(value) for value in step.values()),
        ]
        lines.append(f"    {constant(compiled.run)}({', '.join(call)})")
    parameters = ", ".join(["stream", *(f"address_{i}" for i in range(num_addresses))])
    text = "\n".join([f"def run({parameters}):", *lines, "    return"])
    exec(compile(text, "<moe_inductor program>", "exec"), names)
    return names["run"]


_SEEN, _UNREPEATABLE = object(), object()


class Programs:
    """Programs by the facts they depend on.  One is written the second time that its facts come up."""

    def __init__(self, limit: int = 1024) -> None:
        self._programs: dict[Hashable, Any] = {}
        self._limit = limit

    def __len__(self) -> int:
        return sum(isinstance(program, Program) for program in self._programs.values())

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
        inputs: the tensors on the current device that the launches may read; None where one is absent.
        """
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in inputs]
        facts = [
            (t.shape, t.stride(), t.dtype, t.get_device(), address % ALIGNMENT)
            if t is not None
            else None
            for t, address in zip(inputs, addresses, strict=True)
        ]
        key = (what, *facts)
        program = self._programs.get(key)
        if isinstance(program, Program):
            if not _hooked():
                results = program(addresses)
                if results is not None:
                    return results
        elif program is None:
            if len(self._programs) >= self._limit:
                self._programs.clear()  # many token counts: start over
            self._programs[key] = _SEEN
        elif program is _SEEN:
            with _recording() as recording:
                results = call(*arguments)
                steps, memory = recording.steps or [], recording.scratch
            program = Program.of(inputs, results, memory, steps)
            self._programs[key] = program or _UNREPEATABLE
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
