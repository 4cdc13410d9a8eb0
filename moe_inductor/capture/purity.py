"""Can anybody outside of a tensor graph see how often a piece of Python runs?

A speculated loop body runs for experts without tokens too, and a speculated branch on empty
tensors.  What that does to tensors is in the graph, where it is proved or declined.  What it does
to Python objects is in no graph, so a *region* of bytecode must not do anything to them:

* a local that is written in the region and read later holds a tensor, before and after;
* no object that is older than the region is changed while the region runs, callees included;
* the region is left the way it was found: no exception, no break, no return, and the same random
  numbers drawn and the same grad mode.

Everything that is not understood is ``Impure``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from moe_inductor import _compat
from moe_inductor.capture.assumptions import Pass

_NO_FALL_THROUGH = {
    "RETURN_VALUE",
    "RETURN_CONST",
    "RAISE_VARARGS",
    "RERAISE",
    "JUMP_FORWARD",
    "JUMP_BACKWARD",
    "JUMP_ABSOLUTE",
    "JUMP_BACKWARD_NO_INTERRUPT",
}
_JUST_JUMPS = {
    "JUMP_FORWARD",
    "JUMP_BACKWARD",
    "JUMP_ABSOLUTE",
    "JUMP_BACKWARD_NO_INTERRUPT",
    "NOP",
}
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
    older: dict[int, Any] = dataclasses.field(default_factory=dict)
    closed: bool = False
    passes: list[Pass] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.check_carried(f"before the {self.kind}")
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
        if not self.running():
            return
        mutation = type(getattr(item, "mutation_type", None)).__name__
        made_by_tracing = mutation in ("ValueMutationNew", "AttributeMutationNew")
        if not made_by_tracing or id(item) in self.older:
            raise Impure(f"an object from outside ({_type_name(item)}) is changed")

    def check_carried(self, when: str) -> None:
        for name in sorted(self.carried):
            value = self.tx.symbolic_locals.get(name)
            value = value.realize() if hasattr(value, "realize") else value
            if type(value) is not _compat.TensorVariable:
                raise Impure(f"loop-carried state `{name}`, which is not a tensor {when}")

    def _carried_nodes(self) -> dict[str, torch.fx.Node]:
        held = {name: self.tx.symbolic_locals[name] for name in sorted(self.carried)}
        return {name: variable.realize().as_proxy().node for name, variable in held.items()}

    def _enter(self) -> None:
        self.passes.append(Pass(before=self._carried_nodes()))

    def after_step(self) -> None:
        """The frame has executed one instruction."""
        pointer = self.tx.instruction_pointer
        coming = id(self.tx.instructions[pointer]) if pointer is not None else None
        inside = coming in self.body
        if self.inside and not inside:
            if coming not in self.joins:
                raise Impure("it is left through an exception")
            self.check_carried(f"after the {self.kind}")
            self.passes[-1].after.update(self._carried_nodes())
            if _interpreter_state(self.tx) != self._state:
                raise Impure("random numbers are drawn or a global mode is changed")
            if any(_position(it) != position for it, position in self._iterators):
                raise Impure("an iterator from outside is advanced")
        if inside and not self.inside:
            self._enter()
        self.inside = inside
        self.closed = not inside and (self.header is None or coming != self.header)


def watch(region: Region, give_up: Callable[[Region, Impure], None]) -> None:
    """Have the region checked after every instruction of its frame until it is closed.

    An attribute of this one translator: other frames, and other backends, run undisturbed.
    """
    tx, step = region.tx, region.tx.step

    def checked_step() -> Any:
        was_running = id(tx.instructions[tx.instruction_pointer]) in region.body
        try:
            result = step()
        except _compat.dynamo_exc.ObservedException:
            if was_running:
                give_up(region, Impure("an exception leaves it"))
            raise
        if not region.closed:
            try:
                region.after_step()
            except Impure as impure:
                give_up(region, impure)
        return result

    tx.step = checked_step
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


def loop_region(tx: Any, location: str) -> Region:
    """The body of the ``for`` whose GET_ITER ``tx`` is executing."""
    code = _Bytecode(tx.instructions)
    header = code.index[id(tx.current_instruction)] + 1
    if tx.instructions[header].opname != "FOR_ITER":
        raise Impure("it is not a for statement")
    after = code.index[id(tx.instructions[header].target)]
    body = code.reachable(header + 1, stop={header, after})
    if {s for i in body for s in code.jumps[i]} - body - {header}:
        raise Impure("it has a break")
    code.check_allowed(body)
    return Region(
        tx,
        "loop",
        location,
        body=code.ids(body),
        joins=code.ids([header]),
        header=id(tx.instructions[header]),
        carried=code.carried(body, [header]),
        inside=False,
    )


def branch_region(tx: Any, truth: bool, location: str) -> Region:
    """What is executed only because the test at the conditional jump of ``tx`` is ``truth``."""
    code = _Bytecode(tx.instructions)
    jump = code.index[id(tx.current_instruction)]
    opname = tx.instructions[jump].opname
    if not opname.startswith("POP_JUMP") or not opname.endswith(("IF_TRUE", "IF_FALSE")):
        raise Impure("the test is not an if statement")
    taken, fall = code.index[id(tx.instructions[jump].target)], jump + 1
    arm, skipped = (taken, fall) if opname.endswith("TRUE") == truth else (fall, taken)
    join = skipped
    while tx.instructions[join].opname in _JUST_JUMPS:
        join = code.jumps[join][0]
    loops = {i for i in range(jump) if tx.instructions[i].opname == "FOR_ITER"}
    body = code.reachable(arm, stop=loops | {join})
    if {s for i in body for s in code.jumps[i]} - body != {join}:
        raise Impure("the other branch does something")
    code.check_allowed(body)
    return Region(
        tx,
        "branch",
        location,
        body=code.ids(body),
        joins=code.ids([join]),
        header=None,
        carried=code.carried(body, [join]),
        inside=True,
    )


class _Bytecode:
    """Control flow and liveness of one function."""

    def __init__(self, instructions: Sequence[Any]) -> None:
        self.instructions = instructions
        self.index = {id(inst): i for i, inst in enumerate(instructions)}
        self.jumps = [self._jumps(i) for i in range(len(instructions))]
        accesses = [_locals_of(inst) for inst in instructions]
        self.written = [written for _, written in accesses]
        self._live = self._liveness([read for read, _ in accesses])

    def ids(self, indices: Iterable[int]) -> frozenset[int]:
        return frozenset(id(self.instructions[i]) for i in indices)

    def reachable(self, start: int, stop: set[int]) -> set[int]:
        seen: set[int] = set()
        todo = [start]
        while todo:
            i = todo.pop()
            if i not in seen and i not in stop:
                seen.add(i)
                todo += self.jumps[i]
        return seen

    def carried(self, body: set[int], joins: list[int]) -> frozenset[str]:
        """Locals that the body writes and somebody reads after it, its next pass included."""
        written = set().union(*(self.written[i] for i in body))
        return frozenset(written & set().union(*(self._live[j] for j in joins)))

    def check_allowed(self, body: set[int]) -> None:
        for i in sorted(body):
            why = _FORBIDDEN.get(self.instructions[i].opname)
            if why is not None:
                raise Impure(why)

    def _jumps(self, i: int) -> list[int]:
        inst = self.instructions[i]
        targets = [self.index[id(inst.target)]] if inst.target is not None else []
        if inst.opname not in _NO_FALL_THROUGH and i + 1 < len(self.instructions):
            targets.append(i + 1)
        return targets

    def _liveness(self, read: list[set[str]]) -> list[set[str]]:
        """The locals that may still be read, before each instruction."""
        # Any instruction of a try may also continue in its handler.
        successors = [
            jumps + ([self.index[id(inst.exn_tab_entry.target)]] if inst.exn_tab_entry else [])
            for jumps, inst in zip(self.jumps, self.instructions, strict=True)
        ]
        live: list[set[str]] = [set() for _ in self.instructions]
        changed = True
        while changed:
            changed = False
            for i in range(len(live) - 1, -1, -1):
                after = set().union(*(live[s] for s in successors[i]))
                # A write does not end liveness on the way into a handler; keeping it is the safe side.
                if not self.instructions[i].exn_tab_entry:
                    after -= self.written[i]
                before = read[i] | after
                if before != live[i]:
                    live[i], changed = before, True
        return live


def _locals_of(inst: Any) -> tuple[set[str], set[str]]:
    """The locals that an instruction reads and writes.  One instruction may name two."""
    names = inst.argval if isinstance(inst.argval, tuple) else (inst.argval,)
    opname = inst.opname
    if opname.startswith(("LOAD_FAST", "LOAD_DEREF", "LOAD_CLOSURE", "LOAD_CLASSDEREF")):
        return set(names), (set(names) if opname == "LOAD_FAST_AND_CLEAR" else set())
    if opname == "STORE_FAST_LOAD_FAST":
        stored, loaded = names[0], names[-1]
        return {loaded} - {stored}, {stored}
    if opname.startswith(("STORE_FAST", "STORE_DEREF", "DELETE_FAST", "DELETE_DEREF")):
        return set(), set(names)
    return set(), set()


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
