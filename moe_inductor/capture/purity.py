"""Can anybody outside of a tensor graph see how often a piece of Python runs?

A speculated loop body runs for experts without tokens too, and a speculated branch on empty
tensors.  What that does to tensors is in the graph, where it is proved or declined.  What it does
to Python objects is in no graph, so a *region* of bytecode must not do anything to them:

* a local that is written in the region and read later holds a tensor, before and after, or a number
  that is the same before and after if the tested size is 0; one that is only sliced with may turn
  from a number into a tensor;
* no object that is older than the region is changed while the region runs, callees included, except
  a list that starts empty and whose only use is to be concatenated;
* the region is left the way it was found: no exception, no break, no return, and the same random
  numbers drawn and the same grad mode.

Everything that is not understood is ``Impure``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch

from moe_inductor import _compat
from moe_inductor.capture.assumptions import Pass
from moe_inductor.capture.bytecode import Bytecode

# Never in a region, whatever they are applied to.
_FORBIDDEN = {
    "STORE_GLOBAL": "a global is assigned",
    "DELETE_GLOBAL": "a global is deleted",
    "STORE_NAME": "a name is assigned",
    "DELETE_NAME": "a name is deleted",
    "STORE_ATTR": "an attribute is assigned",
    "DELETE_ATTR": "an attribute is deleted",
    "STORE_DEREF": "a variable of a closure is assigned",
    "DELETE_DEREF": "a variable of a closure is deleted",
    "DELETE_SUBSCR": "an element is deleted",
    "YIELD_VALUE": "it yields",
    "RETURN_GENERATOR": "it yields",
    "RETURN_VALUE": "it returns",
    "RETURN_CONST": "it returns",
    "RAISE_VARARGS": "it raises",
}


class Impure(Exception):
    """How often the region runs can be seen, or we cannot exclude it.  The text says how."""


@dataclasses.dataclass(eq=False)
class Region:
    """A piece of the bytecode of one frame, opened when it was speculated, closed when it is left."""

    tx: Any  # the instruction translator of the frame
    kind: str
    location: str
    body: frozenset[int]  # ids of instructions
    joins: frozenset[int]  # where control may go from the body
    header: int | None  # a loop: the FOR_ITER that it comes back to
    carried: frozenset[str]  # locals that outlive one pass through the body
    inside: bool
    code: Bytecode
    rolled: bool = False  # one pass stands for all
    on_close: Callable[[], None] = lambda: None
    size: Any = None  # the number (``emptiness.of_number``) that is 0 where the body is skipped, if there is one
    older: dict[int, Any] = dataclasses.field(default_factory=dict)
    closed: bool = False
    passes: list[Pass] = dataclasses.field(default_factory=list)
    # Is something traced in it that the data at hand may never execute?
    both_ways = False

    def __post_init__(self) -> None:
        self._numbers = self.code.only_numbers() if self.carried else frozenset()
        lists = self.code.only_concatenated(self.tx.f_globals)
        held = {name: self.tx.symbolic_locals.get(name) for name in lists}
        self._pieces = [v for v in held.values() if type(v) is _compat.ListVariable]
        if self.inside:
            self._enter()
        self.older = _objects_in_reach(self.tx)
        self._state = _interpreter_state(self.tx)
        self._iterators = _positions(self.older.values())

    def running(self) -> bool:
        """Is an instruction of the body being executed, or something that it called?"""
        return not self.closed and id(self.tx.current_instruction) in self.body

    def note(self, node: torch.fx.Node) -> None:
        """``node`` was just made, somewhere.  An input is no computation, wherever it is first read."""
        if node.op.startswith("call") and self.running():
            self.passes[-1].nodes.append(node)

    def check_mutation(self, item: Any) -> None:
        """``item`` is about to be changed, somewhere."""
        if not self.running() or any(item is pieces for pieces in self._pieces):
            return
        mutation = type(getattr(item, "mutation_type", None)).__name__
        made_by_tracing = mutation in ("ValueMutationNew", "AttributeMutationNew")
        if not made_by_tracing or id(item) in self.older:
            raise Impure(f"an object from outside ({_type_name(item)}) is changed")

    def _enter(self) -> None:
        self._before = self._carried_values(f"before the {self.kind}")
        self._lengths = [len(pieces.items) for pieces in self._pieces]
        nodes = {name: _node_of(value) for name, value in self._before.items()}
        self.passes.append(Pass(before={n: v for n, v in nodes.items() if v is not None}))

    def _leave(self) -> None:
        after = self._carried_values(f"after the {self.kind}")
        for name, value in after.items():
            self._check_kind(name, self._before[name], value)
            node = _node_of(value)
            if isinstance(node, torch.fx.Node):
                self.passes[-1].after[name] = node
            else:
                self.passes[-1].before.pop(name, None)
        for pieces, length in zip(self._pieces, self._lengths, strict=True):
            if self.rolled and len(pieces.items) > length:
                raise Impure("a list gets a piece in every pass")
            for piece in pieces.items[length:]:
                value = _node_of(piece)
                if not isinstance(value, torch.fx.Node) or not value.meta["example_value"].dim():
                    raise Impure("something other than a tensor is appended to a list")
                self.passes[-1].appended.append(value)

    def _carried_values(self, when: str) -> dict[str, Any]:
        held = {}
        for name in sorted(self.carried):
            value = self.tx.symbolic_locals.get(name)
            held[name] = value.realize() if hasattr(value, "realize") else value
            if _node_of(held[name]) is None and _number_of(held[name]) is None:
                raise Impure(f"loop-carried state `{name}`, which is not a tensor {when}")
        return held

    def _check_kind(self, name: str, before: Any, after: Any) -> None:
        """May eager have ``before`` in ``name`` where we have ``after``, as far as Python can tell?"""
        old, new = _number_of(before), _number_of(after)
        if old is None and new is None:
            return
        if old is not None and new is not None:
            if self.size is not None and _at_zero(new, self.size) == _at_zero(old, self.size):
                return
            raise Impure(f"loop-carried state `{name}`, which is a number that changes")
        value = _node_of(after)
        if new is None and isinstance(value, torch.fx.Node) and name in self._numbers:
            example = value.meta["example_value"]
            if example.dim() == 0 and not example.dtype.is_floating_point:
                return
        raise Impure(f"loop-carried state `{name}`, which is a number and then a tensor")

    def _check_left(self) -> None:
        """What no object says is as it was found."""
        if _interpreter_state(self.tx) != self._state:
            raise Impure("random numbers are drawn or a global mode is changed")
        if any(_position(it) != position for it, position in self._iterators):
            raise Impure("an iterator from outside is advanced")

    def after_step(self) -> None:
        """The frame has executed one instruction."""
        pointer = self.tx.instruction_pointer
        coming = id(self.tx.instructions[pointer]) if pointer is not None else None
        inside = coming in self.body
        if self.inside and not inside:
            if coming not in self.joins:
                raise Impure("it is left through an exception")
            self._leave()
            self._check_left()
        if inside and not self.inside:
            self._enter()
        self.inside = inside
        self.closed = not inside and (self.header is None or coming != self.header)


@dataclasses.dataclass(eq=False)
class _CheckedStep:
    """``step`` of the region's translator, and a look at the region after it."""

    region: Region
    step: Callable[[], Any]
    give_up: Callable[[Region, Impure], None]

    def __call__(self) -> Any:
        region, tx = self.region, self.region.tx
        was_running = id(tx.instructions[tx.instruction_pointer]) in region.body
        try:
            result = self.step()
        except _compat.dynamo_exc.ObservedException:
            if was_running:
                self.give_up(region, Impure("an exception leaves it"))
            raise
        if not region.closed:
            try:
                region.after_step()
                if region.closed:
                    region.on_close()
            except Impure as impure:
                self.give_up(region, impure)
        # A loop has one for every expert, and Python's stack is only so deep.
        while isinstance(tx.step, _CheckedStep) and tx.step.region.closed:
            tx.step = tx.step.step
        return result


def watch(region: Region, give_up: Callable[[Region, Impure], None]) -> None:
    """Have the region checked after every instruction of its frame until it is closed.

    An attribute of this one translator: other frames, and other backends, run undisturbed.
    """
    region.tx.step = _CheckedStep(region, region.tx.step, give_up)
    for value in region.older.values():
        if isinstance(getattr(value, "inline_tracer", None), _compat.InstructionTranslatorBase):
            _watch_generator(value.inline_tracer, region, give_up)


def _watch_generator(
    generator: Any, region: Region, give_up: Callable[[Region, Impure], None]
) -> None:
    """A generator that was made before the region must not be advanced by it."""
    step = generator.step

    def checked_step() -> Any:
        if region.running():
            give_up(region, Impure("a generator from outside is advanced"))
        return step()

    generator.step = checked_step


def loop_region(tx: Any, location: str, start: Any) -> Region:
    """The body of the ``for`` whose iterator the instruction ``start`` makes."""
    code = Bytecode.of(tx)
    header = code.index[id(start)] + 1
    if tx.instructions[header].opname != "FOR_ITER":
        raise Impure("it is not a for statement")
    after = code.index[id(tx.instructions[header].target)]
    body = code.reachable(header + 1, stop={header, after})
    if {s for i in body for s in code.jumps[i]} - body - {header}:
        raise Impure("it has a break")
    check_allowed(code, body)
    return Region(
        tx,
        "loop",
        location,
        body=code.ids(body),
        joins=code.ids([header]),
        header=id(tx.instructions[header]),
        carried=code.carried(body, [header]),
        inside=False,
        code=code,
    )


def branch_region(tx: Any, truth: bool, location: str, test: Any, size: Any = None) -> Region:
    """What is executed only because at the conditional jump ``test`` the value is ``truth``."""
    code = Bytecode.of(tx)
    arms = code.arms(test, truth)
    if arms is None:
        raise Impure("the test is not an if statement")
    arm, skipped, loops = arms
    joins = code.same_returns(code.after_jumps(skipped))
    body = code.reachable(arm, stop=loops | joins)
    if code.index[id(test)] in body:
        raise Impure("the test is that of a while statement")  # each answer would lead to the next
    exits = {s for i in body for s in code.jumps[i]} - body
    if not exits or not exits <= joins:
        raise Impure("the other branch does something")
    check_allowed(code, body)
    return Region(
        tx,
        "branch",
        location,
        body=code.ids(body),
        joins=code.ids(joins),
        header=None,
        carried=code.carried(body, sorted(joins)),
        inside=True,
        code=code,
        size=size,
    )


def check_allowed(code: Bytecode, body: set[int]) -> None:
    for i in sorted(body):
        why = _FORBIDDEN.get(code.instructions[i].opname)
        if why is not None:
            raise Impure(why)


def _node_of(value: Any) -> torch.fx.Node | int | None:
    """The node of a tensor, or a number that may become one."""
    if type(value) in (_compat.TensorVariable, _compat.NumpyNdarrayVariable):
        return value.as_proxy().node
    return value.value if _is_int(value) else None


def _number_of(value: Any) -> Any:
    """An int or a sympy expression."""
    if isinstance(value, _compat.SymNodeVariable):
        return value.sym_num.node.expr if isinstance(value.sym_num, torch.SymInt) else None
    return value.value if _is_int(value) else None


def _is_int(value: Any) -> bool:
    return type(value) is _compat.ConstantVariable and type(value.value) is int


def _at_zero(number: Any, size: Any) -> Any:
    """``number`` where ``size`` is 0: a symbol, or how far apart two symbols are."""
    if isinstance(number, int):
        return number
    one, *others = sorted(size.free_symbols, key=str)
    return number.subs(one, others[0] if others else 0)


def _objects_in_reach(tx: Any) -> dict[int, Any]:
    """Everything that tracing has made so far and that code can still get at, by id."""
    found: dict[int, Any] = {}

    def note(value: Any) -> None:
        found.setdefault(id(value), value)

    frame = tx
    while frame is not None:
        _compat.VariableTracker.visit(
            note, [dict(frame.symbolic_locals), list(frame.stack), dict(frame.symbolic_globals)]
        )
        frame = getattr(frame, "parent", None)
    effects = tx.output.side_effects
    for owner, attributes in list(effects.store_attr_mutations.items()):
        _compat.VariableTracker.visit(note, [owner, dict(attributes)])
    _compat.VariableTracker.visit(note, list(effects.id_to_variable.values()))
    return found


def _positions(values: Iterable[Any]) -> list[tuple[Any, dict[str, Any]]]:
    """Iterators do not report being advanced as a side effect, so their state is compared."""
    iterators = [v for v in values if isinstance(v, _compat.IteratorVariable)]
    return [(it, _position(it)) for it in iterators]


def _position(iterator: Any) -> dict[str, Any]:
    return {
        name: value if isinstance(value, (int, str, bool, type(None))) else id(value)
        for name, value in vars(iterator).items()
    }


def _interpreter_state(tx: Any) -> tuple[Any, ...]:
    return (
        len(tx.output.random_calls),
        len(tx.debug_locals),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cpu"),
        torch.get_autocast_dtype("cuda"),
    )


def _type_name(item: Any) -> str:
    try:
        return item.python_type().__name__
    except Exception:
        return type(item).__name__
