"""``python -m census.run``: compile every MoE block of the installed transformers, and record what came of it.

Each (case, experts implementation) runs in a process of its own with a time limit.  Results go to
``census/results/transformers-<version>.json`` as they come in, or with another torch than CI's to a folder for that;
``--resume`` goes on where a run was stopped, ``--check`` writes nothing and fails if a row is worse than recorded.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import multiprocessing
import multiprocessing.connection
import os
import platform
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from census import measure, models, results
from census.constructs import constructs
from census.families import Case, cases
from moe_inductor.backend import _fingerprint

LIMIT = 300.0


@dataclasses.dataclass(frozen=True)
class Task:
    """What one process does.  part: "block", or "model" for the whole tiny model around it."""

    case: Case
    implementation: str
    dtypes: tuple[str, ...] = tuple(measure.DTYPES)
    modes: tuple[str, ...] = measure.MODES
    inner: str = "eager"
    part: str = "block"

    def rows(self) -> Iterator[results.Row]:
        if self.part == "block":
            rows = measure.measure(
                self.case, [self.implementation], self.dtypes, self.modes, self.inner
            )
        else:
            rows = models.measure(self.case, self.implementation, self.modes)
        for row in rows:
            yield {"part": self.part} | row

    def keys(self) -> list[results.Key]:
        return [
            (self.part, self.case.name, self.implementation, dtype, mode)
            for dtype in self.dtypes
            for mode in self.modes
        ]

    def __str__(self) -> str:
        return f"{self.part} {self.case.name} {self.implementation}"


class Process:
    """A task in a process, from a server that has torch and transformers imported already."""

    def __init__(self, task: Task, limit: float, log: Path | None) -> None:
        self.task = task
        self.deadline = time.monotonic() + limit
        self.limit = limit
        context = _server()
        self.receiver, sender = context.Pipe(duplex=False)
        self.process = context.Process(target=_work, args=(task, sender, log), daemon=True)
        self.process.start()
        sender.close()
        self.rows: list[results.Row] = []

    def done(self) -> bool:
        """Take what has arrived; True once nothing more will come."""
        try:
            while self.receiver.poll():
                self.rows.append(self.receiver.recv())
        except EOFError:
            self.process.join()
            return self._close("error", f"the process died with {self.process.exitcode}")
        if time.monotonic() > self.deadline:
            self.process.kill()
            self.process.join()
            return self._close("timeout", f"not done in {self.limit:.0f} s")
        return False

    def _close(self, status: str, message: str) -> bool:
        """Say of every row that did not come why."""
        came = {results.key(row) for row in self.rows}
        for part, case, implementation, dtype, mode in self.task.keys():  # noqa: SIM118
            row = {
                "part": part,
                "case": case,
                "family": self.task.case.family,
                "implementation": implementation,
                "dtype": dtype,
                "mode": mode,
            }
            if results.key(row) not in came:
                self.rows.append(row | {"status": status, "message": message})
        return True


@functools.cache
def _server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["census.models"])
    return context


def _work(task: Task, sender: Any, log: Path | None) -> None:
    """The body of the process.  What models and compilers print goes to the log or nowhere."""
    target = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.environ["MOE_INDUCTOR_RAISE"] = "1"  # an internal error is to be seen
    torch.set_num_threads(1)
    print(f"=== {task}", flush=True)
    for row in task.rows():
        sender.send(row)
    sender.close()


def sweep(
    tasks: list[Task], jobs: int = 1, limit: float = LIMIT, log: Path | None = None
) -> Iterator[tuple[Task, list[results.Row]]]:
    """Run the tasks, ``jobs`` at a time; each with its rows when it is done."""
    waiting = list(reversed(tasks))
    running: list[Process] = []
    while waiting or running:
        while waiting and len(running) < jobs:
            running.append(Process(waiting.pop(), limit, log))
        multiprocessing.connection.wait([p.receiver for p in running], timeout=1.0)
        for process in [p for p in running if p.done()]:
            running.remove(process)
            yield process.task, process.rows


def _tasks(arguments: argparse.Namespace) -> list[Task]:
    wanted = set(arguments.families)
    chosen = [c for c in cases().values() if not wanted or wanted & {c.name, c.family}]
    unknown = wanted - {c.name for c in chosen} - {c.family for c in chosen}
    if unknown:
        sys.exit(f"not in transformers {transformers.__version__}: {', '.join(sorted(unknown))}")
    pairs = [
        (case, implementation)
        for case in chosen
        for implementation in case.implementations
        if not arguments.implementations or implementation in arguments.implementations
    ]
    dtypes, modes = tuple(arguments.dtypes), tuple(arguments.modes)
    tasks = []
    if "block" in arguments.parts:
        tasks += [Task(*pair, dtypes, modes, arguments.inner) for pair in pairs]
    if "model" in arguments.parts:
        tasks += [Task(*pair, ("float32",), models.MODES, part="model") for pair in pairs]
    return tasks


def _loops(tasks: list[Task]) -> dict[str, list[dict[str, str]]]:
    """What is special about the code of each block, for docs/capture.md."""
    named = {task.case.name: task.case for task in tasks}
    return {
        name: constructs(case.build(case.implementations[0]), case.found.module)
        for name, case in named.items()
    }


def _command(arguments: argparse.Namespace) -> str:
    """What to type to measure the same again; where results go and how many at a time is left out."""
    words = ["python", "-m", "census.run"]
    for name in ("families", "implementations", "dtypes", "modes", "parts", "inner"):
        value = getattr(arguments, name)
        if value != _parser().get_default(name):
            words += [f"--{name}", *([value] if isinstance(value, str) else value)]
    return shlex.join(words)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m census.run", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--families", nargs="*", default=[], help="or single cases, family:variant")
    parser.add_argument("--implementations", nargs="*", default=[], help="eager, grouped_mm, ..")
    parser.add_argument("--dtypes", nargs="*", default=list(measure.DTYPES), choices=measure.DTYPES)
    parser.add_argument("--modes", nargs="*", default=list(measure.MODES), choices=measure.MODES)
    parser.add_argument("--parts", nargs="*", default=["block"], choices=["block", "model"])
    parser.add_argument("--inner", default="eager", help="backend behind ours; inductor is slow")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds per process")
    parser.add_argument("--resume", action="store_true", help="leave out what this code measured")
    parser.add_argument(
        "--unfused", action="store_true", help="leave out what is recorded as fused"
    )
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    parser.add_argument(
        "--out", type=Path, default=results.folder(torch.__version__), help="folder of the results"
    )
    parser.add_argument("--log", type=Path, help="file for what the processes print")
    return parser


def main() -> None:
    arguments = _parser().parse_args()
    file = results.path(transformers.__version__, arguments.out)
    before = results.load(file)
    recorded = before["rows"]
    tasks = _tasks(arguments)
    sources = _fingerprint()
    if arguments.resume:
        fresh = {results.key(r) for r in recorded if r.get("sources") == sources}
        tasks = [task for task in tasks if not fresh.issuperset(task.keys())]
    if arguments.unfused:
        done = {results.key(r) for r in recorded if r["status"] in ("fused", "not MoE-fusable")}
        tasks = [task for task in tasks if not done.issuperset(task.keys())]
    run = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "command": _command(arguments),
        "date": datetime.date.today().isoformat(),
        "loops": before.get("loops", {}) | _loops(tasks),
    }
    total: Counter[str] = Counter()
    complaints: list[str] = []
    for number, (task, rows) in enumerate(
        sweep(tasks, arguments.jobs, arguments.limit, arguments.log), 1
    ):
        rows = [row | {"sources": sources} for row in rows]
        total.update(row["status"] for row in rows)
        told = Counter(row["status"] for row in rows)
        words = ", ".join(f"{count} {status}" for status, count in told.items())
        print(f"{number}/{len(tasks)} {task}: {words}", flush=True)
        if arguments.check:
            complaints += results.worse(recorded, rows)
        else:
            results.save(file, run, rows)
    print(", ".join(f"{count} {status}" for status, count in total.most_common()))
    if complaints:
        sys.exit("\n".join(["worse than recorded:", *complaints]))


if __name__ == "__main__":
    main()
