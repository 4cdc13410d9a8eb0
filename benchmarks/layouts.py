"""``python -m benchmarks.layouts``: what each way to store the experts costs, against stacked ``[E, 2I, H]``.

The same experts are stored in every way that models store them in, one way at a time, and the block (``topk_routing``
and ``fused_experts``) is timed side by side with the stacked one, in a CUDA graph over rotating inputs.  Results go to
``benchmarks/results/layouts.json`` or ``--out``.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch

from moe_inductor.ops.cuda import fused_experts, topk_routing

from .cells import SHAPES, Inputs, Shape, Weights, make_inputs, make_weights
from .h200 import RESULTS, environment
from .timing import graph_us

TOKENS = (1, 8, 128, 512, 2048, 8192)


class Stored(NamedTuple):
    """Arguments of ``fused_experts``; as lists they are one tensor, or one per expert."""

    gate_up_proj: list[torch.Tensor]
    up_proj: list[torch.Tensor]
    down_proj: list[torch.Tensor]
    interleaved: bool = False


def _transposed(weight: torch.Tensor) -> torch.Tensor:
    return weight.mT.contiguous().mT


def _separate(w: Weights) -> Stored:
    gate, up = w.gate_up.chunk(2, 1)
    return Stored([gate.contiguous()], [up.contiguous()], [w.down])


def _interleaved(w: Weights) -> Stored:
    return Stored([torch.stack(w.gate_up.chunk(2, 1), 2).flatten(1, 2)], [], [w.down], True)


def _in_out(stored: Stored) -> Stored:
    one = [[_transposed(t) for t in tensors] for tensors in stored[:3]]
    return Stored(*one, stored.interleaved)


def _list(stored: Stored) -> Stored:
    """One tensor per expert, each in memory of its own."""
    lists = [[e.clone() for t in tensors for e in t] for tensors in stored[:3]]
    return Stored(*lists, stored.interleaved)


def stacked(w: Weights) -> Stored:
    return Stored([w.gate_up], [], [w.down])


STORAGES: dict[str, Callable[[Weights], Stored]] = {
    "gate and up separate": _separate,
    "gate and up interleaved": _interleaved,
    "[in, out]": lambda w: _in_out(stacked(w)),
    "[in, out], interleaved": lambda w: _in_out(_interleaved(w)),
    "list": lambda w: _list(stacked(w)),
    "list, separate": lambda w: _list(_separate(w)),
    "list, separate, [in, out]": lambda w: _list(_in_out(_separate(w))),
}


def block(shape: Shape, stored: Stored) -> Callable[[Inputs], torch.Tensor]:
    def run(one: Inputs) -> torch.Tensor:
        x = one.hidden_states
        topk_weights, topk_ids = topk_routing(one.router_logits, shape.k, True, x.dtype)
        return fused_experts(
            x, topk_ids, topk_weights, *stored[:3], "silu", x.dtype, interleaved=stored.interleaved
        )

    return run


def side_by_side(
    one: Callable[[Inputs], torch.Tensor],
    two: Callable[[Inputs], torch.Tensor],
    inputs: list[Inputs],
) -> tuple[float, float]:
    """us of each, in both orders: the clock falls while the card is at its power limit."""
    first, second = graph_us(one, inputs, 60), graph_us(two, inputs, 60)
    second, first = second + graph_us(two, inputs, 60), first + graph_us(one, inputs, 60)
    return first / 2, second / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / "layouts.json")
    parser.add_argument("--shapes", nargs="*", default=[shape.name for shape in SHAPES])
    parser.add_argument("--tokens", nargs="*", type=int, default=list(TOKENS))
    parser.add_argument("--storages", nargs="*", default=list(STORAGES))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    command = " ".join(["python -m benchmarks.layouts", *sys.argv[1:]])
    run = {**environment(), "command": command, "storages": []}
    for shape in SHAPES:
        if shape.name not in arguments.shapes:
            continue
        weights = make_weights(shape)
        plain = block(shape, stacked(weights))
        inputs = {T: make_inputs(shape, T) for T in arguments.tokens}
        for name in arguments.storages:
            other = block(shape, STORAGES[name](weights))
            for T, sets in inputs.items():
                us = side_by_side(plain, other, sets)
                run["storages"].append(
                    {"shape": shape.name, "T": T, "storage": name, "stacked_us": us[0], "us": us[1]}
                )
                print(f"{shape.name} T={T} {name}: {us[1]:.1f} us, stacked {us[0]:.1f}", flush=True)
            del other
            torch.cuda.empty_cache()
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(run, indent=1) + "\n")
        del weights, plain


if __name__ == "__main__":
    main()
