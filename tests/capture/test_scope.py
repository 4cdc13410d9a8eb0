"""Capture settings act on frames of our backend, and on nothing else."""

from __future__ import annotations

import concurrent.futures
import logging
import os
import threading
import traceback
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from moe_inductor import _compat
from moe_inductor.capture import scope
from moe_inductor.reasons import Code, NotFused, Reason
from tests.capture import models
from tests.capture.fake_backend import FakeBackend, Recorder, installed

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
LOOPS = [models.RangeModuleList, models.RangeStacked]


@pytest.fixture(autouse=True)
def _same_config() -> Iterator[None]:
    before = torch._dynamo.config.get_config_copy()
    yield
    assert torch._dynamo.config.get_config_copy() == before


def tokens(count: int = 6) -> torch.Tensor:
    return torch.randn(count, models.H)


def graphs_of(backend: Any, function: Any, *args: Any, **options: Any) -> list[str]:
    """The graphs that a compile of ``function`` hands to ``backend``, as text, and check the
    result.
    """
    torch._dynamo.reset()
    expected = function(*args)
    torch.testing.assert_close(torch.compile(function, backend=backend, **options)(*args), expected)
    return backend.texts


def selects_rows(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """No MoE, but a data-dependent shape: stock breaks the graph at nonzero."""
    rows = torch.nonzero(mask)[:, 0]
    return x[rows].sum() + x.sin().sum()


def reads_a_number(x: torch.Tensor) -> torch.Tensor:
    return x * x.sum().item() + 1


def reads_a_constant(x: torch.Tensor) -> torch.Tensor:
    return x * torch.tensor(3).item() + 1


def iterates_ids(x: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """With the flags on, Dynamo fails on the 0-d integer tensor used as an index (2.15: an internal
    error).
    """
    out = torch.zeros_like(x)
    for e in ids:
        (t,) = torch.where(mask[e])
        out.index_add_(0, t, x[t])
    return out


def calls_iterates_ids(x: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return iterates_ids(x.sin(), ids, mask) + 1


NOT_MOE = [
    pytest.param(
        selects_rows, (torch.randn(8, 8), torch.tensor([1, 0, 1, 1, 0, 0, 0, 1])), id="nonzero"
    ),
    pytest.param(reads_a_number, (torch.randn(4),), id="item"),
    pytest.param(reads_a_constant, (torch.randn(4),), id="item of a constant"),
]


@pytest.mark.parametrize("loop", LOOPS)
def test_range_loop_is_one_graph(loop: type[nn.Module]) -> None:
    block, x = loop(), tokens()
    stock = Recorder()
    assert len(graphs_of(stock, block, x)) > 1, "the loop does not need the flags"
    backend = FakeBackend()
    with installed(backend):
        assert len(graphs_of(backend, block, x)) == 1
    assert backend.active == [True]
    assert backend.reasons == []


def test_training_step_is_one_graph() -> None:
    block, x = models.RangeModuleList(), tokens()
    block(x).sum().backward()
    expected = {n: p.grad.clone() for n, p in block.named_parameters() if p.grad is not None}
    block.zero_grad()
    backend = FakeBackend()
    with installed(backend):
        torch.compile(block, backend=backend)(x).sum().backward()
    assert len(backend.graphs) == 1
    for name, grad in expected.items():
        torch.testing.assert_close(block.get_parameter(name).grad, grad)


@pytest.mark.parametrize("dynamic", [None, True, False])
def test_new_shapes_recompile(dynamic: bool | None) -> None:
    block, backend = models.RangeStacked(), FakeBackend()
    with installed(backend):
        compiled = torch.compile(block, backend=backend, dynamic=dynamic)
        for count in (6, 9, 3, 0, 1):
            x = tokens(count)
            torch.testing.assert_close(compiled(x), block(x))
    assert all(backend.active)
    assert len(backend.graphs) >= 1


def test_through_mode_and_options() -> None:
    backend = FakeBackend()
    with installed(backend):
        assert len(graphs_of(backend, models.RangeStacked(), tokens(), options={"a": 1})) == 1
        assert len(graphs_of(backend, models.RangeStacked(), tokens(), mode="max-autotune")) == 2
    assert backend.options == [{"options": {"a": 1}}, {"mode": "max-autotune"}]


def test_another_backend_sees_stock() -> None:
    block, x = models.RangeStacked(), tokens()
    ours, before, after = FakeBackend(), Recorder(), Recorder()
    graphs_of(before, block, x)
    with installed(ours):
        graphs_of(ours, block, x)
        graphs_of(after, block, x)
        graphs_of(FakeBackend(), block, x)  # of our class, but not the object that was installed
    assert after.texts == before.texts
    assert not any(after.active)


@pytest.mark.parametrize("name", ["eager", "inductor"])
def test_named_backends_keep_their_graph_count(name: str) -> None:
    block, x = models.RangeStacked(), tokens()
    with torch.no_grad():
        before = torch._dynamo.explain(block)(x).graph_count
        ours = FakeBackend()
        with installed(ours):
            graphs_of(ours, block, x)
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            # inductor compiles nothing here, which takes long; its graphs are counted where Dynamo
            # makes them
            torch.compile(block, backend=name if name == "eager" else "aot_eager")(x)
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


@pytest.mark.parametrize(("function", "args"), NOT_MOE)
def test_after_a_decline_the_graphs_are_stock(function: Any, args: tuple[Any, ...]) -> None:
    stock, ours = Recorder(), FakeBackend(decline_when=scope.changed_capture)
    expected = graphs_of(stock, function, *args)
    with installed(ours):
        assert graphs_of(ours, function, *args) == expected
    assert str(ours.reasons[0]).startswith("the test declines at ")
    assert ours.reasons[0].location.startswith("test_scope.py:")


def test_a_model_without_data_dependence_is_not_declined() -> None:
    stock, ours = Recorder(), FakeBackend(decline_when=scope.changed_capture)
    model, x = models.Expert(), tokens()
    with installed(ours):
        assert graphs_of(ours, model, x) == graphs_of(stock, model, x)
    assert ours.reasons == []


def test_declined_expert_loop_is_stock() -> None:
    block, x = models.RangeModuleList(), tokens()
    stock, ours = Recorder(), FakeBackend(decline_when=lambda gm: scope.active())
    expected = graphs_of(stock, block, x)
    with installed(ours):
        assert graphs_of(ours, block, x) == expected
    assert len(expected) > 1
    assert not ours.active[0]


def test_decline_outside_of_a_trace_only_notes_the_reason() -> None:
    reason = Reason(Code.PROOF, "late", "here")
    scope.decline(reason)
    assert not scope.active()
    assert scope.take_decline_reasons() == [reason]
    assert scope.take_decline_reasons() == []


def test_a_failure_under_the_flags_is_traced_again_as_stock() -> None:
    x, ids, mask = tokens(), torch.arange(3), torch.randn(3, 6) > 0
    stock, ours = Recorder(), FakeBackend()
    expected = graphs_of(stock, calls_iterates_ids, x, ids, mask)
    with installed(ours):
        assert graphs_of(ours, calls_iterates_ids, x, ids, mask) == expected
    if TORCH >= (2, 15):  # before, Dynamo breaks the graph at the call, as it does in stock
        assert not ours.active[0]
        assert ours.reasons[0].code is Code.CONTROL_FLOW
        assert ours.reasons[0].location.startswith("test_scope.py:")


def test_a_backend_failure_under_the_flags_is_tried_again_as_stock() -> None:
    class Fragile(FakeBackend):
        def __call__(self, gm: torch.fx.GraphModule, inputs: list[Any], **options: Any) -> Any:
            if scope.changed_capture(gm):
                raise ValueError("cannot lower this")
            return super().__call__(gm, inputs, **options)

    block, x = models.RangeStacked(), tokens()
    stock, ours = Recorder(), Fragile()
    expected = graphs_of(stock, block, x)
    with installed(ours):
        assert graphs_of(ours, block, x) == expected
    assert ours.reasons[0].code is Code.INTERNAL
    assert "cannot lower this" in ours.reasons[0].message


def test_strict_mode_reaches_the_user() -> None:
    def strict(gm: torch.fx.GraphModule) -> bool:
        raise NotFused("strict")

    ours = FakeBackend(decline_when=strict)
    with installed(ours), pytest.raises(Exception, match="strict"):
        torch.compile(models.RangeStacked(), backend=ours)(tokens())


class Raises(models.RangeStacked):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = super().forward(x)
        if out.shape[0] == 6:
            raise KeyError("the model's own error")
        return out


def test_the_models_own_error_is_unchanged() -> None:
    backend = FakeBackend()
    with installed(backend):
        compiled = torch.compile(Raises(), backend=backend)
        with pytest.raises(KeyError, match="the model's own error"):
            compiled(tokens())
        assert compiled(tokens(5)).shape == (5, models.H)


def test_user_set_flags_are_kept() -> None:
    block, x = models.RangeStacked(), tokens()
    flags = {"capture_dynamic_output_shape_ops": True, "capture_scalar_outputs": True}
    ours = FakeBackend(decline_when=scope.changed_capture)
    with installed(ours), torch._dynamo.config.patch(flags):
        assert len(graphs_of(ours, block, x)) == 1
        assert torch._dynamo.config.capture_scalar_outputs
    assert ours.active == [False]
    assert ours.reasons == []


def test_one_user_set_flag_is_what_a_decline_returns_to() -> None:
    args = (torch.randn(8, 8), torch.tensor([1, 0, 1, 1, 0, 0, 0, 1]))
    stock, ours = Recorder(), FakeBackend(decline_when=scope.changed_capture)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        expected = graphs_of(stock, selects_rows, *args)
        assert len(expected) == 1
        with installed(ours):
            assert graphs_of(ours, selects_rows, *args) == expected
    assert ours.active == [False]


def test_fullgraph() -> None:
    ours = FakeBackend(decline_when=lambda gm: True)
    with installed(ours):
        assert len(graphs_of(ours, models.RangeStacked(), tokens(), fullgraph=True)) == 1
    assert ours.active == [False]


def test_fullgraph_error_is_dynamos_own() -> None:
    def breaks(x: torch.Tensor) -> torch.Tensor:
        rows = torch.nonzero(x)
        return x + 1 if rows.shape[0] > 3 else x - 1

    def message(backend: Any) -> str:
        torch._dynamo.reset()
        with pytest.raises(Exception) as caught:  # noqa: PT011
            torch.compile(breaks, backend=backend, fullgraph=True)(tokens())
        return f"{type(caught.value).__name__}: {caught.value}"

    ours = FakeBackend()
    with installed(ours):
        assert message(ours) == message(Recorder())


def test_another_backend_inside_our_compile_call_sees_stock() -> None:
    inner = Recorder()
    args = (torch.randn(8, 8), torch.tensor([1, 0, 1, 1, 0, 0, 0, 1]))

    class Nests(FakeBackend):
        def __call__(self, gm: torch.fx.GraphModule, inputs: list[Any], **options: Any) -> Any:
            with torch._guards.tracing(None):
                torch.compile(selects_rows, backend=inner)(*args)
            assert scope.active()
            return super().__call__(gm, inputs, **options)

    ours, alone = Nests(), Recorder()
    expected = graphs_of(alone, selects_rows, *args)
    with installed(ours):
        assert len(graphs_of(ours, models.RangeStacked(), tokens())) == 1
    assert len(inner.texts) in (0, len(expected)), "0: this torch does not compile inside a compile"
    assert inner.texts in ([], expected)
    assert not any(inner.active)


def test_export_is_not_affected() -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sin() + 1

    ours = FakeBackend()
    before = str(torch.export.export(Model(), (tokens(),), strict=True).graph)
    with installed(ours):
        assert str(torch.export.export(Model(), (tokens(),), strict=True).graph) == before
    assert ours.graphs == []


def test_eager_is_not_affected() -> None:
    block, x = models.RangeStacked(), tokens()
    expected = block(x)
    with installed(FakeBackend()):
        assert torch.equal(block(x), expected)


def test_reset() -> None:
    block, x, backend = models.RangeStacked(), tokens(), FakeBackend()
    with installed(backend):
        for count in (1, 2, 3):
            torch._dynamo.reset()
            torch.compile(block, backend=backend)(x)
            assert len(backend.graphs) == count
    assert backend.active == [True] * 3


def test_install_is_idempotent_and_uninstall_undoes_it() -> None:
    backend = FakeBackend()
    with installed(backend):
        wrapper = _compat.dynamo_convert_frame.trace_frame
        assert scope.install(backend)
        assert _compat.dynamo_convert_frame.trace_frame is wrapper
    assert len(graphs_of(backend, models.RangeStacked(), tokens())) > 1
    assert not any(backend.active)


@pytest.mark.parametrize(
    "unknown", [None, lambda code, globals: None, lambda *args, **kwargs: None, 3]
)
def test_unknown_signature_is_left_alone(
    unknown: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_compat.dynamo_convert_frame, "trace_frame", unknown)
    scope._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="moe_inductor"):
        assert not scope.install(FakeBackend())
        assert not scope.install(FakeBackend())
    assert _compat.dynamo_convert_frame.trace_frame is unknown
    assert len(caplog.records) == 1


def expert_loop(x: torch.Tensor, mask: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(x)
    for e in range(4):
        (t,) = torch.where(mask[e])
        out.index_add_(0, t, x[t] @ weights[e])
    return out


def test_eight_threads_two_backends() -> None:
    """Half of the threads compile for us, half for a stock backend.

    Each has a copy of the code: threads that compile the same code get each other's graphs, with
    stock backends just as well.
    """
    start = threading.Barrier(8)
    ours = [FakeBackend() for _ in range(4)]
    stock = [Recorder() for _ in range(4)]
    args = (torch.randn(5, 8), torch.randn(4, 5) > 0, torch.randn(4, 8, 8))
    expected = graphs_of(Recorder(), expert_loop, *args)

    def compile_copy(backend: Any) -> None:
        code = expert_loop.__code__.replace(co_name=f"copy_{id(backend)}")
        loop = types.FunctionType(code, expert_loop.__globals__)
        start.wait(timeout=60)
        torch.testing.assert_close(torch.compile(loop, backend=backend)(*args), loop(*args))

    for backend in ours:
        assert scope.install(backend)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(compile_copy, backend) for backend in (*ours, *stock)]:
            done.result(timeout=120)
    for backend in ours:
        scope.uninstall(backend)
    assert [len(b.graphs) for b in ours] == [1] * 4
    assert [len(b.graphs) for b in stock] == [len(expected)] * 4
    assert not any(flag for b in stock for flag in b.active)


def test_only_torch_itself_is_left_out_of_locations():
    """Its neighbours' names begin with its own (torchtitan, torchvision)."""
    neighbour = os.path.join(
        os.path.dirname(_compat.TORCH_FOLDER.rstrip(os.sep)), "torchtitan", "moe.py"
    )
    own = os.path.join(_compat.TORCH_FOLDER, "_dynamo", "polyfills", "__init__.py")
    stack = [
        traceback.FrameSummary("main.py", 1, "main", lookup_line=False),
        traceback.FrameSummary(neighbour, 2, "forward", lookup_line=False),
        traceback.FrameSummary(own, 3, "enumerate", lookup_line=False),
    ]
    assert scope._location_in(stack) == f"{neighbour}:2"
