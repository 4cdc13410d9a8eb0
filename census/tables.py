"""``python -m census.tables``: write docs/coverage.md and docs/capture.md from census/results.

Text between ``<!-- tables: begin -->`` and ``<!-- tables: end -->`` is generated; ``--check`` only compares.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from census import results
from moe_inductor.reasons import Code

Row = dict[str, Any]

DOCS = Path(__file__).parents[1] / "docs"
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
# As users know them; "own" is the only loop of a family that offers no choice.
IMPLEMENTATIONS = {
    "grouped_mm": "grouped_mm (default)",
    "batched_mm": "batched_mm",
    "eager": "eager (loop)",
    "own": "own code",
}
LOOPS = ("own", "eager")
MODES = ("inference", "training")
DTYPES = {"float32": "fp32", "bfloat16": "bf16"}


def table(header: list[str], rows: Iterable[list[str]]) -> list[str]:
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return [
        "|".join(["", *header, ""]),
        "|" + "---|" * len(header),
        *("|".join(["", *row, ""]) for row in escaped),
        "",
    ]


def label(row: Row) -> str:
    """What came of one row, in a word or two."""
    status = row["status"]
    if status in ("fused", "partly fused"):
        whole = "" if status == "fused" else f" ({row['fused']} of {row['blocks']})"
        return ("fused" if row["router_fused"] else "experts fused") + whole
    if status == "refused":
        return f"no: {row['code']}"
    words = {"silent": "no, nothing said", "not MoE-fusable": "no MoE to fuse"}
    return words.get(status, str(status).upper())


def cell(rows: list[Row], of: Callable[[Row], str] = label) -> str:
    """One text for all modes and dtypes where they agree, else as few as possible."""
    if not rows:
        return ""
    by_mode = {mode: [r for r in rows if r["mode"] == mode] for mode in MODES}
    said = {mode: _by_dtype(some, of) for mode, some in by_mode.items() if some}
    if len(set(said.values())) == 1:
        return next(iter(said.values()))
    return "; ".join(f"{mode}: {text}" for mode, text in said.items())


def _by_dtype(rows: list[Row], of: Callable[[Row], str]) -> str:
    said = {DTYPES[row["dtype"]]: of(row) for row in rows}
    if len(set(said.values())) == 1:
        return next(iter(said.values()))
    return ", ".join(f"{dtype} {text}" for dtype, text in said.items())


def names(rows: Iterable[Row]) -> str:
    return ", ".join(sorted({row["case"] for row in rows}))


# --- docs/coverage.md ---------------------------------------------------------------------------------------------


def totals(runs: list[dict[str, Any]]) -> list[str]:
    lines = []
    for run in runs:
        for implementation, title in IMPLEMENTATIONS.items():
            rows = [r for r in _blocks(run) if r["implementation"] == implementation]
            if rows:
                lines.append([run["transformers"], title, *_counts(rows)])
        lines.append([run["transformers"], "**all**", *_counts(_blocks(run))])
    header = [
        "transformers",
        "experts",
        "blocks",
        "fused in inference",
        "fused in training",
        "no MoE to fuse",
        "wrong results",
    ]
    return table(header, lines)


def _counts(rows: list[Row]) -> list[str]:
    """Pairs of block and implementation; fused counts where it is so in fp32 and in bf16."""
    pairs: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        pairs.setdefault((row["case"], row["implementation"]), []).append(row)
    dense = sum(all(r["status"] == "not MoE-fusable" for r in rs) for rs in pairs.values())
    fused = {
        mode: sum(
            all(r["status"] == "fused" for r in rs if r["mode"] == mode) for rs in pairs.values()
        )
        for mode in MODES
    }
    wrong = sum(any(r["status"] == "wrong" for r in rs) for rs in pairs.values())
    of = len(pairs) - dense
    return [
        str(len(pairs)),
        *(f"{n} of {of} ({100 * n / of:.0f} %)" if of else "-" for n in fused.values()),
        str(dense),
        str(wrong),
    ]


def families(run: dict[str, Any]) -> list[str]:
    rows = _blocks(run)
    lines: list[str] = []
    for shown in (("grouped_mm", "batched_mm", "eager"), ("own",)):
        cases = sorted({r["case"] for r in rows if r["implementation"] in shown})
        if cases:
            lines += table(
                ["block", *(IMPLEMENTATIONS[i] for i in shown)],
                [
                    [
                        case,
                        *(
                            cell(
                                [
                                    r
                                    for r in rows
                                    if r["case"] == case and r["implementation"] == implementation
                                ]
                            )
                            for implementation in shown
                        ),
                    ]
                    for case in cases
                ],
            )
    return lines


def reasons(run: dict[str, Any]) -> list[str]:
    """Every refusal with the model's line."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in _blocks(run):
        if row["status"] in ("refused", "partly fused") and "code" in row:
            found.setdefault((row["code"], row["message"]), []).append(row)
    return table(
        ["reason", "what we say", "where", "blocks", "experts"],
        [
            [
                f"{code}: {Code[code].value}",
                message,
                ", ".join(sorted({r["location"] for r in rows})),
                names(rows),
                ", ".join(sorted({r["implementation"] for r in rows})),
            ]
            for (code, message), rows in sorted(found.items())
        ],
    )


def routers(run: dict[str, Any]) -> list[str]:
    """Why routers stayed as the model wrote them where the experts were fused."""
    found: dict[str, list[Row]] = {}
    for row in _blocks(run):
        if "router_reason" in row:
            found.setdefault(row["router_reason"].split(" at ")[0], []).append(row)
    return table(
        ["why the router stays", "blocks"],
        [[reason, names(rows)] for reason, rows in sorted(found.items())],
    )


def failures(run: dict[str, Any]) -> list[str]:
    """Rows that need an explanation of their own, if there are any."""
    bad = [
        [
            " ".join(results.key(row)[1:]),
            row["status"],
            row.get("wrong") or row.get("message", ""),
        ]
        for row in run["rows"]
        if row["status"] in ("wrong", "error", "timeout", "not runnable")
    ]
    return table(["row", "what", "why"], bad) if bad else ["None.", ""]


def coverage(runs: list[dict[str, Any]]) -> list[str]:
    lines = ["## Totals", "", *totals(runs)]
    for run in runs:
        version = run["transformers"]
        lines += [f"## transformers {version}", "", _provenance(run), "", *families(run)]
        lines += [f"### Why not, {version}", "", *reasons(run)]
        lines += [f"### Routers, {version}", "", *routers(run)]
        lines += [f"### Not as it should be, {version}", "", *failures(run)]
    return lines


# --- docs/capture.md ----------------------------------------------------------------------------------------------


def loops(run: dict[str, Any]) -> list[str]:
    rows = [r for r in _blocks(run) if r["implementation"] in LOOPS]
    lines = []
    for case in sorted({r["case"] for r in rows}):
        mine = [r for r in rows if r["case"] == case]
        loop = run["loops"].get(case, [])
        lines.append(
            [
                case,
                "<br>".join(f"`{each['code']}` {each['place']}" for each in loop)
                or "no loop: all experts at once",
                cell(mine, _captured),
                cell(mine),
                _why(mine),
            ]
        )
    header = ["block", "its loops and reads of data", "one graph", "result", "why not"]
    return table(header, lines)


def _captured(row: Row) -> str:
    if "captured" not in row:
        return row["status"]
    if row["captured"]:
        return "yes" if row["graphs"] == 1 else f"yes, compiled in {row['graphs']}"
    places = sorted({place for _, place in row["breaks"]})
    return f"no, {row['graphs']} graphs" + (f", breaks at {', '.join(places)}" if places else "")


def _why(rows: list[Row]) -> str:
    said = {
        f"{r['code']}: {r['message']} at {r['location']}" for r in rows if r["status"] == "refused"
    }
    return "<br>".join(sorted(said))


def models(run: dict[str, Any]) -> list[str]:
    rows = [r for r in run["rows"] if r.get("part") == "model"]
    modes = ("inference", "training", "generate", "generate without cache")
    lines = []
    for case, implementation in sorted({(r["case"], r["implementation"]) for r in rows}):
        mine = {
            r["mode"]: r for r in rows if (r["case"], r["implementation"]) == (case, implementation)
        }
        if any(r["status"] == "no model" for r in mine.values()):
            continue
        title = IMPLEMENTATIONS[implementation]
        lines.append([case, title, *(_model(mine[m]) if m in mine else "" for m in modes)])
    if not lines:
        return ["Not run.", ""]
    header = [
        "model",
        "experts",
        "forward",
        "training step",
        "generate",
        "generate without cache",
    ]
    return table(header, lines)


def _model(row: Row) -> str:
    if "graphs" not in row:
        return f"{row['status']}: {row.get('message', '')}"
    graphs = f"{row['graphs']} graph{'s' * (row['graphs'] != 1)}"
    breaks = len(row["breaks"])
    broken = f", {breaks} breaks, {row['breaks_in_moe']} of them in the MoE" if breaks else ""
    if row["status"] == "wrong":
        return f"WRONG: {row['wrong']}"
    return f"{label(row)}; {graphs}{broken}"


def capture(runs: list[dict[str, Any]], others: list[dict[str, Any]]) -> list[str]:
    lines = []
    for run in runs:
        version = run["transformers"]
        lines += [f"## transformers {version}", "", _provenance(run), ""]
        whole, of = _captured_total(run)
        lines += [
            f"{whole} of {of} blocks are captured in one graph, in inference and in training.",
            "",
            *loops(run),
        ]
        lines += [f"### Whole models, {version}", "", *models(run)]
    if others:
        lines += ["## Other versions of torch", "", *_other_torch(runs, others)]
    return lines


def _captured_total(run: dict[str, Any]) -> tuple[int, int]:
    rows = [r for r in _blocks(run) if r["implementation"] in LOOPS]
    cases: dict[str, bool] = {}
    for row in rows:
        cases[row["case"]] = cases.get(row["case"], True) and bool(row.get("captured"))
    return sum(cases.values()), len(cases)


def _other_torch(runs: list[dict[str, Any]], others: list[dict[str, Any]]) -> list[str]:
    """The same blocks, fp32, with other releases of torch: totals, and every block that fares otherwise."""
    usual = {(run["transformers"], results.key(row)): row for run in runs for row in _blocks(run)}
    totals, different = [], []
    for run in others:
        versions = [run["torch"], run["transformers"]]
        rows = [row for row in _blocks(run) if row["implementation"] in LOOPS]
        whole, of = _captured_total(run)
        counted = Counter(row["status"] for row in rows)
        told = ", ".join(f"{count} {status}" for status, count in counted.most_common())
        totals.append([*versions, run["date"], f"{whole} of {of}", told])
        by_case: dict[str, list[Row]] = {}
        for row in rows:
            before = usual.get((run["transformers"], results.key(row)), {})
            if any(before.get(what) != row.get(what) for what in ("status", "captured", "graphs")):
                by_case.setdefault(row["case"], []).append(row)
        different += [
            [*versions, case, cell(some, _captured), cell(some)] for case, some in by_case.items()
        ]
    lines = table(["torch", "transformers", "date", "one graph", "rows"], totals)
    if not different:
        return [*lines, "Every row is as above.", ""]
    header = ["torch", "transformers", "block", "one graph", "result"]
    return [*lines, "What is not as above:", "", *table(header, different)]


# --- both ---------------------------------------------------------------------------------------------------------


def _blocks(run: dict[str, Any]) -> list[Row]:
    return [row for row in run["rows"] if row.get("part", "block") == "block"]


def _provenance(run: dict[str, Any]) -> str:
    counted = Counter(row["status"] for row in run["rows"])
    told = ", ".join(f"{count} {status}" for status, count in counted.most_common())
    versions = len({row.get("sources") for row in run["rows"]})
    mixed = f" They come from {versions} states of our sources." if versions > 1 else ""
    return (
        f"`python -m census.run`, last on {run['date']}: torch {run['torch']}, Python {run['python']},"
        f" {run['machine']}. Rows: {told}.{mixed}"
    )


def write(page: Path, lines: list[str], check: bool) -> bool:
    """Put the lines between the markers; True if the page was up to date."""
    text = page.read_text()
    head, rest = text.split(BEGIN)
    new = "\n".join([head + BEGIN, "", *lines]) + END + rest.split(END)[1]
    if not check:
        page.write_text(new)
    return new == text


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m census.tables", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--check", action="store_true", help="fail if a page is out of date")
    arguments = parser.parse_args()
    runs, others = (
        [json.loads(path.read_text()) for path in sorted(results.FOLDER.glob(pattern))]
        for pattern in ("*.json", "torch-*/*.json")
    )
    pages = {"coverage.md": coverage(runs), "capture.md": capture(runs, others)}
    stale = [
        name for name, lines in pages.items() if not write(DOCS / name, lines, arguments.check)
    ]
    if arguments.check and stale:
        sys.exit(f"out of date: {', '.join(stale)}. Run python -m census.tables")


if __name__ == "__main__":
    main()
