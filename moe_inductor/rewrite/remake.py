"""Operands of a block that the model never computes as such, made from what it does compute.

The normal form says what the chosen experts' scores are where the model only has the scores of all experts, and what is
left of the ids where a mask has dropped some.  These are a few small operators on [T, k] or [T, E], emitted here.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from moe_inductor.reasons import Code, Refusal
from moe_inductor.region.canonical import Canonical
from moe_inductor.region.nodes import is_floating, node_arg, same_sizes, value

aten = torch.ops.aten

Holder = Callable[[fx.Node], fx.Node | None]
Finish = Callable[[fx.Node, fx.Node], None]

# Nothing with a matrix product in it: an operand that is as large as that belongs to the model.
_OPERATORS = frozenset(
    {
        operator.getitem, aten._softmax.default, aten._to_copy.default, aten.abs.default, aten.add.Scalar,
        aten.add.Tensor, aten.bitwise_not.default, aten.cat.default, aten.clamp.default, aten.div.Scalar,
        aten.div.Tensor, aten.eq.Scalar, aten.exp.default, aten.expand.default, aten.full.default,
        aten.gather.default, aten.ge.Scalar, aten.gt.Scalar, aten.le.Scalar, aten.logical_not.default, aten.lt.Scalar,
        aten.mul.Scalar, aten.mul.Tensor, aten.ne.Scalar, aten.neg.default, aten.permute.default, aten.relu.default,
        aten.sigmoid.default, aten.square.default, aten.sum.dim_IntList, aten.tanh.default, aten.view.default,
        aten.where.ScalarOther,
    }
)  # fmt: skip
_SIZED = (aten.expand.default, aten.full.default, aten.view.default)


class Remake:
    """holder: the Dynamo node that holds the value of a normal-form node where the block is to stand, or None.

    read: the Dynamo nodes that what is made will read.
    """

    def __init__(self, canonical: Canonical, holder: Holder) -> None:
        self.canonical = canonical
        self.holder = holder
        self.read: list[fx.Node] = []
        self._at_hand: dict[fx.Node, fx.Node] = {}

    def plan(self, node: fx.Node) -> None:
        """See that ``node`` can be had.  Raises Refusal(MUTATION, SPELLING, GRAD_STATE)."""
        if node in self._at_hand:
            return
        found = self.holder(node)
        if found is not None:
            self._at_hand[node] = found
            self.read.append(found)
            return
        where = self.canonical.source_of(node)
        if self.canonical.dynamo_of.get(node):
            raise Refusal(
                Code.MUTATION,
                "an operand of the block exists only in a tensor that is written to again",
                where,
            )
        if node.target not in _OPERATORS or (node.target in _SIZED and _sizes(node) is None):
            raise Refusal(
                Code.SPELLING, "an operand of the block is never computed by the model", where
            )
        if is_floating(node):
            if self.canonical.router_refusal is not None:
                raise self.canonical.router_refusal
            if self.canonical.autocast or self.canonical.router_autocast:
                raise Refusal(Code.SPELLING, "the scores are masked under autocast", where)
        for argument in node.all_input_nodes:
            self.plan(argument)

    def emit(self, graph: fx.Graph, node: fx.Node, finish: Finish) -> fx.Node:
        """The Dynamo node that is worth ``node``, made where ``graph`` inserts if the model has none."""
        if node in self._at_hand:
            return self._at_hand[node]
        args, kwargs = fx.map_arg(
            (node.args, dict(node.kwargs)), lambda a: self.emit(graph, a, finish)
        )
        if node.target is aten.view.default:
            made = graph.call_method(*_reshape(node, self._at_hand[node_arg(node, 0)]))
        else:
            assert callable(node.target)
            made = graph.call_function(node.target, tuple(args), kwargs)
        finish(made, next(iter(made.all_input_nodes), made))
        self._at_hand[node] = made
        return made


def _reshape(node: fx.Node, base: fx.Node) -> tuple[str, tuple[Any, ...]]:
    """A method and its arguments."""
    if _is_column(value(node), value(node_arg(node, 0))):
        return "unsqueeze", (base, -1)
    if _is_column(value(node_arg(node, 0)), value(node)):
        return "squeeze", (base, -1)
    return "reshape", (base, _sizes(node))


def _is_column(a: torch.Tensor, b: torch.Tensor) -> bool:
    return same_sizes(a.shape, (*b.shape, 1))


def _sizes(node: fx.Node) -> list[int] | None:
    """The sizes that a view, an expand or a full is given; one that is symbolic is left to torch, where it can be."""
    sizes: Any = next((a for a in node.args if isinstance(a, (list, tuple))), [])
    known = [size if isinstance(size, int) else -1 for size in sizes]
    fits = known.count(-1) <= (1 if node.target is aten.view.default else 0)
    if node.target is aten.view.default:
        made, base = value(node), value(node_arg(node, 0))
        fits = fits or _is_column(made, base) or _is_column(base, made)
    return known if fits and isinstance(value(node), torch.Tensor) else None
