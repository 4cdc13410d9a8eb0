"""Propose a router for a matched block: from ``topk_weights`` back to the logits."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import fx

from moe_inductor.match.api import RouterSpelling, combinations
from moe_inductor.match.bind import Bound, BoundRouter
from moe_inductor.match.pieces import Shapes, router_piece
from moe_inductor.reasons import Code, Refusal
from moe_inductor.region.canonical import Canonical
from moe_inductor.region.nodes import name_of, value


def propose_routers(
    canonical: Canonical, bound: Bound, spellings: list[RouterSpelling]
) -> list[BoundRouter]:
    """Every known router that ``bound.topk_weights`` could be.  Raises Refusal(ROUTER) when there is none."""
    found = []
    weights = bound.topk_weights
    if weights is None:
        where = canonical.source_of(bound.topk_ids)
        raise Refusal(Code.ROUTER, "router not recognised (weights are applied elsewhere)", where)
    tokens = value(weights).shape[0]
    for spelling in spellings:
        for facts, dtype in itertools.product(combinations(spelling.facts), _floats(canonical)):
            shapes = Shapes(
                x_dtype=dtype,
                weight_dtype=dtype,
                routing_dtype=value(weights).dtype,
                device=value(weights).device,
                num_tokens=1 if isinstance(tokens, int) and tokens == 1 else 7,
                top_k=1 if bound.moe.top_k == 1 else 2,
                autocast=canonical.router_autocast,
            )
            pattern, root = router_piece(spelling, tuple(sorted(facts.items())), shapes)
            if weights.target is not root:
                continue
            match = pattern.match(weights)
            if match:
                logits = match.kwargs["router_logits"]  # type: ignore[union-attr]
                if value(logits).shape[-1] != bound.moe.experts.num_experts:
                    raise Refusal(
                        Code.ROUTER,
                        f"the router chooses among {value(logits).shape[-1]} experts, of which "
                        f"{bound.moe.experts.num_experts} are there",
                        canonical.source_of(bound.topk_ids),
                    )
                found.append(BoundRouter(spelling, facts, logits))
    if not found:
        names = ", ".join(f"`{n}`" for n in _named_steps(weights))
        raise Refusal(
            Code.ROUTER, f"router not recognised ({names})", canonical.source_of(bound.topk_ids)
        )
    return found


def _floats(canonical: Canonical) -> list[torch.dtype]:
    seen: dict[torch.dtype, Any] = {}
    for node in canonical.graph.nodes:
        if isinstance(value(node), torch.Tensor) and value(node).dtype.is_floating_point:
            seen.setdefault(value(node).dtype)
    return list(seen)


def _named_steps(weights: fx.Node) -> list[str]:
    """The operators that made the weights, nearest to the logits first; views and casts are not worth telling."""
    plain = {"view", "permute", "_to_copy", "getitem", "expand", "full", "slice"}
    steps, todo, seen = [], [weights], set()
    while todo:
        node = todo.pop()
        if node in seen or node.op != "call_function":
            continue
        seen.add(node)
        if name_of(node) not in plain:
            steps.append(name_of(node).lstrip("_"))
        todo += node.all_input_nodes
    return list(dict.fromkeys(reversed(steps)))
