"""``python -m benchmarks.capture``: what it costs to capture, match, prove and rewrite an expert loop.  CPU only.

The loops are those of transformers' eager experts (a hit list over stacked weights) and of 4.57's sparse blocks (a hit
list, or ``range(E)``, over a ModuleList), at tiny width: the cost depends on the number of experts, not on their size.
Beside our whole way, Dynamo included and Inductor excluded, stands what plain capture costs that unrolls the loop and
does nothing with the graph.  Every number is the best of three compiles in one process, after one that warms it up;
results go to ``benchmarks/results/capture.json``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from moe_inductor.backend import MoEInductor
from moe_inductor.capture import scope
from moe_inductor.prove.assumptions import Assumed

RESULTS = pathlib.Path(__file__).parent / "results" / "capture.json"
EXPERTS = (8, 32, 128, 256)
H, I, K, TOKENS, RUNS = 32, 48, 2, 16, 3


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3 = (nn.Linear(H, I, bias=False) for _ in range(2))
        self.w2 = nn.Linear(I, H, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """One layer; subclasses say where the weights are and which experts are visited."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.gate = nn.Linear(H, num_experts, bias=False)

    def visited(self, mask: torch.Tensor) -> Any:
        return torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero().squeeze(-1)

    def expert(self, e: Any, rows: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = torch.topk(F.softmax(self.gate(x), dim=-1), K, dim=-1)
        out, mask = torch.zeros_like(x), F.one_hot(ids, self.num_experts).permute(2, 1, 0)
        for e in self.visited(mask):
            slot, token = torch.where(mask[e])
            out.index_add_(0, token, self.expert(e, x[token]) * weights[token, slot, None])
        return out


class Stacked(Block):
    def __init__(self, num_experts: int) -> None:
        super().__init__(num_experts)
        self.gate_up_proj = nn.Parameter(torch.randn(num_experts, 2 * I, H) * 0.2)
        self.down_proj = nn.Parameter(torch.randn(num_experts, H, I) * 0.2)

    def expert(self, e: Any, rows: torch.Tensor) -> torch.Tensor:
        gate, up = F.linear(rows, self.gate_up_proj[e]).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.down_proj[e])


class Modules(Block):
    def __init__(self, num_experts: int) -> None:
        super().__init__(num_experts)
        self.experts = nn.ModuleList(Mlp() for _ in range(num_experts))

    def expert(self, e: Any, rows: torch.Tensor) -> torch.Tensor:
        return self.experts[e](rows)


class ModulesInRange(Modules):
    """The loop visits every expert."""

    def visited(self, mask: torch.Tensor) -> Any:
        return range(self.num_experts)


LOOPS: dict[str, type[Block]] = {
    "stacked": Stacked,
    "ModuleList": Modules,
    "ModuleList, range(E)": ModulesInRange,
}


class Ours(MoEInductor):
    """Everything but Inductor."""

    def _inductor(self, mode: Any, options: Any, name: Any) -> Callable[..., Any]:
        return lambda gm, inputs, **kwargs: gm.forward


class Unrolled:
    """Captures as far as we do, one pass per expert, and does not look at the graph.

    It runs as it is, right here because an expert without tokens adds nothing.
    """

    nodes = 0

    def __call__(self, gm: torch.fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
        self.nodes = len(gm.graph.nodes)
        Assumed(scope.assumptions())  # takes the markers out
        return gm.forward


def compile_once(module: nn.Module, backend: Any, x: torch.Tensor) -> float:
    torch._dynamo.reset()
    start = time.perf_counter()
    with torch.no_grad():
        torch.compile(module, backend=backend)(x)
    return time.perf_counter() - start


def measure(name: str, num_experts: int, layers: int) -> dict[str, Any]:
    torch.manual_seed(0)
    module = nn.Sequential(*(LOOPS[name](num_experts) for _ in range(layers))).eval()
    x = torch.randn(TOKENS, H)
    ours, unrolled = Ours(), Unrolled()
    ours.install()
    scope.install(unrolled, speculate=True)
    try:
        seconds, stages = [], {}
        for _ in range(RUNS):
            seconds.append(compile_once(module, ours, x))
            (report,) = ours.reports
            assert len(report.fused) == layers, report.summary()
            stages = {k: round(v, 3) for k, v in report.stage_seconds.items()}
        plain = [compile_once(module, unrolled, x) for _ in range(1 if num_experts > 32 else RUNS)]
    finally:
        scope.uninstall(ours)
        scope.uninstall(unrolled)
    return {
        "loop": name,
        "E": num_experts,
        "layers": layers,
        "seconds": round(min(seconds), 3),
        "stages": stages,
        "unrolled_capture_seconds": round(min(plain), 3),
        "unrolled_nodes": unrolled.nodes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    options = parser.parse_args()
    for name in LOOPS:
        measure(name, 4, 1)  # imports, caches of patterns
    cells = []
    cases = [(name, e, 1) for name in LOOPS for e in EXPERTS]
    for name, e, layers in (*cases, ("stacked", 128, 4), ("ModuleList", 128, 4)):
        cells.append(measure(name, e, layers))
        print(json.dumps(cells[-1]), flush=True)
    result = {
        "command": "python -m benchmarks.capture",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "threads": torch.get_num_threads(),
        "cells": cells,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
