"""``python -m benchmarks.h200``: us against every installed peer, Hugging Face grouped_mm under torch.compile among
them, and the eager loop.

Per cell (shape, T), in one run: the output of 32 tokens is compared with fp64, then every contestant is timed, in many
short rounds of which the median counts (``timing.rounds_us``).
All run in a CUDA graph over rotating inputs, each with its own skewed routing; only the eager loop synchronises with
the host, so it runs on a stream.  Peers that are not installed are left out and named in the results.  Results are
written after every cell, to ``benchmarks/results/h200.json`` or ``--out``; ``python -m benchmarks.tables`` makes
docs/performance.md of them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import pathlib
import random
import statistics
import sys
import time
from typing import Any

import torch

from .cells import (
    BYTES_PER_S,
    FLOP_PER_S,
    SHAPES,
    TOKENS,
    Inputs,
    Shape,
    Weights,
    active_experts,
    floor_us,
    make_inputs,
    make_weights,
)
from .contestants import PEERS, Block, hugging_face, ours, ours_per_expert, reference
from .timing import graph_us, rounds_us, stream_us

RESULTS = pathlib.Path(__file__).parent / "results"
CHECKED_ROWS = 32


def rmse(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.double() - b).square().mean().sqrt().item()


def check(
    shape: Shape, weights: Weights, one: Inputs, blocks: dict[str, Block]
) -> dict[str, float]:
    """rmse of each contestant to fp64 over some rows, and the worst row of ours against eager's typical row."""
    T = one.hidden_states.shape[0]
    rows = torch.linspace(0, T - 1, min(T, CHECKED_ROWS), device="cuda").round().long()
    wanted = reference(shape, weights, one, rows)
    outputs = {name: block(one)[rows] for name, block in blocks.items()}
    errors = {
        f"rmse_{name}": rmse(
            out, reference(shape, weights, one, rows, name) if name in PEERS else wanted
        )
        for name, out in outputs.items()
    }
    errors["ratio_to_eager"] = errors["rmse_ours"] / errors["rmse_hf_eager"]
    row_error = (outputs["ours"].double() - wanted).square().mean(1).sqrt().max().item()
    errors["worst_row_to_eager"] = row_error / errors["rmse_hf_eager"]
    return errors


def measure(
    shape: Shape,
    T: int,
    weights: Weights,
    blocks: dict[str, Block],
    orders: random.Random,
    time_eager: bool = True,
) -> dict[str, Any]:
    inputs = make_inputs(shape, T)
    active = active_experts(shape, inputs)
    floor = floor_us(shape, T, active)
    cell: dict[str, Any] = {
        "shape": shape.name,
        "T": T,
        "active_experts": active,
        "floor_us": floor,
        "us": {},
        **check(shape, weights, inputs[0], blocks),
    }
    accepted = 2 * cell["rmse_hf_eager"] + 1e-5
    cell["accepted"] = cell["rmse_ours"] <= accepted
    captured = {name: block for name, block in blocks.items() if name != "hf_eager"}
    times = rounds_us(captured, inputs, orders)
    cell["us"] = {name: statistics.median(some) for name, some in times.items()}
    cell["us_of_rounds"] = {name: [round(us, 1) for us in some] for name, some in times.items()}
    if time_eager:
        cell["us"]["hf_eager"] = stream_us(blocks["hf_eager"], inputs, rounds=1)
    cell["roofline_fraction"] = floor / cell["us"]["ours"]
    return cell


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / "h200.json")
    parser.add_argument("--shapes", nargs="*", default=[shape.name for shape in SHAPES])
    parser.add_argument("--tokens", nargs="*", type=int, default=list(TOKENS))
    parser.add_argument(
        "--only",
        nargs="*",
        help="contestants to time: ours ours_per_expert ours_batch_invariant hf_compiled hf_eager"
        " triton_kernels vllm quack",
    )
    arguments = parser.parse_args()
    torch.manual_seed(0)
    orders = random.Random(0)
    run = {**environment(), **ceilings(), "missing": {}, "cells": []}
    started = time.monotonic()
    for shape in SHAPES:
        if shape.name not in arguments.shapes:
            continue
        torch._dynamo.reset()
        weights = make_weights(shape)
        blocks = {
            "ours": ours(shape, weights),
            "ours_per_expert": ours_per_expert(shape, weights),
            "ours_batch_invariant": ours(shape, weights, batch_invariant=True),
            "hf_compiled": hugging_face(shape, weights, "grouped_mm"),
            "hf_eager": hugging_face(shape, weights, "eager"),
        }
        only = arguments.only or [*blocks, *PEERS]
        for name, build in PEERS.items():
            if name in only:
                try:
                    blocks[name] = build(shape, weights)
                # Not ImportError alone: an engine may tune its kernels here, on a torch it was not made for.
                except Exception as error:
                    run["missing"][name] = f"{type(error).__name__}: {error}"
        blocks = {n: b for n, b in blocks.items() if n in only or n == "hf_eager"}
        for T in arguments.tokens:
            cell = measure(shape, T, weights, blocks, orders, "hf_eager" in only)
            run["cells"].append(cell)
            run["seconds"] = round(time.monotonic() - started, 1)
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(run, indent=1) + "\n")
            times = " ".join(f"{name} {us:.1f}" for name, us in cell["us"].items())
            print(
                f"{shape.name} T={T}: {times} | roofline {cell['roofline_fraction']:.2f}"
                f" | rmse ratio {cell['ratio_to_eager']:.2f} worst row"
                f" {cell['worst_row_to_eager']:.2f}{'' if cell['accepted'] else ' REJECTED'}",
                flush=True,
            )
        del weights, blocks
        torch.cuda.empty_cache()


def ceilings() -> dict[str, Any]:
    """What this card reaches now: a pass over 2 GiB (bytes read plus bytes written), and cuBLAS bf16, 8192 cubed."""
    source = torch.randn(2**29, device="cuda")
    copy = graph_us(lambda target: torch.add(source, 1, out=target), [torch.empty_like(source)])
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    product = graph_us(lambda _: a @ b, [None])
    return {
        "ceilings": {
            "copy_bytes_per_s": 2 * 4 * 2**29 / copy * 1e6,
            "cublas_flop_per_s": 2 * 8192**3 / product * 1e6,
        }
    }


def environment() -> dict[str, Any]:
    import transformers
    import triton

    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "dtype": "bfloat16",
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python -m benchmarks.h200", *sys.argv[1:]]),
        "roofline": {"bytes_per_s": BYTES_PER_S, "flop_per_s": FLOP_PER_S},
    }


if __name__ == "__main__":
    main()
