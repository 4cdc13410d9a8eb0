"""Pairs in the order of a sort by expert, and the token of each.

The (token, choice) pairs have an order of their own: pair ``j`` of token ``t`` has the number ``t k + j``.  Here it is
said which indices in a graph are these numbers sorted by expert, which undo that sort, and which give the token
``number // k`` of each pair, sorted or not.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch import fx

from moe_inductor.region.counts import SORTS, choices, root_of
from moe_inductor.region.nodes import node_arg, value, written

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True, eq=False)
class Order:
    """``order``: positions of the pairs, sorted by expert.  ids [.., k], all in ``[0, E)``."""

    order: fx.Node
    ids: fx.Node
    num_experts: int

    @property
    def top_k(self) -> Any:
        return value(self.ids).shape[-1]

    @property
    def pairs(self) -> Any:
        return value(self.order).shape[0]

    @property
    def tokens(self) -> Any:
        return value(self.ids).numel() // self.top_k


def order_of(index: Any) -> Order | None:
    """``argsort(ids)``, ascending."""
    index = _integers(index)
    if index is None or index.target is not operator.getitem or index.args[1] != 1:
        return None
    pack = node_arg(index, 0)
    if pack.target not in SORTS or any(pack.args[2:]) or "descending" in pack.kwargs:
        return None
    ids = root_of(node_arg(pack, 0))
    experts = choices(ids)
    if experts is None or value(index).dim() != 1 or _reordered(node_arg(pack, 0), ids):
        return None
    return Order(index, ids, experts)


def _reordered(flat: fx.Node, ids: fx.Node) -> bool:
    """``flat`` holds the ids in another order than their own."""
    while flat is not ids:
        if flat.target not in (aten.view.default, aten._to_copy.default):
            return True
        flat = node_arg(flat, 0)
    return False


def inverted(index: Any) -> Order | None:
    """``argsort(order)``, or ``inverse[order] = arange``"""
    index = _integers(index)
    if index is None:
        return None
    if index.target is operator.getitem and index.args[1] == 1:
        pack = node_arg(index, 0)
        if pack.target in SORTS and not any(pack.args[2:]) and "descending" not in pack.kwargs:
            return order_of(pack.args[0])
    if index.target is aten.index_put.default and len(index.args) == 3:
        _, where, numbers = index.args
        order = order_of(where[0]) if len(where) == 1 else None  # type: ignore[index, arg-type]
        if order is not None and _counts_up(numbers, order.pairs):
            return order
    return None


def tokens_of(index: Any) -> Order | None:
    """``order // k``, or ``token_of_pair[order]``: the token of each sorted row."""
    index = _integers(index)
    if index is None:
        return None
    divided = quotient(index)
    if divided is not None:
        order = order_of(divided[0])
        return order if order is not None and divided[1] == order.top_k else None
    if index.target is aten.index.Tensor and len(index.args[1]) == 1:  # type: ignore[arg-type]
        order = order_of(index.args[1][0])  # type: ignore[index]
        if order is not None and are_tokens_of_pairs(index.args[0], order):
            return order
    order = order_of(index)
    return order if order is not None and order.top_k == 1 else None


def quotient(node: fx.Node) -> tuple[Any, Any] | None:
    """``n // k`` of numbers that are not negative"""
    if node.target is aten.floor_divide.default and len(node.args) == 2:
        return node.args  # type: ignore[return-value]
    is_division = node.target in (aten.div.Tensor_mode, aten.div.Scalar_mode)
    if is_division and len(node.args) == 2 and node.kwargs["rounding_mode"] in ("floor", "trunc"):
        return node.args  # type: ignore[return-value]
    return None


def are_tokens_of_pairs(node: Any, order: Order) -> bool:
    """0, .., 0, 1, .., 1, .., each k times"""
    node = _integers(node)
    if node is None:
        return False
    divided = quotient(node)
    if divided is not None:
        return divided[1] == order.top_k and _counts_up(divided[0], order.pairs)
    if node.target is aten.view.default:
        node = node_arg(node, 0)
    shape = [written(size) for size in value(node).shape]
    if node.target is not aten.expand.default or shape != [
        written(order.tokens),
        written(order.top_k),
    ]:
        return False
    column = node_arg(node, 0)
    if column.target is not aten.view.default or value(column).shape[-1] != 1:
        return False
    return _counts_up(node_arg(column, 0), order.tokens)


def _counts_up(node: Any, size: Any) -> bool:
    """arange(size)"""
    node = _integers(node)
    if node is None or node.target is not aten.arange.default or len(node.args) != 1:
        return False
    return written(value(node).shape[0]) == written(size)


def _integers(node: Any) -> fx.Node | None:
    """Without casts between types of integers that hold any position."""
    while isinstance(node, fx.Node) and node.target is aten._to_copy.default:
        inner = node_arg(node, 0)
        if {value(n).dtype for n in (node, inner)} - {torch.int32, torch.int64}:
            break
        node = inner
    return node if isinstance(node, fx.Node) else None
