"""``moe_inductor.explain(model, *args)``: what would be fused, what not and why, without compiling anything."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from moe_inductor import _compat
from moe_inductor.backend import MoEInductor
from moe_inductor.capture import scope
from moe_inductor.debug.report import BlockReport, CompileReport


@dataclasses.dataclass(frozen=True, kw_only=True)
class Explanation:
    """What ``explain`` found out.  ``str()`` of it is meant for people, the fields for programs.

    reports: one per captured graph, in order.
    graph_breaks: (reason, ``file.py:line``) of every graph break.
    """

    reports: list[CompileReport]
    graph_breaks: list[tuple[str, str]]

    @property
    def blocks(self) -> list[BlockReport]:
        return [block for report in self.reports for block in report.blocks]

    @property
    def graph_count(self) -> int:
        return len(self.reports)

    def __str__(self) -> str:
        merged = CompileReport(blocks=self.blocks)
        lines = [f"moe_inductor: {merged.summary() or 'nothing MoE-like found'}"]
        graphs, breaks = len(self.reports), len(self.graph_breaks)
        lines.append(
            f"{graphs} graph{'s' * (graphs != 1)}, {breaks} graph break{'s' * (breaks != 1)}"
        )
        lines += [str(report) for report in self.reports if report.blocks or report.notes]
        for (reason, place), count in Counter(self.graph_breaks).items():
            times = f"{count} x " if count > 1 else ""
            first_line = reason.strip().splitlines()[0] if reason.strip() else "no reason given"
            lines.append(f"graph break: {times}{first_line}" + (f" at {place}" if place else ""))
        return "\n".join(lines)


def explain(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Run ``model(*args, **kwargs)`` once, print and return what moe_inductor makes of it.

    The stages run for real, but the graphs then run as they were captured: no kernel is compiled.  ``model`` may be
    compiled already; what you compiled stays valid, and what explain compiled is thrown away.
    """
    model = getattr(model, "_orig_mod", model)  # a module that torch.compile wrapped
    model = getattr(model, "_torchdynamo_orig_callable", model)  # a function that it wrapped
    backend = MoEInductor(dry_run=True)
    backend.install()
    breaks_before = len(_compat.graph_breaks())
    try:
        with _compat.isolated_dynamo():
            compiled = torch.compile(model, backend=backend)
            compiled(*args, **kwargs)
    finally:
        scope.uninstall(backend)
    explanation = Explanation(
        reports=list(backend.reports), graph_breaks=_compat.graph_breaks()[breaks_before:]
    )
    print(explanation)
    return explanation
