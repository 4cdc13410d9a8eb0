"""``if mask.any(): A else: B`` in one graph: both ways are traced, one by one, and meet where they meet in Python.

The way for a mask with nothing in it is traced first.  Where the two ways come together again the frame is put back to
the test, and the other way is traced.  A local that is a tensor either way then becomes ``torch.where(test, a, b)``,
which says what the model does.  Both are in one trace, so the guards are those of both.

Rewritten as it stands, such a graph would compute both ways for all data.  So it is only an assumption
(``assumptions.Forked``), which holds if for a mask with nothing in it way A gives what B gives: then B goes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from moe_inductor import _compat
from moe_inductor.capture.assumptions import Forked, Pass
from moe_inductor.capture.bytecode import Bytecode
from moe_inductor.capture.purity import Impure, Region, check_allowed
from moe_inductor.capture.trackers import realized
from moe_inductor.region.nodes import mutated, storages


class Ways(NamedTuple):
    """Indices of instructions.  some: where the code for something starts.  body: all that may be executed either way
    before the ways meet, at ``join``."""

    some: int
    body: frozenset[int]
    join: int


def ways(tx: Any, truth: bool, test: Any) -> Ways | None:
    """The two ways from the conditional jump ``test``, where ``truth`` stands for something; None unless both do
    something and then meet."""
    code = Bytecode.of(tx)
    arms = code.arms(test, truth)
    if arms is None:
        return None
    some, none, loops = arms
    reached = [code.reachable(start, stop=loops) for start in (some, none)]
    shared = reached[0] & reached[1]
    body = (reached[0] | reached[1]) - shared
    joins = {s for i in body for s in code.jumps[i]} - body
    if len(joins) != 1 or any(code.after_jumps(start) not in body for start in (some, none)):
        return None
    return Ways(some, frozenset(body), joins.pop())


@dataclasses.dataclass(eq=False)
class Fork(Region):
    """Both ways.  The region is closed, and the assumption complete, where they meet for the second time."""

    some: int = dataclasses.field(kw_only=True)
    forked: Forked = dataclasses.field(kw_only=True)
    # What both ways make of a value, or None where that is not possible.
    merge: Callable[[Any, Any], Any] = dataclasses.field(kw_only=True)
    both_ways = True

    def __post_init__(self) -> None:
        super().__post_init__()
        tx = self.tx
        self._pieces = []  # what is appended either way is not known to be the same
        self._locals, self._stack = dict(tx.symbolic_locals), list(tx.stack[:-1])
        self._blocks = list(tx.block_stack)
        self._none: dict[str | int, Any] | None = None

    def _enter(self) -> None:
        self.passes.append(Pass())

    def after_step(self) -> None:
        tx = self.tx
        pointer = tx.instruction_pointer
        coming = id(tx.instructions[pointer]) if pointer is not None else None
        if coming in self.body:
            return
        if coming not in self.joins:
            raise Impure("it is left through an exception")
        self._check_left()
        if self._none is None:
            self._none = self._made()
            tx.symbolic_locals.clear()
            tx.symbolic_locals.update(self._locals)
            tx.stack[:] = self._stack
            tx.instruction_pointer = self.some
            self._enter()
        else:
            self.closed = True
            self._meet(self._made(), self._none)

    def _check_left(self) -> None:
        super()._check_left()
        tx, depth = self.tx, len(self._stack)
        if not _same(tx.stack[:depth], self._stack) or not _same(tx.block_stack, self._blocks):
            raise Impure("it changes what was on the stack")
        nodes = dict.fromkeys(self.passes[-1].nodes)
        made = {s for n in nodes for s in storages(n)}
        made -= {s for n in nodes for a in n.all_input_nodes if a not in nodes for s in storages(a)}
        if not all(storages(target) <= made for n in nodes for target in mutated(n)):
            raise Impure("a tensor from outside is changed")

    def _made(self) -> dict[str | int, Any]:
        """What this way leaves: locals, and what lies on the stack (``A if mask.any() else B``)."""
        tx, depth = self.tx, len(self._stack)
        left: dict[str | int, Any] = dict(enumerate(tx.stack[depth:], depth))
        return left | {name: tx.symbolic_locals.get(name) for name in sorted(self.carried)}

    def _meet(self, of_some: dict[str | int, Any], of_none: dict[str | int, Any]) -> None:
        self.forked.ways.extend(reversed(self.passes))
        if of_some.keys() != of_none.keys():
            raise Impure("it leaves more on the stack than the other way")
        for name in of_some:
            some, none = realized(of_some[name]), realized(of_none[name])
            if some is None or none is None:
                raise Impure(f"`{name}` is not assigned either way")
            if some is none or _same_constant(some, none):
                continue
            made = self.merge(some, none)
            if made is None:
                what = f"`{name}`" if isinstance(name, str) else "what it makes"
                raise Impure(f"{what} is not a tensor of the same kind either way")
            self.forked.merged.append(made.as_proxy().node)
            if isinstance(name, str):
                self.tx.symbolic_locals[name] = made
            else:
                self.tx.stack[name] = made


def open_fork(
    tx: Any, found: Ways, location: str, forked: Forked, merge: Callable[[Any, Any], Any]
) -> Fork:
    """Raises Impure where Python could tell that both ways are executed."""
    code = Bytecode.of(tx)
    body = set(found.body)
    check_allowed(code, body)
    return Fork(
        tx,
        "branch",
        location,
        body=code.ids(body),
        joins=code.ids([found.join]),
        header=None,
        carried=code.carried(body, [found.join]),
        inside=True,
        code=code,
        some=found.some,
        forked=forked,
        merge=merge,
    )


def _same(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


def _same_constant(a: Any, b: Any) -> bool:
    constants = all(type(v) is _compat.ConstantVariable for v in (a, b))
    return constants and type(a.value) is type(b.value) and a.value == b.value


def alike(a: Any, b: Any) -> bool:
    """Two tensors that Python cannot tell apart, but for their values."""
    if not all(type(v) is _compat.TensorVariable for v in (a, b)):
        return False
    return _facts(a.as_proxy().node) == _facts(b.as_proxy().node)


def _facts(node: torch.fx.Node) -> tuple[Any, ...]:
    found = node.meta["example_value"]
    sizes = [str(size) for size in (*found.shape, *found.stride())]
    return type(found), sizes, found.dtype, found.device, found.layout, found.requires_grad
