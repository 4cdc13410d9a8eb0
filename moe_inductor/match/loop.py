"""Iterations of an expert loop, put together into one block, or refused with the requirement that failed.

One iteration is the pattern; what makes E iterations a mixture of experts is checked here: one chain of sums that
starts from zeros and is read by nobody else, the same x and the same router for all, every expert once, and every
expert with its own weights.  The proof compares all of it again; this file exists to say *which* requirement fails.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from moe_inductor._compat import Match, bound_nodes
from moe_inductor.match.activation import GatedUnit
from moe_inductor.match.bind import Weight
from moe_inductor.reasons import Code, Refusal
from moe_inductor.region.canonical import Folded
from moe_inductor.region.nodes import location, node_arg, value

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True, eq=False)
class Iteration:
    """One visit: what the upper piece bound, the activation, and what the lower piece bound per first GEMM."""

    match: Match
    upper: dict[str, Any]
    unit: GatedUnit
    lower: list[dict[str, Any]]

    @property
    def output(self) -> fx.Node:
        return self.match.output_node()


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """A whole block.  Weights are in the order of expert ids; visited is the order of a loop's sum.

    traced: how many of the visited experts are in the graph; the others are folded into these.
    """

    output: fx.Node
    x: fx.Node
    gate_up: Weight
    up: Weight | None
    down: Weight
    visited: tuple[int, ...] | None
    traced: int | None = None


def group_iterations(
    iterations: list[Iteration], *, is_transposed: bool, folded: Folded | None = None
) -> Group:
    """Raises Refusal with the code of the first requirement that does not hold."""
    chain = _chain(iterations)
    first = chain[0]
    for it in chain:
        same = (
            it.upper["topk_ids"] is first.upper["topk_ids"]
            and it.upper["topk_weights"] is first.upper["topk_weights"]
            and all(low["x"] is first.lower[0]["x"] for low in it.lower)
            and it.unit.activation == first.unit.activation
            and it.unit.is_concatenated == first.unit.is_concatenated
        )
        if not same:
            raise Refusal(Code.INPUTS_DIFFER, "", location(it.output))
    traced = _expert_ids(chain)
    visited = traced
    if folded is not None:
        visited = folded.ids
        if visited[: len(traced)] != traced:
            raise Refusal(Code.SPELLING, "", location(chain[0].output))

    def weight(sources: list[fx.Node]) -> Weight:
        found = _weight(chain, traced, sources, is_transposed)
        if folded is None or found.is_stacked:
            return found
        every = folded.weights.get(sources[0])
        if every is None:
            raise Refusal(Code.LAYOUT, "", location(sources[0]))
        by_id = dict(zip(visited, every, strict=True))
        return dataclasses.replace(found, nodes=tuple(by_id[e] for e in sorted(by_id)))

    gate_up = weight([it.lower[0]["gate_up"] for it in chain])
    up = None
    if not first.unit.is_concatenated:
        up = weight([it.lower[-1]["gate_up"] for it in chain])
    down = weight([it.upper["down"] for it in chain])
    num_experts = value(down.nodes[0]).shape[0] if down.is_stacked else len(down.nodes)
    last = location(chain[-1].output)
    if len(set(visited)) < len(visited):
        twice = next(e for e in visited if visited.count(e) > 1)
        raise Refusal(Code.EXPERT_TWICE, f"expert {twice} is visited twice", last)
    missing = sorted(set(range(num_experts)) - set(visited))
    if missing or sorted(visited) != list(range(len(visited))):
        raise Refusal(Code.EXPERT_MISSING, f"experts {missing[:4]} are never visited", last)
    return Group(
        chain[-1].output, first.lower[0]["x"], gate_up, up, down, visited, traced=len(traced)
    )


def _chain(iterations: list[Iteration]) -> list[Iteration]:
    """In the order of the sum: each adds to the result of the one before, the first to zeros."""
    after = {it.upper["acc"]: it for it in iterations}
    outputs = {it.output for it in iterations}
    starts = [it for it in iterations if it.upper["acc"] not in outputs]
    if len(starts) != 1 or len(after) != len(iterations):
        where = location((starts or iterations)[0].output)
        raise Refusal(Code.ACCUMULATOR, "the experts are not added up one after the other", where)
    start = starts[0].upper["acc"]
    if start.target is not aten.full.default or start.args[1] != 0:
        raise Refusal(
            Code.ACCUMULATOR,
            "the sum over experts does not start from zeros",
            location(starts[0].output),
        )
    chain = [starts[0]]
    while chain[-1].output in after:
        chain.append(after[chain[-1].output])
    if len(chain) != len(iterations):
        raise Refusal(Code.ACCUMULATOR, "", location(chain[-1].output))
    return chain


def _expert_ids(chain: list[Iteration]) -> tuple[int, ...]:
    """The id each iteration selects tokens with: the one constant in which its pattern nodes differ from the first's.

    Constants are wildcards of the pattern, so corresponding nodes of two iterations can be compared
    argument by argument.
    """
    first = bound_nodes(chain[0].match)
    position: tuple[Any, int] | None = None
    for it in chain[1:]:
        nodes = bound_nodes(it.match)
        for part, node in nodes.items():
            for i, (a, b) in enumerate(zip(node.args, first[part].args, strict=False)):
                if isinstance(a, int) and isinstance(b, int) and a != b:
                    position = position or (part, i)
    if position is None:  # a single iteration, or every one selects the same expert
        return tuple(_only_select(bound_nodes(it.match).values()) for it in chain)
    part, i = position
    return tuple(int(bound_nodes(it.match)[part].args[i]) for it in chain)  # type: ignore[arg-type]


def _only_select(nodes: Any) -> int:
    for node in nodes:
        if node.target is aten.select.int and isinstance(node.args[2], int):
            return node.args[2]
        if node.target is aten.eq.Scalar and isinstance(node.args[1], int):
            return node.args[1]
    return 0


def _weight(
    chain: list[Iteration], visited: tuple[int, ...], sources: list[fx.Node], is_transposed: bool
) -> Weight:
    """One projection of all iterations: rows of one stack selected by the expert's own id, or E tensors."""
    selected = [s.target is aten.select.int and s.args[1] == 0 for s in sources]
    if all(selected):
        stacks = {node_arg(s, 0) for s in sources}
        if len(stacks) > 1:
            raise Refusal(
                Code.LAYOUT, "experts come from several stacks", location(chain[0].output)
            )
        for e, source, it in zip(visited, sources, chain, strict=True):
            if source.args[2] != e:
                raise Refusal(
                    Code.EXPERT_WEIGHTS,
                    f"weights of expert {source.args[2]} are used for expert {e}",
                    location(it.output),
                )
        return Weight((stacks.pop(),), is_stacked=True, is_transposed=is_transposed)
    if any(selected):
        raise Refusal(
            Code.LAYOUT, "stacked and separate weights are mixed", location(chain[0].output)
        )
    shapes = {(tuple(value(s).shape), value(s).dtype) for s in sources}
    if len(shapes) > 1:
        raise Refusal(Code.EXPERT_SHAPES, "", location(chain[0].output))
    by_id = dict(zip(visited, sources, strict=True))
    return Weight(
        tuple(by_id[e] for e in sorted(by_id)), is_stacked=False, is_transposed=is_transposed
    )
