"""A module under torch.compile with our backend, and what was seen on the way."""

from __future__ import annotations

from typing import Any

import torch
from torch._dynamo.utils import counters

from moe_inductor import _compat
from moe_inductor.debug.report import BlockReport, CompileReport
from tests.without_inductor import WithoutInductor


class Watching(WithoutInductor):
    """whole: of each graph that reached the backend, also of those it declined: did it end where the frame ends?"""

    def __init__(self, inner: str) -> None:
        super().__init__(inner)
        self.whole: list[bool] = []

    def __call__(self, gm: torch.fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        why = getattr(gm, "compile_subgraph_reason", None)
        self.whole.append(why is not None and not why.graph_break)
        return super().__call__(gm, *args, **kwargs)


class Compiled:
    """Starts from a clean slate: what was compiled before is forgotten."""

    __signature__: Any  # for who asks what the module's forward takes

    def __init__(self, module: Any, inner: str = "eager") -> None:
        torch._dynamo.reset()
        counters.clear()
        self.backend = Watching(inner)
        self.backend.install()
        self._breaks_before = len(_compat.graph_breaks())
        self.run = torch.compile(module, backend=self.backend)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)

    @property
    def breaks(self) -> list[tuple[str, str]]:
        """(reason, ``file.py:line``), the declined attempts included."""
        return _compat.graph_breaks()[self._breaks_before :]

    @property
    def reports(self) -> list[CompileReport]:
        return list(self.backend.reports)

    @property
    def blocks(self) -> list[BlockReport]:
        return [block for report in self.reports for block in report.blocks]
