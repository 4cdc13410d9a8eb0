"""Settings for all tests."""

from __future__ import annotations

import gc
import os
from typing import Any

import pytest

# Our internal errors fail the test that meets them instead of falling back to stock Inductor.
os.environ.setdefault("MOE_INDUCTOR_RAISE", "1")

# Workers share the cores: each with threads for all of them would be slower than one alone.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Thousands of tests are kept, none of which is ever garbage: to look through them again and again took a sixth of the
# time.
gc.set_threshold(100_000, 50, 1000)

# These run in a process of their own, started by kernels/test_interpreter.py: the interpreter is chosen at import.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") else ["kernels/interpreter"]


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """The tests of one spelling on one worker, so that its patterns are made there alone, its samples compiled once.

    By their names: xdist 3.8 tells groups by a suffix that it cannot give to the tests of pytest 9.2.
    """
    if config.getvalue("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file, _, test = nodeid.partition("::")
            spelling = test.partition("[")[2].rstrip("]").partition("-")[0]
            return spelling if "tests/patterns/" in file and spelling else nodeid

    return Scheduling(config, log)
