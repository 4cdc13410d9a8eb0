"""The experts of a proved block, rewritten into one call of ``fused_experts``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import fx

from moe_inductor.description import Experts
from moe_inductor.match.bind import Bound, Weight
from moe_inductor.reasons import Code, Refusal
from moe_inductor.region.nodes import (
    is_floating,
    is_tensor,
    location,
    same_sizes,
    storages,
    unviewed,
    value,
)
from moe_inductor.rewrite.calls import EXPERTS
from moe_inductor.rewrite.identities import add_identities, keep_tokens
from moe_inductor.rewrite.liveness import erase_unneeded, needed
from moe_inductor.rewrite.remake import Remake
from moe_inductor.rewrite.replace import Rewriter


@dataclasses.dataclass(eq=False)
class ExpertsRewriter(Rewriter):
    """batch_invariant: as the option of that name."""

    batch_invariant: bool = False

    def fuse(self, bound: Bound) -> fx.Node:
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
            anchor = self.graph.call_function(EXPERTS, ())
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
        self._adopt(remake.made)
        return anchor

    def _adopt(self, made: dict[fx.Node, fx.Node]) -> None:
        """What was made for the call is of the model's router from now on, which may be replaced as a whole."""
        region = self.canonical.region
        for node, new in made.items():
            self.canonical.dynamo_of.setdefault(node, []).append(new)
            self.canonical.grad_modes[new] = self.canonical.grad_enabled
        members = {*region.nodes, *made.values()}
        region.nodes = [n for n in region.graph.nodes if n in members]

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


def _added(total: fx.Node, output: fx.Node) -> fx.Node | None:
    """b where ``total`` is b + output, and nothing is broadcast or promoted."""
    if total.target is not torch.ops.aten.add.Tensor or total.kwargs or len(total.args) != 2:
        return None
    (base,) = [a for a in total.args if a is not output] or [None]
    if not isinstance(base, fx.Node) or not is_tensor(base):
        return None
    alike = value(base).dtype == value(output).dtype == value(total).dtype
    return base if alike and same_sizes(value(base).shape, value(output).shape) else None
