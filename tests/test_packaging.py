"""What an installed copy holds, and what happens when a checkout hides it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(
    int(setuptools.__version__.split(".")[0]) < 77, reason="pyproject.toml needs setuptools >= 77"
)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy: building leaves files behind."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("moe_inductor", "patterns", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory) -> zipfile.ZipFile:
    target = tmp_path_factory.mktemp("wheel")
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(target)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=checkout, check=True, capture_output=True)
    return zipfile.ZipFile(next(target.glob("*.whl")))


def run(code: str, *path: Path) -> subprocess.CompletedProcess[str]:
    """Run code with ``path`` first on sys.path, and without the editable install of this environment."""
    site = sysconfig.get_paths()
    head = f"import sys; sys.path[:0] = {[str(p) for p in path]!r}; "
    head += f"sys.path += {sorted({site['purelib'], site['platlib']})!r}; "
    command = [sys.executable, "-S", "-E", "-c", head + code]
    return subprocess.run(
        command, cwd=path[0].parent, capture_output=True, text=True, timeout=120, check=False
    )


def test_wheel_holds_the_package_and_nothing_beside_it(wheel):
    names = wheel.namelist()
    top = {name.split("/")[0] for name in names}
    assert {each for each in top if not each.endswith(".dist-info")} == {"moe_inductor"}
    for path in [*(ROOT / "moe_inductor").rglob("*.py")]:
        assert str(path.relative_to(ROOT)) in names
    for path in (ROOT / "patterns").glob("*.py"):
        assert f"moe_inductor/patterns/{path.name}" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    (entry_points,) = [name for name in names if name.endswith("entry_points.txt")]
    assert "moe_inductor = moe_inductor.backend:moe_inductor" in wheel.read(entry_points).decode()


def test_wheel_works_when_unpacked(wheel, tmp_path):
    wheel.extractall(tmp_path / "site")
    code = (
        "from moe_inductor.match.api import discover; assert discover(); "
        "import moe_inductor.backend as b; print(b.__file__)"
    )
    done = run(code, tmp_path / "site")
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stdout


def test_checkout_that_is_not_installed_says_what_to_do(checkout):
    done = run("import moe_inductor.backend", checkout)
    assert done.returncode == 1
    assert "pip install -e ." in done.stderr
    assert "ImportError" in done.stderr
