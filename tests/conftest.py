"""Settings for all tests."""

from __future__ import annotations

import os

# Our internal errors fail the test that meets them instead of falling back to stock Inductor.
os.environ.setdefault("MOE_INDUCTOR_RAISE", "1")

# These run in a process of their own, started by kernels/test_interpreter.py: the interpreter is chosen at import.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") else ["kernels/interpreter"]
