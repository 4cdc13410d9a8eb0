"""Run a module through our backend without Inductor, and look at what the stages did."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_inductor.debug.report import BlockReport
from moe_inductor.match.api import ExpertsSpelling, Spelling
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


def require(spelling: Spelling) -> None:
    """Skips what cannot run because the package that has the spelling's operator is missing, or too old for it."""
    if isinstance(spelling, ExpertsSpelling):
        pytest.importorskip(spelling.defined_in)
        namespace, name = spelling.anchor.split("::")
        if not hasattr(getattr(torch.ops, namespace), name):
            pytest.skip(f"{spelling.defined_in} has no {spelling.anchor}")


@pytest.fixture(autouse=True, scope="module")
def every_shape_is_new():
    """To keep what fake tensors came of an operator takes longer than to ask it again, where no two tests are alike."""
    with torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
        yield


@pytest.fixture
def rewritten(monkeypatch: pytest.MonkeyPatch) -> type[Rewritten]:
    monkeypatch.setenv("MOE_INDUCTOR_RAISE", "1")
    return Rewritten
