"""The backend object: what it takes, what it hands to Inductor, and what it does when a stage refuses or fails.

The stages themselves are replaced here, and so is Inductor where only its input matters; both are tested elsewhere.
"""

from __future__ import annotations

import logging
import operator
import re

import pytest
import torch
import torch._inductor.compile_fx as inductor_compile_fx
from torch import nn

import moe_inductor.rewrite.pipeline
from moe_inductor.backend import MoEInductor
from moe_inductor.backend import moe_inductor as backend
from moe_inductor.debug.report import BlockReport
from moe_inductor.reasons import Code, NotFused, Reason

REASON = Reason(Code.PROOF, "the block differs", "modeling_x.py:12")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv("MOE_INDUCTOR_RAISE", raising=False)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Handed:
    """What compile_fx was given, call by call."""

    def __init__(self):
        self.code: list[str] = []
        self.patches: list[dict] = []
        self.tags: list[str] = []
        self.modules: list[torch.fx.GraphModule] = []

    def __call__(self, gm, inputs, *args, config_patches=None, **kwargs):
        self.code.append(gm.code)
        self.patches.append(dict(config_patches or {}))
        self.tags.append(torch.compiler.config.cache_key_tag)
        self.modules.append(gm)
        return gm.forward

    def texts(self):
        """With child graphs and metadata, without a counter that goes up with every trace."""
        texts = [module.print_readable(print_output=False) for module in self.modules]
        return [re.sub(r"ac_graph_id: \d+", "", text) for text in texts]


@pytest.fixture
def handed(monkeypatch):
    record = Handed()
    monkeypatch.setattr(inductor_compile_fx, "compile_fx", record)
    return record


@pytest.fixture
def stages(monkeypatch):
    """Replace the stages by a function of (gm, report, options)."""

    def use(function):
        monkeypatch.setattr(moe_inductor.rewrite.pipeline, "fuse_moe_blocks", function)

    return use


def blocks(*fused: bool, reason: Reason = REASON):
    def stage(gm, report, options, *capture):
        for each in fused:
            report.blocks.append(
                BlockReport(spelling="x_loop", fused=each, reason=None if each else reason)
            )

    return stage


def routed(x):
    """Enough of a router for the pre-check."""
    values, ids = torch.topk(x.softmax(-1), 2)
    return values * ids


def graphs_of(function, inputs, handed, **kwargs):
    """The graphs that Inductor is given, as code."""
    torch._dynamo.reset()
    handed.__init__()
    compiled = torch.compile(function, **kwargs)
    outputs = [compiled(*each) for each in inputs]
    return list(handed.code), outputs


X = torch.arange(24.0).reshape(4, 6)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"mode": "default"},
        {"mode": "reduce-overhead"},
        {"mode": "max-autotune"},
        {"mode": "max-autotune-no-cudagraphs"},
        {"options": {"max_autotune": True, "epilogue-fusion": False}},
        {"dynamic": True},
        {"dynamic": False},
        {"fullgraph": True},
    ],
    ids=str,
)
def test_inductor_is_called_as_torch_compile_calls_it(handed, stages, kwargs):
    stages(blocks())
    seen = {}
    for name in ("inductor", "moe_inductor"):
        code, (result,) = graphs_of(routed, [(X,)], handed, backend=name, **kwargs)
        seen[name] = (code, handed.patches, handed.tags)
        torch.testing.assert_close(result, routed(X))
    assert seen["moe_inductor"] == seen["inductor"]


def test_own_options_are_taken_and_not_handed_on(handed, stages):
    got = []
    stages(lambda gm, report, options, *capture: got.append(options))
    options = {
        "moe_inductor.fuse_router": False,
        "moe-inductor.summary": False,
        "max_autotune": True,
    }
    torch.compile(routed, backend="moe_inductor", options=options)(X)
    assert (got[0].fuse_router, got[0].summary, got[0].strict) == (False, False, False)
    assert handed.patches == [{"max_autotune": True}]


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        (
            {"options": {"moe_inductor.strikt": True}},
            ["Did you mean moe_inductor.strict?", "fuse_router"],
        ),
        ({"options": {"moe_inductor.zzz": True}}, ["moe_inductor.zzz", "moe_inductor.summary"]),
        ({"options": {"moe_inductor.strict": 1}}, ["got int, should be bool"]),
        ({"options": {"no_such_option": True}}, ["Unexpected optimization option no_such_option"]),
        ({"options": {"max_autotune": "yes"}}, ["max_autotune", "got str should be bool"]),
        ({"mode": "fast"}, ["Unrecognized mode=fast"]),
    ],
)
def test_wrong_options_are_errors_that_help(handed, kwargs, words):
    with pytest.raises(RuntimeError) as error:
        torch.compile(routed, backend="moe_inductor", **kwargs)(X)
    assert all(word in str(error.value) for word in words)


def test_mode_and_options_together_as_inductor(handed):
    errors = []
    for name in ("inductor", "moe_inductor"):
        with pytest.raises(RuntimeError) as error:
            torch.compile(routed, backend=name, mode="max-autotune", options={"max_autotune": True})
        errors.append(str(error.value))
    assert errors[0] == errors[1]


class Plain(nn.Module):
    """No MoE, but everything that tempts: a break, sizes that depend on data, top-k, a scatter."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        hidden = self.linear(x).relu()
        kept = hidden[hidden.sum(-1) > 0]
        torch._dynamo.graph_break()
        best, ids = torch.topk(hidden, 2)
        return kept.sum() + torch.zeros_like(hidden).scatter_add_(1, ids, best).sum()


@pytest.mark.parametrize("model", [Plain(), nn.Sequential(nn.Linear(6, 6), nn.ReLU())])
@pytest.mark.parametrize("dynamic", [None, True, False])
def test_model_without_moe_gives_the_graphs_of_inductor(handed, caplog, model, dynamic):
    inputs = [(X,), (X[:3],), (X[:2],)]
    stock, expected = graphs_of(model, inputs, handed, backend="inductor", dynamic=dynamic)
    with caplog.at_level(logging.INFO):
        ours, results = graphs_of(model, inputs, handed, backend="moe_inductor", dynamic=dynamic)
    assert ours == stock
    assert set(handed.tags) == {""}
    torch.testing.assert_close(results, expected)
    assert not [record for record in caplog.records if record.name.startswith("moe_inductor")]


def test_graph_without_telltales_does_not_reach_the_stages(handed, stages):
    stages(lambda *_: pytest.fail("the pre-check let it through"))
    torch.compile(lambda x: x.sin() @ x.T, backend="moe_inductor")(X)
    assert len(handed.code) == 1


def spoil(gm, report, options, *capture):
    """Get half-way through a rewrite, then fail."""
    blocks(True)(gm, report, options)
    for module in gm.modules():
        if isinstance(module, torch.fx.GraphModule):
            output = next(iter(reversed(module.graph.nodes)))
            with module.graph.inserting_before(output):
                first = next(iter(module.graph.nodes))
                module.graph.call_function(operator.neg, (first,))
            module.recompile()
    raise KeyError("half-way")


@pytest.mark.parametrize("checkpointed", [False, True])
def test_internal_error_restores_the_graph_and_warns_once(handed, stages, caplog, checkpointed):
    stages(spoil)

    def function(x):
        if checkpointed:  # the body is a child graph
            return torch.utils.checkpoint.checkpoint(routed, x, use_reentrant=False)
        return routed(x)

    x = X.clone().requires_grad_()
    stock, _ = graphs_of(function, [(x,)], handed, backend="inductor")
    stock = handed.texts()
    _, (result,) = graphs_of(function, [(x,)], handed, backend="moe_inductor")
    assert handed.texts() == stock
    torch.testing.assert_close(result, routed(x))
    assert set(handed.tags) == {""}

    torch.compile(lambda x: function(x) + 1, backend="moe_inductor")(x)
    (warning,) = [r for r in caplog.records if r.name == "moe_inductor"]
    text = warning.getMessage()
    assert "KeyError: 'half-way' at test_backend.py" in text
    assert "MOE_INDUCTOR_RAISE=1" in text
    assert len(backend.reports) == 2
    assert not backend.reports[0].blocks


def test_internal_error_with_the_real_inductor(stages):
    stages(spoil)
    result = torch.compile(routed, backend="moe_inductor")(X)
    torch.testing.assert_close(result, routed(X))


def test_internal_error_raises_in_tests_and_under_strict(handed, stages, monkeypatch):
    stages(spoil)
    with pytest.raises(Exception, match="half-way"):
        torch.compile(routed, backend="moe_inductor", options={"moe_inductor.strict": True})(X)
    monkeypatch.setenv("MOE_INDUCTOR_RAISE", "1")
    torch._dynamo.reset()
    with pytest.raises(Exception, match="half-way"):
        torch.compile(routed, backend="moe_inductor")(X)


def test_strict_raises_not_fused_with_reason_and_place(handed, stages):
    stages(blocks(True, False))
    strict = torch.compile(routed, backend="moe_inductor", options={"moe_inductor.strict": True})
    with pytest.raises(NotFused, match=r"fused 1/2 .* the block differs at modeling_x.py:12"):
        strict(X)
    assert not handed.code


def test_strict_is_content_when_all_is_fused_and_when_there_is_no_moe(handed, stages):
    for stage in (blocks(True), blocks()):
        stages(stage)
        torch._dynamo.reset()
        torch.compile(routed, backend="moe_inductor", options={"moe_inductor.strict": True})(X)
    assert len(handed.code) == 2


def test_one_summary_line_per_compile(handed, stages, caplog):
    stages(blocks(True, False))
    torch.compile(routed, backend="moe_inductor")(X)
    lines = [r.getMessage() for r in caplog.records if r.name == "moe_inductor"]
    assert lines == [
        "moe_inductor: fused 1/2 MoE blocks (x_loop); 1 not: the block differs at modeling_x.py:12"
    ]
    caplog.clear()
    torch.compile(routed, backend="moe_inductor", options={"moe_inductor.summary": False})(X)
    assert not [record for record in caplog.records if record.name == "moe_inductor"]


def test_caches_depend_on_our_sources_and_options_where_we_rewrote(handed, stages):
    stages(blocks(True))
    torch.compile(routed, backend="moe_inductor")(X)
    torch._dynamo.reset()
    torch.compile(routed, backend="moe_inductor", options={"moe_inductor.fuse_router": False})(X)
    assert all("moe_inductor-" in tag for tag in handed.tags)
    assert handed.tags[0] != handed.tags[1]
    assert torch.compiler.config.cache_key_tag == ""


def test_capture_that_led_to_nothing_is_undone_and_its_reason_told(handed, stages, caplog):
    def loop(x):
        rows = torch.where(torch.topk(x, 2)[1] > 3)[0]
        return x.new_zeros(x.shape).index_add_(0, rows, x[rows])

    def refuse_if_captured_whole(gm, report, options, *capture):
        if "index_add_" in gm.code and "topk" in gm.code:
            blocks(False)(gm, report, options)

    stages(refuse_if_captured_whole)
    stock, (expected,) = graphs_of(loop, [(X,)], handed, backend="inductor")
    ours, (result,) = graphs_of(loop, [(X,)], handed, backend="moe_inductor")
    assert ours == stock
    assert len(stock) > 1
    torch.testing.assert_close(result, expected)
    lines = [r.getMessage() for r in caplog.records if r.name == "moe_inductor"]
    assert lines == ["moe_inductor: fused 0/1 MoE block: the block differs at modeling_x.py:12"]


def test_reset_forgets(handed, stages):
    stages(blocks(True))
    torch.compile(routed, backend="moe_inductor")(X)
    assert backend.reports[-1].fused
    torch._dynamo.reset()
    assert not backend.reports


def test_an_own_backend_object_works_like_the_name(handed, stages):
    stages(blocks(True))
    mine = MoEInductor()
    result = torch.compile(routed, backend=mine)(X)
    torch.testing.assert_close(result, routed(X))
    assert mine.reports[0].fused
    assert not backend.reports
