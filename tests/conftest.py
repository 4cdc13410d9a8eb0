"""Settings for all tests."""

from __future__ import annotations

import os

# Our internal errors fail the test that meets them instead of falling back to stock Inductor.
os.environ.setdefault("MOE_INDUCTOR_RAISE", "1")

# Workers share the cores: each with threads for all of them would be slower than one alone.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# These run in a process of their own, started by kernels/test_interpreter.py: the interpreter is chosen at import.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") else ["kernels/interpreter"]
