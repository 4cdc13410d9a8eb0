"""A program: the launches of one call as a generated function, for other tensors of the same kind.

The inputs' facts are compared one by one.  Making, hashing and looking up a key of them takes longer than that.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_inductor._compat import empty_on

from .launcher import call_of

ALIGNMENT = 16  # what Triton specialises addresses on
SCRATCH_ALIGNMENT = 256


@dataclasses.dataclass
class Step:
    compiled: Any  # triton's CompiledKernel
    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    meta: dict[str, Any]

    def values(self) -> list[Any]:
        """The arguments as a compiled kernel takes them: every parameter in order, compile-time ones too."""
        named = dict(zip(self.kernel.arg_names, self.args, strict=False)) | self.meta
        return [named[name] for name in self.kernel.arg_names]


def facts(tensor: torch.Tensor) -> tuple[Any, ...]:
    """What the launches depend on beside the address itself."""
    offset = tensor.data_ptr() % ALIGNMENT
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.get_device(), offset


class Program:
    """``run(*inputs)``: the results; None, and nothing launched, where the inputs differ in anything that the launches
    depend on, or where an allocator does not align what it gives."""

    def __init__(
        self,
        inputs: Sequence[torch.Tensor | None],
        results: Sequence[torch.Tensor],
        scratch: Sequence[torch.Tensor],
        steps: Sequence[Step],
    ) -> None:
        self.compiled = [step.compiled for step in steps]  # a kernel is unloaded with its object
        text = _Text()
        text.compare(inputs)
        text.allocate(results, scratch)
        for step in steps:
            text.launch(step)
        self.run = text.function(len(inputs), len(results))

    @staticmethod
    def of(
        inputs: Sequence[torch.Tensor | None],
        results: Sequence[torch.Tensor],
        scratch: Sequence[torch.Tensor],
        steps: Sequence[Step],
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


def _is_plain(tensor: torch.Tensor) -> bool:
    touched = not tensor.is_inference() and tensor._version > 0  # by an operator in place
    return tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0 and not touched


class _Text:
    """The lines of ``Program.run``."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.names: dict[str, Any] = {"rebased": _rebased}
        self.places: dict[int, str] = {}  # by a tensor's id: the code of its address

    def function(self, num_inputs: int, num_results: int) -> Callable[..., Any]:
        parameters = ", ".join(f"input_{i}" for i in range(num_inputs))
        results = ", ".join(f"result_{i}" for i in range(num_results))
        lines = [f"def run({parameters}):", *self.lines, f"return [{results}]"]
        exec(compile("\n    ".join(lines), "<moe_inductor program>", "exec"), self.names)
        return self.names["run"]

    def compare(self, inputs: Sequence[torch.Tensor | None]) -> None:
        absent = [i for i, tensor in enumerate(inputs) if tensor is None]
        present = [(i, tensor) for i, tensor in enumerate(inputs) if tensor is not None]
        self._give_up_if(
            [f"input_{i} is not None" for i in absent] + [f"input_{i} is None" for i, _ in present]
        )
        differs = []
        for i, tensor in present:
            self.lines.append(f"address_{i} = input_{i}.data_ptr()")
            shape, strides, dtype, device, offset = facts(tensor)
            differs += [
                f"address_{i} % {ALIGNMENT} != {offset}",
                f"input_{i}.shape != {self._constant(shape)}",
                f"input_{i}.stride() != {self._constant(strides)}",
                f"input_{i}.dtype is not {self._constant(dtype)}",
                f"input_{i}.get_device() != {device}",
            ]
            # Inputs that were one tensor: what the launches know is the first one's address.
            first = self.places.setdefault(id(tensor), f"address_{i}")
            if first != f"address_{i}":
                differs.append(f"address_{i} != {first}")
        self._give_up_if(differs)

    def allocate(self, results: Sequence[torch.Tensor], scratch: Sequence[torch.Tensor]) -> None:
        device = results[0].device
        self.names["empty"] = empty_on(device)
        starts = []
        for i, tensor in enumerate(results):
            like = (tuple(tensor.shape), tensor.stride(), tensor.dtype)
            self.lines.append(f"result_{i} = empty({', '.join(map(self._constant, like))})")
            self.lines.append(f"start_{i} = result_{i}.data_ptr()")
            self.places[id(tensor)] = f"start_{i}"
            starts.append(f"start_{i}")
        size = 0
        for tensor in scratch:
            self.places[id(tensor)] = f"start + {size}"
            num_bytes = math.prod(tensor.shape) * tensor.dtype.itemsize
            size += -(-num_bytes // SCRATCH_ALIGNMENT) * SCRATCH_ALIGNMENT
        if size:
            self.lines.append(f"memory = empty(({size},), (1,), {self._constant(torch.uint8)})")
            self.lines.append("start = memory.data_ptr()")
            starts.append("start")
        self._give_up_if([f"{start} % {ALIGNMENT}" for start in starts])
        self.names["current_stream"] = triton.runtime.driver.active.get_current_stream
        self.lines.append(f"stream = current_stream({device.index})")

    def launch(self, step: Step) -> None:
        compiled = step.compiled
        size = [*map(int, step.grid), 1, 1][:3]
        no_hooks = None, None, None
        head = (*size, _Code("stream"), compiled.function, compiled.packed_metadata, *no_hooks)
        function, call = call_of(compiled.run, (*head, *map(self._argument, step.values())))
        self.lines.append(f"{self._constant(function)}({', '.join(map(self._code, call))})")

    def _argument(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return _Code(self.places[id(value)])
        if isinstance(value, TensorDescriptor):
            place = self.places[id(value.base)]
            return _Code(f"rebased({self._constant(_rebased(value, 0))}, {place})")
        return value

    def _code(self, value: Any) -> str:
        if isinstance(value, _Code):
            return value.text
        if type(value) is tuple:
            return f"({''.join(f'{self._code(one)}, ' for one in value)})"
        return self._constant(value)

    def _constant(self, value: Any) -> str:
        if value is None or type(value) in (bool, int, str):
            return repr(value)
        name = f"constant_{len(self.names)}"
        self.names[name] = value
        return name

    def _give_up_if(self, conditions: Sequence[str]) -> None:
        if conditions:
            self.lines.append(f"if {' or '.join(conditions)}: return None")


class _Code:
    """An argument of a launch that is computed when it is repeated."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text


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
