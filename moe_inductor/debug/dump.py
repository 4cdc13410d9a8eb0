"""Where graphs and reports go: the debug folder and the structured trace that tlparse reads.

TORCH_COMPILE_DEBUG=1   ->  torch_compile_debug/run_*/moe_inductor/000_graph_0_0/{0_before.py, 1_after.py, ...}
TORCH_TRACE=/tmp/trace  ->  tlparse /tmp/trace   shows moe_inductor_before, moe_inductor_after, moe_inductor_report
"""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

from moe_inductor import _compat
from moe_inductor.debug.report import CompileReport

_number = itertools.count()


def wanted(dump: bool) -> bool:
    """Will somebody read the text of the graphs?  Printing a large graph is not free."""
    return dump or _compat.debugging() or _compat.tracing()


def write(report: CompileReport, dump: bool) -> Path | None:
    """Send one finished report to everybody who asked; the folder, if one was written."""
    _trace(report)
    return _to_folder(report) if dump or _compat.debugging() else None


def _trace(report: CompileReport) -> None:
    _compat.trace_artifact("moe_inductor_before", "string", lambda: report.graph_before or "")
    _compat.trace_artifact("moe_inductor_after", "string", lambda: report.graph_after or "")
    _compat.trace_artifact("moe_inductor_report", "json", lambda: json.dumps(report.to_json()))


def _to_folder(report: CompileReport) -> Path:
    name = re.sub(r"\W+", "_", report.frame).strip("_") or "unknown"
    folder = _compat.debug_dir() / "moe_inductor" / f"{next(_number):03d}_graph_{name}"
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"before.py": report.graph_before, "after.py": report.graph_after}
    texts |= {f"{name}.py": text for name, text in report.artifacts.items()}
    texts |= {"report.txt": str(report), "report.json": json.dumps(report.to_json(), indent=2)}
    for index, (name, text) in enumerate(texts.items()):
        if text is not None:
            (folder / f"{index}_{name}").write_text(text + "\n", encoding="utf-8")
    return folder
