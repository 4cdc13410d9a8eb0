"""Settings for all tests."""

from __future__ import annotations

import os

# Our internal errors fail the test that meets them instead of falling back to stock Inductor.
os.environ.setdefault("MOE_INDUCTOR_RAISE", "1")
