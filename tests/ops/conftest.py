"""Shared by tests/ops.  Tests are imported by path (importlib mode), so tests/ goes on sys.path here."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
