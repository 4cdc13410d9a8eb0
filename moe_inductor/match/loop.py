"""Iterations of an expert loop, put together into one block, or refused with the requirement that failed.

One iteration is the pattern; what makes E iterations a mixture of experts is checked here: one chain of sums that
starts from zeros and is read by nobody else, the same x and the same router for all, every expert once, and every
expert with its own weights.  Experts that give their input as it is have none and come last.  The proof compares all of
it again; this file exists to say *which* requirement fails.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import fx

from moe_inductor._compat import Match, bound_nodes
from moe_inductor.match.activation import Gated
from moe_inductor.match.bind import Weight
from moe_inductor.match.diagnose import weighed_by_column
from moe_inductor.reasons import Code, Refusal
from moe_inductor.region.canonical import Folded
from moe_inductor.region.nodes import location, node_arg, unviewed, value

aten = torch.ops.aten


class MLP(NamedTuple):
    """The unit between the projections, with what the first of these bound, and what the second bound."""

    unit: Gated
    second: dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Iteration:
    """One visit: what the upper piece bound, the unit with what its projections bound, and the second projection.

    mlp: None for an expert that gives what it reads.  bound: x, topk_ids and topk_weights.
    """

    match: Match
    upper: dict[str, Any]
    mlp: MLP | None
    bound: dict[str, fx.Node]

    @property
    def output(self) -> fx.Node:
        return self.match.output_node()


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """A whole block.  Weights are in the order of expert ids; visited is the order of a loop's sum.

    identities: how many of the visited experts, the last by id, give their input as it is.
    traced: the experts of the passes that are in the graph.  The others are folded into these (``region/fold.py``), or
    there is one pass for all, whose expert is the node of a symbolic index (``capture/rolled.py``).
    """

    output: fx.Node
    x: fx.Node
    gate_up: Weight
    up: Weight | None
    down: Weight
    visited: tuple[Any, ...] | None
    traced: tuple[int | fx.Node, ...] = ()
    identities: int = 0


def group_iterations(
    iterations: list[Iteration], folded: Folded | None = None, keeps_tokens: bool = False
) -> Group:
    """Raises Refusal with the code of the first requirement that does not hold.

    keeps_tokens: the chain starts from x.
    """
    chain = _chain(iterations, keeps_tokens)
    first = chain[0]
    traced = _expert_ids(chain)
    for it in chain:
        if it.bound != first.bound:
            raise Refusal(Code.INPUTS_DIFFER, _difference(chain, traced), location(it.output))
    last = location(chain[-1].output)
    is_rolled = isinstance(traced[0], fx.Node)
    if folded is not None and not is_rolled:
        folded = folded.of(traced)
        if folded.traced != traced:
            raise Refusal(Code.SPELLING, "", location(first.output))
    visited = folded.ids if folded is not None else traced
    experts = [(e, it, it.mlp) for e, it in zip(traced, chain, strict=True) if it.mlp is not None]
    if len(set(visited)) < len(visited):
        for e, it, mlp in experts:  # that it is another one, with this one's scores, says more
            _weight({e: it}, [mlp.second], folded)
        twice = next(e for e in visited if visited.count(e) > 1)
        raise Refusal(Code.EXPERT_TWICE, f"expert {twice} is visited twice", last)
    unit = experts[0][2].unit
    for _, it, mlp in experts:
        if not mlp.unit.same_function(unit):
            raise Refusal(
                Code.ACTIVATION,
                f"one expert computes {unit.activation}, another {mlp.unit.activation}",
                location(it.output),
            )
    by_id = {e: it for e, it, _ in experts}
    gate_up, *up = [
        _weight(by_id, [mlp.unit.projections[i] for *_, mlp in experts], folded)
        for i in range(len(unit.projections))
    ]
    down = _weight(by_id, [mlp.second for *_, mlp in experts], folded)
    num_experts = value(down.nodes[0]).shape[0] if down.is_stacked else len(down.nodes)
    computing = set(folded.of(by_id).ids) if folded is not None and not is_rolled else set(by_id)
    identities = len(visited) - len(computing) if len(chain) > len(experts) else 0
    if identities:  # a stack may have rows for these as well
        num_experts = len(computing)
    if is_rolled:  # how many it stands for is an assumption, and proved as such
        visited = tuple(range(num_experts))
    known = set(visited) if not identities else computing
    missing = sorted(set(range(num_experts)) - known)
    if missing or sorted(visited) != list(range(len(visited))):
        raise Refusal(Code.EXPERT_MISSING, f"experts {missing[:4]} are never visited", last)
    return Group(
        chain[-1].output,
        first.bound["x"],
        gate_up,
        up[0] if up else None,
        down,
        visited,
        traced,
        identities,
    )


def _chain(iterations: list[Iteration], keeps_tokens: bool) -> list[Iteration]:
    """In the order of the sum: each adds to the result of the one before, the first to zeros, or puts rows into x."""
    after = {it.upper["acc"]: it for it in iterations}
    outputs = {it.output for it in iterations}
    starts = [it for it in iterations if it.upper["acc"] not in outputs]
    if len(starts) != 1 or len(after) != len(iterations):
        where = location((starts or iterations)[0].output)
        raise Refusal(Code.ACCUMULATOR, "the experts are not added up one after the other", where)
    start = starts[0].upper["acc"]
    if keeps_tokens:
        if unviewed(start) is not unviewed(starts[0].bound["x"]):
            words = "a token that no expert takes (capacity) keeps what is not the experts' input"
            raise Refusal(Code.ACCUMULATOR, words, location(starts[0].output))
    elif start.target is not aten.full.default or start.args[1] != 0:
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


def _difference(chain: list[Iteration], traced: tuple[Any, ...]) -> str:
    """Which of their inputs differ, in the words of the model; "" where that is what the code says."""
    names = {n for it in chain for n in it.bound if it.bound[n] is not chain[0].bound.get(n)}
    if "x" in names:
        return ""
    if "topk_ids" in names:
        return "experts find their tokens by different ids"
    columns = [_column(it.bound["topk_weights"]) for it in chain]
    if None in columns:
        return "experts take their routing weights from different tensors"
    for e, column in zip(traced, columns, strict=True):
        if column != e:
            return weighed_by_column(e, column)
    return weighed_by_column(traced[0], traced[0])


def _column(weights: fx.Node) -> Any:
    """e of ``p [T, E][:, e]``."""
    column = unviewed(weights)
    return column.args[2] if column.target is aten.select.int and column.args[1] == 1 else None


def _expert_ids(chain: list[Iteration]) -> tuple[Any, ...]:
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


def _only_select(nodes: Any) -> int | fx.Node:
    for node in nodes:
        position = {aten.select.int: 2, aten.eq.Scalar: 1}.get(node.target)
        if position is not None and isinstance(node.args[position], (int, fx.Node)):
            return node.args[position]
    return 0


def _weight(
    experts: dict[Any, Iteration],
    projections: list[dict[str, Any]],
    folded: Folded | None,
) -> Weight:
    """One projection of all experts, those that are folded included.  experts: by id."""
    first = next(iter(experts.values()))
    kinds = {(p["is_transposed"], "bias" in p) for p in projections}
    if len(kinds) > 1:
        raise Refusal(Code.EXPERT_SHAPES, "", location(first.output))
    (is_transposed, has_bias) = kinds.pop()
    nodes, is_stacked = _tensors(experts, [p["weight"] for p in projections], folded)
    bias: tuple[fx.Node, ...] = ()
    if has_bias:
        bias, bias_is_stacked = _tensors(experts, [p["bias"] for p in projections], folded)
        if bias_is_stacked != is_stacked:
            raise Refusal(
                Code.LAYOUT, "stacked and separate weights are mixed", location(first.output)
            )
    return Weight(nodes, is_stacked, is_transposed, bias)


def _tensors(
    experts: dict[Any, Iteration],
    sources: list[fx.Node],
    folded: Folded | None,
) -> tuple[tuple[fx.Node, ...], bool]:
    """Rows of one stack selected by the expert's own id (True), or E tensors (False)."""
    where = location(next(iter(experts.values())).output)
    selected = [s.target is aten.select.int and s.args[1] == 0 for s in sources]
    if all(selected):
        stacks = {node_arg(s, 0) for s in sources}
        if len(stacks) > 1:
            raise Refusal(Code.LAYOUT, "experts come from several stacks", where)
        for (e, it), source in zip(experts.items(), sources, strict=True):
            if source.args[2] != e:
                raise Refusal(
                    Code.EXPERT_WEIGHTS,
                    f"weights of expert {source.args[2]} are used for expert {e}",
                    location(it.output),
                )
        return (stacks.pop(),), True
    if any(selected):
        raise Refusal(Code.LAYOUT, "stacked and separate weights are mixed", where)
    shapes = {(tuple(value(s).shape), value(s).dtype) for s in sources}
    if len(shapes) > 1:
        raise Refusal(Code.EXPERT_SHAPES, "", where)
    by_id = dict(zip(experts, sources, strict=True))
    if folded is not None:
        by_id = {}
        for source in sources:
            if source not in folded.weights:
                raise Refusal(Code.LAYOUT, "", location(source))
            by_id |= folded.weights[source]
    return tuple(by_id[e] for e in sorted(by_id)), False
