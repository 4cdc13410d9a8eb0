"""Capture of loops and tests that depend on the data, on assumptions that are proved later.

``for e in expert_hit`` over the result of nonzero is traced for every expert there is, and
``if t.numel() > 0`` as for an expert that has tokens.  Every such step is noted as an assumption
(``scope.assumptions()``), and taken only where ``capture.purity`` finds that nothing but tensors can
tell the difference.  Otherwise the frame is captured without speculation.

Works by a few methods of Dynamo's variable trackers and by the one that executes an instruction, which
behave as ever unless the frame is being traced for a backend that asked for speculation.
"""

from __future__ import annotations

import builtins
import functools
import operator
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from moe_inductor import _compat
from moe_inductor.capture import (
    alike,
    conversion,
    emptiness,
    fork,
    limit,
    padded,
    purity,
    rolled,
    scope,
)
from moe_inductor.capture.assumptions import (
    Forked,
    Kept,
    Length,
    NonEmpty,
    Padded,
    Rolled,
    RolledModules,
    Tested,
    Visited,
)
from moe_inductor.capture.marker import keep
from moe_inductor.capture.trackers import function_of, is_kind, realized

# A loop over more rows than this is hardly one over experts, and unrolling it takes minutes.
MAX_EXPERTS = 1024

_NUMBER_OF = (builtins.int, operator.index)

# The argument of BINARY_OP for x[i], from Python 3.14 on.
_SUBSCRIPT = 26


class ExpertIndex(_compat.ConstantVariable):
    """One row of the hit list, while its loop is traced for all of them.

    The model has a tensor here, we have a number.  It may be used where the two cannot be told
    apart: as an index, as an operand of a tensor, in the test of an ``if``, in ``int()``.
    """

    def __init__(self, value: int, dims: int, **kwargs: Any) -> None:
        super().__init__(value, **kwargs)
        self._number = value
        self.dims = dims

    def python_type(self) -> type:
        return torch.Tensor

    def as_proxy(self) -> Any:
        # x[e] with e of shape [1] keeps the dimension.
        return self._number if self.dims == 0 else slice(self._number, self._number + 1)

    @property
    def value(self) -> int:
        """What Dynamo computes with when it evaluates Python: the number, where that is allowed."""
        use = _use_of_number(self.dims)
        if use is not None:
            give_up(f"the expert index is used in {use}")
        return self._number

    @value.setter
    def value(self, value: int) -> None:
        """Set by the base class; ``_number`` is what counts."""

    def as_python_constant(self) -> Any:
        return self.value

    def nb_index_impl(self, tx: Any) -> Any:
        return _compat.ConstantVariable.create(self._number)

    def nb_int_impl(self, tx: Any) -> Any:
        return _compat.ConstantVariable.create(self._number)

    def mp_subscript_impl(self, tx: Any, key: Any) -> Any:
        return self._element(key)

    def getitem_const(self, tx: Any, key: Any) -> Any:
        return self._element(key)

    def var_getattr(self, tx: Any, name: str) -> Any:
        if name not in ("item", "squeeze", "tolist"):
            give_up(f"the expert index is used in .{name}")
        return _compat.GetAttrVariable(self, name)

    def call_method(self, tx: Any, name: str, args: Any, kwargs: Any) -> Any:
        if name == "__getitem__":
            return self._element(args[0])
        if name in ("item", "__int__", "__index__"):
            return _compat.ConstantVariable.create(self._number)
        if name == "squeeze":
            return ExpertIndex(self._number, 0)
        if name == "tolist":
            return _compat.VariableTracker.build(tx, _listed(self._number, self.dims))
        give_up(f"the expert index is used in .{name}()")

    def is_python_hashable(self) -> bool:
        give_up("the expert index is used as a key")

    def reconstruct(self, codegen: Any) -> None:
        give_up("the expert index is used after a graph break")

    def _element(self, key: Any) -> ExpertIndex:
        if self.dims == 0:
            give_up("the expert index is itself indexed")
        if type(key) is not _compat.ConstantVariable or key.value not in (0, -1):
            give_up("the expert index is itself indexed")
        return ExpertIndex(self._number, self.dims - 1)


_ROWS = (ExpertIndex, rolled.RolledIndex)


def give_up(why: str, location: str = "") -> NoReturn:
    """Capture the frame again, without speculation at ``location`` and wherever we are inside of now."""
    attempt = scope.speculating()
    assert attempt is not None
    around = {region.location for region in attempt.regions if not region.closed}
    where = location or _location(_innermost())
    scope.distrust(scope.reason_at(where, why), around | {where})


@functools.cache
def hook() -> None:
    """Put the hooks in place; once, and before anything is speculated."""
    _hook(_compat.TensorVariable, "unpack_var_sequence", _unpack)
    _hook(_compat.TensorVariable, "call_method", _call_method)
    _hook(_compat.SymNodeVariable, "evaluate_expr", _evaluate)
    _hook(_compat.SideEffects, "check_allowed_side_effect", _check_mutation)
    _hook(_compat.InstructionTranslatorBase, "step", _step, scope.current)


def _hook(
    owner: type,
    name: str,
    replacement: Any,
    wanted: Callable[[], scope.Attempt | None] = scope.speculating,
) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        attempt = wanted()
        if attempt is None:
            return original(self, *args, **kwargs)
        return replacement(original, attempt, self, *args, **kwargs)

    setattr(owner, name, method)


class Hits(_compat.ListVariable):
    """``hits.tolist()``: one may loop over it, and not ask it anything."""

    def __init__(self, rows: Any, bound: int, dims: int, location: str) -> None:
        super().__init__([], mutation_type=_compat.ValueMutationNew())
        self.rows, self.bound, self.dims, self.location = rows, bound, dims, location

    @property
    def items(self) -> NoReturn:
        give_up("the list of hit experts is used other than in a for statement", self.location)

    @items.setter
    def items(self, items: list[Any]) -> None:
        """Set by the base class; there is nothing in it."""


def _listed(number: int, dims: int) -> Any:
    return number if dims == 0 else [number]


def _step(original: Any, attempt: scope.Attempt, tx: Any) -> Any:
    """One instruction of the model.  What lies on the stack is answered before Dynamo looks at it."""
    pointer = tx.instruction_pointer
    then = None
    if pointer is not None and tx.stack:
        coming = tx.instructions[pointer]
        wrong = _looks_for_a_number(tx.stack, coming)
        if wrong:
            for number in wrong:
                _unroll_if_rolled(attempt, number.sym_num)
            why = "a number that depends on the data is looked for in a list"
            scope.stop_capturing(scope.reason_at(_location(tx, coming), why))
        if scope.speculating() is not None:
            then = _before(attempt, tx, coming)
    result = original(tx)
    if then is not None:
        then()
    return result


def _looks_for_a_number(stack: list[Any], coming: Any) -> list[Any]:
    """``e in counts.tolist()``: there Dynamo (up to 2.13) takes a number that it does not know to differ from every
    constant, and ``is`` does so everywhere.  That is a wrong graph, not a break.
    """
    if coming.opname not in ("CONTAINS_OP", "IS_OP"):
        return []
    operands = stack[-2:]
    if coming.opname == "CONTAINS_OP":
        held = operands[-1]
        if type(held) is Hits or not is_kind(held, _compat.BaseListVariable):
            return []
        operands = [operands[0], *held.items]
    return [value for value in operands if is_kind(value, _compat.SymNodeVariable)]


def _before(attempt: scope.Attempt, tx: Any, coming: Any) -> Callable[[], None] | None:
    """What to do before the instruction.  Returns what to do after it."""
    if coming.opname.startswith("POP_JUMP"):
        _answer_test(attempt, tx, coming)
    elif coming.opname == "GET_ITER" and type(tx.stack[-1]) is Hits:
        _iterate(attempt, tx, coming)
    elif coming.opname == "GET_ITER":
        _pad(attempt, tx, coming, padded.length_of(tx.stack[-1]))
    elif coming.opname in ("BINARY_SUBSCR", "BINARY_OP", "COMPARE_OP", "CALL", "STORE_SUBSCR"):
        then = _index_modules(attempt, tx) if _is_subscript(coming) and attempt.rolled else None
        if then is not None:
            return then
        if _is_subscript(coming) or coming.opname == "STORE_SUBSCR":
            _index_by_row(tx, coming)
        if _is_subscript(coming):
            for held in attempt.padded:
                if held.is_read_by(*tx.stack[-2:]):
                    tx.stack[-2] = held.padded
        _use_of_rolled(tx, coming)
    elif coming.opname.startswith("FORMAT_"):
        _format_of_rolled(tx, coming)
    if coming.opname == "CALL":
        conversion.before_call(tx, coming)
    if coming.opname == "CALL" and any(function_of(f) is len for f in tx.stack[-3:-1]):
        _note_length_of_pieces(attempt, tx.stack[-1], _location(tx, coming))
    if coming.opname == "CALL" and coming.arg == 1:
        pad = _pad_enumerated(attempt, tx, coming)
        if pad is not None:
            return pad
    if coming.opname.startswith("CALL"):
        return functools.partial(_settle_counts, attempt, tx, _location(tx, coming))
    return None


def _pad_enumerated(attempt: scope.Attempt, tx: Any, call: Any) -> Callable[[], None] | None:
    """``for e, n in enumerate(counts)``: what to do after the call."""
    counts, after = tx.stack[-1], tx.instructions[tx.instruction_pointer + 1]
    length = padded.length_of(counts)
    if length is None or after.opname != "GET_ITER":
        return None
    called = [function_of(realized(f)) for f in tx.stack[-3:-1]]
    if not any(f is enumerate for f in called):
        return None
    if _location(tx, after) in attempt.frame.distrusted:
        return None
    # Nobody asks for what enumerate makes of it.
    tx.stack[-1] = _compat.VariableTracker.build(tx, [])
    return functools.partial(_pad, attempt, tx, after, length, counts)


def _pad(
    attempt: scope.Attempt, tx: Any, start: Any, length: int | None, enumerated: Any = None
) -> None:
    """``for n in ids.bincount()``, whose iterator ``start`` makes, or ``for e, n in enumerate(enumerated)``."""
    location = _location(tx, start)
    if length is None or location in attempt.frame.distrusted:
        return
    counts = tx.stack[-1] if enumerated is None else enumerated
    node, tracker = padded.pad(tx, counts, length)
    items = tracker.unpack_var_sequence(tx)
    if enumerated is not None:
        numbers = map(_compat.ConstantVariable.create, range(length))
        items = [_compat.TupleVariable([e, n]) for e, n in zip(numbers, items, strict=True)]
    tx.stack[-1] = _compat.VariableTracker.build(tx, items)
    region = _region(
        attempt, "for-loop over counts", location, lambda: purity.loop_region(tx, location, start)
    )
    if region is None:
        give_up("the loop over counts", location)
    attempt.padded.append(padded.Counts(counts, tracker, length, region))
    attempt.assumptions.append(Padded(node, length, location, region.passes))


def _settle_counts(attempt: scope.Attempt, tx: Any, location: str) -> None:
    """``bincount(ids, minlength=E)`` has just been called: what is made of it has its length as well."""
    counts = tx.stack[-1] if tx.stack else None
    if type(counts) is _compat.TensorVariable and emptiness.counts_choices(counts.as_proxy().node):
        _settle_length(attempt, tx, counts, location)


def _is_subscript(instruction: Any) -> bool:
    return instruction.opname == "BINARY_SUBSCR" or (
        instruction.opname == "BINARY_OP" and instruction.arg == _SUBSCRIPT
    )


def _index_by_row(tx: Any, coming: Any) -> None:
    """``x[token_idx, e, None]``: eager takes row ``e`` first where it has no dimensions, and broadcasts it against
    the other index where it has one.  Both are ``x.select(1, e)[token_idx, None]``.
    """
    key = tx.stack[-1]
    if is_kind(key, _ROWS) and is_kind(realized(tx.stack[-2]), _compat.BaseListVariable):
        if is_kind(key, rolled.RolledIndex):
            key.refuse("the index of a list")
        tx.stack[-1] = key.nb_index_impl(tx)  # what Python does, and Dynamo from torch 2.13 on
    if not is_kind(key, _compat.TupleVariable):
        return
    places = [i for i, item in enumerate(key.items) if is_kind(item, _ROWS)]
    if not places:
        return
    row, place = key.items[places[0]], places[0]
    if coming.opname == "STORE_SUBSCR" and not row.dims:
        return  # a number means the same
    refuse = row.refuse if is_kind(row, rolled.RolledIndex) else give_up
    kinds = [_kind_of_index(item) for item in key.items]
    tensors = [i for i, kind in enumerate(kinds) if kind in ("tensor", "row")]
    in_place = tensors == list(range(tensors[0], tensors[-1] + 1))  # dimensions keep their order
    if (
        None in kinds
        or len(places) > 1
        or coming.opname == "STORE_SUBSCR"
        or (row.dims and not in_place)
        or not isinstance(tx.stack[-2], _compat.TensorVariable)
    ):
        refuse("an index with others")
    dim = _compat.ConstantVariable.create(sum(kind != "new" for kind in kinds[:place]))
    selected = tx.stack[-2].call_method(tx, "select", [dim, row.nb_index_impl(tx)], {})
    kept = [_compat.ConstantVariable.create(None)] if row.dims and len(tensors) == 1 else []
    rest = _compat.TupleVariable([*key.items[:place], *kept, *key.items[place + 1 :]])
    tx.stack[-2:] = [selected, rest]


def _kind_of_index(item: Any) -> str | None:
    """How torch takes one part of an index; None where it is not known here."""
    if is_kind(item, _ROWS):
        return "row"
    if is_kind(item, _compat.TensorVariable):
        value = item.as_proxy().node.meta["example_value"]
        return "tensor" if value.dim() and value.dtype in (torch.int64, torch.int32) else None
    if is_kind(item, _compat.SliceVariable):
        return "slice"
    if type(item) is _compat.ConstantVariable:
        kinds = {type(None): "new", int: "number"}
        return kinds.get(type(item.value))
    return None


def _use_of_rolled(tx: Any, coming: Any) -> None:
    """Where the model may use a row of the hit list, give Dynamo what it knows to handle there."""
    stack, right = tx.stack, tx.stack[-1]
    rows = [value for value in stack[-2:] if is_kind(value, rolled.RolledIndex)]
    if not rows:
        return
    if coming.opname == "CALL":
        if (
            rows[-1] is right
            and coming.arg == 1
            and any(function_of(f) in _NUMBER_OF for f in stack[-3:-1])
        ):
            stack[-1] = right.number
        return
    beside_tensor = any(isinstance(value, _compat.TensorVariable) for value in stack[-2:])
    if _is_subscript(coming):
        if rows[-1] is right and beside_tensor:
            if right.dims:  # x[e] with e of shape [1] keeps the dimension
                one = _compat.ConstantVariable.create(1)
                stack[-2] = stack[-2].call_method(tx, "unsqueeze", [one], {})
            stack[-1] = right.number
        return
    following = tx.instructions[tx.instruction_pointer + 1].opname
    tested = following.startswith("POP_JUMP") or following == "TO_BOOL"
    beside_tensor &= not any(row.dims for row in rows)
    if beside_tensor or (coming.opname == "COMPARE_OP" and tested):
        stack[-2:] = [v.number if is_kind(v, rolled.RolledIndex) else v for v in stack[-2:]]


def _format_of_rolled(tx: Any, coming: Any) -> None:
    """``f"expert_{e}"`` needs the number.  Torch 2.11 would put the row into a string that it then cannot look up."""
    has_spec = coming.opname == "FORMAT_WITH_SPEC" or (
        coming.opname == "FORMAT_VALUE" and coming.arg & 0x04
    )
    row = tx.stack[-2 if has_spec else -1]
    if is_kind(row, rolled.RolledIndex):
        row.refuse("a string")


def _answer_test(attempt: scope.Attempt, tx: Any, jump: Any) -> None:
    """``if size > 0``, ``if mask.any()``, ``if count == 0``, ``if pieces``."""
    value = tx.stack[-1]
    location = _location(tx, jump)
    if location in attempt.frame.distrusted:
        return
    if is_kind(value, _compat.SymNodeVariable) and _rolled_loops(attempt, value.sym_num):
        tx.stack[-1] = _compat.ConstantVariable.create(_decide(attempt, value.sym_num))
    elif is_kind(value, _compat.SymNodeVariable):
        found = emptiness.of_number(value.sym_num)
        if found is None:
            _limit(attempt, tx, jump, location)
            return
        size, truth = found
        region = _region(
            attempt,
            "test of a data-dependent size",
            location,
            lambda: purity.branch_region(tx, truth, location, jump, size),
        )
        if region is not None:
            attempt.assumptions.append(NonEmpty(size, location, region.passes))
            tx.stack[-1] = _compat.ConstantVariable.create(truth)
    elif type(value) in (_compat.TensorVariable, _compat.NumpyNdarrayVariable):
        answer = emptiness.of_tensor(value.as_proxy().node)
        if answer is None:
            return
        two = fork.ways(tx, answer, jump)
        if two is not None:
            _fork(attempt, tx, answer, two, location)
            return
        region = _region(
            attempt,
            "test of a tensor",
            location,
            lambda: purity.branch_region(tx, answer, location, jump),
        )
        if region is not None:
            marker = keep(tx, value)
            attempt.assumptions.append(Tested(marker, answer, location, region.passes))
            tx.stack[-1] = _compat.ConstantVariable.create(answer)
    else:
        _note_length_of_pieces(attempt, value, location)


def _fork(attempt: scope.Attempt, tx: Any, truth: bool, ways: fork.Ways, location: str) -> None:
    """``if mask.any()`` with an ``else``: both."""
    test = tx.stack[-1]
    node = test.as_proxy().node
    zeros = emptiness.all_zeros(node)
    if zeros is None or node.meta["example_value"].dtype != torch.bool:
        why = "test of a tensor: the other branch does something"
        scope.refuse(scope.reason_at(location, why), location)
        return
    forked = Forked(node, truth, zeros, location)

    def merge(some: Any, none: Any) -> Any:
        if not fork.alike(some, none):
            return None
        pair = (some, none) if truth else (none, some)
        args = tuple(v.as_proxy() for v in (test, *pair))
        proxy = tx.output.create_proxy("call_function", torch.where, args, {})
        return _compat.wrap_fx_proxy(tx, proxy)

    region = _region(
        attempt,
        "test of a tensor",
        location,
        lambda: fork.open_fork(tx, ways, location, forked, merge),
    )
    if region is not None:
        attempt.assumptions.append(forked)
        tx.stack[-1] = _compat.ConstantVariable.create(not truth)  # that way first


def _limit(attempt: scope.Attempt, tx: Any, jump: Any, location: str) -> None:
    """``rows[:C] if len(rows) > C else rows``."""
    test = tx.stack[-1]
    found = emptiness.of_limit(test.sym_num)
    if found is None:
        return
    count, truth = found
    two = fork.ways(tx, truth, jump)

    def make() -> purity.Region:
        if two is None:
            return purity.branch_region(tx, truth, location, jump)
        node = test.as_proxy().node
        forked = Forked(node, truth, node, location)
        return fork.open_fork(
            tx, two, location, forked, lambda first, rows: limit.merge(first, rows, count)
        )

    region = _region(attempt, "test of a data-dependent size", location, make)
    if region is not None:
        if two is None:
            region.on_close = lambda: limit.check(region.passes[0], count)
        tx.stack[-1] = _compat.ConstantVariable.create(truth if two is None else not truth)


def _note_length_of_pieces(attempt: scope.Attempt, pieces: Any, location: str) -> None:
    """``if pieces``, ``if len(pieces)``: Dynamo answers for the list with all of the pieces."""
    if type(pieces) is not _compat.ListVariable:
        return
    held = [item.as_proxy().node for item in pieces.items if item.is_tensor()]
    passes = [
        each
        for assumption in attempt.assumptions
        for each in getattr(assumption, "passes", ())
        if any(node in held for node in each.appended)
    ]
    if passes:
        attempt.assumptions.append(Kept(passes, location))


def _iterate(attempt: scope.Attempt, tx: Any, start: Any) -> None:
    """``for e in hits.tolist()``."""
    hits, location = tx.stack[-1], _location(tx, start)
    region = _region(
        attempt,
        "for-loop over data-dependent rows",
        location,
        lambda: purity.loop_region(tx, location, start),
    )
    if region is None:
        give_up("the loop over the list of hit experts", location)
    elements: list[Any] | None = _roll(attempt, tx, region, hits.rows, hits.bound, hits.dims)
    if elements is not None:
        last = _listed(hits.bound - 1, hits.dims)
        elements = [
            each.listed(tx) if is_kind(each, rolled.RolledIndex) else last for each in elements
        ]
    else:
        attempt.assumptions.append(
            Visited(keep(tx, hits.rows), hits.bound, location, region.passes)
        )
        elements = [_listed(number, hits.dims) for number in range(hits.bound)]
    tx.stack[-1] = _compat.VariableTracker.build(tx, elements)


def _roll(
    attempt: scope.Attempt, tx: Any, region: purity.Region, rows: Any, bound: int, dims: int
) -> list[Any] | None:
    """The elements of a loop that is traced once; None if it has to be traced for each expert."""
    frame, location = attempt.frame, region.location
    if attempt.level < scope.Level.ROLLED or location in frame.unrolled or region.carried:
        return None
    last = location in frame.sentinels
    count = bound - 1 if last else bound
    if count < rolled.MIN_EXPERTS:
        return None
    paired = location in frame.paired
    made = [rolled.make_index(tx, rows, count) for _ in range(2 if paired else 1)]
    nodes = [node for node, _ in made]
    if paired:
        loop = RolledModules(nodes, count, last, location, region.passes)
        region.on_close = functools.partial(_lift_experts, attempt, tx, loop)
    else:
        loop = Rolled(nodes[0], count, last, location, region.passes)
    attempt.assumptions.append(loop)
    region.rolled = True
    elements: list[Any] = []
    for traced, (_, number) in enumerate(made):
        attempt.rolled[number.sym_num.node.expr] = (loop, traced)
        elements.append(rolled.RolledIndex(number, dims, lambda use: scope.unroll(location)))
    return [*elements, ExpertIndex(bound - 1, dims)] if last else elements


def _index_modules(attempt: scope.Attempt, tx: Any) -> Callable[[], None] | None:
    """``self.experts[e]`` for a list of modules: trace it for a representative."""
    key = tx.stack[-1]
    number = key.number if is_kind(key, rolled.RolledIndex) else key
    if not is_kind(number, _compat.SymNodeVariable) or not isinstance(number.sym_num, torch.SymInt):
        return None
    found = attempt.rolled.get(number.sym_num.node.expr)
    if found is None:
        return None
    modules = getattr(realized(tx.stack[-2]), "value", None)
    if type(modules) is not torch.nn.ModuleList:
        return None
    loop, traced = found
    if not attempt.frame.settings.roll_modules:
        scope.unroll(loop.location)
    if loop.location not in attempt.frame.paired:
        scope.pair(loop.location)
    if len(modules) < loop.count or tx.output.current_tracer.parent is not None:
        scope.unroll(loop.location)
    tx.stack[-1] = _compat.ConstantVariable.create(traced)
    indexed = attempt.indexed.setdefault((loop, id(modules)), alike.Indexed(modules))

    def note_source() -> None:
        try:
            source = alike.source_of(tx.stack[-1], traced)
        except alike.Unlike:
            scope.unroll(loop.location)
        if indexed.sources.setdefault(traced, source) != source:
            scope.unroll(loop.location)

    return note_source


def _lift_experts(attempt: scope.Attempt, tx: Any, loop: RolledModules) -> None:
    """The two passes of a loop over modules have been traced."""
    of_loop = [indexed for (where, _), indexed in attempt.indexed.items() if where is loop]
    try:
        lifted = [alike.lift(tx, indexed, loop.count) for indexed in of_loop]
    except alike.Unlike:
        scope.unroll(loop.location)
    loop.experts.extend(
        [node for each in lifted for node in each[number]] for number in range(loop.count)
    )
    renamed = dict(zip(loop.experts[0], loop.experts[1], strict=True))
    renamed[loop.indices[0]] = loop.indices[1]
    if not alike.same_pass(loop.passes[0].nodes, loop.passes[1].nodes, renamed):
        scope.unroll(loop.location)
    loop.kept.append(alike.keep(tx, loop.experts))


def _rolled_loops(attempt: scope.Attempt, number: Any) -> list[Rolled | RolledModules]:
    """The loops whose expert ``number`` depends on."""
    if not attempt.rolled or not isinstance(number, (torch.SymInt, torch.SymBool, torch.SymFloat)):
        return []
    symbols = number.node.expr.free_symbols
    return [loop for symbol, (loop, _) in attempt.rolled.items() if symbol in symbols]


def _unroll_if_rolled(attempt: scope.Attempt, number: Any) -> None:
    for loop in _rolled_loops(attempt, number):
        scope.unroll(loop.location)


def _decide(attempt: scope.Attempt, condition: Any) -> bool:
    """A test on the expert's number that comes out the same for all of them, or else not here."""
    truth = rolled.decided(condition)
    if truth is None:
        loops = _rolled_loops(attempt, condition)
        if len(loops) == 1 and not loops[0].last and rolled.asks_for(condition, loops[0].count - 1):
            scope.split_last(loops[0].location)
        scope.unroll(loops[0].location)
    return truth


def _evaluate(original: Any, attempt: scope.Attempt, symbol: Any, output_graph: Any = None) -> Any:
    """Dynamo needs a number."""
    if isinstance(symbol.sym_num, torch.SymBool) and _rolled_loops(attempt, symbol.sym_num):
        return _decide(attempt, symbol.sym_num)
    _unroll_if_rolled(attempt, symbol.sym_num)
    return original(symbol, output_graph)


def _region(attempt: scope.Attempt, what: str, location: str, make: Any) -> purity.Region | None:
    """Open a region of speculated code; None, and not again here, where that is not safe."""
    try:
        region = make()
    except purity.Impure as impure:
        scope.refuse(scope.reason_at(location, f"{what}: {impure}"), location)
        return None
    attempt.regions[:] = [r for r in attempt.regions if not r.closed]
    attempt.regions.append(region)
    purity.watch(region, _refuse)
    return region


def _refuse(region: purity.Region, impure: purity.Impure) -> NoReturn:
    if region.rolled:
        scope.unroll(region.location)
    give_up(f"{region.kind}: {impure}", region.location)


def _unpack(
    original: Any, attempt: scope.Attempt, rows: Any, tx: Any, *args: Any, **kw: Any
) -> Any:
    """``for e in rows``."""
    node = rows.proxy.node
    value, location = node.meta.get("example_value"), _location(tx)
    if _settle_length(attempt, tx, rows, location):
        return original(rows, tx, *args, **kw)
    bound = _row_bound(node)
    start = tx.current_instruction
    if bound is None or start.opname != "GET_ITER" or location in attempt.frame.distrusted:
        return original(rows, tx, *args, **kw)
    region = _region(
        attempt,
        "for-loop over data-dependent rows",
        location,
        lambda: purity.loop_region(tx, location, start),
    )
    if region is None:
        return original(rows, tx, *args, **kw)
    one = _roll(attempt, tx, region, rows, bound, value.dim() - 1)
    if one is not None:
        return one
    attempt.assumptions.append(Visited(keep(tx, rows), bound, location, region.passes))
    return [ExpertIndex(i, value.dim() - 1) for i in range(bound)]


def _call_method(
    original: Any, attempt: scope.Attempt, rows: Any, tx: Any, name: str, *args: Any, **kw: Any
) -> Any:
    """``rows.tolist()``."""
    if name == "tolist" and type(rows) is _compat.TensorVariable:
        node, location = rows.proxy.node, _location(tx)
        if not _settle_length(attempt, tx, rows, location):
            bound = _row_bound(node)
            if bound is not None and location not in attempt.frame.distrusted:
                return Hits(rows, bound, node.meta["example_value"].dim() - 1, location)
    return original(rows, tx, name, *args, **kw)


def _settle_length(attempt: scope.Attempt, tx: Any, rows: Any, location: str) -> bool:
    """The counts of ``bincount`` are as many as the model said they are at least."""
    node = rows.proxy.node
    length = emptiness.minimal_length(node)
    if length is None or location in attempt.frame.distrusted:
        return False
    size = node.meta["example_value"].shape[0]
    if isinstance(size, torch.SymInt):
        if not size.node.expr.is_symbol:
            return False
        torch._check(size == length)
        attempt.assumptions.append(Length(keep(tx, rows), length, location))
    return True


def _check_mutation(original: Any, attempt: scope.Attempt, effects: Any, item: Any) -> Any:
    for region in attempt.regions:
        try:
            region.check_mutation(item)
        except purity.Impure as impure:
            _refuse(region, impure)
    return original(effects, item)


def _row_bound(node: torch.fx.Node) -> int | None:
    """How many rows an integer tensor [n] or [n, 1] of data-dependent length can have at most."""
    value = node.meta.get("example_value")
    if not isinstance(value, torch.Tensor) or value.dtype != torch.int64:
        return None
    if value.dim() not in (1, 2) or (value.dim() == 2 and value.shape[1] != 1):
        return None
    length = value.shape[0]
    if not isinstance(length, torch.SymInt):
        return None
    expression = length.node.expr
    if not expression.is_symbol or not _compat.free_unbacked_symbols(length):
        return None
    upper = emptiness.distinct_values(node)
    if upper is None:
        upper = length.node.shape_env.var_to_range[expression].upper
        upper = int(upper) if upper.is_Integer else None
    return upper if upper is not None and 2 <= upper <= MAX_EXPERTS else None


def _use_of_number(dims: int) -> str | None:
    """None if the instruction being traced may use the number in place of the tensor."""
    tx = _innermost()
    opname = tx.current_instruction.opname
    if _is_subscript(tx.current_instruction):
        return None
    if (
        opname == "COMPARE_OP"
    ):  # a number that is tested behaves like the tensor, one that is kept does not
        pointer = tx.instruction_pointer
        coming = {inst.opname for inst in tx.instructions[pointer : pointer + 1]}
        tested = any(name.startswith("POP_JUMP") or name == "TO_BOOL" for name in coming)
        return None if tested else "a comparison whose result is kept"
    if opname in ("FORMAT_VALUE", "FORMAT_SIMPLE") and not tx.current_instruction.arg:
        # f"{e}" of a tensor without dimensions is the text of its number.
        return None if dims == 0 else "a string"
    if opname.startswith("CALL"):
        called = _builtin_being_called()
        if any(called is function for function in _SAME_FOR_NUMBERS):
            return None
        return f"a call of {getattr(called, '__name__', 'something')}"
    return opname


_SAME_FOR_NUMBERS = (
    builtins.int,
    builtins.bool,
    builtins.float,
    builtins.isinstance,
    operator.index,
    operator.getitem,
)


def _builtin_being_called() -> Any:
    """The Python builtin that Dynamo is evaluating further up this call stack, if any."""
    frame: Any = sys._getframe(2)
    for _ in range(20):
        owner = frame.f_locals.get("self")
        if isinstance(owner, _compat.BuiltinVariable):
            return owner.fn
        if frame.f_code.co_name == "call_function" and isinstance(owner, _compat.VariableTracker):
            # torch >= 2.15 has other trackers for builtins that it evaluates on constants.
            return function_of(owner)
        frame = frame.f_back
        if frame is None:
            return None
    return None


def _innermost() -> Any:
    return _compat.InstructionTranslator.current_tx().output.current_tx


def _location(tx: Any, coming: Any = None) -> str:
    """Of the instruction being traced, or of the one that comes next."""
    line = tx.lineno if coming is None or coming.starts_line is None else coming.starts_line
    return f"{tx.f_code.co_filename}:{line}"
