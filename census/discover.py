"""Which model folders of the installed transformers hold a mixture of experts, and which classes are its blocks.

Found in the source, by one habit that all authors share: the class that owns router and experts says
``self.experts = ...`` in its ``__init__`` (the Granite kind says ``self.input_linear = ...ParallelExperts(...)``).
What does otherwise is in ``families.py``.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import inspect
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers

ROOT = Path(transformers.__file__).parent / "models"
VERSION = transformers.__version__

# A layer that calls router and experts by itself: families.py says what of it is the block.
_LAYER = re.compile("(DecoderLayer|EncoderTextLayer|DecoderTextLayer|Attention)$")
_COUNT_OF_EXPERTS = re.compile(r"(^|_)(num|n)_.*experts$|^moe_num_experts$|^num_part_features$")


@dataclasses.dataclass(frozen=True)
class Found:
    """One class that owns experts.  folder: below ``transformers/models``, ``deprecated/..`` included."""

    folder: str
    block: str

    @property
    def family(self) -> str:
        return self.folder.rpartition("/")[2]

    @property
    def module(self) -> types.ModuleType:
        return modeling(self.folder)

    @property
    def on_interface(self) -> bool:
        """May the experts implementation be chosen (transformers >= 5)?"""
        return "@use_experts_implementation" in source(self.folder)


@functools.cache
def scan() -> tuple[Found, ...]:
    """Every class of the installed transformers that owns experts, by folder."""
    found = []
    for path in sorted(ROOT.glob("**/modeling_*.py")):
        if "expert" not in (text := path.read_text()).lower():
            continue
        folder = path.parent.relative_to(ROOT).as_posix()
        classes = [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
        found += [Found(folder, c.name) for c in classes if _owns_experts(c)]
    return tuple(found)


def layers(found: Found) -> bool:
    """Is the class a whole layer or an attention, so that its block has to be taken out of it?"""
    return _LAYER.search(found.block) is not None


def _owns_experts(node: ast.ClassDef) -> bool:
    for statement in ast.walk(_method(node, "__init__")):
        match statement:
            case ast.Assign(targets=[ast.Attribute(attr=name)], value=ast.Call(func=made)):
                if name == "experts" or ast.unparse(made).endswith("ParallelExperts"):
                    return True
    return False


def _method(node: ast.ClassDef, name: str) -> ast.AST:
    for part in node.body:
        if isinstance(part, ast.FunctionDef) and part.name == name:
            return part
    return ast.Module([], [])


@functools.cache
def source(folder: str) -> str:
    (path,) = sorted((ROOT / folder).glob("modeling_*.py"))[:1]
    return path.read_text()


@functools.cache
def modeling(folder: str) -> types.ModuleType:
    return _module(folder, "modeling")


def _module(folder: str, kind: str) -> types.ModuleType:
    (path,) = sorted((ROOT / folder).glob(f"{kind}_*.py"))[:1]
    return importlib.import_module(f"transformers.models.{folder.replace('/', '.')}.{path.stem}")


def config_classes(folder: str) -> Iterator[type]:
    module = _module(folder, "configuration")
    for value in vars(module).values():
        if (
            isinstance(value, type)
            and issubclass(value, transformers.PretrainedConfig)
            and value.__module__ == module.__name__
        ):
            yield value


def config_class(found: Found) -> type:
    """The config that the block is made from: as annotated, else the one that counts experts."""
    candidates = {c.__name__: c for c in config_classes(found.folder)}
    counting = {n: c for n, c in candidates.items() if counts_experts(c)}
    for owner in (found.block, *_relatives(found)):
        name = _annotated_config(getattr(found.module, owner))
        if name in counting:
            return counting[name]
    if not counting:
        raise LookupError(f"no config of {found.folder} counts experts: {sorted(candidates)}")
    return max(counting.values(), key=lambda c: "Text" in c.__name__)


def counts_experts(config: type) -> bool:
    return any(_COUNT_OF_EXPERTS.search(name) for name in defaults(config))


@functools.cache
def defaults(config: type) -> dict[str, Any]:
    """Every argument of the config, with the value it has when nothing is given."""
    try:
        made = config().to_dict()
    except Exception:
        made = {}
    parameters = inspect.signature(config.__init__).parameters.values()
    named = [p for p in parameters if p.name != "self" and p.kind is not p.VAR_KEYWORD]
    return {p.name: made.get(p.name, None if p.default is p.empty else p.default) for p in named}


def _relatives(found: Found) -> list[str]:
    """Classes of the same file with the same beginning of the name: whose annotation may say more."""
    stem = re.split("SparseM|M[oO][eE]|MLP|FFN", found.block)[0]
    names = [n for n, v in vars(found.module).items() if inspect.isclass(v) and n.startswith(stem)]
    return sorted(names)


def _annotated_config(owner: type) -> str:
    parameter = inspect.signature(owner.__init__).parameters.get("config")
    annotation = getattr(parameter, "annotation", None)
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
