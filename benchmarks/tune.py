"""``python -m benchmarks.tune``: time tile candidates of each kernel.  For whoever edits kernels/configs.py.

Prints, per shape, T and kernel, the fastest candidates per BLOCK_M.  Not run by users: configs.py ships the result.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import multiprocessing
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import torch

from moe_inductor.kernels.align import align
from moe_inductor.kernels.configs import GemmConfig, GemvConfig
from moe_inductor.kernels.decode import decode_down, decode_gate_up
from moe_inductor.kernels.down import down
from moe_inductor.kernels.gate_up import gate_up
from moe_inductor.kernels.weights import Projection
from moe_inductor.ops.cuda import topk_routing

from .cells import SHAPES, Shape, make_inputs, make_weights
from .timing import graph_us

# block_n, block_k, num_warps, num_stages, group_m, by TMA, persistent
SMALL_GATE_UP = [
    (32, 128, 4, 4),
    (32, 256, 4, 3),
    (64, 64, 4, 5),
    (64, 128, 4, 3),
    (64, 128, 4, 4),
    (128, 64, 4, 4),
    (128, 64, 8, 4),
]
SMALL_DOWN = [
    (32, 256, 4, 4),
    (64, 128, 4, 4),
    (64, 256, 4, 3),
    (128, 64, 4, 5),
    (128, 128, 4, 3),
    (128, 128, 4, 4),
    (256, 64, 4, 4),
]
LARGE_GATE_UP = [
    (128, 64, 8, 4, 8, True, True),
    (128, 64, 8, 4, 8, True, False),
    (128, 64, 8, 3, 8, True, True),
    (128, 64, 8, 3, 4, True, True),
    (64, 64, 4, 4, 8, True, False),
    (64, 128, 8, 3, 8, True, True),
    (128, 64, 8, 3, 8, False, False),
    (128, 64, 8, 4, 8, False, False),
    (64, 64, 4, 4, 8, False, False),
    (64, 64, 8, 4, 8, False, False),
]
LARGE_DOWN = [
    (256, 64, 8, 4, 8, True, True),
    (256, 64, 8, 3, 8, True, True),
    (256, 64, 8, 4, 8, True, False),
    (256, 64, 8, 3, 4, True, True),
    (128, 64, 8, 4, 8, True, True),
    (128, 64, 4, 4, 8, True, False),
    (128, 128, 8, 3, 8, True, True),
    (128, 64, 8, 4, 8, False, False),
    (128, 64, 4, 3, 8, False, False),
    (256, 64, 8, 3, 8, False, False),
]
GEMV = [
    GemvConfig(n, k, w, s)
    for n, k, w, s in [
        (4, 512, 2, 2),
        (4, 1024, 4, 2),
        (8, 256, 2, 3),
        (8, 512, 4, 1),
        (8, 512, 4, 2),
        (8, 512, 4, 3),
        (8, 256, 4, 4),
        (16, 256, 4, 2),
        (16, 256, 4, 3),
        (16, 128, 4, 3),
        (8, 1024, 8, 2),
        (2, 1024, 2, 2),
    ]
]


def candidates(kernel: str, block_m: int) -> Iterator[GemmConfig]:
    if block_m == 128:
        pool: Any = LARGE_GATE_UP if kernel == "gate_up" else LARGE_DOWN
    else:
        small = SMALL_GATE_UP if kernel == "gate_up" else SMALL_DOWN
        groups = (4,) if block_m == 64 else (1,)
        pool = [
            (*tile, group, tma, False)
            for tile, group, tma in itertools.product(small, groups, (True, False))
        ]
        if block_m == 64:
            pool += [(128, 64, 4, 4, 8, True, True), (128, 128, 8, 3, 8, True, False)]
    for n, k, warps, stages, group, tma, persistent in pool:
        yield GemmConfig(block_m, n, k, group, warps, stages, tma, persistent)


def block_ms(shape: Shape, T: int) -> list[int]:
    mean = T * shape.k / shape.E
    return [
        m
        for m in (16, 32, 64, 128)
        if m / 8 <= mean <= m * 1.6 or (m == 16 and mean < 2) or (m == 128 and mean > 80)
    ]


class Bench:
    def __init__(self, shape: Shape, T: int, weights: Any) -> None:
        self.shape, self.inputs = shape, make_inputs(shape, T)
        self.gate_up = Projection.of([weights.gate_up])
        self.down = Projection.of([weights.down])
        self.routed = [
            topk_routing(i.router_logits, shape.k, True, torch.bfloat16) for i in self.inputs
        ]
        self.programs = torch.cuda.get_device_properties(0).multi_processor_count

    def grouped(self, kernel: str, config: GemmConfig) -> float:
        shape, T = self.shape, self.inputs[0].hidden_states.shape[0]
        aligned = [align(ids, shape.E, config.block_m) for _, ids in self.routed]
        rows = aligned[0].sorted_token_ids.numel()
        h = torch.randn(rows, shape.I, device="cuda", dtype=torch.bfloat16)
        y = torch.empty(T * shape.k, shape.H, device="cuda", dtype=torch.bfloat16)

        def call(index: int) -> None:
            x = self.inputs[index].hidden_states
            if kernel == "gate_up":
                gate_up(
                    x,
                    self.gate_up,
                    None,
                    aligned[index],
                    shape.k,
                    "silu",
                    h,
                    shape.I,
                    config,
                    self.programs,
                )
            else:
                down(
                    h,
                    shape.I,
                    self.down,
                    self.routed[index][0],
                    aligned[index],
                    y,
                    config,
                    self.programs,
                )

        return graph_us(call, range(len(self.inputs)), budget_ms=20)

    def decode(self, kernel: str, config: GemvConfig) -> float:
        shape, T = self.shape, self.inputs[0].hidden_states.shape[0]
        h = torch.randn(T * shape.k, shape.I, device="cuda", dtype=torch.bfloat16)
        y = torch.empty(T, shape.H, device="cuda", dtype=torch.bfloat16)

        def call(index: int) -> None:
            x = self.inputs[index].hidden_states
            weights, ids = self.routed[index]
            if kernel == "gate_up":
                decode_gate_up(x, self.gate_up, None, ids, "silu", h, shape.I, config)
            else:
                decode_down(h, shape.I, self.down, weights, ids, y, config)

        return graph_us(call, range(len(self.inputs)), budget_ms=20)


def compile_share(index: int, count: int) -> int:
    """Fill Triton's cache in parallel processes: even shapes, and gptoss' uneven ones."""
    done = 0
    work = [
        (kernel, c)
        for kernel in ("gate_up", "down")
        for m in (16, 32, 64, 128)
        for c in candidates(kernel, m)
    ]
    for H, I in ((2048, 2048), (2880, 2880)):
        shape = Shape("warm", 2, 2, H, I)
        bench = Bench(shape, 8, make_weights(shape))
        for kernel, config in work[index::count]:
            try:
                bench.grouped(kernel, config)
                done += 1
            except Exception as error:
                print("candidate failed:", kernel, config, repr(error)[:150], flush=True)
    return done


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("tune.json"))
    parser.add_argument("--shapes", nargs="*", default=[s.name for s in SHAPES])
    parser.add_argument(
        "--tokens", nargs="*", type=int, default=[1, 2, 4, 8, 32, 128, 512, 2048, 8192]
    )
    arguments = parser.parse_args()
    workers = min(14, os.cpu_count() or 1)
    with concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn")
    ) as pool:
        print(
            "compiled",
            sum(pool.map(compile_share, range(workers), [workers] * workers)),
            flush=True,
        )
    rows = []
    for shape in SHAPES:
        if shape.name not in arguments.shapes:
            continue
        weights = make_weights(shape)
        for T in arguments.tokens:
            bench = Bench(shape, T, weights)
            measured = []
            for kernel in ("gate_up", "down"):
                if T <= 4:
                    measured += [(kernel, 0, c, _time(bench.decode, kernel, c)) for c in GEMV]
                for m in block_ms(shape, T) if T > 1 else []:
                    measured += [
                        (kernel, m, c, _time(bench.grouped, kernel, c))
                        for c in candidates(kernel, m)
                    ]
            rows += [
                dict(shape=shape.name, T=T, kernel=n, block_m=m, config=repr(c), us=us)
                for n, m, c, us in measured
            ]
            arguments.out.write_text(json.dumps(rows))
            for (kernel, m), group in itertools.groupby(measured, key=lambda r: r[:2]):
                best = sorted(group, key=lambda r: r[3])[:2]
                print(
                    shape.name,
                    T,
                    kernel,
                    m,
                    *[f"| {us:.1f} {_short(c)}" for _, _, c, us in best],
                    flush=True,
                )
        del weights
        torch.cuda.empty_cache()


def _time(run: Any, kernel: str, config: Any) -> float:
    try:
        return run(kernel, config)
    except Exception:
        return float("inf")


def _short(c: Any) -> str:
    if isinstance(c, GemvConfig):
        return f"{c.block_n}x{c.block_k} w{c.num_warps} s{c.num_stages}"
    return (
        f"{c.block_n}x{c.block_k} w{c.num_warps} s{c.num_stages} g{c.group_m}"
        f"{' tma' * c.weights_by_tma}{' persistent' * c.persistent}"
    )


if __name__ == "__main__":
    main()
