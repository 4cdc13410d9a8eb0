"""Rolled capture and what else happens to a model: checkpointing, threads, other backends, Dynamo's config."""

from __future__ import annotations

import concurrent.futures
import threading
from typing import Any

import pytest
import torch
from moe_inductor.patterns._blocks import HIDDEN
from moe_inductor.patterns.hit_list import HitLoop
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import config as inductor_config
from torch.utils.checkpoint import checkpoint

from tests.without_inductor import WithoutInductor


def ours(inner: str = "eager") -> WithoutInductor:
    backend = WithoutInductor(inner)
    backend.install()
    return backend


class Checkpointed(nn.Module):
    """Two layers, whose experts are computed again in the backward."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(HitLoop() for _ in range(2))
        self.use_reentrant = use_reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            y: Any = checkpoint(layer, x, use_reentrant=self.use_reentrant)
            x = x + y
        return x


def step(run: Any, module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients; an expert without tokens has none in eager, and zeros here."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    out = run(x)
    out.square().sum().backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in (x, *module.parameters())]
    return [out.detach(), *grads]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_blocks_are_fused(use_reentrant: bool) -> None:
    model, x, backend = Checkpointed(use_reentrant), torch.randn(5, HIDDEN), ours("aot_eager")
    expected = step(model, model, x)
    compiled = torch.compile(model, backend=backend)
    for _ in range(2):  # the second time nothing is compiled any more
        for mine, eager in zip(step(compiled, model, x), expected, strict=True):
            torch.testing.assert_close(mine, eager, rtol=1e-4, atol=1e-4)
    blocks = [block for report in backend.reports for block in report.blocks]
    assert [block.fused for block in blocks] == [True] * len(blocks)
    assert len(blocks) == 2


def settings() -> list[dict[str, Any]]:
    return [c.get_config_copy() for c in (torch._dynamo.config, inductor_config)]


def graphs_of(backend: str, x: torch.Tensor) -> int:
    """How many graphs a stock backend gets of a loop over a hit list."""
    counter = CompileCounterWithBackend(backend)
    with torch.no_grad():
        torch.compile(HitLoop(), backend=counter)(x)
    return counter.frame_count


def test_config_and_other_backends_are_as_before() -> None:
    x, backend, before = torch.randn(5, HIDDEN), WithoutInductor(), settings()
    stock = graphs_of("inductor", x)
    torch._dynamo.reset()
    backend.install()
    with torch.no_grad():
        torch.compile(HitLoop(), backend=backend)(x)
    assert [len(report.fused) for report in backend.reports] == [1]
    assert settings() == before
    torch._dynamo.reset()
    assert graphs_of("inductor", x) == stock > 1


class Other(HitLoop):
    """With code of its own: threads that compile the same code get each other's graphs, with any backend."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        topk_weights, topk_ids = self.route(self.gate(x))
        return self.experts(x, topk_ids, topk_weights)


def test_two_threads_compile_at_once_for_us_and_for_inductor() -> None:
    x, backend = torch.randn(5, HIDDEN), ours()
    counter = CompileCounterWithBackend("inductor")
    start = threading.Barrier(2)

    def run(block: nn.Module, backend: Any) -> torch.Tensor:
        start.wait()
        with torch.no_grad():
            return torch.compile(block, backend=backend)(x)

    blocks = HitLoop(), Other()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        results = list(pool.map(run, blocks, (backend, counter)))
    for block, result in zip(blocks, results, strict=True):
        torch.testing.assert_close(result, block(x), rtol=1e-4, atol=1e-4)
    assert [len(report.fused) for report in backend.reports] == [1]
    assert counter.frame_count > 1


class Chosen(nn.Module):
    """What stock capture breaks in."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = torch.topk(x[(x.sum(-1) > -1e9).nonzero().squeeze(-1)].softmax(-1), 2)
        return weights, ids


class Cut(nn.Module):
    """Stock capture makes no graph of this frame itself."""

    def __init__(self) -> None:
        super().__init__()
        self.chosen = Chosen()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = self.chosen(x)
        out = torch.zeros_like(x)
        for e in range(8):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, x[t] * weights[t, k, None])
        return out


def test_why_is_told_of_a_frame_of_which_stock_capture_makes_no_graph() -> None:
    backend, model, x = ours(), Cut(), torch.randn(3, 8)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=backend)(x), model(x))
    told = {str(report.frame): report for report in backend.reports}
    assert "no expert computes anything" in told["0/0"].summary()
