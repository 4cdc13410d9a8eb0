"""Run a module through our backend without Inductor, and look at what the stages did."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_inductor.debug.report import BlockReport
from tests.without_inductor import WithoutInductor


class Rewritten:
    """``module`` compiled by our backend; the rewritten graph runs as it is, so that any difference is ours."""

    def __init__(self, module: torch.nn.Module, **kwargs: Any) -> None:
        torch._dynamo.reset()
        self.backend = WithoutInductor()
        self.backend.install()
        self.run = torch.compile(module, backend=self.backend, **kwargs)

    def __call__(self, *args: Any) -> Any:
        return self.run(*args)

    @property
    def blocks(self) -> list[BlockReport]:
        return [block for report in self.backend.reports for block in report.blocks]


@pytest.fixture
def rewritten(monkeypatch: pytest.MonkeyPatch) -> type[Rewritten]:
    monkeypatch.setenv("MOE_INDUCTOR_RAISE", "1")
    return Rewritten
