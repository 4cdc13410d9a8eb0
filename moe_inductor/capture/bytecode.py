"""Control flow and data flow of one function's bytecode, as far as ``capture.purity`` asks for it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

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
# The argument of BINARY_OP for + and +=.
_ADDITIONS = (0, 13)
# What may stand between [] and the local that it becomes.
_MAKES_A_CONSTANT = ("BUILD_LIST", "LOAD_CONST", "LOAD_SMALL_INT")
_MOVES = ("SWAP", "STORE_FAST", "STORE_FAST_STORE_FAST", "NOP")
_LOAD_ONE = {"LOAD_FAST", "LOAD_FAST_CHECK", "LOAD_FAST_BORROW"}


class Bytecode:
    """Control flow and liveness of one function."""

    @staticmethod
    def of(tx: Any) -> Bytecode:
        """Of the frame that ``tx`` traces, analysed once."""
        if not hasattr(tx, "_moe_inductor_bytecode"):
            tx._moe_inductor_bytecode = Bytecode(tx.instructions)
        return tx._moe_inductor_bytecode

    def __init__(self, instructions: Sequence[Any]) -> None:
        self.instructions = instructions
        self.index = {id(inst): i for i, inst in enumerate(instructions)}
        self.jumps = [self._jumps(i) for i in range(len(instructions))]
        self._targets = {self.index[id(i.target)] for i in instructions if i.target is not None}
        accesses = [locals_of(inst) for inst in instructions]
        self.written = [written for _, written in accesses]
        self._read = [read for read, _ in accesses]
        self._live: dict[frozenset[int], list[set[str]]] = {}

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
        """Locals that the body writes and somebody reads after it, its next pass included.

        A body that an exception leaves or continues in is given up when it is traced, so the ways from the body
        into its handlers are not counted: ``with torch.no_grad():`` has one, and comes back from it.
        """
        key = frozenset(body)
        if key not in self._live:
            self._live[key] = self._liveness(key)
        written = set().union(*(self.written[i] for i in body))
        return frozenset(written & set().union(*(self._live[key][j] for j in joins)))

    def after_jumps(self, i: int) -> int:
        """Where control arrives that only jumps from ``i`` on."""
        while self.instructions[i].opname in _JUST_JUMPS:
            i = self.jumps[i][0]
        return i

    def arms(self, test: Any, truth: bool) -> tuple[int, int, set[int]] | None:
        """Where the conditional jump ``test`` goes on if what it tests is ``truth``, where else, and the headers of the
        loops that it may be in.  None if it is not that of an ``if``."""
        jump, opname = self.index[id(test)], test.opname
        if not opname.startswith("POP_JUMP") or not opname.endswith(("IF_TRUE", "IF_FALSE")):
            return None
        taken, fall = self.index[id(test.target)], jump + 1
        arm, other = (taken, fall) if opname.endswith("TRUE") == truth else (fall, taken)
        loops = {i for i in range(jump) if self.instructions[i].opname == "FOR_ITER"}
        return arm, other, loops

    def same_returns(self, i: int) -> set[int]:
        """``return x`` of a local or a constant starts at ``i``: everywhere it does.  Else ``i`` alone."""
        returned = self._returned(i)
        if returned is None:
            return {i}
        return {j for j in range(len(self.instructions)) if self._returned(j) == returned}

    def only_numbers(self) -> frozenset[str]:
        """Locals that are only ever added to and sliced with, and so is what is computed from them.

        A number and an integer tensor of the same value cannot be told apart there.
        """
        names = {name for written in self.written for name in written}
        while True:
            wrong = {
                name
                for name in names
                if not all(self._is_number_use(i, names) for i in self._loads(name))
            }
            if not wrong:
                return frozenset(names)
            names -= wrong

    def only_concatenated(self, namespace: dict[str, Any]) -> frozenset[str]:
        """Locals that start as ``[]`` and are then appended to, tested and given to ``torch.cat``."""
        return frozenset(
            name
            for name in {name for written in self.written for name in written}
            if all(self._is_empty_list(i, name) for i, w in enumerate(self.written) if name in w)
            and all(self._is_list_use(i, namespace) for i in self._loads(name))
        )

    def _loads(self, name: str) -> Iterator[int]:
        return (i for i, inst in enumerate(self.instructions) if name in locals_of(inst)[0])

    def _is_empty_list(self, i: int, name: str) -> bool:
        """``name = []`` or ``other, name = 0, []``: is that what the instruction ``i`` stores in ``name``?"""
        start = i
        while start and i not in self._targets and self._is_plain(self.instructions[start - 1]):
            start -= 1
            if start in self._targets:
                break
        stack: list[Any] = []
        stored: dict[str, Any] = {}
        for inst in self.instructions[start : i + 1]:
            if inst.opname in _MAKES_A_CONSTANT:
                stack.append(inst)
            elif inst.opname == "SWAP" and inst.arg <= len(stack):
                stack[-1], stack[-inst.arg] = stack[-inst.arg], stack[-1]
            elif inst.opname in ("STORE_FAST", "STORE_FAST_STORE_FAST"):
                names = inst.argval if isinstance(inst.argval, tuple) else (inst.argval,)
                for target in names:
                    stored[target] = stack.pop() if stack else None
        made = stored.get(name)
        return made is not None and made.opname == "BUILD_LIST" and made.arg == 0

    def _is_plain(self, inst: Any) -> bool:
        return inst.opname in (*_MAKES_A_CONSTANT, *_MOVES) and (
            inst.opname != "BUILD_LIST" or inst.arg == 0
        )

    def _is_list_use(self, i: int, namespace: dict[str, Any]) -> bool:
        if self.instructions[i].opname not in _LOAD_ONE:
            return False
        coming = self._following(i)
        following = next(coming)
        if following.opname == "LOAD_METHOD" or (
            following.opname == "LOAD_ATTR" and following.arg & 1
        ):
            return following.argval == "append"
        before = [
            inst for inst in self.instructions[max(i - 3, 0) : i] if inst.opname != "PUSH_NULL"
        ]
        function, module = before[-1], before[-2]
        if function.opname == "LOAD_GLOBAL" and function.argval == "len" and "len" not in namespace:
            while following.opname in ("PRECALL", "CALL"):
                following = next(coming)
        if following.opname == "TO_BOOL":
            following = next(coming)
        if following.opname.startswith("POP_JUMP"):
            return following.opname.endswith(("IF_TRUE", "IF_FALSE"))
        # torch.cat(pieces), torch.cat(pieces, 0), torch.cat(pieces, dim=0)
        if (
            function.opname not in ("LOAD_METHOD", "LOAD_ATTR")
            or function.argval not in ("cat", "concat", "concatenate")
            or module.opname != "LOAD_GLOBAL"
            or namespace.get(module.argval) is not torch
        ):
            return False
        if following.opname in ("LOAD_CONST", "LOAD_SMALL_INT"):
            if following.argval != 0:
                return False
            following = next(coming)
            if following.opname == "KW_NAMES" or (
                following.opname == "LOAD_CONST" and following.argval == ("dim",)
            ):
                following = next(coming)
        if following.opname == "PRECALL":
            following = next(coming)
        return following.opname in ("CALL", "CALL_KW") and following.arg in (1, 2)

    def _is_number_use(self, i: int, names: set[str]) -> bool:
        """Is the local that is loaded at ``i`` used up as a number, in straight code?"""
        if self.instructions[i].opname not in _LOAD_ONE:
            return False
        above = 0  # how many values lie on top of ours
        for inst in self._following(i):
            if inst.opname in _LOAD_ONE or inst.opname in ("LOAD_CONST", "LOAD_SMALL_INT"):
                above += 1
            elif inst.opname == "BINARY_OP" and inst.arg in _ADDITIONS:
                if above <= 1:
                    above = 0  # the sum takes our place
                else:
                    above -= 1
            elif inst.opname in ("BINARY_SLICE", "STORE_SLICE"):
                return above <= 1
            elif inst.opname == "BUILD_SLICE":
                return above < inst.arg
            elif inst.opname == "STORE_FAST":
                if above == 0:
                    return inst.argval in names
                above -= 1
            else:
                return False
        return False

    def _following(self, i: int) -> Iterator[Any]:
        """What is executed after ``i``, with nothing left out but what does nothing."""
        return (
            inst
            for inst in itertools.islice(self.instructions, i + 1, None)
            if inst.opname not in ("NOP", "CACHE", "EXTENDED_ARG")
        )

    def _returned(self, i: int) -> tuple[str, Any] | None:
        inst = self.instructions[i]
        if inst.opname == "RETURN_CONST":
            return "LOAD_CONST", inst.argval
        if inst.opname in (*_LOAD_ONE, "LOAD_CONST", "LOAD_SMALL_INT") and i + 1 < len(
            self.instructions
        ):
            kind = "LOAD_FAST" if inst.opname in _LOAD_ONE else "LOAD_CONST"
            return (
                (kind, inst.argval) if self.instructions[i + 1].opname == "RETURN_VALUE" else None
            )
        return None

    def _jumps(self, i: int) -> list[int]:
        inst = self.instructions[i]
        targets = [self.index[id(inst.target)]] if inst.target is not None else []
        if inst.opname not in _NO_FALL_THROUGH and i + 1 < len(self.instructions):
            targets.append(i + 1)
        return targets

    def _liveness(self, without_handlers: frozenset[int]) -> list[set[str]]:
        """The locals that may still be read, before each instruction."""
        # Any instruction of a try may also continue in its handler, before it has written anything.
        handlers = [
            self.index[id(inst.exn_tab_entry.target)]
            if inst.exn_tab_entry and i not in without_handlers
            else None
            for i, inst in enumerate(self.instructions)
        ]
        live: list[set[str]] = [set() for _ in self.instructions]
        changed = True
        while changed:
            changed = False
            for i in range(len(live) - 1, -1, -1):
                after = set().union(*(live[s] for s in self.jumps[i])) - self.written[i]
                handler = handlers[i]
                before = self._read[i] | after | (live[handler] if handler is not None else set())
                if before != live[i]:
                    live[i], changed = before, True
        return live


def locals_of(inst: Any) -> tuple[set[str], set[str]]:
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
