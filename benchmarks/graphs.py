"""``python -m benchmarks.graphs``: whole Hugging Face blocks in CUDA graphs beside the fused ops alone, on the GPU.

``torch.compile(model, backend="moe_inductor", mode="reduce-overhead")`` of transformers' own Qwen3-MoE and Mixtral
blocks, one and ``--depth`` of them, against ``topk_routing`` + ``fused_experts`` on the same tokens, against those
behind the router's GEMM, and against the op that is all of these; each a CUDA graph that is replayed again and again.
And ``mode="default"``, without graphs, where the host takes the time while there are few tokens.
Before each replay torch copies the model's input into the graph's memory: once a model, not once a block.  Times are
per block.  Results go to ``benchmarks/results/graphs.json`` or ``--out``.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from moe_inductor.ops.block import Block
from moe_inductor.ops.check import Call, Routing
from moe_inductor.ops.cuda import fused_experts, fused_moe, topk_routing

from .h200 import environment
from .layers import BLOCKS, RESULTS, block_width, first

TOKENS = (1, 8, 64, 512, 2048)
DEPTH = 16  # of the 48 blocks of Qwen3-30B-A3B and the 32 of Mixtral 8x7B


def replays_us(run: Callable[[], Any], calls: int = 30) -> float:
    """us per call of calls that follow one another, so that the host is ahead of the GPU where it can be."""
    for _ in range(5):
        run()
    times = []
    for _ in range(7):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / calls)
    return statistics.median(times)


def graph_of(call: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


class Model(nn.Module):
    """Its blocks read one input, so that all of them choose as many experts as the ops do."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [first(block(x)) for block in self.blocks]


def measure(name: str, T: int, blocks: list[nn.Module]) -> dict[str, Any]:
    x = torch.randn(1, T, block_width(blocks[0]), device="cuda", dtype=torch.bfloat16)
    rows = x.flatten(0, 1)
    logits = [nn.functional.linear(rows, block.gate.weight) for block in blocks]

    def ops(block: nn.Module, logits: torch.Tensor) -> torch.Tensor:
        gate_up, down = [block.experts.gate_up_proj], [block.experts.down_proj]
        topk_weights, topk_ids = topk_routing(logits, block.gate.top_k, True, x.dtype)
        return fused_experts(rows, topk_ids, topk_weights, gate_up, [], down, "silu", x.dtype)

    def all_ops() -> list[torch.Tensor]:
        return [ops(block, one) for block, one in zip(blocks, logits, strict=True)]

    def behind_gates() -> list[torch.Tensor]:
        return [ops(block, nn.functional.linear(rows, block.gate.weight)) for block in blocks]

    def whole(block: nn.Module) -> torch.Tensor:
        routing = Routing(rows, block.gate.top_k, True, x.dtype)
        gate_up, down = [block.experts.gate_up_proj], [block.experts.down_proj]
        experts = Call(rows, rows, rows, gate_up, [], down, "silu", x.dtype)  # type: ignore[arg-type]
        return fused_moe(*Block.of(rows, block.gate.weight, None, routing, experts))

    def all_whole() -> list[torch.Tensor]:
        return [whole(block) for block in blocks]

    row: dict[str, Any] = {"block": name, "T": T, "depth": len(blocks)}
    row["us_ops"] = replays_us(graph_of(all_ops).replay) / len(blocks)
    row["us_gate_and_ops"] = replays_us(graph_of(behind_gates).replay) / len(blocks)
    row["us_block_op"] = replays_us(graph_of(all_whole).replay) / len(blocks)
    for column, backend, mode, some in (
        ("us_block", "moe_inductor", "reduce-overhead", blocks[:1]),
        ("us_block_of_model", "moe_inductor", "reduce-overhead", blocks),
        ("us_default", "moe_inductor", "default", blocks[:1]),
        ("us_default_of_model", "moe_inductor", "default", blocks),
        ("us_default_inductor", "inductor", "default", blocks[:1]),
    ):
        torch._dynamo.reset()
        compiled = torch.compile(Model(some), backend=backend, mode=mode)
        row[column] = replays_us(lambda run=compiled: run(x)) / len(some)
    row["allowed_us"] = 1.02 * row["us_ops"] + 3
    return row


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--blocks", nargs="+", default=["qwen3", "mixtral"])
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--depth", type=int, default=DEPTH, help="blocks of the model")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / "graphs.json")
    options = parser.parse_args()
    command = " ".join(["python -m benchmarks.graphs", *sys.argv[1:]])
    result: dict[str, Any] = environment() | {"command": command, "blocks": []}
    for name in options.blocks:
        blocks = [BLOCKS[name]() for _ in range(options.depth)]
        for T in options.tokens:
            result["blocks"].append(measure(name, T, blocks))
            print(result["blocks"][-1], flush=True)
            options.out.write_text(json.dumps(result, indent=1) + "\n")
        del blocks
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
