"""``python -m benchmarks.tune``: time tile candidates of each kernel.  For whoever edits kernels/configs.py.

Prints, per shape, T and kernel, the fastest candidates per BLOCK_M.  Not run by users: configs.py ships the result.
Each kernel is timed alone: what down gains beside gate_up (kernels/overlap.py) is not seen here, but in whole blocks.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
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
from moe_inductor.kernels.weights import Projection, Stored
from moe_inductor.ops.cuda import topk_routing
from moe_inductor.unit import parse

from .cells import SHAPES, Shape, make_inputs, make_weights
from .timing import graph_us

SILU = parse("silu")

# By BLOCK_M: block_n, block_k, num_warps, num_stages of programs with one tile each, of programs that walk the tiles
# (persistent), and GROUP_M.  Weights come by TMA.
Tile = tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True)
class Pool:
    one: list[Tile]
    walk: list[Tile]
    groups: tuple[int, ...]


# fmt: off
GATE_UP = {
    16: Pool(
        [(32, 256, 4, 3), (32, 128, 4, 4), (32, 128, 4, 6), (64, 128, 4, 3), (64, 64, 4, 5)],
        [(32, 256, 4, 3), (64, 128, 4, 3)],
        (1,),
    ),
    32: Pool(
        [(64, 128, 4, 3), (64, 128, 4, 4), (32, 256, 4, 3), (32, 128, 4, 4), (64, 64, 4, 4), (64, 64, 4, 6),
         (128, 64, 4, 4)],
        [(64, 128, 4, 3), (32, 256, 4, 3), (128, 64, 4, 4)],
        (1,),
    ),
    64: Pool(
        [(64, 128, 4, 3), (64, 128, 4, 4), (64, 64, 4, 4), (64, 64, 4, 5), (32, 128, 4, 4), (128, 64, 4, 3),
         (128, 64, 4, 4), (128, 64, 8, 4)],
        [(64, 128, 4, 3), (64, 128, 4, 4), (64, 64, 4, 4), (128, 64, 4, 4), (128, 64, 8, 4)],
        (1, 4),
    ),
    128: Pool(
        [(64, 64, 4, 3), (64, 64, 4, 4), (64, 64, 8, 4), (64, 128, 8, 3), (128, 64, 8, 3), (128, 64, 8, 4)],
        [(64, 64, 4, 4), (64, 64, 8, 4), (64, 64, 8, 6), (64, 128, 8, 3), (128, 64, 8, 3), (128, 64, 8, 4)],
        (8,),
    ),
}
DOWN = {
    16: Pool(
        [(64, 256, 4, 3), (64, 256, 4, 4), (32, 256, 4, 4), (64, 128, 4, 4), (64, 128, 4, 6), (128, 128, 4, 3),
         (128, 128, 4, 4)],
        [(64, 256, 4, 3), (128, 128, 4, 4)],
        (1,),
    ),
    32: Pool(
        [(64, 256, 4, 3), (64, 128, 4, 4), (64, 128, 4, 6), (128, 128, 4, 3), (128, 128, 4, 4), (128, 64, 4, 5)],
        [(64, 256, 4, 3), (128, 128, 4, 4)],
        (1,),
    ),
    64: Pool(
        [(64, 128, 4, 4), (64, 256, 4, 3), (128, 64, 4, 4), (128, 64, 4, 5), (128, 128, 4, 3), (128, 128, 4, 4),
         (256, 64, 4, 4), (256, 64, 8, 4)],
        [(128, 128, 4, 3), (128, 64, 4, 5), (128, 128, 4, 4), (256, 64, 8, 4), (128, 128, 8, 4)],
        (1, 4),
    ),
    128: Pool(
        [(128, 64, 4, 3), (128, 64, 4, 4), (128, 64, 8, 4), (128, 128, 8, 3), (256, 64, 8, 3), (256, 64, 8, 4)],
        [(128, 64, 4, 4), (128, 64, 8, 4), (128, 64, 8, 6), (128, 128, 8, 3), (256, 64, 8, 3), (256, 64, 8, 4)],
        (8,),
    ),
}
# fmt: on
DECODE_GATE_UP = [
    GemvConfig(n, k, w, s)
    for n, k, w, s in [
        (16, 256, 4, 3),
        (8, 256, 2, 3),
        (8, 512, 4, 3),
        (8, 256, 4, 4),
        (4, 512, 2, 3),
    ]
]
# The down tile also has up to 8 experts in it: n * k is divided by how many there are.
DECODE_DOWN = [
    GemvConfig(n, k, w, s)
    for n, k in [
        (2, 1024),
        (4, 512),
        (8, 256),
        (16, 128),
        (4, 1024),
        (8, 512),
        (16, 256),
        (32, 128),
    ]
    for w, s in [(4, 2), (4, 3), (2, 3)]
]


def decode_candidates(kernel: str, k: int) -> list[GemvConfig]:
    if kernel == "gate_up":
        return DECODE_GATE_UP
    slots = min(8, k)
    return [
        dataclasses.replace(c, block_k=c.block_k // slots)
        for c in DECODE_DOWN
        if c.block_k // slots >= 32
    ] + [
        dataclasses.replace(c, block_n=c.block_n // slots)
        for c in DECODE_DOWN
        if slots > 1 and c.block_n // slots
    ]


def candidates(kernel: str, block_m: int) -> Iterator[GemmConfig]:
    pool = (GATE_UP if kernel == "gate_up" else DOWN)[block_m]
    for group in pool.groups:
        for tiles, persistent in ((pool.one, False), (pool.walk, True)):
            for n, k, warps, stages in tiles:
                yield GemmConfig(block_m, n, k, group, warps, stages, True, persistent)


def block_ms(shape: Shape, T: int) -> list[int]:
    mean = T * shape.k / shape.E
    return [
        m
        for m in (16, 32, 64, 128)
        if m / 6 <= mean <= m * 1.3 or (m == 16 and mean < 2) or (m == 128 and mean > 80)
    ]


class Bench:
    def __init__(self, shape: Shape, T: int, weights: Any, table: bool = False) -> None:
        self.shape, self.inputs = shape, make_inputs(shape, T)
        self.weights = weights  # a pointer table does not keep them alive
        self.gate_up = Projection.of(
            Stored.of(list(weights.gate_up) if table else [weights.gate_up])
        )
        self.down = Projection.of(Stored.of(list(weights.down) if table else [weights.down]))
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
                    SILU,
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
                decode_gate_up(x, self.gate_up, None, ids, SILU, h, shape.I, config)
            else:
                decode_down(h, shape.I, self.down, weights, ids, y, config)

        return graph_us(call, range(len(self.inputs)), budget_ms=20)


def work(shape: Shape, T: int, table: bool) -> Iterator[tuple[str, int, Any]]:
    """(kernel, block_m or 0 for decode, config) to time for one cell."""
    for kernel in ("gate_up", "down"):
        if T <= 2 and not table:
            yield from ((kernel, 0, c) for c in decode_candidates(kernel, shape.k))
        for m in block_ms(shape, T) if T > 1 else []:
            yield from ((kernel, m, c) for c in candidates(kernel, m))


def run(bench: Bench, kernel: str, block_m: int, config: Any) -> float:
    try:
        return (bench.grouped if block_m else bench.decode)(kernel, config)
    except Exception as error:
        print("candidate failed:", kernel, config, repr(error)[:150], flush=True)
        return float("inf")


def compile_share(index: int, count: int, tokens: list[int], table: bool) -> int:
    """Fill Triton's cache in parallel processes, on small shapes with the same divisibility."""
    todo: dict[Any, None] = {}
    for shape, T in itertools.product(SHAPES, tokens):
        for kernel, m, config in work(shape, T, table):
            uneven = shape.name == "gptoss"
            todo[kernel, m, config, uneven, 0 if m else shape.k] = None
    mine = list(todo)[index::count]
    for kernel, m, config, uneven, k in mine:
        size = 2880 if uneven else 2048
        small = Shape("small", 8, k or 2, size, size)
        run(Bench(small, 1 if not m else 8, make_weights(small), table), kernel, m, config)
    return len(mine)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("tune.json"))
    parser.add_argument("--shapes", nargs="*", default=[s.name for s in SHAPES])
    parser.add_argument(
        "--tokens", nargs="*", type=int, default=[1, 2, 8, 32, 128, 512, 2048, 8192]
    )
    parser.add_argument("--table", action="store_true", help="weights through a pointer table")
    arguments = parser.parse_args()
    workers = min(14, os.cpu_count() or 1)
    with concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn")
    ) as pool:
        shares = [
            pool.submit(compile_share, i, workers, arguments.tokens, arguments.table)
            for i in range(workers)
        ]
        print("compiled", sum(share.result() for share in shares), flush=True)
    rows = []
    for shape in SHAPES:
        if shape.name not in arguments.shapes:
            continue
        weights = make_weights(shape)
        for T in arguments.tokens:
            bench = Bench(shape, T, weights, arguments.table)
            measured = [
                (kernel, m, config, run(bench, kernel, m, config))
                for kernel, m, config in work(shape, T, arguments.table)
            ]
            rows += [
                dict(shape=shape.name, T=T, kernel=n, block_m=m, config=repr(c), us=us)
                for n, m, c, us in measured
            ]
            arguments.out.write_text(json.dumps(rows))
            for (kernel, m), group in itertools.groupby(measured, key=lambda r: r[:2]):
                best = sorted(group, key=lambda r: r[3])[:3]
                print(
                    shape.name,
                    T,
                    kernel,
                    m,
                    *[f"| {us:.1f} {_short(c)}" for _, _, c, us in best],
                    flush=True,
                )
        del weights, bench
        torch.cuda.empty_cache()


def _short(c: Any) -> str:
    if isinstance(c, GemvConfig):
        return f"{c.block_n}x{c.block_k} w{c.num_warps} s{c.num_stages}"
    return (
        f"{c.block_n}x{c.block_k} w{c.num_warps} s{c.num_stages} g{c.group_m}"
        f"{' tma' * c.weights_by_tma}{' persistent' * c.persistent}"
    )


if __name__ == "__main__":
    main()
