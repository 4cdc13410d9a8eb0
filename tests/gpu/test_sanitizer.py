"""compute-sanitizer finds nothing in any kernel: no access out of bounds, no race in shared memory."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from tests.gpu.small_cases import CASES

SANITIZER = shutil.which("compute-sanitizer") or shutil.which(
    "compute-sanitizer", path="/usr/local/cuda/bin"
)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(SANITIZER is None, reason="needs compute-sanitizer"),
]


@pytest.mark.parametrize("case", range(len(CASES)))
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_small_cases(tool, case):
    assert SANITIZER is not None
    command = [SANITIZER, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
    done = subprocess.run(
        [*command, sys.executable, "-m", "tests.gpu.small_cases", str(case)],
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        cwd=pathlib.Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "all right" in done.stdout
