"""What of a block's own source decides at run time which experts run: its loops, and the tests inside of them."""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

# Calls that hand numbers from the device to Python.
_READS = ("tolist", "item", "cpu", "numpy")


def constructs(block: nn.Module, modeling: types.ModuleType) -> list[dict[str, str]]:
    """The loops over experts in the code that ``block`` is made of, as ``{"code": .., "place": "file.py:12"}``.

    modeling: whose classes count, and whose functions about experts; the rest is not the model's.
    """
    owners: list[Any] = [type(m) for m in block.modules()]
    owners += [
        f for name, f in vars(modeling).items() if "expert" in name and inspect.isfunction(f)
    ]
    found = [each for o in set(owners) if o.__module__ == modeling.__name__ for each in _of(o)]
    return sorted(found, key=lambda each: int(each["place"].rpartition(":")[2]))


def _of(owner: Any) -> Iterator[dict[str, str]]:
    lines, first = inspect.getsourcelines(owner)
    (tree,) = ast.parse(textwrap.dedent("".join(lines))).body
    file = Path(inspect.getsourcefile(owner) or "").name
    methods = tree.body if isinstance(tree, ast.ClassDef) else [tree]
    for method in methods:
        if not isinstance(method, ast.FunctionDef) or method.name.startswith("_"):
            continue
        for node in ast.walk(method):
            code = _told(node)
            if code and isinstance(node, ast.stmt):
                yield {"code": code, "place": f"{file}:{first + node.lineno - 1}"}


def _told(node: ast.AST) -> str:
    match node:
        case ast.For():
            head = f"for {ast.unparse(node.target).strip('()')} in {ast.unparse(node.iter)}:"
            return " ".join([head, *_tests(node)])
        case ast.Assign() if _reads(node.value):
            return ast.unparse(node)
    return ""


def _tests(loop: ast.For) -> Iterator[str]:
    """Tests in the loop that look at data: they compare, or ask for ``any()``; not at the module alone."""
    for node in ast.walk(loop):
        if (
            isinstance(node, ast.If)
            and isinstance(node.test, ast.Compare | ast.Call)
            and any(isinstance(n, ast.Name) and n.id != "self" for n in ast.walk(node.test))
        ):
            leaves = node.body and isinstance(node.body[0], ast.Continue)
            yield f"if {ast.unparse(node.test)}:" + (" continue" if leaves else "")


def _reads(value: ast.AST) -> bool:
    return any(
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in _READS
        for node in ast.walk(value)
    )
