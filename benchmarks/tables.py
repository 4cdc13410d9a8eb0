"""``python -m benchmarks.tables``: write the tables of docs/performance.md from benchmarks/results/*.json.

Text between ``<!-- tables: begin -->`` and ``<!-- tables: end -->`` is generated; ``--check`` only compares.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pathlib
import sys
from collections.abc import Callable, Iterable
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"


def geomean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def number(us: float) -> str:
    return f"{us:,.1f}" if us < 1000 else f"{us:,.0f}"


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    line = "|".join(["", *header, ""])
    rule = "|" + "---|" + "---:|" * (len(header) - 1)
    return [line, rule, *("|".join(["", *row, ""]) for row in rows), ""]


NAMES = {
    "ours_per_expert": "ours, weights as a list",
    "ours_batch_invariant": "ours, batch-invariant",
    "hf_compiled": "HF grouped_mm compiled",
    "hf_eager": "HF eager loop",
    "triton_kernels": "triton_kernels",
    "vllm": "vLLM",
    "quack": "quack",
}
PEERS = ("hf_compiled", "triton_kernels", "vllm", "quack")


def best_peer(cell: dict[str, Any]) -> str:
    measured = {name: us for name, us in cell["us"].items() if name in PEERS}
    return min(measured, key=measured.__getitem__)


def over_best(cell: dict[str, Any]) -> float:
    return cell["us"][best_peer(cell)] / cell["us"]["ours"]


def over(name: str) -> Callable[[dict[str, Any]], float]:
    """Time of ``name`` / time of ours; nan where it was not measured."""
    return lambda cell: cell["us"].get(name, math.nan) / cell["us"]["ours"]


def cells_table(cells: list[dict[str, Any]], roofline: bool) -> list[str]:
    present = [name for name in NAMES if name in cells[0]["us"]]
    header = ["shape", "T", "active experts", "ours", *(NAMES[name] for name in present)]
    loop = "hf_eager" in present
    header += ["best peer", "vs best", *(["vs loop"] if loop else [])]
    header += ["of roofline"] if roofline else []
    header += ["rmse vs eager's"]
    rows = []
    for cell in cells:
        us = cell["us"]
        row = [cell["shape"], str(cell["T"]), f"{cell['active_experts']:g}", number(us["ours"])]
        row += [number(us[name]) for name in present]
        row += [NAMES[best_peer(cell)], f"{over_best(cell):.2f}x"]
        row += [f"{over('hf_eager')(cell):.1f}x"] if loop else []
        row += [f"{cell['roofline_fraction']:.2f}"] if roofline else []
        rows.append([*row, f"{cell['ratio_to_eager']:.2f}"])
    return table(header, rows)


@dataclasses.dataclass(frozen=True)
class Must:
    """One line of the goals: a ratio over some cells, its least geometric mean and its least single value."""

    what: str
    tokens: tuple[int, int]  # first and last T
    ratio: Callable[[dict[str, Any]], float]
    mean: float | None = None
    worst: float | None = None


ALL = 1 << 30
MUSTS = (
    Must("best peer, T = 1", (1, 1), over_best, 1.20, 1.08),
    Must("best peer, T = 2..8", (2, 8), over_best, 1.06, 1.0),
    Must("best peer, T = 32", (32, 32), over_best, 1.02),
    Must("best peer, T = 128", (128, 128), over_best, 1.05),
    Must("best peer, T = 512", (512, 512), over_best, None, 1.0),
    Must("best peer, T = 2048", (2048, 2048), over_best, 1.0),
    Must("triton_kernels, T >= 8192", (8192, ALL), over("triton_kernels"), 0.97),
    Must("vLLM, T >= 8192", (8192, ALL), over("vllm"), 1.25),
    Must("HF grouped_mm compiled, T = 1", (1, 1), over("hf_compiled"), 2.3),
    Must("HF grouped_mm compiled, T <= 2048", (1, 2048), over("hf_compiled"), 1.5),
    Must("HF eager loop, T <= 512", (1, 512), over("hf_eager"), 15.0),
    Must("stacked / list, T <= 512", (1, 512), lambda c: 1 / over("ours_per_expert")(c), 1 / 1.02),
    Must("stacked / list, larger", (513, ALL), lambda c: 1 / over("ours_per_expert")(c), 1 / 1.06),
)


def musts_table(cells: list[dict[str, Any]]) -> list[str]:
    rows = []
    for must in MUSTS:
        chosen = [c for c in cells if must.tokens[0] <= c["T"] <= must.tokens[1]]
        ratios = {f"{c['shape']} T={c['T']}": must.ratio(c) for c in chosen}
        if not ratios or any(map(math.isnan, ratios.values())):
            continue
        mean, worst = geomean(ratios.values()), min(ratios, key=ratios.__getitem__)
        met = mean >= (must.mean or 0) and ratios[worst] >= (must.worst or 0)
        asked = [f"mean {must.mean:.2f}x"] if must.mean else []
        asked += [f"each {must.worst:.2f}x"] if must.worst else []
        row = [must.what, ", ".join(asked), f"{mean:.2f}x", f"{ratios[worst]:.2f}x ({worst})"]
        rows.append([*row, str(len(ratios)), "yes" if met else "**no**"])
    return table(["against", "must", "geometric mean", "worst", "cells", "met"], rows)


def summary_table(cells: list[dict[str, Any]], roofline: bool) -> list[str]:
    loop = all("hf_eager" in c["us"] for c in cells)
    invariant = all("ours_batch_invariant" in c["us"] for c in cells)
    compiled = all("hf_compiled" in c["us"] for c in cells)
    lists = all("ours_per_expert" in c["us"] for c in cells)

    def row(name: str, chosen: list[dict[str, Any]]) -> list[str]:
        best = [over_best(c) for c in chosen]
        return [
            name,
            f"{geomean(best):.2f}x",
            f"{min(best):.2f}x",
            *([f"{geomean(map(over('hf_compiled'), chosen)):.2f}x"] if compiled else []),
            *([f"{geomean(map(over('hf_eager'), chosen)):.1f}x"] if loop else []),
            *([f"{geomean(c['roofline_fraction'] for c in chosen):.2f}"] if roofline else []),
            *([f"{geomean(map(over('ours_per_expert'), chosen)):.3f}"] if lists else []),
            *([f"{geomean(map(over('ours_batch_invariant'), chosen)):.3f}"] if invariant else []),
        ]

    rows = [row(str(T), [c for c in cells if c["T"] == T]) for T in sorted({c["T"] for c in cells})]
    header = ["T", "vs best peer", "worst shape", *(["vs HF compiled"] if compiled else [])]
    header += ["vs HF eager loop"] if loop else []
    header += ["of roofline"] if roofline else []
    header += ["list / stacked time"] if lists else []
    header += ["batch-invariant / default time"] if invariant else []
    return table(header, [*rows, row("all", cells)])


def render(run: dict[str, Any]) -> list[str]:
    cells = run["cells"]
    peers = [NAMES[name] for name in PEERS if name in cells[0]["us"]]
    slower = [f"{c['shape']} T={c['T']} ({over_best(c):.2f}x)" for c in cells if over_best(c) < 1]
    rejected = [f"{c['shape']} T={c['T']}" for c in cells if not c["accepted"]]
    roofline = run["gpu"] == "NVIDIA H200"  # whose ceilings the floor is made of
    lines = [
        f"{run['gpu']}, torch {run['torch']}, Triton {run['triton']}, transformers {run['transformers']},"
        f" {run['dtype']}, {run['date']}. `{run['command'].split(' --out')[0]}`",
        "",
    ]
    if "note" in run:
        lines += [run["note"], ""]
    if "ceilings" in run:
        ceilings = run["ceilings"] if isinstance(run["ceilings"], list) else [run["ceilings"]]
        lines += [
            "Measured ceilings: "
            + "; ".join(
                f"{c['copy_bytes_per_s'] / 1e12:.2f} TB/s (copy), {c['cublas_flop_per_s'] / 1e12:.0f} TFLOP/s"
                for c in ceilings
            )
            + ".",
            "",
        ]
    lines += [
        f"{len(cells)} cells; peers: {', '.join(peers)}. Slower than the best of them:"
        f" {', '.join(slower) or 'nowhere'}. Outside the accuracy rule: {', '.join(rejected) or 'none'}.",
        "",
    ]
    if all(name in cells[0]["us"] for name in ("hf_compiled", "triton_kernels", "vllm")):
        lines += [
            "The goals, which are meant for an H200 (time of the other / time of ours):",
            "",
            *musts_table(cells),
        ]
    return [
        *lines,
        "Geometric means over the shapes:",
        "",
        *summary_table(cells, roofline),
        "us per block, router logits to output:",
        "",
        *cells_table(cells, roofline),
    ]


def layers_table(rows: list[dict[str, Any]]) -> list[str]:
    header = [
        "block",
        "mode",
        "T",
        "ours",
        "inductor",
        "vs inductor",
        "rmse vs eager's",
        "worst row",
    ]
    return table(
        header,
        [
            [
                row["block"],
                row["mode"],
                str(row["T"]),
                number(row["us_ours"]),
                number(row["us_inductor"]),
                f"{row['us_inductor'] / row['us_ours']:.2f}x",
                f"{row['ratio']:.2f}",
                f"{row['worst_row_ratio']:.2f}",
            ]
            for row in rows
        ],
    )


def render_layers(run: dict[str, Any]) -> list[str]:
    rejected = [f"{r['block']} {r['mode']} T={r['T']}" for r in run["rows"] if not r["accepted"]]
    return [
        f"{run['gpu']}, torch {run['torch']}, Triton {run['triton']}, transformers {run['transformers']},"
        f" bfloat16, {run['date']}. `{run['command'].split(' --out')[0]}`",
        "",
        "Unmodified blocks of transformers through `torch.compile`, us per call on the stream, Python included, best of"
        " interleaved rounds; without CUDA graphs (mode default) small T is launch time and varies with the host.",
        f"Outside the accuracy rule: {', '.join(rejected) or 'none'}.",
        "",
        *layers_table(run["rows"]),
    ]


def render_graphs(run: dict[str, Any]) -> list[str]:
    columns = {
        "ops": "us_ops",
        "library's GEMM and ops": "us_gate_and_ops",
        "one op": "us_block_op",
        "a model of one block": "us_block",
        "a block in a model of so many": "us_block_of_model",
        "2 % and 3 us over the ops": "allowed_us",
        "no graphs: a model of one block": "us_default",
        "no graphs: a block in a model of so many": "us_default_of_model",
        "no graphs: one block, inductor": "us_default_inductor",
    }
    rows = [
        [row["block"], str(row["T"]), str(row.get("depth", 8))]
        + [number(row[name]) if name in row else "" for name in columns.values()]
        for row in run["blocks"]
    ]
    return [
        f"{run['gpu']}, torch {run['torch']}, Triton {run['triton']}, transformers {run['transformers']},"
        f" {run['dtype']}, {run['date']}. `{run['command'].split(' --out')[0]}`",
        "",
        "Unmodified blocks of transformers, us per block. *ops*: `topk_routing` and `fused_experts`, from the"
        " router's logits, in a CUDA graph of their own, *depth* blocks after each other; behind the router's"
        " GEMM of cuBLAS; and as the one op that Inductor's code calls, the router's product included. Then"
        ' the compiled model with `mode="reduce-overhead"`, one block and *depth* of them, and without graphs. What a'
        " call of a model with graphs has more than the op is torch's copy of the input into the graph's"
        " memory (5 us at T = 8, 15 us from T = 64 on, says the profiler), the gap before the graph, and at T"
        " = 1 of qwen3 the host, which cannot launch replays of one block as fast as the GPU runs them."
        " Without graphs it is the host that takes the time at few tokens.",
        "",
        *([run["note"], ""] if "note" in run else []),
        *table(["block", "T", "depth", *columns], rows),
    ]


def render_layouts(run: dict[str, Any]) -> list[str]:
    rows: dict[str, dict[int, dict[str, float]]] = {}
    for one in run["storages"]:
        row = rows.setdefault(one["storage"], {})
        row.setdefault(one["T"], {})[one["shape"]] = one["us"] / one["stacked_us"]
    tokens = sorted({T for row in rows.values() for T in row})

    def of(ratios: dict[str, float]) -> str:
        worst = max(ratios, key=ratios.__getitem__)
        return f"{geomean(ratios.values()):.2f} ({worst} {ratios[worst]:.2f})"

    shapes = dict.fromkeys(one["shape"] for one in run["storages"])
    return [
        f"{run['gpu']}, torch {run['torch']}, Triton {run['triton']}, {run['dtype']}, {run['date']}."
        f" `{run['command'].split(' --out')[0]}`",
        "",
        f"Time of a block ({', '.join(shapes)}) whose experts are stored otherwise, divided by that of stacked"
        " `[E, 2I, H]` and `[E, H, I]`, side by side: geometric mean, and the worst shape. gpt-oss stores"
        " *[in, out], interleaved*, Llama 4 *[in, out]*; a `ModuleList` of three linear layers is *list, separate*.",
        "",
        *([run["note"], ""] if "note" in run else []),
        *table(
            ["experts stored as", *(f"T = {T}" for T in tokens)],
            [
                [name, *(of(row[T]) if T in row else "" for T in tokens)]
                for name, row in rows.items()
            ],
        ),
    ]


def render_capture(run: dict[str, Any]) -> list[str]:
    rows = []
    for cell in run["cells"]:
        stages = cell["stages"]
        ours = stages["all stages"]
        rows.append(
            [
                cell["loop"],
                str(cell["E"]),
                str(cell["layers"]),
                f"{cell['seconds']:.2f}",
                f"{cell['seconds'] - ours:.2f}",
                f"{ours:.2f}",
                f"{cell['unrolled_capture_seconds']:.2f}",
                f"{cell['unrolled_capture_seconds'] / cell['seconds']:.1f}x",
            ]
        )
    header = ["loop", "E", "layers", "ours, s", "Dynamo", "our stages", "unrolled, s", "ratio"]
    return [
        f"What compiling an expert loop costs, without Inductor: torch {run['torch']}, Python {run['python']},"
        f" {run['threads']} threads, CPU, {run['date']}. `{run['command']}`",
        "",
        "*ours*: capture, match, proof, rewrite. *unrolled*: capture alone, one pass per expert, nothing done with the"
        " graph. Best of three in one process.",
        "",
        *table(header, rows),
    ]


def render_compiled(run: dict[str, Any]) -> list[str]:
    header = [
        "kernel",
        "weights",
        "tile",
        "warps",
        "stages",
        "registers",
        "spilled",
        "shared",
        "used in",
    ]
    rows = []
    for kernel in run["kernels"]:
        tile = " x ".join(str(kernel[n]) for n in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if n in kernel)
        rows.append(
            [
                kernel["kernel"].strip("_"),
                kernel["stored"],
                tile,
                str(kernel.get("num_warps", 4)),
                str(kernel.get("num_stages", "")),
                str(kernel["registers"]),
                f"{kernel['spilled']} B",
                f"{kernel['shared'] / 1024:.0f} KiB",
                _cells(kernel["cells"]),
            ]
        )
    spilling = sum(kernel["spilled"] > 0 for kernel in run["kernels"])
    return [
        f"What the assembler says of every kernel that the six shapes launch on {run['target']}, bf16: registers per "
        f"thread, spilled bytes per thread, shared memory per block. {spilling} of {len(rows)} spill. "
        f"`{run['command']}` (no GPU needed), Triton {run['triton']}, torch {run['torch']}, {run['date']}.",
        "",
        *table(header, rows),
    ]


def _cells(cells: list[str]) -> str:
    """ "qwen3 1", "qwen3 2" as "qwen3 1, 2"."""
    tokens: dict[str, list[str]] = {}
    for cell in dict.fromkeys(cells):
        shape, T = cell.split()
        tokens.setdefault(shape, []).append(T)
    return "; ".join(f"{shape} {', '.join(many)}" for shape, many in tokens.items())


def render_any(run: dict[str, Any]) -> list[str]:
    if "rows" in run:
        return render_layers(run)
    if "kernels" in run:
        return render_compiled(run)
    if "blocks" in run:
        return render_graphs(run)
    if "storages" in run:
        return render_layouts(run)
    return render_capture(run) if "threads" in run else render(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="fail if the page is out of date")
    arguments = parser.parse_args()
    lines: list[str] = []
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        run = json.loads(path.read_text())
        lines += [f"### {path.stem}", "", *render_any(run)]
    page = PAGE.read_text()
    head, rest = page.split(BEGIN)
    tail = rest.split(END)[1]
    new = "\n".join([head + BEGIN, "", *lines]) + END + tail
    if arguments.check:
        sys.exit(0 if new == page else "docs/performance.md: run python -m benchmarks.tables")
    PAGE.write_text(new)


if __name__ == "__main__":
    main()
