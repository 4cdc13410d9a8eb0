"""Runs the files of interpreter/ under Triton's interpreter: the kernels' index logic, on the CPU, in fp32.

``TRITON_INTERPRET`` is read when a kernel is decorated, so it needs a process of its own: the other tests in
this process compile the same kernels.
"""

import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("triton")

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.mark.parametrize("name", sorted(p.name for p in (HERE / "interpreter").glob("check_*.py")))
def test_under_interpreter(name):
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            "-n0",
            f"interpreter/{name}",
        ],
        cwd=HERE,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    print(done.stdout.splitlines()[-1])
