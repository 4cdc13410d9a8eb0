"""Equality of expressions by value numbering.

Two nodes get the same number exactly when the whole expressions below them are the same: operator, arguments, every
constant, and shape, dtype and device of every result.  Symbolic sizes are compared by symbol, sizes that depend on data
by the expression that makes them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from moe_inductor._compat import size_expr
from moe_inductor.region.nodes import name_of, unbacked, value, written


class Numbering:
    """Numbers shared by any number of graphs."""

    def __init__(self) -> None:
        self._numbers: dict[Any, int] = {}
        self._of: dict[fx.Node, int] = {}
        self._known: frozenset[Any] = (
            frozenset()
        )  # unbacked symbols of the leaves: the same in all graphs

    def leaf(self, node: fx.Node, name: Any) -> None:
        """``node`` stands for the tensor called ``name``, whatever it was computed from."""
        self._of[node] = self._number(("leaf", name))
        self._known |= unbacked(value(node))

    def number(self, root: fx.Node) -> int:
        todo = [root]
        while todo:
            node = todo[-1]
            waiting = [a for a in node.all_input_nodes if a not in self._of]
            if node in self._of or not waiting:
                todo.pop()
                if node not in self._of:
                    self._of[node] = self._number(self._key(node))
            else:
                todo += waiting
        return self._of[root]

    def difference(self, a: Any, b: Any) -> tuple[Any, Any] | None:
        """The innermost first place where ``a`` and ``b`` differ, as a pair of nodes or constants."""
        if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)):
            return None if self._constant(a) == self._constant(b) else (a, b)
        if self.number(a) == self.number(b):
            return None
        if a.target is b.target and len(a.args) == len(b.args):
            for x, y in zip(_flat(a.args), _flat(b.args), strict=False):
                found = self.difference(x, y)
                if found is not None:
                    return found if any(isinstance(f, fx.Node) for f in found) else (a, b)
        return a, b

    def _number(self, key: Any) -> int:
        return self._numbers.setdefault(key, len(self._numbers))

    def _key(self, node: fx.Node) -> Any:
        if node.op in ("placeholder", "get_attr"):
            return (node.op, id(node))  # an input that nobody declared equals only itself
        return (
            str(node.target),
            self._constant(node.args),
            self._constant(node.kwargs),
            self._meta(value(node)),
        )

    def _constant(self, item: Any) -> Any:
        if isinstance(item, fx.Node):
            found = value(item)
            if isinstance(found, torch.SymInt) and unbacked(found) <= self._known:
                # The number of tokens may depend on data itself: then it is the leaves' and has a name.
                return self._constant(written(found))
            return ("node", self._of.get(item, id(item)))
        if isinstance(item, (tuple, list)):
            return tuple(self._constant(i) for i in item)
        if isinstance(item, dict):
            return tuple(sorted((k, self._constant(v)) for k, v in item.items()))
        if isinstance(item, torch.SymInt):
            # Of a shape, hence implied by the arguments, where a size that depends on data is a node.
            if unbacked(item):
                return "data-dependent"
            expr = size_expr(item)
            return self._constant(int(expr)) if expr.is_Integer else ("size", str(expr))
        return (type(item).__name__, repr(item))

    def _meta(self, item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            return (self._constant(tuple(item.shape)), str(item.dtype), str(item.device))
        if isinstance(item, (tuple, list)):
            return tuple(self._meta(i) for i in item)
        return None


def describe(item: Any) -> str:
    """One operand of a difference, in words for the user."""
    if not isinstance(item, fx.Node):
        return f"`{item}`"
    if item.op != "call_function":
        return f"input `{item.name}`"
    constants = [str(a) for a in item.args if not isinstance(a, fx.Node) and not _flat_nodes(a)]
    found = value(item)
    kind = str(found.dtype).removeprefix("torch.") if isinstance(found, torch.Tensor) else ""
    return f"`{name_of(item)}({', '.join(['..', *constants])})`" + (f" {kind}" if kind else "")


def _flat(args: Any) -> list[Any]:
    out: list[Any] = []
    for item in args:
        out += _flat(item) if isinstance(item, (tuple, list)) else [item]
    return out


def _flat_nodes(item: Any) -> bool:
    return isinstance(item, (tuple, list)) and any(isinstance(i, fx.Node) for i in _flat(item))
