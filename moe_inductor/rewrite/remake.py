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
        aten.add.Tensor, aten.arange.default, aten.bitwise_not.default, aten.cat.default, aten.clamp.default,
        aten.cumsum.default, aten.div.Scalar, aten.div.Tensor, aten.eq.Scalar, aten.eq.Tensor, aten.exp.default,
        aten.expand.default, aten.full.default, aten.gather.default, aten.ge.Scalar, aten.gt.Scalar, aten.le.Scalar,
        aten.logical_not.default, aten.lt.Scalar, aten.mul.Scalar, aten.mul.Tensor, aten.ne.Scalar, aten.neg.default,
        aten.permute.default, aten.relu.default, aten.sigmoid.default, aten.square.default, aten.sum.dim_IntList,
        aten.tanh.default, aten.view.default, aten.where.ScalarOther,
    }
)  # fmt: skip
_SIZED = (aten.expand.default, aten.full.default, aten.view.default)


class Remake:
    """holder: the Dynamo node that holds the value of a normal-form node where the block is to stand, or None.

    read: the Dynamo nodes that what is made will read.
    made: those that were made, by the normal-form node that they are worth.
    """

    def __init__(self, canonical: Canonical, holder: Holder) -> None:
        self.canonical = canonical
        self.holder = holder
        self.read: list[fx.Node] = []
        self.made: dict[fx.Node, fx.Node] = {}
        self._at_hand: dict[fx.Node, fx.Node] = {}
        self._views: dict[fx.Node, fx.Node] = {}

    def plan(self, node: fx.Node) -> None:
        """See that ``node`` can be had.  Raises Refusal(MUTATION, SPELLING, GRAD_STATE)."""
        if node in self._at_hand:
            return
        found = self.holder(node)
        if found is not None:
            self._at_hand[node] = found
            self.read.append(found)
            return
        if (view := self._held_view(node)) is not None:
            self._views[node] = view
            self.read.append(view)
            return
        if (constant := self._constant(node)) is not None:
            self.plan(constant)
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
            # A look-up keeps the dtype of what is looked up; other operators may have been cast.
            cast = self.canonical.autocast or self.canonical.router_autocast
            if cast and node.target is not aten.gather.default:
                words = "scores would have to be computed under autocast that the model has in another form"
                raise Refusal(Code.SPELLING, words, where)
        for argument in node.all_input_nodes:
            self.plan(argument)

    def emit(self, graph: fx.Graph, node: fx.Node, finish: Finish) -> fx.Node:
        """The Dynamo node that is worth ``node``, made where ``graph`` inserts if the model has none."""
        if node in self._at_hand:
            return self._at_hand[node]
        if node in self._views:
            view = self._views[node]
            made = graph.call_method("reshape", (view, [-1, *value(node).shape[1:]]))
            finish(made, view)
            return self._keep(node, made)
        if (constant := self._constant(node)) is not None:
            held = self._at_hand[constant]
            made = graph.call_method(*_reshape(node, constant, held))
            finish(made, held)
            return self._keep(node, made)
        args, kwargs = fx.map_arg(
            (node.args, dict(node.kwargs)), lambda a: self.emit(graph, a, finish)
        )
        if node.target is aten.view.default:
            base = node_arg(node, 0)
            made = graph.call_method(*_reshape(node, base, self._at_hand[base]))
        else:
            assert callable(node.target)
            made = graph.call_function(node.target, tuple(args), kwargs)
        finish(made, next(iter(made.all_input_nodes), made))
        return self._keep(node, made)

    def _keep(self, node: fx.Node, made: fx.Node) -> fx.Node:
        self._at_hand[node] = self.made[node] = made
        return made

    def _held_view(self, node: fx.Node) -> fx.Node | None:
        """What holds a view [B, S, ..] of ``node`` [T, ..], all of whose other sizes are known."""
        made = value(node)
        if not isinstance(made, torch.Tensor) or not all(
            isinstance(n, int) for n in made.shape[1:]
        ):
            return None
        for view in node.users:
            is_view = view.target is aten.view.default and value(view).dim() == made.dim() + 1
            if is_view and same_sizes(value(view).shape[2:], made.shape[1:]):
                found = self.holder(view)
                if found is not None:
                    return found
        return None

    def _constant(self, node: fx.Node) -> fx.Node | None:
        """A tensor of one number that the model holds and that ``node``, whose size is symbolic, is a view of."""
        if node.target is not aten.full.default or _sizes(node) is not None:
            return None
        made = value(node)
        return next(
            (
                n
                for n in self.canonical.graph.nodes
                if n.target is node.target
                and n.args[1:] == node.args[1:]
                and n.kwargs == node.kwargs
                and (_is_column(value(n), made) or _is_column(made, value(n)))
                and self.holder(n) is not None
            ),
            None,
        )


def _reshape(node: fx.Node, base: fx.Node, held: fx.Node) -> tuple[str, tuple[Any, ...]]:
    """A method and its arguments that make ``node`` of ``base``, which ``held`` holds."""
    if _is_column(value(node), value(base)):
        return "unsqueeze", (held, -1)
    if _is_column(value(base), value(node)):
        return "squeeze", (held, -1)
    return "reshape", (held, _sizes(node))


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
