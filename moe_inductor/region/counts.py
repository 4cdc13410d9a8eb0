"""Numbers that the data decide, as sums of counts: how many rows an expert has, and where they start.

A model counts how often each expert was chosen, reads the counts into Python, adds them up and slices a sorted array
by the sums.  Each number is written here as a *form*: how often each *atom* is added.  An atom is one element of a
tensor of integers, ``(node, i)``, where ``node`` is one-dimensional, or ``(node, None)`` for a number of its own; the
constant stands under None.  ``counted`` says which tensor counts what.
"""

from __future__ import annotations

import operator
from typing import Any

import sympy
import torch
from torch import fx

from moe_inductor.capture.padded import PADDED
from moe_inductor.region.nodes import is_integral, is_one, node_arg, unbacked, value

aten = torch.ops.aten

Atom = tuple[Any, int | None]
Form = dict[Atom | None, int]

# Floating-point types that hold every id exactly.
_EXACT = (torch.float32, torch.float64)


class Numbers:
    """What the symbols of one trace are.  Filled while the trace is brought to normal form."""

    def __init__(self) -> None:
        self._symbols: dict[sympy.Expr, Form] = {}
        self._elements: dict[Atom, Form] = {}
        self._bounds: dict[fx.Node, tuple[Form, Form]] = {}

    def note_item(self, number: Any, tensor: fx.Node) -> None:
        """``number`` is what ``item()`` or ``tolist()`` made of ``tensor``."""
        if isinstance(number, torch.SymInt) and number.node.expr.is_symbol:
            self._symbols.setdefault(number.node.expr, self.scalar(tensor))

    def note_slice(self, node: fx.Node, start: Any, end: Any) -> None:
        """``node`` holds the rows from ``start`` to ``end``, data-dependent numbers, of another tensor."""
        first, last = (self.form(n) for n in (start, end))
        self._bounds[node] = (first, last)
        rows = value(node).shape[0]
        if isinstance(rows, torch.SymInt) and rows.node.expr.is_symbol and unbacked(rows):
            self._symbols.setdefault(rows.node.expr, plus(last, first, -1))

    def bounds(self, node: fx.Node) -> tuple[Form, Form] | None:
        """Start and end of rows that were noted."""
        return self._bounds.get(node)

    def form(self, number: Any) -> Form:
        """A size or bound.  A symbol that nothing is known about is an atom."""
        if not isinstance(number, torch.SymInt):
            return {None: int(number)} if number else {}
        found: Form = {}
        for term, times in sympy.expand(number.node.expr).as_coefficients_dict().items():
            known: Form = {(str(term), None): 1}
            known = {None: 1} if term == 1 else self._symbols.get(term, known)
            found = plus(found, known, int(times))
        return found

    def total(self, number: Any) -> Any:
        """T k, where ``number`` is how often each of the experts was chosen, added up; otherwise ``number``."""
        form = self.form(number)
        counts = {atom[0] for atom in form if atom is not None}
        one = counts.pop() if len(counts) == 1 else None
        found = counted(one) if isinstance(one, fx.Node) else None
        if found is None or form != {(one, e): 1 for e in range(found[1])}:
            return number
        ids, experts = found
        return value(ids).numel() if choices(ids) == experts else number

    def scalar(self, node: fx.Node) -> Form:
        """A tensor of one integer."""
        target, args = node.target, node.args
        if target is aten.select.int and value(node_arg(node, 0)).dim() == 1:
            position = args[2]
            if isinstance(position, int):
                return self.element(node_arg(node, 0), position)
        elif target in (aten.view.default, aten._to_copy.default) and is_integral(
            node_arg(node, 0)
        ):
            inner = node_arg(node, 0)
            return self.element(inner, 0) if value(inner).dim() == 1 else self.scalar(inner)
        elif target is aten.sum.default and _length(node_arg(node, 0)) is not None:
            return self.sum(node_arg(node, 0), _length(node_arg(node, 0)) or 0)
        elif target is aten.full.default:
            return _constant(args[1])
        found = self._arithmetic(node, self.scalar)
        return {(node, None): 1} if found is None else found

    def element(self, node: fx.Node, i: int) -> Form:
        """Element ``i`` of a tensor of integers with one dimension."""
        key = (node, i)
        if key not in self._elements:
            self._elements[key] = self._element(node, i)
        return self._elements[key]

    def sum(self, node: fx.Node, length: int) -> Form:
        """The first ``length`` elements together."""
        found: Form = {}
        for i in range(length):
            found = plus(found, self.element(node, i))
        return found

    def _element(self, node: fx.Node, i: int) -> Form:
        target, args = node.target, node.args
        if target is aten.cumsum.default and is_integral(node_arg(node, 0)):
            inner = node_arg(node, 0)
            before = self.element(node, i - 1) if i else {}
            return plus(before, self.element(inner, i))
        if target is aten.cat.default:
            for part in args[0]:  # type: ignore[union-attr]
                length = _length(part)
                if length is None:
                    break
                if i < length:
                    return self.element(part, i)
                i -= length
        elif target is aten.constant_pad_nd.default and len(args[1]) == 2:  # type: ignore[arg-type]
            left, _ = args[1]  # type: ignore[misc]
            inner, fill = node_arg(node, 0), (*args, 0)[2]
            length = _length(inner)
            if length is not None and isinstance(left, int) and left >= 0:
                inside = left <= i < left + length
                return self.element(inner, i - left) if inside else _constant(fill)
        elif target is PADDED:
            return self.element(node_arg(node, 0), i)
        elif target is aten.slice.Tensor and isinstance(args[2], int) and len(args) == 4:
            return self.element(node_arg(node, 0), args[2] + i)
        elif target is aten.full.default:
            return _constant(args[1])
        elif target in (aten._to_copy.default, aten.view.default):
            inner = node_arg(node, 0)
            if is_integral(inner) and value(inner).dim() <= 1:
                return self.element(inner, i) if value(inner).dim() else self.scalar(inner)
        found = self._arithmetic(node, lambda n: self.element(n, i))
        return {(node, i): 1} if found is None else found

    def _arithmetic(self, node: fx.Node, read: Any) -> Form | None:
        """a + b, a - b, element by element"""
        sign = _SIGNS.get(node.target)  # type: ignore[arg-type]
        if sign is None or len(node.args) != 2 or node.kwargs or not is_integral(node):
            return None
        forms = []
        for item in node.args:
            if isinstance(item, fx.Node):
                alike = str(value(item).shape) == str(value(node).shape)
                if not is_integral(item) or not (alike or value(item).dim() == 0):
                    return None
                forms.append(read(item) if alike else self.scalar(item))
            elif type(item) is int:
                forms.append(_constant(item))
            else:
                return None
        return plus(forms[0], forms[1], sign)


_SIGNS = {
    aten.add.Tensor: 1,
    aten.add.Scalar: 1,
    aten.sub.Tensor: -1,
    aten.sub.Scalar: -1,
}


def plus(a: Form, b: Form, times: int = 1) -> Form:
    """a + times b"""
    found = dict(a)
    for atom, n in b.items():
        found[atom] = found.get(atom, 0) + times * n
        if not found[atom]:
            del found[atom]
    return found


def _constant(number: Any) -> Form:
    return {None: int(number)} if number else {}


def _length(node: fx.Node) -> int | None:
    found = value(node)
    one = isinstance(found, torch.Tensor) and found.dim() == 1 and is_integral(node)
    return found.shape[0] if one and isinstance(found.shape[0], int) else None


# -- counts ------------------------------------------------------------------------------------------------------------


def root_of(ids: Any) -> fx.Node:
    """The integers of which ``ids`` is a view, a cast that keeps them, or a reordering."""
    node: fx.Node = ids
    while True:
        inner = node.args[0] if node.args else None
        if not isinstance(inner, fx.Node):
            return node
        if node.target is aten._to_copy.default:
            kept = is_integral(inner) and (is_integral(node) or value(node).dtype in _EXACT)
            if not kept or value(node).dtype in (torch.bool, torch.int8, torch.uint8):
                return node
        elif node.target is operator.getitem:
            if inner.target not in SORTS or node.args[1] != 0:
                return node
            inner = node_arg(inner, 0)
        elif node.target is aten.index.Tensor:
            if not is_integral(inner) or not _reorders(node):
                return node
        elif node.target is not aten.view.default or not is_integral(inner):
            return node
        node = inner


SORTS = (aten.sort.default, aten.sort.stable)


def _reorders(index: fx.Node) -> bool:
    """x[order], where order are the positions that a sort of as many elements gives"""
    base, positions = index.args
    (order,) = positions if len(positions) == 1 else (None,)  # type: ignore[arg-type]
    if not isinstance(order, fx.Node) or order.target is not operator.getitem:
        return False
    pack, which = order.args
    if not isinstance(pack, fx.Node) or pack.target not in SORTS or which != 1:
        return False
    shapes = [str(value(n).shape) for n in (base, order)]  # type: ignore[arg-type]
    return value(order).dim() == 1 and shapes[0] == shapes[1]


def choices(ids: fx.Node) -> int | None:
    """E where ``ids`` are positions of a top-k among E scores: in ``[0, E)``, and in a row no two alike."""
    pack = ids.args[0] if ids.target is operator.getitem and ids.args[1] == 1 else None
    if not isinstance(pack, fx.Node) or pack.target is not aten.topk.default:
        return None
    scores, _, dim = (*pack.args, -1)[:3]
    shape = value(scores).shape  # type: ignore[arg-type]
    if dim not in (value(ids).dim() - 1, -1):
        return None
    return shape[-1] if isinstance(shape[-1], int) else None


def counted(counts: fx.Node) -> tuple[fx.Node, int] | None:
    """(ids [.., k], E) where ``counts [E]`` says how often each of ``0 .. E - 1`` is in ``ids``.

    Right for ids that are positions of a top-k among E scores (``choices``).
    """
    while counts.target is aten._to_copy.default and value(counts).dtype in (
        torch.int32,
        torch.int64,
    ):
        counts = node_arg(counts, 0)
    for read in (_scattered, _one_hot, _bincount, _histc, _added):
        found = read(counts)
        if found is not None:
            return found
    return None


def _scattered(counts: fx.Node) -> tuple[fx.Node, int] | None:
    """zeros(T, E).scatter(1, ids, 1).sum(0), as integers"""
    if counts.target is not aten.sum.dim_IntList or counts.args[1:] != ([0],):
        return None
    hits = node_arg(counts, 0)
    while hits.target is aten._to_copy.default:
        if not is_integral(hits):
            return None
        hits = node_arg(hits, 0)
    if value(counts).dtype != torch.int64 or not _summed_as_integers(counts):
        return None
    if hits.target is aten.scatter.value:
        one = hits.args[3]
    elif hits.target is aten.scatter.src:
        one = fill_of(node_arg(hits, 3))
    else:
        return None
    zeros, dim, ids = hits.args[:3]
    if not isinstance(zeros, fx.Node) or not isinstance(ids, fx.Node):
        return None
    if dim != 1 or one != 1 or fill_of(zeros) != 0 or value(zeros).dim() != 2:
        return None
    rows, experts = value(zeros).shape
    root = root_of(ids)
    same_rows = str(rows) == str(value(root).shape[0])
    if (
        not same_rows
        or not isinstance(experts, int)
        or str(value(ids).shape) != str(value(root).shape)
    ):
        return None
    return root, experts


def _summed_as_integers(counts: fx.Node) -> bool:
    return value(node_arg(counts, 0)).dtype in (torch.bool, torch.int32, torch.int64)


def _one_hot(counts: fx.Node) -> tuple[fx.Node, int] | None:
    """one_hot(ids, E) summed over all dimensions but the last"""
    if counts.target is not aten.sum.dim_IntList or not _summed_as_integers(counts):
        return None
    hits = node_arg(counts, 0)
    if hits.target is aten._to_copy.default:
        hits = node_arg(hits, 0)
    if hits.target is not aten.eq.Tensor:
        return None
    ids, numbers = hits.args
    if not isinstance(ids, fx.Node) or not isinstance(numbers, fx.Node):
        return None
    rank = value(hits).dim()
    if numbers.target is not aten.arange.default or len(numbers.args) != 1:
        return None
    last = value(ids).shape[-1]
    if counts.args[1] != list(range(rank - 1)) or value(ids).dim() != rank:
        return None
    if not isinstance(last, int) or last != 1 or not isinstance(numbers.args[0], int):
        return None
    return root_of(ids), numbers.args[0]


def _bincount(counts: fx.Node) -> tuple[fx.Node, int] | None:
    """bincount(ids, minlength=E), or bincount(ids): elements that it does not have would be zero"""
    if counts.target is not aten.bincount.default or counts.kwargs:
        return None
    ids, weights, length = (*counts.args, None, 0)[:3]
    if weights is not None or not isinstance(length, int) or not isinstance(ids, fx.Node):
        return None
    root = root_of(ids)
    experts = length or choices(root)
    return None if experts is None else (root, experts)


def _histc(counts: fx.Node) -> tuple[fx.Node, int] | None:
    """histc(ids, E, 0, E - 1) or histc(ids, E, 0, E): id e is in bin e, and E - 1 is the largest"""
    if counts.target is not aten.histc.default or len(counts.args) != 4:
        return None
    ids, bins, low, high = counts.args
    if not isinstance(ids, fx.Node) or not isinstance(bins, int) or bins < 2:
        return None
    if low != 0 or high not in (bins - 1, bins):
        return None
    return root_of(ids), bins


def _added(counts: fx.Node) -> tuple[fx.Node, int] | None:
    """zeros(E).index_add(0, ids, ones);  zeros(E).scatter(0, ids, ones) for those of one token, which are distinct"""
    adds = counts.target in (aten.index_add.default, aten.scatter_add.default)
    if not adds and counts.target is not aten.scatter.src:
        return None
    if len(counts.args) != 4:
        return None
    zeros, dim, ids, ones = counts.args
    if not all(isinstance(n, fx.Node) for n in (zeros, ids, ones)) or dim != 0:
        return None
    if fill_of(zeros) != 0 or fill_of(ones) != 1 or _length(zeros) is None:  # type: ignore[arg-type]
        return None
    root = root_of(ids)
    of_one = choices(root) is not None and all(map(is_one, value(root).shape[:-1]))
    return (root, _length(zeros) or 0) if adds or of_one else None  # type: ignore[arg-type]


def fill_of(node: fx.Node) -> Any:
    """The value of every element, where that is a constant."""
    while node.target in (aten._to_copy.default, aten.expand.default, aten.view.default):
        node = node_arg(node, 0)
    return node.args[1] if node.target is aten.full.default else None


def single(form: Form) -> Atom | None:
    """The atom of which there is one, where there is nothing else."""
    ((atom, times),) = form.items() if len(form) == 1 else ((None, 0),)
    return atom if times == 1 else None
