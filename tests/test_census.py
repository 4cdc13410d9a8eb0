"""Rows of docs/coverage.md measured again: none may be worse than recorded.

Every block in fp32 as transformers runs it by default, and a few under the other implementations.
``census.run --check`` measures all of them.
"""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

import transformers

from census import results
from census.families import cases
from census.run import Task, sweep

RECORDED = results.load(results.path(transformers.__version__))["rows"]

# A loop, one more, another spelling.  In transformers 4 every block has one implementation, its own.
SAMPLE = {5: [("mixtral", "eager"), ("gpt_oss", "eager"), ("mixtral", "batched_mm")], 4: []}
SHARES = 12


def _tasks():
    sample = SAMPLE[int(transformers.__version__.split(".")[0])]
    by_default = [
        (name, implementation)
        for name, case in cases().items()
        for implementation in ("own", "grouped_mm")
        if implementation in case.implementations
    ]
    return [Task(cases()[name], one, ("float32",)) for name, one in [*sample, *by_default]]


@pytest.mark.skipif(not RECORDED, reason=f"no results for transformers {transformers.__version__}")
@pytest.mark.parametrize("share", range(SHARES))
def test_no_row_is_worse(share):
    tasks = _tasks()[share::SHARES]
    # Not in a process for each: to trace the patterns and to fill the caches of torch takes as long as the block.
    rows = [row for task in tasks for row in task.rows()]
    assert len(rows) == 2 * len(tasks)
    assert {results.key(row) for row in rows} <= {results.key(row) for row in RECORDED}
    assert results.worse(RECORDED, rows) == []


def test_a_process_sends_what_is_measured():
    task = _tasks()[0]
    ((done, sent),) = sweep([task], limit=300)
    assert done is task
    assert [_untimed(row) for row in sent] == [_untimed(row) for row in task.rows()]


def _untimed(row):
    return {name: value for name, value in row.items() if name != "seconds"}


def test_what_a_process_does_not_send_is_accounted_for():
    """It is out of time as soon as it is looked at, at the latest with its first row."""
    task = _tasks()[0]
    ((_, rows),) = sweep([task], limit=0)
    assert {results.key(row) for row in rows} == set(task.keys())
    assert rows[-1]["status"] == "timeout"


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
