"""Tokens that come out as they went in, in plain PyTorch beside the fused op.

Experts that give their input as it is: ``y + x * s``, where
``s [T, 1]`` is what the choices of a token weigh together whose ids are from E on; the op gives nothing for these.
A token without an expert that is kept: ``where(taken, y, x)``, where ``taken [T, 1]`` says whether its id is in 0..E-1.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from moe_inductor.description import Experts
from moe_inductor.region.nodes import value

_SUMMED = "moe_inductor_summed"


@dataclasses.dataclass(eq=False)
class _After:
    """Makes nodes, each after the one before, the first after ``node``."""

    node: fx.Node
    finish: Callable[[fx.Node, fx.Node], None]

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        op, before = "call_method" if isinstance(target, str) else "call_function", self.node
        with before.graph.inserting_after(before):
            self.node = before.graph.create_node(op, target, args, kwargs)
        self.finish(self.node, before)
        return self.node


def is_summed(node: fx.Node) -> bool:
    """Does nothing come of ``node [T, k]`` but sums over the choices of a token, to which their order is nothing?"""
    return _SUMMED in node.meta


def add_identities(
    y: fx.Node,
    x: fx.Node,
    topk_ids: fx.Node,
    topk_weights: fx.Node,
    experts: Experts,
    finish: Callable[[fx.Node, fx.Node], None],
) -> fx.Node:
    """Dynamo nodes after ``y [T, H]``, the last of which has its shape and dtype.

    finish: records the value of a new node, and the source line of another.
    """
    then = _After(y, finish)
    above = then(operator.ge, topk_ids, experts.num_experts)
    below = then(operator.lt, topk_ids, experts.num_choices)
    weights = then(torch.where, then(operator.and_, above, below), topk_weights, 0.0)
    for node in (above, below, weights):
        node.meta[_SUMMED] = True
    share = then(torch.sum, weights, dim=-1, keepdim=True)
    total = then(operator.add, y, then(operator.mul, x, share))
    dtype = value(y).dtype
    return total if value(total).dtype == dtype else then("to", total, dtype)


def keep_tokens(
    y: fx.Node,
    x: fx.Node,
    topk_ids: fx.Node,
    experts: Experts,
    finish: Callable[[fx.Node, fx.Node], None],
) -> fx.Node:
    """As ``add_identities``; topk_ids [T, 1]."""
    then = _After(y, finish)
    above, below = then(operator.ge, topk_ids, 0), then(operator.lt, topk_ids, experts.num_experts)
    return then(torch.where, then(operator.and_, above, below), y, x)
