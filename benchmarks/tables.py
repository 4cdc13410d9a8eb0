"""``python -m benchmarks.tables``: write the tables of docs/performance.md from benchmarks/results/*.json.

Text between ``<!-- tables: begin -->`` and ``<!-- tables: end -->`` is generated; ``--check`` only compares.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import sys
from collections.abc import Iterable
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


def cells_table(cells: list[dict[str, Any]]) -> list[str]:
    header = [
        "shape",
        "T",
        "active experts",
        "ours",
        "ours, weights as a list",
        "HF grouped_mm compiled",
        "HF eager loop",
        "vs compiled",
        "vs loop",
        "of roofline",
        "rmse vs eager's",
    ]
    rows = []
    for cell in cells:
        us = cell["us"]
        rows.append(
            [
                cell["shape"],
                str(cell["T"]),
                f"{cell['active_experts']:g}",
                number(us["ours"]),
                number(us["ours_per_expert"]),
                number(us["hf_compiled"]),
                number(us["hf_eager"]),
                f"{us['hf_compiled'] / us['ours']:.2f}x",
                f"{us['hf_eager'] / us['ours']:.1f}x",
                f"{cell['roofline_fraction']:.2f}",
                f"{cell['ratio_to_eager']:.2f}",
            ]
        )
    return table(header, rows)


def summary_table(cells: list[dict[str, Any]]) -> list[str]:
    def row(name: str, chosen: list[dict[str, Any]]) -> list[str]:
        compiled = [c["us"]["hf_compiled"] / c["us"]["ours"] for c in chosen]
        return [
            name,
            f"{geomean(compiled):.2f}x",
            f"{min(compiled):.2f}x",
            f"{geomean(c['us']['hf_eager'] / c['us']['ours'] for c in chosen):.1f}x",
            f"{geomean(c['roofline_fraction'] for c in chosen):.2f}",
            f"{geomean(c['us']['ours_per_expert'] / c['us']['ours'] for c in chosen):.3f}",
        ]

    rows = [row(str(T), [c for c in cells if c["T"] == T]) for T in sorted({c["T"] for c in cells})]
    header = [
        "T",
        "vs HF compiled",
        "worst shape",
        "vs HF eager loop",
        "of roofline",
        "list / stacked time",
    ]
    return table(header, [*rows, row("all", cells)])


def render(run: dict[str, Any]) -> list[str]:
    cells = run["cells"]
    slower = [
        f"{c['shape']} T={c['T']}" for c in cells if c["us"]["ours"] >= c["us"]["hf_compiled"]
    ]
    rejected = [f"{c['shape']} T={c['T']}" for c in cells if not c["accepted"]]
    return [
        f"{run['gpu']}, torch {run['torch']}, Triton {run['triton']}, transformers {run['transformers']},"
        f" {run['dtype']}, {run['date']}. `{run['command'].split(' --out')[0]}`",
        "",
        f"{len(cells)} cells. Not faster than HF grouped_mm compiled: {', '.join(slower) or 'none'}."
        f" Outside the accuracy rule: {', '.join(rejected) or 'none'}.",
        "",
        "Geometric means over the shapes:",
        "",
        *summary_table(cells),
        "us per block, router logits to output:",
        "",
        *cells_table(cells),
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


def render_any(run: dict[str, Any]) -> list[str]:
    if "rows" in run:
        return render_layers(run)
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
