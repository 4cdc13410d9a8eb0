"""Rules about the repository that nothing else would notice: who imports whom, and what README and CI promise."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "moe_inductor"

# Everything in torch without an underscore in its path that is nevertheless not a documented interface.
PRIVATE = re.compile(r"\btorch\.(_(?!_version__)\w+|fx\.experimental|\w+(\.\w+)*\._\w+)")


def files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """Modules that a file imports, also inside functions; ``from a import b`` counts as ``a`` and ``a.b``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                above = module_of(path).split(".")
                above = above[: len(above) - node.level + (path.name == "__init__.py")]
                source = ".".join([*above, source]).rstrip(".")
            found |= {source} | {f"{source}.{alias.name}" for alias in node.names}
    return found


def offenders(paths: list[Path], pattern: str) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}: {name}"
        for path in paths
        for name in sorted(imports(path))
        if re.fullmatch(pattern, name)
    ]


def test_kernels_know_no_fx():
    assert not offenders(
        files("moe_inductor/kernels"),
        r"torch\.fx.*|moe_inductor\.(region|match|prove|rewrite|capture|patterns|debug|backend)\b.*",
    )


def test_graph_stages_know_no_triton():
    stages = files("moe_inductor/region", "moe_inductor/match", "moe_inductor/prove")
    assert not offenders(stages, r"triton\b.*|moe_inductor\.kernels\b.*")


def test_patterns_import_torch_and_the_pattern_api_only():
    # "moe_inductor" and "moe_inductor.match" appear as the left side of "from ... import".
    allowed = r"(torch|__future__|moe_inductor\.match\.api|moe_inductor\.patterns)\b.*|moe_inductor(\.match)?"
    found = {name for path in files("patterns") for name in imports(path)}
    assert not {name for name in found if not re.fullmatch(allowed, name)}


def test_debug_is_imported_by_its_readers_only():
    allowed = {
        "moe_inductor.backend",
        "moe_inductor.rewrite.pipeline",
        "moe_inductor.__main__",
        "moe_inductor.demo",
        "moe_inductor",
    }
    others = [
        path
        for path in files("moe_inductor", "patterns")
        if module_of(path) not in allowed and PACKAGE / "debug" not in path.parents
    ]
    assert not offenders(others, r"moe_inductor\.debug\b.*")
    assert not [
        each
        for each in offenders([PACKAGE / "rewrite" / "pipeline.py"], r"moe_inductor\.debug\b.*")
        if ".debug.report" not in each and not each.endswith(".debug")
    ]


def private_names(path: Path) -> set[str]:
    """Private names of torch in code: imports, and attribute chains that start at ``torch``."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    # Compared as text, so that torch.ops.aten._softmax, which is an operator's name, can be told apart.
    chains = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names = {each for each in imports(path) | chains if re.match(r"torch\b", each)}
    return {
        name
        for name in names
        if PRIVATE.search(name) and not name.startswith(("torch.ops.", "torch._check"))
    }


def test_private_names_of_torch_are_in_compat_only():
    paths = [path for path in files("moe_inductor", "patterns") if path.name != "_compat.py"]
    found = {str(path.relative_to(ROOT)): names for path in paths if (names := private_names(path))}
    # Documented for users; and what the authors of a spelling call, which a pattern has to quote.
    allowed = {"torch._dynamo", "torch._dynamo.reset", "torch._grouped_mm"}
    assert not {path: names - allowed for path, names in found.items() if names - allowed}


def test_import_does_not_import_torch():
    code = "import sys, moe_inductor; assert moe_inductor.__version__; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_entry_point_resolves_without_an_import():
    (entry,) = metadata.entry_points(group="torch_dynamo_backends", name="moe_inductor")
    assert entry.value == "moe_inductor.backend:moe_inductor"
    assert entry.load().__name__ == "moe_inductor"
    code = (
        "import sys, torch; assert 'moe_inductor' in torch.compiler.list_backends(); "
        "assert 'moe_inductor.backend' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def readme_commands() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return [block.strip() for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)]


def test_ci_runs_the_first_two_commands_of_the_readme():
    commands = readme_commands()
    assert len(commands) == 3
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    for command in commands[:2]:
        assert "\n" not in command
        assert command in lines
    assert "python -m moe_inductor demo" in commands[0]
    assert commands[1].endswith("pytest")


def test_ci_script_can_be_executed():
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
    subprocess.run(["bash", "-n", ROOT / ".ci" / "run"], check=True, timeout=20)


def test_readme_lists_the_options():
    import dataclasses

    from moe_inductor.options import PREFIX, Options

    rows = re.findall(
        rf"\| `{re.escape(PREFIX)}(\w+)` \| `(\w+)`", (ROOT / "README.md").read_text()
    )
    assert dict(rows) == {field.name: str(field.default) for field in dataclasses.fields(Options)}


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_links_between_documents_exist(name):
    for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / name).read_text(encoding="utf-8")):
        assert (ROOT / target).exists(), target


def test_every_package_is_listed_for_installation():
    import tomllib

    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {module_of(path) for path in files("moe_inductor") if path.name == "__init__.py"}
    assert set(listed) == found | {"moe_inductor.patterns"}
