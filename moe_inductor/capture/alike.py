"""One expert of a ModuleList stands for all: is there any difference that Python could see, and what holds that?

A rolled loop (``capture.rolled``) over experts that are modules is traced with two of them, the first and the second.
The trace of any other would have been the same if whatever Dynamo read of the first is the same there.  ``pairs`` finds
out, for everything that can be reached from an expert.  Dynamo wrote down what it read as guards, and ``guard`` writes
the same down for every other expert, so that a later change of one of them is noticed like a change of the first.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from moe_inductor import _compat

_LIBRARY = torch.library.Library("moe_inductor_capture", "FRAGMENT")
_LIBRARY.define("experts(Tensor[] parameters) -> ()")
EXPERTS = torch.ops.moe_inductor_capture.experts.default


@torch.library.impl("moe_inductor_capture::experts", "CompositeExplicitAutograd", lib=_LIBRARY)
def _run(parameters: list[torch.Tensor]) -> None:
    raise AssertionError("moe_inductor: a graph captured on unproved assumptions was run")


_CONSTANTS = (
    int,
    float,
    complex,
    bool,
    str,
    bytes,
    type(None),
    torch.dtype,
    torch.device,
    torch.Size,
    type,
)
_TENSORS = (torch.Tensor, nn.Parameter, nn.Buffer)


class Unlike(Exception):
    """Two experts differ, or we cannot exclude it."""


@dataclasses.dataclass(eq=False)
class Indexed:
    """``modules[e]`` in the body of a rolled loop.

    sources: where Dynamo found the experts that were traced, by number.
    """

    modules: nn.ModuleList
    sources: dict[int, Any] = dataclasses.field(default_factory=dict)


def pairs(one: nn.Module, other: nn.Module) -> dict[int, torch.Tensor]:
    """The tensor of ``other`` in the place of each tensor of ``one``, by id.  Raises Unlike."""
    found: dict[int, torch.Tensor] = {}
    _compare(one, other, found, set())
    return found


def lift(tx: Any, indexed: Indexed, count: int) -> list[list[fx.Node]]:
    """Make the parameters of all experts graph inputs and guard them.  ``[e][p]``: the placeholder of expert ``e``.

    Only what the graph reads of expert 0.  Raises Unlike.
    """
    modules = list(indexed.modules)
    base = indexed.sources[0]
    inputs = {}
    for node in tx.output.graph.find_nodes(op="placeholder"):
        source = getattr(node.meta.get("grapharg"), "source", None)
        if source is not None and _is_part_of(source, base):
            inputs[source] = node
    if not all(isinstance(n.meta.get("example_value"), torch.Tensor) for n in inputs.values()):
        raise Unlike("a number of an expert is an input")
    mutated = {
        id(getattr(owner, "value", None)) for owner in tx.output.side_effects.store_attr_mutations
    }
    guards = [g for g in tx.output.guards if _is_part_of(g.originating_source, base)]
    values = {source: node.meta["grapharg"].example for source, node in inputs.items()}
    found = [list(inputs.values())]
    for number in range(1, count):
        if any(id(part) in mutated for part in (*modules[0].modules(), *modules[number].modules())):
            raise Unlike("an expert is changed while it is traced")
        twin = pairs(modules[0], modules[number])
        there = dataclasses.replace(base, index=str(number))
        placeholders = []
        for source, value in values.items():
            if id(value) not in twin:
                raise Unlike("an input of an expert is not its own")
            tracker = _compat.VariableBuilder(tx, _moved(source, base, there))(twin[id(value)])
            placeholders.append(tracker.as_proxy().node)
        if number not in indexed.sources:
            for guard in guards:
                _guard(guard, inputs, base, there)
        found.append(placeholders)
    return found


def keep(tx: Any, placeholders: Sequence[Sequence[fx.Node]]) -> fx.Node:
    """A node that reads them all: Dynamo drops inputs that nothing reads."""
    return tx.output.graph.call_function(EXPERTS, ([n for each in placeholders for n in each],))


def same_pass(
    one: Sequence[fx.Node], other: Sequence[fx.Node], renamed: dict[fx.Node, fx.Node]
) -> bool:
    """Do two passes compute the same, if what ``one`` reads is ``renamed`` to what ``other`` reads?"""
    one, other = [[n for n in nodes if not n._erased] for nodes in (one, other)]
    renamed = dict(renamed)
    if len(one) != len(other):
        return False
    for left, right in zip(one, other, strict=True):
        if (left.op, left.target) != (right.op, right.target):
            return False
        arguments = _compat.map_arg((left.args, left.kwargs), lambda n: renamed.get(n, n))
        if arguments != (right.args, right.kwargs):
            return False
        renamed[left] = right
    return True


def source_of(expert: Any, number: int) -> Any:
    """Where Dynamo found ``modules[number]``.  Raises Unlike if that does not tell where the others are."""
    source: Any = expert.source
    if type(source).__name__ != "DictGetItemSource":
        source = getattr(source, "base", None)  # which says in addition that it is a module
    if (
        type(source).__name__ != "DictGetItemSource"
        or source.index != str(number)
        or getattr(source.base, "member", None) != "_modules"
    ):
        raise Unlike("the expert was not found in its list")
    return source


def _is_part_of(source: Any, base: Any) -> bool:
    while source is not None:
        if source == base:
            return True
        source = getattr(source, "base", None)
    return False


def _moved(source: Any, base: Any, there: Any) -> Any:
    """``source``, which is part of ``base``, in the place of ``base`` that is ``there``."""
    if source == base:
        return there
    changes = {
        field.name: _moved(value, base, there)
        for field in dataclasses.fields(source)
        if field.init and isinstance(value := getattr(source, field.name), _compat.Source)
    }
    return dataclasses.replace(source, **changes) if changes else source


def _guard(guard: Any, inputs: dict[Any, fx.Node], base: Any, there: Any) -> None:
    """What ``guard`` says of the first expert, said of another."""
    source, create = guard.originating_source, guard.create_fn
    if isinstance(create, functools.partial):
        if create.func is _compat.GuardBuilder.TENSOR_MATCH:
            if source not in inputs:
                raise Unlike("a tensor of an expert is looked at")
            return  # written down when the other's tensor became an input
        constant = all(
            isinstance(v, (str, int, bool, type(None))) for v in create.keywords.values()
        )
        if create.args or not constant:
            raise Unlike("what Dynamo read of an expert is not understood")
    _compat.install_guard(_moved(source, base, there).make_guard(create))


def _compare(a: Any, b: Any, found: dict[int, torch.Tensor], seen: set[tuple[int, int]]) -> None:
    if isinstance(a, torch.Tensor):
        _compare_tensors(a, b, found)
        return
    if (id(a), id(b)) in seen:
        return
    seen.add((id(a), id(b)))
    if type(a) is not type(b):
        raise Unlike(f"a {type(a).__name__} and a {type(b).__name__}")
    if isinstance(a, nn.Module):
        _compare(vars(a), vars(b), found, seen)
    elif isinstance(a, dict):
        if list(a) != list(b):
            raise Unlike("other names")
        for key in a:
            _compare(a[key], b[key], found, seen)
    elif isinstance(a, (list, tuple)) and type(a) is not torch.Size:
        if len(a) != len(b):
            raise Unlike("other lengths")
        for x, y in zip(a, b, strict=True):
            _compare(x, y, found, seen)
    elif isinstance(a, functools.partial):
        _compare((a.func, a.args, a.keywords), (b.func, b.args, b.keywords), found, seen)
    elif isinstance(a, types.MethodType):
        _compare((a.__func__, a.__self__), (b.__func__, b.__self__), found, seen)
    elif isinstance(a, (*_CONSTANTS, set, frozenset)):
        if a != b:
            raise Unlike(f"{a!r} and {b!r}")
    elif a is not b:
        raise Unlike(f"two objects of type {type(a).__name__}")


def _compare_tensors(a: torch.Tensor, b: Any, found: dict[int, torch.Tensor]) -> None:
    if type(a) is not type(b) or type(a) not in _TENSORS:
        raise Unlike("tensors of other types")
    for name in ("dtype", "device", "layout", "requires_grad", "is_leaf", "shape"):
        if getattr(a, name) != getattr(b, name):
            raise Unlike(f"tensors with another {name}")
    if a.layout is not torch.strided or a.stride() != b.stride():
        raise Unlike("tensors with other strides")
    if a.is_conj() != b.is_conj() or a.is_neg() != b.is_neg() or vars(a) != vars(b):
        raise Unlike("tensors with other attributes")
    if found.setdefault(id(a), b) is not b:
        raise Unlike("parameters that are shared in one expert only")
