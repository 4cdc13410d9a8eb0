"""Facts about single nodes of a Dynamo graph: values, storages, mutation, source lines."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from moe_inductor._compat import (
    TORCH_FOLDER,
    OpOverload,
    OpOverloadPacket,
    free_unbacked_symbols,
    size_expr,
)

# Dynamo keeps the fake value of a node under "example_value", ATen graphs keep it under "val".
_VALUE_KEYS = ("example_value", "val")

BATCHED_PRODUCTS = frozenset({"bmm", "matmul", "__matmul__", "einsum", "baddbmm"})
_INPLACE_OPERATORS = frozenset(
    {
        "setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul",
        "iand", "ior", "ixor", "ilshift", "irshift",
    }
)  # fmt: skip


def value(node: fx.Node) -> Any:
    """The fake value of ``node``: FakeTensor, SymInt, a tuple of them, or None."""
    for key in _VALUE_KEYS:
        if key in node.meta:
            return node.meta[key]
    return None


def node_arg(node: fx.Node, position: int) -> fx.Node:
    """A positional argument that is known to be a node."""
    found = node.args[position]
    assert isinstance(found, fx.Node)
    return found


def tensors(node: fx.Node) -> Iterator[torch.Tensor]:
    """All tensors in the value of ``node`` (``topk`` and ``chunk`` return several)."""
    found = value(node)
    if isinstance(found, torch.Tensor):
        yield found
    elif isinstance(found, (tuple, list)):
        yield from (item for item in found if isinstance(item, torch.Tensor))


def is_tensor(node: fx.Node) -> bool:
    return isinstance(value(node), torch.Tensor)


def is_floating(node: fx.Node) -> bool:
    return any(t.dtype.is_floating_point for t in tensors(node))


def is_integral(node: fx.Node) -> bool:
    found = value(node)
    return isinstance(found, torch.Tensor) and not (
        found.dtype.is_floating_point or found.dtype.is_complex
    )


def unbacked(item: Any) -> frozenset:
    """The unbacked symbols (data-dependent sizes) in the shapes of a value."""
    if isinstance(item, (tuple, list)):
        return frozenset().union(*(unbacked(i) for i in item))
    if isinstance(item, (torch.Tensor, torch.SymInt, torch.SymBool, torch.SymFloat)):
        return frozenset(free_unbacked_symbols(item))
    return frozenset()


def unviewed(node: Any) -> fx.Node:
    """What ``node`` of the normal form is a view of, or itself."""
    while node.target is torch.ops.aten.view.default:
        node = node_arg(node, 0)
    return node


def same_sizes(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Compared by how they are written: to ask a symbolic size for its value would add a guard."""
    return [written(size) for size in a] == [written(size) for size in b]


def written(size: Any) -> str:
    return str(size_expr(size)) if isinstance(size, torch.SymInt) else str(size)


def is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def has_unbacked(node: fx.Node) -> bool:
    return bool(unbacked(value(node)))


def name_of(node: fx.Node) -> str:
    """``"index_add_"`` for a method call, ``torch.Tensor.index_add_`` or ``aten.index_add_.default``."""
    if isinstance(node.target, str):
        return node.target
    if isinstance(node.target, OpOverload):
        return node.target._schema.name.split("::")[-1]
    if isinstance(node.target, OpOverloadPacket):
        return node.target.__name__
    return getattr(node.target, "__name__", str(node.target))


# The key in a placeholder's ``meta`` that says what it is to the block: STORED (a weight) or STATES (tokens).
ROLE = "moe_inductor_role"
STORED, STATES = "stored", "states"


def role_of(node: fx.Node) -> str | None:
    """STORED or STATES, for an input of a region, cast or not; None where that is not known."""
    return uncast(node).meta.get(ROLE)


def uncast(node: fx.Node) -> fx.Node:
    """What ``node``, in normal form, is a cast of; else itself."""
    return node_arg(node, 0) if node.target is torch.ops.aten._to_copy.default else node


def is_random(target: Any) -> bool:
    """Does the operator draw random numbers?  Two equal calls are not the same value then."""
    return isinstance(target, OpOverload) and torch.Tag.nondeterministic_seeded in target.tags


def is_pointwise(target: Any) -> bool:
    """Does each element of the result depend on the elements at its own place alone?"""
    is_tagged = isinstance(target, OpOverload) and torch.Tag.pointwise in target.tags
    return is_tagged and not is_random(target)


def origin_of(node: fx.Node) -> str | None:
    """Where in the model ``node`` comes from, for nodes that take its place."""
    return node.meta.get("stack_trace")


def storages(node: fx.Node) -> set[int]:
    """Identities of the storages behind the value: views of one tensor share them."""
    return {id_ for t in tensors(node) if (id_ := _storage_id(t)) is not None}


def _storage_id(tensor: torch.Tensor) -> int | None:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # subclasses without storage
        return None


def mutated(node: fx.Node) -> list[fx.Node]:
    """The arguments that ``node`` changes in place."""
    if node.op not in ("call_function", "call_method"):
        return []
    if isinstance(node.target, OpOverload):
        schema = node.target._schema
        named = dict(zip((a.name for a in schema.arguments), node.args, strict=False))
        named.update(node.kwargs)
        hit = [
            named.get(a.name)
            for a in schema.arguments
            if a.alias_info is not None and a.alias_info.is_write
        ]
        return [a for a in hit if isinstance(a, fx.Node)]
    out = node.kwargs.get("out")
    found = [out] if isinstance(out, fx.Node) else []
    name = name_of(node)
    inplace = name in _INPLACE_OPERATORS or (name.endswith("_") and not name.endswith("__"))
    inplace = inplace or node.kwargs.get("inplace") is True
    if inplace and node.args and isinstance(node.args[0], fx.Node):
        found.append(node.args[0])
    return found


_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')


def location(node: fx.Node) -> str:
    """``file.py:line`` of the model's source that made the node, or "" when Dynamo did not record one.

    The innermost line outside of torch: of a call of ``torch.nn.functional``, not the line in there.
    """
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    if not frames:
        return ""
    file, line = next(
        (f for f in reversed(frames) if not f[0].startswith(TORCH_FOLDER)), frames[-1]
    )
    return f"{os.path.basename(file)}:{line}"
