"""What a user sees: the report, the summary line, explain, dumps, the structured trace."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import moe_inductor as package
import moe_inductor.rewrite.pipeline
from moe_inductor.backend import moe_inductor as backend
from moe_inductor.debug import log as debug_log
from moe_inductor.debug.report import BlockReport, CompileReport
from moe_inductor.description import Combine, Experts, MoE, Router
from moe_inductor.reasons import Code, Reason

REASON = Reason(Code.ACTIVATION, "activation gelu\nis not supported", "modeling_x.py:7")
MIXTRAL = MoE(
    spelling="x_loop",
    top_k=2,
    experts=Experts(
        num_experts=8,
        hidden_size=16,
        intermediate_size=32,
        activation="silu",
        layout="concatenated",
        storage="stacked",
        weight_dtype=torch.bfloat16,
        compute_dtype=torch.bfloat16,
    ),
    combine=Combine(out_dtype=torch.bfloat16),
    router=Router(score="softmax", k=2, renormalise=True, weights_dtype=torch.float32),
)


def fused(spelling="x_loop"):
    return BlockReport(spelling=spelling, fused=True, location="modeling_x.py:5")


def refused(reason=REASON, **kwargs):
    return BlockReport(spelling="", fused=False, reason=reason, **kwargs)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("blocks", "line"),
    [
        ([], ""),
        ([fused()] * 24, "fused 24/24 MoE blocks (x_loop)"),
        ([fused()], "fused 1/1 MoE block (x_loop)"),
        ([fused(), fused("y"), fused()], "fused 3/3 MoE blocks (x_loop, y)"),
        (
            [refused()] * 24,
            "fused 0/24 MoE blocks: activation gelu is not supported at modeling_x.py:7",
        ),
        (
            [fused()] * 22 + [refused()] * 2,
            "fused 22/24 MoE blocks (x_loop); 2 not: activation gelu is not supported at modeling_x.py:7",
        ),
        (
            [refused(Reason(Code.PROOF, "unequal")), refused(), refused()],
            "fused 0/3 MoE blocks: 2 x activation gelu is not supported at modeling_x.py:7; 1 x unequal",
        ),
        (
            [refused(Reason(Code.PROOF, str(index))) for index in range(5)],
            "fused 0/5 MoE blocks: 1 x 0; 1 x 1; 1 x 2; 2 more reasons",
        ),
        ([refused(None, location="a.py:3")], "fused 0/1 MoE block: no reason given at a.py:3"),
        (
            [refused(Reason(Code.DTYPE, ""), location="a.py:3")],
            "fused 0/1 MoE block: dtype not supported at a.py:3",
        ),
    ],
)
def test_summary(blocks, line):
    assert CompileReport(blocks=blocks).summary() == line


def test_report_for_people_and_for_programs():
    full = BlockReport(
        spelling="x_loop",
        fused=True,
        location="modeling_x.py:5",
        moe=MIXTRAL,
        router_fused=True,
        nodes_before=40,
        nodes_after=3,
        shapes={"hidden_states": "[s0, 16]"},
    )
    report = CompileReport(blocks=[full, refused()], frame="0/1", notes=["a note"])
    report.stage_seconds["match"] = 0.25
    text = str(report)
    for part in (
        "graph 0/1",
        "block 0: fused, x_loop at modeling_x.py:5",
        "router: softmax, top-2, renormalised, float32 weights, fused",
        "experts: 8 x (16 -> 32 -> 16), silu-gated, stacked weights, gate and up in one weight, bfloat16",
        "hidden_states [s0, 16]",
        "nodes: 40 -> 3",
        "reason: activation gelu is not supported at modeling_x.py:7",
        "kind: ACTIVATION",
        "match 0.250 s",
        "note: a note",
    ):
        assert part in text
    plain = json.loads(json.dumps(report.to_json()))
    assert plain["blocks"][0]["moe"]["experts"]["weight_dtype"] == "bfloat16"
    assert plain["blocks"][1]["reason"]["code"] == "ACTIVATION"
    assert plain["summary"] == report.summary()
    assert "graph_before" not in plain


def test_unfused_router_says_why():
    why = Reason(Code.ROUTER, "sigmoid with groups", "modeling_x.py:9")
    block = BlockReport(spelling="x_loop", fused=True, moe=MIXTRAL, router_reason=why)
    text = str(CompileReport(blocks=[block]))
    assert "left as the model wrote it: sigmoid with groups at modeling_x.py:9" in text


@contextlib.contextmanager
def logging_with(*handlers: logging.Handler, root_level: int = logging.WARNING):
    """Logging as in a program that configured only this (pytest puts handlers on the root)."""
    root, ours = logging.getLogger(), debug_log.log
    before = root.handlers, root.level, ours.handlers, ours.level
    root.handlers, root.level, ours.handlers = list(handlers), root_level, []
    try:
        yield
    finally:
        root.handlers, root.level, ours.handlers = before[:3]
        ours.setLevel(before[3])  # also forgets what isEnabledFor cached


def test_line_reaches_stderr_of_who_configured_nothing(capsys):
    with logging_with():
        debug_log.announce("moe_inductor: fused 1/1")
    assert capsys.readouterr() == ("", "moe_inductor: fused 1/1\n")


def test_line_goes_once_through_the_users_handlers(capsys):
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(name)s|%(levelname)s|%(message)s"))
    with logging_with(handler):
        debug_log.announce("line")
    assert stream.getvalue() == "moe_inductor|INFO|line\n"
    assert capsys.readouterr() == ("", "")


def test_line_can_be_silenced_by_logging(capsys):
    with logging_with(root_level=logging.ERROR):
        debug_log.announce("quiet root")
    with logging_with():
        debug_log.log.setLevel(logging.WARNING)
        debug_log.announce("quiet logger")
    with logging_with():
        logging.disable(logging.CRITICAL)
        debug_log.announce("disabled")
        logging.disable(logging.NOTSET)
    assert capsys.readouterr() == ("", "")


def test_level_of_the_logger_beats_the_root(capsys):
    with logging_with(root_level=logging.ERROR):
        debug_log.log.setLevel(logging.INFO)
        debug_log.announce("line")
    assert capsys.readouterr().err == "line\n"


def routed(x):
    values, ids = torch.topk(x.softmax(-1), 2)
    return values * ids


X = torch.arange(24.0).reshape(4, 6)


@pytest.fixture
def one_block(monkeypatch):
    def stage(gm, report, options, *capture):
        report.blocks.append(refused())
        report.artifacts["canonical_0"] = "a graph"

    monkeypatch.setattr(moe_inductor.rewrite.pipeline, "fuse_moe_blocks", stage)


def test_dump_option_writes_an_ordered_folder(one_block, tmp_path, monkeypatch):
    monkeypatch.setattr(torch._dynamo.utils, "get_debug_dir", lambda: str(tmp_path))
    torch.compile(routed, backend="moe_inductor", options={"moe_inductor.dump": True})(X)
    (folder,) = (tmp_path / "moe_inductor").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == [
        "0_before.py",
        "1_after.py",
        "2_canonical_0.py",
        "3_report.txt",
        "4_report.json",
    ]
    assert "topk" in (folder / "0_before.py").read_text()
    assert "fused 0/1" in (folder / "3_report.txt").read_text()
    assert json.loads((folder / "4_report.json").read_text())["frame"]


def test_explain_returns_prints_and_compiles_nothing(one_block, capsys, monkeypatch):
    def no_inductor(*args, **kwargs):
        pytest.fail("explain ran Inductor")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", no_inductor)

    def model(x):
        y = routed(x)
        torch._dynamo.graph_break()
        return y + 1

    explanation = package.explain(model, X)
    out, err = capsys.readouterr()
    assert out == f"{explanation}\n"
    assert err == ""
    assert explanation.graph_count == 2
    assert [block.reason for block in explanation.blocks] == [REASON, REASON][
        : len(explanation.blocks)
    ]
    assert "activation gelu is not supported at modeling_x.py:7" in out
    ((reason, place),) = explanation.graph_breaks
    assert reason
    assert place.startswith("test_debug.py:")
    assert "topk" in (explanation.reports[0].graph_before or "")
    assert not backend.reports


def test_explain_leaves_no_trace_in_what_the_user_compiles(one_block):
    shapes = []

    def watching(gm, inputs):
        shapes.append([tuple(each.shape) for each in inputs])
        return gm.forward

    model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Softmax(-1))
    package.explain(model, X[:2])
    compiled = torch.compile(model, backend=watching)
    compiled(X)
    # Not dynamic: what explain saw does not count as an earlier size.
    assert (4, 6) in shapes[-1]
    package.explain(compiled, X[:3])
    compiled(X)
    assert len(shapes) == 1


def test_explain_lets_the_models_error_through(one_block):
    def model(x):
        return routed(x) + undefined  # noqa: F821

    with pytest.raises(NameError):
        package.explain(model, X)


SCRIPT = textwrap.dedent("""
    import torch
    import moe_inductor.rewrite.pipeline as pipeline
    from moe_inductor.debug.report import BlockReport

    def stage(gm, report, options, *capture):
        report.blocks.append(BlockReport(spelling="x_loop", fused=True))

    pipeline.fuse_moe_blocks = stage
    torch.compile(lambda x: torch.topk(x, 2)[0], backend="moe_inductor")(torch.ones(3, 4))
""")


def run_script(tmp_path: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": "", **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    return done.stderr


def test_torch_logs_trace_and_debug_folder(tmp_path):
    """One process with everything on: torch imports our package in the middle of its own import."""
    stderr = run_script(
        tmp_path, TORCH_LOGS="+moe_inductor", TORCH_TRACE="trace", TORCH_COMPILE_DEBUG="1"
    )
    lines = [line for line in stderr.splitlines() if "fused 1/1 MoE block (x_loop)" in line]
    assert sum("moe_inductor: fused" in line for line in lines) == 1
    assert any("graph 0/0: fused 1/1" in line for line in lines)

    (folder,) = tmp_path.glob("torch_compile_debug/run_*/moe_inductor/000_graph_0_0")
    assert "topk" in (folder / "0_before.py").read_text()

    (trace,) = (tmp_path / "trace").iterdir()
    text = trace.read_text()
    names = ("moe_inductor_before", "moe_inductor_after", "moe_inductor_report")
    assert all(f'"name": "{name}"' in text for name in names)

    tlparse = shutil.which("tlparse") or shutil.which(
        "tlparse", path=str(Path(sys.executable).parent)
    )
    if tlparse is None:
        pytest.skip("tlparse is not installed; everything before it passed")
    subprocess.run(
        [tlparse, "--no-browser", str(trace), "-o", str(tmp_path / "html")],
        check=True,
        capture_output=True,
        timeout=120,
    )
    shown = {path.name for path in (tmp_path / "html").rglob("moe_inductor_*")}
    assert all(any(each.startswith(name) for each in shown) for name in names)
    index = (tmp_path / "html" / "index.html").read_text()
    assert all(name in index for name in names)


def test_torch_logs_can_silence_the_line(tmp_path):
    assert "fused" not in run_script(tmp_path, TORCH_LOGS="-moe_inductor")
