"""What the compiler says of the kernels that a call would launch, for a GPU that need not be here.

The launches of a real call are recorded on meta tensors, so shapes can be those of real models, and each is compiled
as the JIT would: registers, spills and shared memory are the assembler's.

``python -m benchmarks.compiled`` does it for the six shapes at all token counts, stacked and one tensor per expert, and
writes ``benchmarks/results/compiled_sm90.json``.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks.cells import SHAPES, TOKENS
from moe_inductor.kernels import (
    align,
    combine,
    decode,
    down,
    gate_up,
    router_logits,
    router_pieces,
    routing,
)
from moe_inductor.ops import cuda
from moe_inductor.ops.block import Block
from moe_inductor.ops.check import Call, Routing

SM90 = GPUTarget("cuda", 90, 32)
RESULTS = pathlib.Path(__file__).parent / "results" / "compiled_sm90.json"
MODULES = (align, combine, decode, down, gate_up, router_logits, router_pieces, routing)
_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
}


class Launch(NamedTuple):
    """One launch: the JIT function, its arguments, its constants and options; first: see ``launch.launch``."""

    kernel: Any
    args: tuple[Any, ...]
    meta: dict[str, Any]
    first: bool = False

    def specialised(self) -> tuple[ASTSource, dict[str, Any]]:
        """Source and options as the JIT makes them: integers that are 1 or multiples of 16 are told to the compiler."""
        kernel, meta = self.kernel, self.meta
        options = {n: meta[n] for n in ("num_warps", "num_stages") if n in meta}
        values = dict(zip(kernel.arg_names, self.args, strict=False))
        values |= {n: v for n, v in meta.items() if n not in options}
        signature: dict[str, str] = {}
        constants: dict[tuple[int], Any] = {}
        attributes: dict[tuple[int], Any] = {}
        for index, parameter in enumerate(kernel.params):
            name, value = parameter.name, values[parameter.name]
            if parameter.is_constexpr or value is None:
                signature[name], constants[(index,)] = "constexpr", value
            elif isinstance(value, TensorDescriptor):
                signature[name] = f"tensordesc<{_TYPES[value.base.dtype]}{value.block_shape}>"
            elif isinstance(value, torch.Tensor):
                signature[name] = f"*{_TYPES[value.dtype]}"
                attributes[(index,)] = [["tt.divisibility", 16]]
            elif value == 1 and not parameter.do_not_specialize:
                signature[name], constants[(index,)] = "constexpr", 1
            else:
                signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if value % 16 == 0 and not parameter.do_not_specialize:
                    attributes[(index,)] = [["tt.divisibility", 16]]
        return ASTSource(kernel, signature, constants, attributes), options

    def compile(self, target: GPUTarget) -> Any:
        source, options = self.specialised()
        return triton.compile(source, target=target, options=options)


@contextlib.contextmanager
def recording(
    capability: tuple[int, int], num_multiprocessors: int = 132
) -> Iterator[list[Launch]]:
    """Launches are listed, not made, and planned for a GPU of this capability."""
    launches: list[Launch] = []

    def launch(
        kernel: Any, grid: Any, *args: Any, early: bool = True, first: bool = False, **meta: Any
    ) -> None:
        meta["EARLY"] = early and capability >= (9, 0)
        launches.append(Launch(kernel, args, meta, first))

    with contextlib.ExitStack() as stack:
        for module in MODULES:
            stack.enter_context(mock.patch.object(module, "launch", launch))
        for name, value in (
            ("_capability", capability),
            ("_num_multiprocessors", num_multiprocessors),
        ):
            stack.enter_context(mock.patch.object(cuda, name, lambda device, value=value: value))
        yield launches


def assembled(compiled: Any) -> dict[str, int] | None:
    """``registers`` per thread, ``spilled`` and ``shared`` bytes; None if no ptxas of this Triton takes the PTX."""
    ptx = compiled.asm["ptx"]
    found = re.search(r"\.target (\w+)", ptx)
    assert found is not None
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        for ptxas in (pathlib.Path(triton.__file__).parent / "backends/nvidia/bin").glob("ptxas*"):
            command = [ptxas, "-v", f"--gpu-name={found[1]}", file, "-o", f"{folder}/kernel.cubin"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                return {
                    "registers": max(
                        int(n) for n in re.findall(r"Used (\d+) registers", done.stderr)
                    ),
                    "spilled": sum(
                        int(n) for n in re.findall(r"(\d+) bytes spill stores", done.stderr)
                    ),
                    "shared": compiled.metadata.shared,
                }
    return None


def main() -> None:
    rows: dict[str, dict[str, Any]] = {}
    for shape in SHAPES:
        for stored in ("stacked", "per expert"):
            for T in TOKENS:
                for launch in _launches(shape, T, stored):
                    source, options = launch.specialised()
                    key = f"{source.hash()} {sorted(options.items())}"
                    if key not in rows:
                        rows[key] = _row(launch) | {"stored": stored, "cells": []}
                    if rows[key]["stored"] != stored:
                        rows[key]["stored"] = "either"
                    rows[key]["cells"].append(f"{shape.name} {T}")
    run = {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "target": "sm_90",
        "date": datetime.date.today().isoformat(),
        "command": "python -m benchmarks.compiled",
        "kernels": sorted(rows.values(), key=lambda row: row["kernel"]),
    }
    RESULTS.write_text(json.dumps(run, indent=1) + "\n")
    print(f"{len(rows)} kernels, {RESULTS}")


def _launches(shape: Any, T: int, stored: str) -> list[Launch]:
    with recording((9, 0)) as launches, torch.device("meta"):
        weights = [
            torch.empty(size, dtype=torch.bfloat16)
            for size in ((shape.E, 2 * shape.I, shape.H), (shape.E, shape.H, shape.I))
        ]
        gate_up_proj, down_proj = (
            [w] if stored == "stacked" else list(w.unbind(0)) for w in weights
        )
        x, router_weight = (torch.empty(n, shape.H, dtype=torch.bfloat16) for n in (T, shape.E))
        routing = Routing(x, shape.k, True, torch.bfloat16)
        experts = Call(x, x, x, gate_up_proj, [], down_proj, "silu", torch.bfloat16)
        cuda.fused_moe(*Block.of(x, router_weight, None, routing, experts))
    return launches


def _row(launch: Launch) -> dict[str, Any]:
    found = assembled(launch.compile(SM90))
    assert found is not None, "no ptxas takes this PTX"
    tile = {n: launch.meta[n] for n in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if n in launch.meta}
    names = ("num_warps", "num_stages")
    options = {n: launch.meta[n] for n in names if n in launch.meta}
    return {"kernel": launch.kernel.__name__, **tile, **options, **found}


if __name__ == "__main__":
    main()
