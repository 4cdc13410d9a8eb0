"""The recorded rows: one JSON file per version of transformers, and what it means for a row to get worse."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Key = tuple[str, ...]

FOLDER = Path(__file__).parent / "results"
TORCH = "2.13.0"  # CI's.  What was measured with another one is in a folder of its own.
KEY = ("part", "case", "implementation", "dtype", "mode")

# From worst to best.  A row that was not MoE-fusable and is refused now is as good as before, and the reverse.
_RANK = {
    "wrong": 0,
    "error": 0,
    "timeout": 0,
    "not runnable": 1,
    "no model": 1,
    "silent": 2,
    "refused": 3,
    "not MoE-fusable": 3,
    "partly fused": 4,
    "fused": 5,
}


def folder(torch_version: str) -> Path:
    """Where results with this torch belong."""
    release = torch_version.split("+")[0]
    return FOLDER if release == TORCH else FOLDER / f"torch-{release}"


def path(version: str, folder: Path = FOLDER) -> Path:
    return folder / f"transformers-{version}.json"


def key(row: Row) -> Key:
    return tuple(row.get(name, "") for name in KEY)


def load(file: Path) -> dict[str, Any]:
    if file.exists():
        return json.loads(file.read_text())
    return {"rows": []}


def save(file: Path, run: dict[str, Any], rows: Iterable[Row]) -> None:
    """Replace the rows that were measured again, keep the others."""
    kept = {key(r): r for r in load(file)["rows"]} | {key(r): r for r in rows}
    run = run | {"rows": sorted(kept.values(), key=key)}
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    # One row a line: a diff shows which rows changed.
    head = {k: v for k, v in run.items() if k != "rows"}
    lines = ",\n".join(json.dumps(row) for row in run["rows"])
    temporary.write_text(json.dumps(head, indent=1)[:-2] + ',\n "rows": [\n' + lines + "\n]}\n")
    temporary.replace(file)


def worse(recorded: Iterable[Row], now: Iterable[Row]) -> list[str]:
    """A line for each row of ``now`` that is worse than the recorded one."""
    before = {key(row): row for row in recorded}
    lines = []
    for row in now:
        old = before.get(key(row))
        complaint = _worse(old, row) if old is not None else None
        if complaint:
            lines.append(f"{' '.join(filter(None, key(row)))}: {complaint}")
    return lines


def _worse(old: Row, new: Row) -> str | None:
    if _RANK[new["status"]] < _RANK[old["status"]]:
        why = new.get("wrong") or new.get("message") or ""
        return f"was {old['status']}, is {new['status']}" + (f" ({why})" if why else "")
    if new["status"] == old["status"] and old.get("router_fused") and not new.get("router_fused"):
        return f"the router is not fused any more: {new.get('router_reason', '')}"
    for what in ("graphs", "breaks_in_moe"):
        if what in old and what in new and new[what] > old[what]:
            return f"{what}: was {old[what]}, is {new[what]}"
    return None
