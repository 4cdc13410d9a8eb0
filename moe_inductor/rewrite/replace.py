"""A proved block, rewritten in the Dynamo graph into calls of our ops.

Nothing of the region is touched that somebody else still reads: the new call takes over the readers of the block's
output, and what nobody needs any more is erased.  Router logits, ids or masks that an auxiliary loss reads simply
stay as the model wrote them.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import fx

from moe_inductor import _compat
from moe_inductor.description import Experts, Router
from moe_inductor.match.bind import Bound, BoundRouter, Weight
from moe_inductor.match.pieces import unviewed
from moe_inductor.ops import cpu
from moe_inductor.ops.check import Routing
from moe_inductor.reasons import Code, Refusal
from moe_inductor.region.canonical import Canonical
from moe_inductor.region.nodes import (
    is_floating,
    is_tensor,
    location,
    mutated,
    name_of,
    same_sizes,
    storages,
    value,
)
from moe_inductor.rewrite.identities import add_identities, is_summed, keep_tokens
from moe_inductor.rewrite.liveness import erase_unneeded, needed
from moe_inductor.rewrite.remake import Remake

_EXPERTS = torch.ops.moe_inductor.fused_experts.default
_ROUTING = torch.ops.moe_inductor.topk_routing.default
_compat.call_directly(
    _EXPERTS,
    {"cpu": "moe_inductor.ops.cpu.fused_experts", "cuda": "moe_inductor.ops.cuda.fused_experts"},
)
_compat.call_directly(_ROUTING, {"cuda": "moe_inductor.ops.cuda.topk_routing"})
# Nothing is gained on the CPU by twenty calls of ATen in one op, and at one token they are a tenth of the block.
_compat.decompose(_ROUTING, cpu.topk_routing, "cpu")
# What may stand between a router and fused experts: each element stays what and where it is.
_ELEMENT_BY_ELEMENT = frozenset({"reshape", "view", "flatten", "contiguous", "to", "type", "float"})
_ROUTING_DEFAULTS = Routing._field_defaults


@dataclasses.dataclass(eq=False)
class Rewriter:
    """Rewrites one region.  All checks of a rewrite come before its first change."""

    canonical: Canonical
    batch_invariant: bool = False

    def __post_init__(self) -> None:
        region = self.canonical.region
        self.graph = region.graph
        self.order = {n: i for i, n in enumerate(self.graph.nodes)}
        self.writes: dict[int, list[fx.Node]] = {}
        for node in region.nodes:
            for target in mutated(node):
                for storage in storages(target):
                    self.writes.setdefault(storage, []).append(node)

    # -- who holds a value, and from when on -----------------------------------------------------------------------
    def holders(self, node: fx.Node) -> list[fx.Node]:
        """Dynamo nodes that are worth ``node`` once the region has run, earliest first."""
        alive = [h for h in self.canonical.dynamo_of.get(node, ()) if h in self.order]
        return sorted(alive, key=self.order.__getitem__)

    def ready(self, holder: fx.Node) -> int:
        """Position from which ``holder`` has its final value: where it is made, or last written to."""
        written = [self.order[w] for s in storages(holder) for w in self.writes.get(s, ())]
        return max([self.order[holder], *written])

    def _readable(self, node: fx.Node, position: int) -> fx.Node:
        """A Dynamo node that has the value of ``node`` at ``position``."""
        found = self._holder(node, position)
        if found is None:
            raise Refusal(
                Code.MUTATION,
                "an operand of the block exists only in a tensor that is written to again",
                self.canonical.source_of(node),
            )
        return found

    def _holder(self, node: fx.Node, position: int) -> fx.Node | None:
        return next((h for h in self.holders(node) if self.ready(h) <= position), None)

    # -- the experts -------------------------------------------------------------------------------------------------
    def fuse_experts(self, bound: Bound) -> fx.Node:
        """Replace the block's output by one call of ``fused_experts``.  Raises Refusal(ESCAPES, MUTATION, LAYOUT)."""
        outputs, base = self._outputs(bound.output)
        onto = None if base is None else self._written_to(base, outputs)
        position = min(self.ready(h) for h in outputs)
        (after,) = (n for n in self.graph.nodes if self.order[n] == position)
        remake = Remake(self.canonical, lambda node: self._holder(node, position))
        for operand in bound.inputs():
            remake.plan(operand)
        if base is not None and onto is None:
            remake.plan(base)
        made = value(outputs[0])
        if not made.is_contiguous():
            raise Refusal(Code.LAYOUT, "the block's output is not contiguous", location(outputs[0]))

        replaced = self._takes_over(outputs, position, onto)
        keep = needed(self.canonical.region, replaced)
        self._keep_operands(keep, remake.read)
        if onto is not None:
            self._keep_as_made(keep, onto)
        self._no_escape(bound, keep, outputs)

        moe = bound.moe
        dtype = moe.experts.compute_dtype

        def each(of: Callable[[Weight], list[fx.Node]]) -> list[list[fx.Node]]:
            return [of(w) if w is not None else [] for w in bound.projections]

        with self.graph.inserting_after(after):
            anchor = self.graph.call_function(_EXPERTS, ())
        with self.graph.inserting_before(anchor):
            inputs = {n: remake.emit(self.graph, n, self._finish) for n in bound.inputs()}
            held = None
            if base is not None and onto is None:
                held = remake.emit(self.graph, base, self._finish)
            x, ids = inputs[bound.x], self._matrix(inputs[bound.topk_ids], moe.top_k)
            if bound.topk_weights is not None:
                weights = self._matrix(inputs[bound.topk_weights], moe.top_k)
            else:  # every chosen expert counts once
                weights = self.graph.call_function(torch.ones_like, (ids,), {"dtype": dtype})
                self._finish(weights, ids)
            x = self._matrix(x, moe.experts.hidden_size)
            anchor.args = (
                self._cast(x, dtype),
                ids,
                weights,
                *each(lambda w: self._weights(w, inputs, moe.experts)),
                moe.experts.activation,
                moe.combine.out_dtype,
                *each(lambda w: self._biases(w, inputs, moe.experts)),
                moe.experts.layout == "interleaved",
                moe.combine.weight_on == "input",
                self.batch_invariant,
            )
        self._finish(anchor, outputs[0])
        # Where the model holds [T, H] it is that, though torch may know a size as a quotient of counts only.
        result = anchor
        if moe.experts.identities:
            result = add_identities(anchor, x, ids, weights, moe.experts, self._finish)
        if moe.combine.keeps_tokens:
            result = keep_tokens(anchor, x, ids, moe.experts, self._finish)
        if not self.holders(bound.output):
            with self.graph.inserting_after(result):
                result = self._as_held(result, outputs[0])
        if onto is not None:  # in place: whatever its other names are, they see the sum
            with self.graph.inserting_after(result):
                result = self.graph.call_method("add_", (onto, result))
            self._finish(result, outputs[0])
        elif held is not None:
            with self.graph.inserting_after(result):
                shaped = self._as_held(held, outputs[0])
            with self.graph.inserting_after(result if shaped is held else shaped):
                result = self.graph.call_function(torch.add, (shaped, result))
            self._finish(result, outputs[0])
        self._redirect(outputs, result, replaced)
        erase_unneeded(self.canonical.region, keep)
        return anchor

    def _outputs(self, output: fx.Node) -> tuple[list[fx.Node], fx.Node | None]:
        """The holders of the block's output [T, H], or, where the model has none, of the first view of it, or of the
        sum of it and something that is given then: what the experts' rows were added to one by one."""
        held = self._held_or_viewed(output)
        if not held:
            for total in output.users:
                base = _added(total, output)
                if base is not None and (found := self._held_or_viewed(total)):
                    return found[0], base
            raise Refusal(Code.MUTATION, "the block's output is never held by the model", "")
        if not self.holders(output):
            held.sort(key=lambda holders: min(map(self.ready, holders)))
            if self._like(held[0][0], value(output)) is None:
                raise Refusal(Code.LAYOUT, "the shape of the block's output is not known", "")
        return held[0], None

    def _held_or_viewed(self, node: fx.Node) -> list[list[fx.Node]]:
        """The holders of ``node``, and those of each view of it."""
        views = [n for n in node.users if n.target is torch.ops.aten.view.default]
        return [holders for n in (node, *views) if (holders := self.holders(n))]

    def _written_to(self, base: fx.Node, holders: list[fx.Node]) -> fx.Node | None:
        """The one of the ``holders`` of the sum that was ``base`` when it was made: it is added to in place."""
        made = [h for n in (base, unviewed(base)) for h in self.canonical.made_as.get(n, ())]
        return next((h for h in holders if h in made), None)

    def _keep_as_made(self, keep: set[fx.Node], tensor: fx.Node) -> None:
        """What is written to ``tensor`` before it is what it was made as stays, and all that comes after goes.

        Raises Refusal(ESCAPES) where that is read before the sum is complete.
        """
        writes = {w for s in storages(tensor) for w in self.writes.get(s, ())}
        before = {w for w in writes if self.order[w] <= self.order[tensor]}
        self._keep_operands(keep, (tensor, *before), unwritten=storages(tensor))
        for node in sorted(writes - before, key=self.order.__getitem__):
            if node in keep:
                words = "what the experts are added to is read before all of them are"
                raise Refusal(Code.ESCAPES, words, location(node))

    def _like(self, holder: fx.Node, made: torch.Tensor) -> list[int] | fx.Node | None:
        """What tells the shape of ``holder``: sizes, of which one may be -1, or a tensor that comes before it."""
        shape = value(holder).shape
        sizes = [size if isinstance(size, int) else -1 for size in shape]
        if sizes.count(-1) <= 1 or same_sizes(shape, made.shape):
            return sizes
        inputs = self.canonical.region.inputs
        return next((n for n in inputs if is_tensor(n) and same_sizes(value(n).shape, shape)), None)

    def _as_held(self, result: fx.Node, holder: fx.Node) -> fx.Node:
        """``result [T, H]`` in the shape of ``holder``."""
        if same_sizes(value(result).shape, value(holder).shape):
            return result
        like = self._like(holder, value(result))
        if isinstance(like, fx.Node):
            new = self.graph.call_method("view_as", (result, like))
        else:
            new = self.graph.call_method("reshape", (result, like))
        self._finish(new, holder)
        return new

    def _takes_over(
        self, holders: list[fx.Node], position: int, onto: fx.Node | None = None
    ) -> Any:
        """onto: a tensor that is written to in place, so that its other names need no other readers."""
        held, written = set(holders), storages(onto) if onto is not None else set()
        return lambda reader, node: (
            (node in held or bool(storages(node) & written))
            and self.order.get(reader, -1) > max(position, self.ready(node))
        )

    def _redirect(self, holders: list[fx.Node], new: fx.Node, replaced: Any) -> None:
        for holder in holders:
            for reader in list(holder.users):
                if reader is not new and replaced(reader, holder):
                    reader.replace_input_with(holder, new)

    def _keep_operands(
        self, keep: set[fx.Node], operands: Any, unwritten: Collection[int] = ()
    ) -> None:
        """The new call reads members too: they, and what they were made of and written with, stay.

        unwritten: storages of which only the writes among the ``operands`` are wanted.
        """
        members = set(self.canonical.region.nodes)
        todo = [n for n in operands if n in members]
        while todo:
            node = todo.pop()
            if node in keep:
                continue
            keep.add(node)
            todo += [a for a in node.all_input_nodes if a in members]
            written = storages(node).difference(unwritten)
            todo += [w for s in written for w in self.writes.get(s, ())]

    def _no_escape(self, bound: Bound, keep: set[fx.Node], outputs: list[fx.Node]) -> None:
        """Nothing that an expert computes may be read outside: it would have to be computed twice."""
        weights = {n for w in bound.projections if w for n in (*w.nodes, *w.bias)}
        boundary = {bound.x, bound.topk_ids, bound.topk_weights}
        inside: dict[fx.Node, bool] = {}

        def depends(node: fx.Node) -> bool:
            return inside.get(node, False) or node in weights

        for node in self.canonical.graph.nodes:
            inside[node] = (
                node.op == "call_function"
                and node not in boundary
                and node not in weights
                and any(depends(a) for a in node.all_input_nodes)
            )
            if node is bound.output:
                break  # what follows is computed from the output, fused or not
        views = {
            torch.ops.aten.permute.default,
            torch.ops.aten.view.default,
            torch.ops.aten.select.int,
        }
        for node, computed in inside.items():
            if not computed or node is bound.output or node.target in views:
                continue
            for holder in self.canonical.dynamo_of.get(node, ()):
                if holder in keep and is_floating(holder) and holder not in outputs:
                    raise Refusal(
                        Code.ESCAPES,
                        f"`{holder.name}`, computed inside the experts, is also read outside",
                        location(holder),
                    )

    def _matrix(self, node: fx.Node, width: int) -> fx.Node:
        """``node`` as ``[-1, width]``."""
        found = value(node)
        if found.dim() == 2 and isinstance(found.shape[1], int) and found.shape[1] == width:
            return node
        new = self.graph.call_method("reshape", (node, (-1, width)))
        self._finish(new, node)
        return new

    def _all(
        self, nodes: Sequence[fx.Node], inputs: dict[fx.Node, fx.Node], of: Weight, experts: Experts
    ) -> list[fx.Node]:
        """The operands as the op takes them, and no rows for experts that give their input as it is."""
        made = []
        for stack in (inputs[n] for n in nodes):
            node = stack
            if of.is_stacked and value(stack).shape[0] != experts.num_experts:
                node = self.graph.call_method("narrow", (stack, 0, 0, experts.num_experts))
                self._finish(node, stack)
            made.append(self._cast(node, experts.compute_dtype))
        return made

    def _biases(
        self, weight: Weight, inputs: dict[fx.Node, fx.Node], experts: Experts
    ) -> list[fx.Node]:
        return self._all(weight.bias, inputs, weight, experts)

    def _weights(
        self, weight: Weight, inputs: dict[fx.Node, fx.Node], experts: Experts
    ) -> list[fx.Node]:
        """Logical ``[.., out, in]``; a transposed storage is passed as a view, never copied."""
        nodes = self._all(weight.nodes, inputs, weight, experts)
        if not weight.is_transposed:
            return nodes
        views = [self.graph.call_method("transpose", (n, -2, -1)) for n in nodes]
        for view, node in zip(views, nodes, strict=True):
            self._finish(view, node)
        return views

    def _cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """What autocast, or the model, casts an operand of a GEMM to."""
        if value(node).dtype == dtype:
            return node
        new = self.graph.call_method("to", (node, dtype))
        self._finish(new, node)
        return new

    # -- the router --------------------------------------------------------------------------------------------------
    def fuse_router(self, bound: Bound, router: BoundRouter) -> fx.Node:
        """Replace topk_weights and topk_ids by one call of ``topk_routing``.  Raises Refusal(ROUTER, MUTATION)."""
        assert bound.topk_weights is not None  # such a router is not proposed
        held = {
            i: self.holders(node) or self.holders(unviewed(node))  # [B, S, k] is as good
            for i, node in enumerate((bound.topk_weights, bound.topk_ids))
        }
        start = min(self.order[h] for hs in held.values() for h in hs)
        operands = [self._readable(n, start - 1) for n in router.inputs()]
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
            call = self.graph.call_function(_ROUTING, *_arguments(router.router, matrix, operands))
            self._finish(call, operands[0])
            parts = [self.graph.call_function(operator.getitem, (call, i)) for i in range(2)]
            for i, part in enumerate(parts):
                self._finish(part, held[i][0] if held[i] else call)
            outputs = [self._shaped(part, held[i], operands[0]) for i, part in enumerate(parts)]
        for i, new in enumerate(outputs):
            self._redirect(held[i], new, rules[i])
        erase_unneeded(self.canonical.region, keep)
        return call

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
            if reader in gone or reader.target is _EXPERTS or is_summed(reader):
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

    def _finish(self, node: fx.Node, like: fx.Node) -> None:
        """Value and source line of a new node, as Dynamo would have recorded them."""
        args, kwargs = fx.map_arg((node.args, node.kwargs), value)
        with self.canonical.fake_mode, torch.no_grad():
            if node.op == "call_method":
                made = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                made = node.target(*args, **kwargs)  # type: ignore[operator]
        node.meta["example_value"] = made
        if "stack_trace" in like.meta:
            node.meta["stack_trace"] = like.meta["stack_trace"]


def _added(total: fx.Node, output: fx.Node) -> fx.Node | None:
    """b where ``total`` is b + output, and nothing is broadcast or promoted."""
    if total.target is not torch.ops.aten.add.Tensor or total.kwargs or len(total.args) != 2:
        return None
    (base,) = [a for a in total.args if a is not output] or [None]
    if not isinstance(base, fx.Node) or not is_tensor(base):
        return None
    alike = value(base).dtype == value(output).dtype == value(total).dtype
    return base if alike and same_sizes(value(base).shape, value(output).shape) else None


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
