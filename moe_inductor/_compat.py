"""Every private torch name that we touch, and nothing else.  One section per concern; a torch minor that moved a
name gets a branch here and nowhere else.  Kept by tests/test_layout.py."""

from __future__ import annotations
