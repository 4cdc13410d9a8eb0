"""What a match has bound: the nodes behind every tensor of a block, in the region's normal form."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import fx

from moe_inductor.description import MoE, Router
from moe_inductor.match.api import ExpertsSpelling, RouterSpelling
from moe_inductor.match.router_steps import Step
from moe_inductor.reasons import Code, Refusal
from moe_inductor.region.nodes import location, value


@dataclasses.dataclass(frozen=True, eq=False)
class Weight:
    """One projection: ``nodes`` is one stacked ``[E, ..]`` tensor or E tensors in the order of expert ids.

    bias: the same for its biases ``[E, out]`` or ``[out]``; empty where it has none.
    """

    nodes: tuple[fx.Node, ...]
    is_stacked: bool
    is_transposed: bool
    bias: tuple[fx.Node, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class BoundRouter:
    """A proposed router, ``topk_weights, topk_ids = topk_routing(logits, .., bias)``, as it was read.

    logits [T, E] -> scoring -> choosing -> what the top-k of the spelling compares; its k weights -> finish.
    weighing: from the logits to what weights are taken from, None where the spelling takes them from the choice.
    """

    spelling: RouterSpelling
    facts: dict[str, Any]
    router: Router
    logits: fx.Node
    bias: fx.Node | None
    scoring: tuple[Step, ...]
    weighing: tuple[Step, ...] | None
    choosing: tuple[Step, ...]
    finish: tuple[Step, ...]

    def inputs(self) -> list[fx.Node]:
        """The tensors that a fused router reads."""
        return [self.logits] if self.bias is None else [self.logits, self.bias]


@dataclasses.dataclass(frozen=True, eq=False)
class Bound:
    """A proposed block.  Nothing here is proved yet.

    output [T, H]; x [.., H], topk_ids and topk_weights with T*k elements, each up to a reshape.
    topk_weights: None where every chosen expert counts with weight 1.
    visited: expert ids in the order a loop adds them up; range(E) for the other spellings.
    traced: the experts of the passes that the graph holds, as in ``match.loop.Group``.
    """

    spelling: ExpertsSpelling
    facts: dict[str, Any]
    moe: MoE
    output: fx.Node
    x: fx.Node
    topk_ids: fx.Node
    topk_weights: fx.Node | None
    gate_up: Weight
    up: Weight | None
    down: Weight
    visited: tuple[int, ...]
    traced: tuple[int | fx.Node, ...]
    router: BoundRouter | None = None

    @property
    def projections(self) -> tuple[Weight | None, ...]:
        return self.gate_up, self.up, self.down

    @property
    def index(self) -> list[fx.Node]:
        """The symbolic index of the one pass that stands for all, if there is one."""
        return [e for e in self.traced if isinstance(e, fx.Node)]

    def inputs(self) -> list[fx.Node]:
        """The tensors a fused block reads, in the order that ``prove.reference_of`` takes them."""
        weights = [n for w in self.projections if w is not None for n in (*w.nodes, *w.bias)]
        routing = (
            [self.topk_ids] if self.topk_weights is None else [self.topk_ids, self.topk_weights]
        )
        return [self.x, *routing, *weights]


def check_experts(moe: MoE, gate_up: Weight, up: Weight | None, down: Weight) -> None:
    """All projections have the shapes that one MLP needs.  Raises Refusal(EXPERT_SHAPES)."""
    experts = moe.experts
    E, H, I = experts.num_experts, experts.hidden_size, experts.intermediate_size
    expected = ((gate_up, (experts.first_rows, H)), (up, (I, H)), (down, (H, I)))
    for weight, (outer, inner) in expected:
        if weight is None:
            continue
        matrix = (inner, outer) if weight.is_transposed else (outer, inner)
        for nodes, one in ((weight.nodes, matrix), (weight.bias, (outer,))):
            dtype = experts.weight_dtype if nodes is weight.nodes else None
            for node in nodes:
                found = value(node)
                rows = found.shape[0]
                if not experts.identities or not isinstance(rows, int) or rows < E:
                    rows = E  # otherwise there may be rows of experts that have no use for them
                shape = (rows, *one) if weight.is_stacked else one
                dtype = dtype or found.dtype  # biases may have a dtype of their own, all the same
                if tuple(found.shape) != shape or found.dtype != dtype:
                    raise Refusal(
                        Code.EXPERT_SHAPES,
                        f"weight {tuple(found.shape)} {found.dtype} where {shape} {dtype} is needed",
                        location(node),
                    )
