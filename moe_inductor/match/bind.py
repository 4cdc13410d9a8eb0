"""What a match has bound: the nodes behind every tensor of a block, in the region's normal form."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import fx

from moe_inductor.description import MoE
from moe_inductor.match.api import ExpertsSpelling, RouterSpelling
from moe_inductor.reasons import Code, Refusal
from moe_inductor.region.nodes import location, value


@dataclasses.dataclass(frozen=True, eq=False)
class Weight:
    """One projection: ``nodes`` is one stacked ``[E, ..]`` tensor or E tensors in the order of expert ids."""

    nodes: tuple[fx.Node, ...]
    is_stacked: bool
    is_transposed: bool


@dataclasses.dataclass(frozen=True, eq=False)
class BoundRouter:
    """A proposed router: ``topk_weights, topk_ids = topk_routing(logits)``."""

    spelling: RouterSpelling
    facts: dict[str, Any]
    logits: fx.Node


@dataclasses.dataclass(frozen=True, eq=False)
class Bound:
    """A proposed block.  Nothing here is proved yet.

    output [T, H]; x [.., H], topk_ids and topk_weights with T*k elements, each up to a reshape.
    visited: expert ids in the order a loop adds them up; range(E) for the other spellings.
    traced: how many of these the graph holds; the others are the same code (``region/fold.py``).
    """

    spelling: ExpertsSpelling
    facts: dict[str, Any]
    moe: MoE
    output: fx.Node
    x: fx.Node
    topk_ids: fx.Node
    topk_weights: fx.Node
    gate_up: Weight
    up: Weight | None
    down: Weight
    visited: tuple[int, ...]
    traced: int
    router: BoundRouter | None = None

    def inputs(self) -> list[fx.Node]:
        """The tensors a fused block reads, in the order that ``prove.reference_of`` takes them."""
        weights = [*self.gate_up.nodes, *(self.up.nodes if self.up else ()), *self.down.nodes]
        return [self.x, self.topk_ids, self.topk_weights, *weights]


def check_experts(moe: MoE, gate_up: Weight, up: Weight | None, down: Weight) -> None:
    """All projections have the shapes that one MLP needs.  Raises Refusal(EXPERT_SHAPES)."""
    experts = moe.experts
    E, H, I = experts.num_experts, experts.hidden_size, experts.intermediate_size
    rows = 2 * I if experts.is_concatenated else I
    for weight, (outer, inner) in ((gate_up, (rows, H)), (up, (I, H)), (down, (H, I))):
        if weight is None:
            continue
        matrix = (inner, outer) if weight.is_transposed else (outer, inner)
        expected = (E, *matrix) if weight.is_stacked else matrix
        for node in weight.nodes:
            found = value(node)
            if tuple(found.shape) != expected or found.dtype != experts.weight_dtype:
                raise Refusal(
                    Code.EXPERT_SHAPES,
                    f"weight {tuple(found.shape)} {found.dtype} where {expected} {experts.weight_dtype} is needed",
                    location(node),
                )
