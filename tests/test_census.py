"""A few rows of docs/coverage.md measured again: none may be worse than recorded."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

import transformers

from census import results
from census.families import cases
from census.run import Task, sweep

RECORDED = results.load(results.path(transformers.__version__))["rows"]

# A loop, a router that stays in front of a static spelling, another spelling.
SAMPLE = {
    5: [("mixtral", "eager"), ("deepseek_v3", "grouped_mm"), ("mixtral", "batched_mm")],
    4: [("mixtral", "own"), ("deepseek_v3", "own"), ("llama4", "own")],
}


@pytest.mark.skipif(not RECORDED, reason=f"no results for transformers {transformers.__version__}")
def test_no_row_is_worse():
    sample = SAMPLE[int(transformers.__version__.split(".")[0])]
    tasks = [Task(cases()[case], implementation, ("float32",)) for case, implementation in sample]
    rows = [row for _, rows in sweep(tasks, jobs=2, limit=120) for row in rows]
    assert len(rows) == 2 * len(tasks)
    assert {results.key(row) for row in rows} <= {results.key(row) for row in RECORDED}
    assert results.worse(RECORDED, rows) == []


def test_every_family_of_the_census():
    """What transformers 4.57.6, 5.23.0 and 5.24.0 hold, counted by hand; another version may hold others."""
    counted = {"4.57.6": 32, "5.23.0": 73, "5.24.0": 76}
    families = {case.family for case in cases().values()}
    assert len(families) == counted.get(transformers.__version__, len(families))


ROW = {
    "part": "block",
    "case": "a",
    "implementation": "eager",
    "dtype": "float32",
    "mode": "training",
    "status": "fused",
    "router_fused": True,
    "graphs": 1,
}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"status": "refused", "message": "because"}, "because"),
        ({"status": "wrong", "wrong": "off by one"}, "off by one"),
        ({"router_fused": False}, "router"),
        ({"graphs": 2}, "graphs"),
    ],
)
def test_worse(change, word):
    (line,) = results.worse([ROW], [ROW | change])
    assert word in line


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({}, {}),
        ({"status": "refused"}, {}),
        ({"status": "not MoE-fusable"}, {"status": "refused"}),
        ({"graphs": 2}, {}),
        ({"case": "b"}, {"status": "wrong"}),
    ],
)
def test_not_worse(old, new):
    assert results.worse([ROW | old], [ROW | new]) == []


def test_saving_keeps_what_was_not_measured_again(tmp_path):
    file = tmp_path / "x.json"
    results.save(file, {"torch": "1"}, [ROW, ROW | {"case": "b"}])
    results.save(file, {"torch": "2"}, [ROW | {"status": "refused"}])
    run = results.load(file)
    assert run["torch"] == "2"
    assert [(r["case"], r["status"]) for r in run["rows"]] == [("a", "refused"), ("b", "fused")]
