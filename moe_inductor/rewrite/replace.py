"""A proved block, rewritten in the Dynamo graph into calls of our ops: what experts and router have in common.

Nothing of the region is touched that somebody else still reads: the new call takes over the readers of the block's
output, and what nobody needs any more is erased.  Router logits, ids or masks that an auxiliary loss reads simply
stay as the model wrote them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from moe_inductor.reasons import Code, Refusal
from moe_inductor.region.canonical import Canonical
from moe_inductor.region.nodes import mutated, storages, value


@dataclasses.dataclass(eq=False)
class Rewriter:
    """Rewrites one region.  All checks of a rewrite come before its first change."""

    canonical: Canonical

    def __post_init__(self) -> None:
        region = self.canonical.region
        self.graph = region.graph
        self.order = {n: i for i, n in enumerate(self.graph.nodes)}
        self.writes: dict[int, list[fx.Node]] = {}
        for node in region.nodes:
            for target in mutated(node):
                for storage in storages(target):
                    self.writes.setdefault(storage, []).append(node)
        # Where others first write to a tensor, once the region has begun.
        self.foreign: dict[int, int] = {}
        members, begun = set(region.nodes), False
        for node, position in self.order.items():
            begun |= node in members
            for target in mutated(node) if begun and node not in members else ():
                for storage in storages(target):
                    self.foreign.setdefault(storage, position)

    def unchanged(self, holder: fx.Node, position: int) -> bool:
        """Is ``holder`` still what the region read when all up to ``position`` has run?"""
        return all(self.foreign.get(s, position + 1) > position for s in storages(holder))

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
        return next(
            (
                h
                for h in self.holders(node)
                if self.ready(h) <= position and self.unchanged(h, position)
            ),
            None,
        )

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

    def _matrix(self, node: fx.Node, width: int) -> fx.Node:
        """``node`` as ``[-1, width]``."""
        found = value(node)
        if found.dim() == 2 and isinstance(found.shape[1], int) and found.shape[1] == width:
            return node
        new = self.graph.call_method("reshape", (node, (-1, width)))
        self._finish(new, node)
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
