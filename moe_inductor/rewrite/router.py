"""The router in front of fused experts, rewritten into one call of ``topk_routing``."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from moe_inductor.description import Router
from moe_inductor.match.bind import Bound, BoundRouter
from moe_inductor.ops.check import Routing
from moe_inductor.reasons import Code, Refusal
from moe_inductor.region.nodes import is_floating, location, name_of, same_sizes, unviewed, value
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
        held = [self._held(node) for node in (bound.topk_weights, bound.topk_ids)]
        start = min(self.order[group[0]] for groups in held for group in groups)
        inputs = [n if self.holders(n) else unviewed(n) for n in router.inputs()]
        operands = [self._readable(n, start - 1) for n in inputs]
        logits = operands[0]
        for groups in held:
            groups[:] = [g for g in groups if _can_be_shaped(g[0], logits)] or groups[:1]
        holders = [h for groups in held for group in groups for h in group]
        replaced = self._takes_over(holders, max(map(self.order.__getitem__, operands)))
        keep = needed(self.canonical.region, replaced)
        self._keep_operands(keep, operands)
        root = self.canonical.region.root
        if root in keep:
            raise Refusal(Code.ROUTER, "the top-k is also read in another form", location(root))
        if router.spelling.unordered(router.facts):
            self._order_is_not_read(holders, replaced, keep)
        if not all(_can_be_shaped(holder, logits) for holder in holders):
            words = "the tokens have other dimensions than in the logits"
            raise Refusal(Code.ROUTER, words, location(holders[0]))
        with self.graph.inserting_before(self._router_starts(operands, start)):
            matrix = self._matrix(logits, bound.moe.experts.num_choices)
            call = self.graph.call_function(ROUTING, *_arguments(router.router, matrix, operands))
            self._finish(call, logits)
            made: list[tuple[list[fx.Node], fx.Node]] = []
            for i, groups in enumerate(held):
                part = self.graph.call_function(operator.getitem, (call, i))
                self._finish(part, groups[0][0] if groups else call)
                made += ((group, self._shaped(part, group[0], logits)) for group in groups)
        for group, new in made:
            self._redirect(group, new, replaced)
            if not new.users and name_of(new) == "reshape":  # its readers were the model's router
                self.graph.erase_node(new)
        erase_unneeded(self.canonical.region, keep)
        return call

    def _held(self, node: fx.Node) -> list[list[fx.Node]]:
        """Who holds ``node``, and who each view of it: [B, S, k], or [T] for k = 1, are as good."""
        base = unviewed(node)
        views = [n for n in base.users if n.target is torch.ops.aten.view.default]
        return [held for n in dict.fromkeys((node, base, *views)) if (held := self.holders(n))]

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

    def _order_is_not_read(self, holders: list[fx.Node], replaced: Any, keep: set[fx.Node]) -> None:
        """A top-k that need not sort leaves the order of the k experts open, and ours is another one.  The sum over
        them does not have any: the fused experts, through views and casts, may be the only ones who read it."""
        gone = set(self.canonical.region.nodes) - keep
        todo = [r for h in holders for r in h.users if replaced(r, h)]
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

    def _shaped(self, node: fx.Node, holder: fx.Node, logits: fx.Node) -> fx.Node:
        """``node`` [T, k] as the model holds it."""
        if same_sizes(value(holder).shape, value(node).shape):
            return node
        sizes: list[Any] = _sizes(holder)
        if sizes.count(-1) > 1:
            sizes[1] = self.graph.call_method("size", (logits, 1))
            self._finish(sizes[1], logits)
        new = self.graph.call_method("reshape", (node, tuple(sizes)))
        self._finish(new, holder)
        return new


def _sizes(holder: fx.Node) -> list[int]:
    return [size if isinstance(size, int) else -1 for size in value(holder).shape]


def _can_be_shaped(holder: fx.Node, logits: fx.Node) -> bool:
    """At most one size is not known, or two of which the logits [B, S, E] have the second."""
    shape, unknown = value(holder).shape, _sizes(holder).count(-1)
    return unknown <= 1 or (
        unknown == 2 and len(shape) == 3 and same_sizes(shape[:2], value(logits).shape[:-1])
    )


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
