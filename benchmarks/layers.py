"""``python -m benchmarks.layers``: unmodified Hugging Face blocks at real size, through torch.compile, on the GPU.

What a user gets: ``torch.compile(block, backend="moe_inductor")`` of transformers' own Mixtral-8x7B, Qwen3-30B-A3B and
DeepSeek-V3 block in bf16, in default mode and with CUDA graphs ("reduce-overhead").  The outputs are compared with
fp64 by the rule of tests/oracle.py, and the time per call (Python included) stands beside that of the same block
under ``backend="inductor"`` in the same run.  Results go to ``benchmarks/results/layers.json`` or ``--out``.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import gc
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import torch
import transformers
import triton
from torch import nn

from tests.oracle import FLOOR, ROW_FACTOR, TOTAL_FACTOR

TOKENS = (1, 8, 33, 512, 4096)
MODES = ("default", "reduce-overhead")
RESULTS = pathlib.Path(__file__).parent / "results"


def mixtral() -> nn.Module:
    from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=4096, intermediate_size=14336, num_local_experts=8, num_experts_per_tok=2
    )
    return build(MixtralSparseMoeBlock, config)


def qwen3() -> nn.Module:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import (
        Qwen3MoeConfig,
        Qwen3MoeSparseMoeBlock,
    )

    config = Qwen3MoeConfig(
        hidden_size=2048,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
    )
    return build(Qwen3MoeSparseMoeBlock, config)


def dsv3() -> nn.Module:
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Config, DeepseekV3MoE

    return build(DeepseekV3MoE, DeepseekV3Config())  # its defaults are the released model's


BLOCKS = {"mixtral": mixtral, "qwen3": qwen3, "dsv3": dsv3}


def build(block_class: type[nn.Module], config: Any) -> nn.Module:
    """In bf16, on the GPU, every parameter at unit scale: N(0, 1 / fan_in)."""
    config._experts_implementation = "grouped_mm"
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            block = block_class(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(default)
    for tensor in [*block.parameters(), *block.buffers()]:
        tensor.normal_(std=tensor.shape[-1] ** -0.5) if tensor.dim() > 1 else tensor.zero_()
    return block


class Choice:
    """What the block's own router chose in eager mode: the oracle computes the experts for exactly that."""

    def __init__(self, block: nn.Module) -> None:
        self.hook = block.experts.register_forward_pre_hook(self._note)

    def _note(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self.x, self.topk_ids, self.topk_weights = args[0], args[1], args[2]


def exact(block: nn.Module, x: torch.Tensor, choice: Choice) -> torch.Tensor:
    """fp64 output of the block for the eager router's choice; expert by expert, to fit beside the weights."""
    rows = choice.x.double()
    out = torch.zeros_like(rows)
    for e in choice.topk_ids.unique().tolist():
        token, slot = torch.where(choice.topk_ids == e)
        gate, up = (rows[token] @ block.experts.gate_up_proj[e].double().T).chunk(2, dim=-1)
        y = (nn.functional.silu(gate) * up) @ block.experts.down_proj[e].double().T
        out.index_add_(0, token, y * choice.topk_weights[token, slot, None].double())
    out = out.view(x.shape)
    if hasattr(block, "shared_experts"):
        shared = block.shared_experts
        wide = x.double()
        gate = nn.functional.silu(wide @ shared.gate_proj.weight.double().T)
        up = wide @ shared.up_proj.weight.double().T
        out += (gate * up) @ shared.down_proj.weight.double().T
    return out


def first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def rms(a: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    square = a.double().square()
    return (square.mean() if dim is None else square.mean(dim)).sqrt()


def verdict(ours: torch.Tensor, eager: torch.Tensor, truth: torch.Tensor) -> dict[str, Any]:
    """The fp64 rule over the tensor and per row.  A row where rounding changed the choice of experts has a different
    function value, in eager as well as in ours; such rows (near ties) are counted, and few, and left out."""
    mine, theirs = (ours - truth).flatten(0, -2), (eager - truth).flatten(0, -2)
    typical = rms(theirs).item()
    tied = rms(mine, -1) > 50 * typical + FLOOR
    mine = mine[~tied]
    worst = rms(mine, -1).max().item() if len(mine) else 0.0
    total = rms(mine).item() if len(mine) else 0.0
    return {
        "rmse_ours": total,
        "rmse_eager": typical,
        "ratio": total / max(typical, 1e-30),
        "worst_row_ratio": worst / max(typical, 1e-30),
        "near_ties": int(tied.sum()),
        "accepted": bool(
            torch.isfinite(ours).all()
            and total <= TOTAL_FACTOR * typical + FLOOR
            and worst <= ROW_FACTOR * typical + FLOOR
            and int(tied.sum()) <= max(1, len(tied) // 50)
        ),
    }


def call_us(runs: dict[str, Callable[[], Any]], rounds: int = 4) -> dict[str, float]:
    """Median time per call on the stream, launches included; the best of some interleaved rounds, because at small
    T the host decides, and a virtual machine's host has bad moments."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            median = triton.testing.do_bench(run, warmup=10, rep=30, return_mode="median")
            best[name] = min(best[name], 1e3 * median)
    return best


def measure(name: str, tokens: tuple[int, ...]) -> list[dict[str, Any]]:
    block = BLOCKS[name]()
    choice = Choice(block)
    xs = {
        T: torch.randn(1, T, block_width(block), device="cuda", dtype=torch.bfloat16)
        for T in tokens
    }
    eager: dict[int, torch.Tensor] = {}
    truth: dict[int, torch.Tensor] = {}
    for T, x in xs.items():
        eager[T] = first(block(x))
        truth[T] = exact(block, x, choice)
    choice.hook.remove()
    rows = []
    for mode in MODES:
        torch._dynamo.reset()
        ours = torch.compile(block, backend="moe_inductor", mode=mode, options=None)
        stock = torch.compile(block, mode=mode)
        for T, x in xs.items():
            for _ in range(3):  # CUDA graphs record on the second call and replay from the third
                got = first(ours(x)).clone()
            row = {"block": name, "mode": mode, "T": T, **verdict(got, eager[T], truth[T])}
            for _ in range(3):
                stock(x)
            runs = {
                "us_ours": functools.partial(ours, x),
                "us_inductor": functools.partial(stock, x),
            }
            row |= call_us(runs)
            row["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            rows.append(row)
            print(
                f"{name:8} {mode:16} T={T:<5} ratio {row['ratio']:.2f} worst row {row['worst_row_ratio']:.2f} "
                f"ties {row['near_ties']} {'ok' if row['accepted'] else 'OUT OF RULE'}  "
                f"ours {row['us_ours']:9.1f} us  inductor {row['us_inductor']:9.1f} us",
                flush=True,
            )
    return rows


def block_width(block: nn.Module) -> int:
    return block.experts.gate_up_proj.shape[-1]


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", nargs="+", choices=list(BLOCKS), default=list(BLOCKS))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / "layers.json")
    options = parser.parse_args()
    result: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "date": datetime.date.today().isoformat(),
        "command": f"python -m benchmarks.layers {' '.join(sys.argv[1:])}".strip(),
        "rows": [],
    }
    for name in options.blocks:
        result["rows"] += measure(name, tuple(options.tokens))
        options.out.write_text(json.dumps(result, indent=1))  # a later time-out keeps what was done
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
    return 0 if all(row["accepted"] for row in result["rows"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
