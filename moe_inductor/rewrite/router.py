"""The router in front of fused experts, rewritten into one call of ``topk_routing``."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from moe_inductor.description import Router
from moe_inductor.match.bind import Bound, BoundRouter
from moe_inductor.match.pieces import unviewed
from moe_inductor.ops.check import Routing
from moe_inductor.reasons import Code, Refusal
from moe_inductor.region.nodes import is_floating, location, name_of, same_sizes, value
from moe_inductor.rewrite.calls import EXPERTS, ROUTING
from moe_inductor.rewrite.identities import is_summed
from moe_inductor.rewrite.liveness import erase_unneeded, needed
from moe_inductor.rewrite.replace import Rewriter

# What may stand between a router and fused experts: each element stays what and where it is.
_ELEMENT_BY_ELEMENT = frozenset({"reshape", "view", "flatten", "contiguous", "to", "type", "float"})
_ROUTING_DEFAULTS = Routing._field_defaults


class RouterRewriter(Rewriter):
    def fuse(self, bound: Bound, router: BoundRouter) -> fx.Node:
        """Replace topk_weights and topk_ids by one call of ``topk_routing``.  Raises Refusal(ROUTER, MUTATION)."""
        assert bound.topk_weights is not None  # such a router is not proposed
        held = {
            i: self.holders(node) or self._holders_of_view(node)  # [B, S, k] is as good
            for i, node in enumerate((bound.topk_weights, bound.topk_ids))
        }
        start = min(self.order[h] for hs in held.values() for h in hs)
        inputs = [n if self.holders(n) else unviewed(n) for n in router.inputs()]
        operands = [self._readable(n, start - 1) for n in inputs]
        rules = {
            i: self._takes_over(hs, max(map(self.order.__getitem__, operands)))
            for i, hs in held.items()
        }
        replaced = lambda reader, node: any(rule(reader, node) for rule in rules.values())  # noqa: E731
        keep = needed(self.canonical.region, replaced)
        self._keep_operands(keep, operands)
        root = self.canonical.region.root
        if root in keep:
            raise Refusal(Code.ROUTER, "the top-k is also read in another form", location(root))
        if router.spelling.unordered(router.facts):
            self._order_is_not_read(held, rules, keep)
        with self.graph.inserting_before(self._router_starts(operands, start)):
            matrix = self._matrix(operands[0], bound.moe.experts.num_choices)
            call = self.graph.call_function(ROUTING, *_arguments(router.router, matrix, operands))
            self._finish(call, operands[0])
            parts = [self.graph.call_function(operator.getitem, (call, i)) for i in range(2)]
            for i, part in enumerate(parts):
                self._finish(part, held[i][0] if held[i] else call)
            outputs = [self._shaped(part, held[i], operands[0]) for i, part in enumerate(parts)]
        for i, new in enumerate(outputs):
            self._redirect(held[i], new, rules[i])
        erase_unneeded(self.canonical.region, keep)
        return call

    def _holders_of_view(self, node: fx.Node) -> list[fx.Node]:
        """Of what ``node`` is a view of, or of what is a view of it."""
        views = [n for n in node.users if n.target is torch.ops.aten.view.default]
        found = (self.holders(n) for n in (unviewed(node), *views))
        return next(filter(None, found), [])

    def _router_starts(self, operands: list[fx.Node], start: int) -> fx.Node:
        """Where the router of the model starts, under the grad mode that its weights are computed under."""
        after = max(map(self.order.__getitem__, operands))
        for node in self.canonical.region.nodes:
            if (
                is_floating(node)
                and after < self.order[node] <= start
                and self.canonical.grad_modes[node] is self.canonical.grad_enabled
            ):
                return node
        raise Refusal(
            Code.GRAD_STATE, "the router mixes grad modes", location(self.canonical.region.root)
        )

    def _order_is_not_read(
        self, held: dict[int, list[fx.Node]], rules: dict[int, Any], keep: set[fx.Node]
    ) -> None:
        """A top-k that need not sort leaves the order of the k experts open, and ours is another one.  The sum over
        them does not have any: the fused experts, through views and casts, may be the only ones who read it."""
        gone = set(self.canonical.region.nodes) - keep
        todo = [r for i, hs in held.items() for h in hs for r in h.users if rules[i](r, h)]
        while todo:
            reader = todo.pop()
            if reader in gone or reader.target is EXPERTS or is_summed(reader):
                continue
            if name_of(reader) not in _ELEMENT_BY_ELEMENT:
                raise Refusal(
                    Code.ROUTER,
                    "the order of the k experts, which the top-k leaves open, is read outside the experts",
                    location(reader) or self.canonical.region.location,
                )
            todo += reader.users

    def _shaped(self, node: fx.Node, holders: list[fx.Node], logits: fx.Node) -> fx.Node:
        """``node`` [T, k] as the model holds it: the tokens may have two dimensions, and top-1 may have none for k."""
        if not holders or value(holders[0]).dim() == 2:
            return node
        *tokens, last = value(holders[0]).shape
        shape: tuple[Any, ...] = (-1,)
        if tokens:
            if len(tokens) != 2 or not same_sizes(value(logits).shape[:-1], tokens):
                words = "the tokens have other dimensions than in the logits"
                raise Refusal(Code.ROUTER, words, location(holders[0]))
            length = tokens[1]
            if not isinstance(length, int):
                length = self.graph.call_method("size", (logits, 1))
                self._finish(length, logits)
            shape = (-1, length, last)
        new = self.graph.call_method("reshape", (node, shape))
        self._finish(new, holders[0])
        return new


def _arguments(
    router: Router, logits: fx.Node, operands: list[fx.Node]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Of ``topk_routing``; what is the default is not said, for each argument costs time in the dispatcher."""
    facts: dict[str, Any] = {
        "score": router.score,
        "weight": router.weight,
        "epsilon": router.epsilon,
        "minimum": router.minimum,
        "scale": router.scale,
        "score_dtype": router.score_dtype,
    }
    if router.groups is not None:
        groups = router.groups
        facts |= {
            "groups": groups.count,
            "kept_groups": groups.kept,
            "group_score": groups.score,
            "fill": groups.fill,
            "fill_weights": groups.fill_weights,
        }
    defaults = {**_ROUTING_DEFAULTS, "score_dtype": torch.float32}
    facts = {name: fact for name, fact in facts.items() if fact != defaults[name]}
    if router.bias:
        facts["bias"] = operands[1]
    return (logits, router.k, router.renormalise, router.weights_dtype), facts
