"""Capture of loops and tests that depend on the data, on assumptions that are proved later.

``for e in expert_hit`` over the result of nonzero is traced for every expert there is, and
``if t.numel() > 0`` as for an expert that has tokens.  Every such step is noted as an assumption
(``scope.assumptions()``), and taken only where ``capture.purity`` finds that nothing but tensors can
tell the difference.  Otherwise the frame is captured without speculation.

Works by three methods of Dynamo's variable trackers, which behave as ever unless the frame is being
traced for a backend that asked for speculation.
"""

from __future__ import annotations

import builtins
import functools
import operator
import os
import sys
from typing import Any, NoReturn

import torch

from moe_inductor import _compat
from moe_inductor.capture import purity, scope
from moe_inductor.capture.assumptions import NonEmpty, Visited
from moe_inductor.capture.marker import keep
from moe_inductor.reasons import Code, Reason

# A loop over more rows than this is hardly one over experts, and unrolling it takes minutes.
MAX_EXPERTS = 1024


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
        use = _use_of_number()
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

    def mp_subscript_impl(self, tx: Any, key: Any) -> Any:
        return self._element(key)

    def getitem_const(self, tx: Any, key: Any) -> Any:
        return self._element(key)

    def call_method(self, tx: Any, name: str, args: Any, kwargs: Any) -> Any:
        if name == "__getitem__":
            return self._element(args[0])
        if name in ("item", "__int__", "__index__"):
            return _compat.ConstantVariable.create(self._number)
        if name == "squeeze":
            return ExpertIndex(self._number, 0)
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


def give_up(why: str, location: str = "") -> NoReturn:
    """Capture the frame again, without speculation at ``location`` and wherever we are inside of now."""
    attempt = scope.speculating()
    assert attempt is not None
    around = {region.location for region in attempt.regions if not region.closed}
    where = location or _location(_innermost())
    scope.distrust(Reason(Code.CONTROL_FLOW, why, _short(where)), around | {where})


@functools.cache
def hook() -> None:
    """Put the hooks in place; once, and before anything is speculated."""
    _hook(_compat.TensorVariable, "unpack_var_sequence", _unpack)
    _hook(_compat.SymNodeVariable, "evaluate_expr", _evaluate)
    _hook(_compat.SideEffects, "check_allowed_side_effect", _check_mutation)


def _hook(owner: type, name: str, replacement: Any) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        attempt = scope.speculating()
        if attempt is None:
            return original(self, *args, **kwargs)
        return replacement(original, attempt, self, *args, **kwargs)

    setattr(owner, name, method)


def _unpack(
    original: Any, attempt: scope.Attempt, rows: Any, tx: Any, *args: Any, **kw: Any
) -> Any:
    """``for e in rows``."""
    value = rows.proxy.node.meta.get("example_value")
    bound = _row_bound(value)
    location = _location(tx)
    if (
        bound is None
        or tx.current_instruction.opname != "GET_ITER"
        or location in attempt.frame.distrusted
    ):
        return original(rows, tx, *args, **kw)
    try:
        region = purity.loop_region(tx, location)
    except purity.Impure as impure:
        give_up(f"for-loop over data-dependent rows: {impure}", location)
    _open(attempt, region)
    marker = keep(tx, rows)
    attempt.assumptions.append(Visited(marker, bound, location, region.passes))
    return [ExpertIndex(i, value.dim() - 1) for i in range(bound)]


def _evaluate(original: Any, attempt: scope.Attempt, symbol: Any, output_graph: Any = None) -> Any:
    """``if size > 0`` and the like."""
    found = _emptiness_test(symbol.sym_num)
    if found is None or output_graph is None:
        return original(symbol, output_graph)
    size, truth = found
    tx = output_graph.current_tx
    location = _location(tx)
    if location in attempt.frame.distrusted:
        return original(symbol, output_graph)
    try:
        region = purity.branch_region(tx, truth, location)
    except purity.Impure as impure:
        give_up(f"test of a data-dependent size: {impure}", location)
    _open(attempt, region)
    attempt.assumptions.append(NonEmpty(size, location, region.passes))
    return truth


def _check_mutation(original: Any, attempt: scope.Attempt, effects: Any, item: Any) -> Any:
    for region in attempt.regions:
        try:
            region.check_mutation(item)
        except purity.Impure as impure:
            give_up(f"{region.kind}: {impure}")
    return original(effects, item)


def _open(attempt: scope.Attempt, region: purity.Region) -> None:
    attempt.regions[:] = [r for r in attempt.regions if not r.closed]
    attempt.regions.append(region)
    purity.watch(region, lambda r, impure: give_up(f"{r.kind}: {impure}", r.location))


def _row_bound(value: Any) -> int | None:
    """How many rows an integer tensor [n] or [n, 1] of data-dependent length can have at most."""
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
    upper = length.node.shape_env.var_to_range[expression].upper
    return int(upper) if upper.is_Integer and 2 <= upper <= MAX_EXPERTS else None


def _emptiness_test(condition: Any) -> tuple[Any, bool] | None:
    """The data-dependent size, and the answer for every size from 1 on, if that is what it tests."""
    if not isinstance(condition, torch.SymBool):
        return None
    expression, env = condition.node.expr, condition.node.shape_env
    symbols = _compat.free_unbacked_symbols(condition)
    if len(symbols) != 1 or expression.free_symbols != symbols or not expression.is_Relational:
        return None
    (size,) = symbols
    other = [side for side in expression.args if side != size]
    if len(other) != 1 or other[0] not in (0, 1) or env.var_to_range[size].lower != 0:
        return None
    # Between a size and 0 or 1, a relation that agrees on 1 and 2 agrees from there on.
    answers = {bool(expression.subs(size, n)) for n in (1, 2, 3)}
    if len(answers) != 1 or bool(expression.subs(size, 0)) in answers:
        return None
    return size, answers.pop()


def _use_of_number() -> str | None:
    """None if the instruction being traced may use the number in place of the tensor."""
    tx = _innermost()
    opname = tx.current_instruction.opname
    if opname == "BINARY_SUBSCR" or (opname == "BINARY_OP" and tx.current_instruction.arg == 26):
        return None
    if (
        opname == "COMPARE_OP"
    ):  # a number that is tested behaves like the tensor, one that is kept does not
        pointer = tx.instruction_pointer
        coming = {inst.opname for inst in tx.instructions[pointer : pointer + 1]}
        tested = any(name.startswith("POP_JUMP") or name == "TO_BOOL" for name in coming)
        return None if tested else "a comparison whose result is kept"
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
            return getattr(owner, "fn", getattr(owner, "value", None))
        frame = frame.f_back
        if frame is None:
            return None
    return None


def _innermost() -> Any:
    return _compat.InstructionTranslator.current_tx().output.current_tx


def _location(tx: Any) -> str:
    return f"{tx.f_code.co_filename}:{tx.lineno}"


def _short(location: str) -> str:
    """As users see it."""
    return os.path.basename(location)
