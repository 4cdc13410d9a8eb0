"""What a test or a length that depends on the data is, going by how the tensor was computed.

Is this the test of an emptiness, and how does it come out for something that is not empty?

``t.numel() > 0``, ``len(t) == 0``, ``if count:`` on a size or number that depends on the data;
``mask.any()``, ``(ids == e).sum() == 0``, ``if count:`` on a tensor without dimensions;
``start == end``, ``end > start`` on two of them: from one to the other there is nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch

from moe_inductor import _compat

_COMPARE: dict[Any, Callable[[Any, Any], Any]] = {
    **{
        getattr(operator, name): getattr(operator, name)
        for name in ("eq", "ne", "gt", "ge", "lt", "le")
    },
    **{name: getattr(operator, name) for name in ("eq", "ne", "gt", "ge", "lt", "le")},
    **{f"__{name}__": getattr(operator, name) for name in ("eq", "ne", "gt", "ge", "lt", "le")},
    **{
        getattr(torch, name): getattr(operator, name)
        for name in ("eq", "ne", "gt", "ge", "lt", "le")
    },
}
_NOT = {operator.invert, operator.not_, torch.logical_not, "logical_not"}
_SOME = {torch.any, "any"}
# The result holds the values of the first argument.
_SAME_VALUES = {
    *("flatten", "view", "reshape", "squeeze", "contiguous", "cpu", "cuda", "to", "long", "int"),
    *("detach", "clone", "numpy"),
    "view_as",  # Dynamo's `numpy()` is view_as(x, x) where there are gradients
    *(torch.flatten, torch.reshape, torch.squeeze, torch.clone, torch.detach),
}
# It holds no others, but for 0, which is an id as well.
_NO_OTHERS = _SAME_VALUES | {
    *(
        "type",
        "type_as",
        "float",
        "expand",
        "expand_as",
        "unsqueeze",
        "unflatten",
        "chunk",
        "__getitem__",
    ),
    *("permute", "transpose", "swapaxes", "movedim", "t"),
    *(
        operator.getitem,
        getattr,  # t.mT
        torch.cat,
        torch.concat,
        torch.chunk,
        torch.unsqueeze,
        torch.nn.functional.dropout,
    ),
}
_COUNTS = {torch.bincount, "bincount"}
_CUMULATES = {"cumsum", "wrapped_cumsum"}
_DISTINCT = {torch.unique, torch.Tensor.unique, "unique"}
_CHOOSES = {torch.topk, "topk", torch.argmax, "argmax"}
_GROUPS = {"one_hot", "bincount", "histc", "sort", "argsort", "unique", "eq", "isin"}


def of_number(condition: Any) -> tuple[Any, bool] | None:
    """The number that ``condition`` tests, and the answer for all its values from 1 on.

    The number is a symbol, or how far apart two numbers are, ``a - b`` or ``Abs(a - b)``.
    """
    if isinstance(condition, torch.SymInt):
        condition = condition != 0
    if not isinstance(condition, torch.SymBool):
        return None
    expression, env = condition.node.expr, condition.node.shape_env
    symbols = _compat.free_unbacked_symbols(condition)
    if expression.free_symbols != symbols or not expression.is_Relational:
        return None
    if len(symbols) == 2:
        return _of_two(expression)
    if len(symbols) != 1:
        return None
    (size,) = symbols
    other = [side for side in expression.args if side != size and not _is_limited(side, size)]
    if len(other) != 1 or other[0] not in (0, 1):
        return None
    # Between a number and 0 or 1, a relation that agrees on 1, 2 and 3 agrees from there on.
    largest = env.var_to_range[size].upper
    answers = {bool(expression.subs(size, n)) for n in (1, 2, 3) if n <= largest}
    if len(answers) != 1 or bool(expression.subs(size, 0)) in answers:
        return None
    return size, answers.pop()


def _is_limited(number: Any, size: Any) -> bool:
    """Is ``number`` the smaller of ``size`` and a constant of at least 1?  So it is 0 where ``size`` is."""
    if type(number).__name__ != "Min" or len(number.args) != 2 or size not in number.args:
        return False
    (limit,) = (a for a in number.args if a != size)
    return bool(limit.is_Integer and limit >= 1)


def _of_two(relation: Any) -> tuple[Any, bool] | None:
    """``start == end``, ``end - start > 0`` and the like."""
    left, right = relation.args
    if sorted(sympy.expand(left - right).as_coefficients_dict().values()) != [-1, 1]:
        return None
    if relation.rel_op in ("==", "!="):
        return sympy.Abs(sympy.expand(right - left), evaluate=False), relation.rel_op == "!="
    more = (
        sympy.expand(left - right) if relation.rel_op in (">", "<=") else sympy.expand(right - left)
    )
    return more, relation.rel_op in (">", "<")


def of_limit(condition: Any) -> tuple[int, bool] | None:
    """``size > C``: C, and the answer for all sizes from C + 1 on, which is not that for those up to C."""
    if not isinstance(condition, torch.SymBool):
        return None
    relation = condition.node.expr
    if not relation.is_Relational or relation.rel_op not in (">", ">=", "<", "<="):
        return None
    size, bound = relation.args
    if not size.is_symbol:
        relation = relation.reversed
        size, bound = relation.args
    if {size} != _compat.free_unbacked_symbols(condition) or not bound.is_Integer:
        return None
    largest = int(bound) - (relation.rel_op in (">=", "<"))
    return largest, relation.rel_op in (">", ">=")


def of_tensor(node: torch.fx.Node) -> bool | None:
    """What ``bool()`` of the 0-d tensor ``node`` is wherever there is something; None if it is no such test."""
    value = _zero_dimensional(node)
    if value is None:
        return None
    target = node.target
    if isinstance(target, _compat.numpy_operator_wrapper):
        target = target.op
    if target in _SOME:
        return True
    if target in _NOT and value.dtype == torch.bool:
        inner = of_tensor(node.args[0]) if isinstance(node.args[0], torch.fx.Node) else None
        return None if inner is None else not inner
    compare = _COMPARE.get(target)
    if compare is not None:
        return _of_comparison(compare, *node.args) if len(node.args) == 2 else None
    return True if value.dtype != torch.bool else None


def all_zeros(node: torch.fx.Node) -> torch.fx.Node | None:
    """What has only zeros in it exactly where ``of_tensor(node)`` is not what ``bool()`` of ``node`` is."""
    while node.target in _NOT and isinstance(node.args[0], torch.fx.Node):
        node = node.args[0]
    if node.target not in _SOME or len(node.args) != 1 or node.kwargs:
        return None
    return node.args[0] if isinstance(node.args[0], torch.fx.Node) else None


def minimal_length(rows: torch.fx.Node) -> int | None:
    """The ``minlength`` of the call of bincount that ``rows`` is the result of."""
    made = _through(rows, _SAME_VALUES)
    if made.target not in _COUNTS:
        return None
    length = made.kwargs.get("minlength", made.args[2] if len(made.args) > 2 else None)
    return length if isinstance(length, int) and length > 0 else None


def most_counted(rows: torch.fx.Node) -> int | None:
    """E for a call of bincount without ``minlength`` on what was chosen among E scores, cumulated or not."""
    made = _through(rows, _SAME_VALUES)
    if getattr(made.target, "__name__", made.target) in _CUMULATES and made.args[1:] in ((), (0,)):
        made = _through(made.all_input_nodes[0], _SAME_VALUES)
    if not counts_choices(made) or len(made.args) > 1 or made.kwargs:
        return None
    scores = _through(made.all_input_nodes[0], _NO_OTHERS).all_input_nodes[0]
    size = scores.meta["example_value"].shape[-1]
    return size if isinstance(size, int) else None


def counts_choices(node: torch.fx.Node) -> bool:
    """Is ``node`` a call of bincount on what was chosen among scores ``[.., E]``?"""
    return node.target in _COUNTS and groups_choices(node)


def distinct_values(rows: torch.fx.Node) -> int | None:
    """How many values there are that ``rows``, the result of unique, can hold."""
    made = _through(rows, _SAME_VALUES)
    if made.target not in _DISTINCT:
        return None
    (chosen, *_) = made.all_input_nodes
    chosen = _through(chosen, _NO_OTHERS)
    if chosen.target not in _CHOOSES:
        return None
    scores = chosen.all_input_nodes[0].meta.get("example_value")
    dim = chosen.kwargs.get("dim", -1)
    if not isinstance(scores, torch.Tensor) or not scores.dim() or not isinstance(dim, int):
        return None
    return size if isinstance(size := scores.shape[dim], int) else None


def groups_choices(node: torch.fx.Node) -> bool:
    """Does ``node`` sort, count or compare what a choice among scores ``[.., E]`` chose?  So experts are told apart."""
    if getattr(node.target, "__name__", node.target) not in _GROUPS or not node.all_input_nodes:
        return False
    chosen = _through(node.all_input_nodes[0], _NO_OTHERS)
    if chosen.target not in _CHOOSES or not chosen.all_input_nodes:
        return False
    scores = chosen.all_input_nodes[0].meta.get("example_value")
    return isinstance(scores, torch.Tensor) and scores.dim() >= 2


def _through(node: torch.fx.Node, targets: set[Any]) -> torch.fx.Node:
    while node.target in targets and node.args:
        first = node.args[0]
        if isinstance(first, (list, tuple)) and len(first) == 1:
            (first,) = first
        if not isinstance(first, torch.fx.Node):
            break
        node = first
    return node


def _of_comparison(compare: Callable[[Any, Any], Any], left: Any, right: Any) -> bool | None:
    nodes = [side for side in (left, right) if isinstance(side, torch.fx.Node)]
    if not nodes or not all(map(_is_number, nodes)):
        return None
    if len(nodes) == 2:  # one of them is larger, or they are equal
        ways = (lambda n: compare(n, 0), lambda n: compare(0, n))
    elif left is nodes[0] and type(right) is int and right in (0, 1):
        ways = (lambda n: compare(n, right),)
    elif right is nodes[0] and type(left) is int and left in (0, 1):
        ways = (lambda n: compare(left, n),)
    else:
        return None
    answers = {_beyond_zero(way) for way in ways} - {None}
    return answers.pop() if len(answers) == 1 else None


def _beyond_zero(asked: Callable[[int], Any]) -> bool | None:
    """The answer for every number from 1 on, if it is another for 0."""
    answers = {bool(asked(n)) for n in (1, 2, 3)}
    return answers.pop() if len(answers) == 1 and bool(asked(0)) not in answers else None


def _is_number(node: torch.fx.Node) -> bool:
    value = _zero_dimensional(node)
    return value is not None and value.dtype != torch.bool


def _zero_dimensional(node: torch.fx.Node) -> torch.Tensor | None:
    value = node.meta.get("example_value")
    if not isinstance(value, torch.Tensor) or value.dim() != 0:
        return None
    integral = not value.dtype.is_floating_point and not value.dtype.is_complex
    return value if integral else None
