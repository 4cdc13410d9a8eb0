"""A match proposes; a proof disposes.

The reference of the matched spelling is traced again, with the described MLP and with tensors that have exactly the
metadata of the matched ones, and must be the same expression as the model's block.  Every constant, dimension, dtype
and order that the pattern took for a wildcard is compared here.  What is not proved is not rewritten.

(PyTorch's own attention matcher rewrote wrong permutes silently until it re-traced: pytorch #195320, #195383.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from moe_inductor.match.bind import Bound, BoundRouter
from moe_inductor.match.router_steps import run
from moe_inductor.prove.expressions import Numbering, describe
from moe_inductor.prove.reference import DescribedExperts, Projection
from moe_inductor.reasons import Code, Refusal
from moe_inductor.region.canonical import Autocast, Canonical, trace
from moe_inductor.region.nodes import unviewed, value
from moe_inductor.region.normalise import normalise


def prove_experts(canonical: Canonical, bound: Bound) -> None:
    """``bound.output`` equals the reference of its spelling.  Raises Refusal(PROOF) with the first difference."""
    inputs = [*bound.inputs(), *bound.index]
    _same(canonical, [bound.output], inputs, reference_of(bound), canonical.autocast, Code.PROOF)


def prove_router(canonical: Canonical, bound: Bound, router: BoundRouter) -> None:
    """The block's topk_weights and topk_ids equal the router's reference.  Raises Refusal(ROUTER)."""

    def reference(logits: torch.Tensor, *bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        choice = run(router.choosing, run(router.scoring, logits), *bias)
        scores = choice if router.weighing is None else run(router.weighing, logits)
        chosen, topk_ids = router.spelling.reference(
            scores, choice, router.router.k, **router.facts
        )
        return run(router.finish, chosen), topk_ids

    assert bound.topk_weights is not None  # such a router is not proposed
    outputs = [bound.topk_weights, bound.topk_ids]
    autocast = canonical.router_autocast
    _same(canonical, outputs, router.inputs(), reference, autocast, Code.ROUTER, views=True)


def reference_of(bound: Bound) -> Callable[..., torch.Tensor]:
    """The spelling's reference as a function of ``bound.inputs()`` and ``bound.index``."""
    moe = bound.moe

    def reference(x: torch.Tensor, topk_ids: torch.Tensor, *others: Any) -> torch.Tensor:
        left: list[Any] = list(others)
        topk_weights = (
            left.pop(0).reshape(-1, moe.top_k) if bound.topk_weights is not None else None
        )

        def take(nodes: Sequence[fx.Node]) -> list[torch.Tensor]:
            taken, left[:] = left[: len(nodes)], left[len(nodes) :]
            return taken

        gate_up, up, down = (
            Projection(take(w.nodes), take(w.bias), w.is_stacked, w.is_transposed) if w else None
            for w in bound.projections
        )
        assert gate_up is not None
        assert down is not None
        # What is left is the symbolic index, if there is one.
        experts = DescribedExperts(moe, gate_up, up, down, left or bound.traced)
        return bound.spelling.reference(
            x.reshape(-1, moe.experts.hidden_size),
            topk_ids.reshape(-1, moe.top_k),
            topk_weights,
            experts,
            **bound.facts,
        )

    return reference


def _same(
    canonical: Canonical,
    outputs: Sequence[fx.Node],
    inputs: Sequence[fx.Node],
    reference: Callable[..., Any],
    autocast: Autocast | None,
    code: Code,
    views: bool = False,
) -> None:
    """views: outputs are equal up to a view, which keeps the order of the elements."""
    where = canonical.source_of(outputs[0])
    try:
        values = [value(n) for n in inputs]
        traced = trace(reference, values, canonical.fake_mode, autocast)
    except Exception as error:
        text = str(error).strip().splitlines()
        raise Refusal(
            code,
            "the reference does not run with the block's tensors: "
            f"{type(error).__name__}: {text[0] if text else ''}",
            where,
        ) from error
    graph, _ = normalise(traced.graph, keep_detach=canonical.grad_enabled)
    numbering = Numbering()
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    for position, (mine, theirs) in enumerate(zip(inputs, placeholders, strict=True)):
        # One tensor bound twice (tied experts) is one leaf.
        name = min(i for i, n in enumerate(inputs) if n is mine) if mine in inputs else position
        numbering.leaf(mine, name)
        numbering.leaf(theirs, name)
    (output,) = (n for n in graph.nodes if n.op == "output")
    results = output.args[0] if isinstance(output.args[0], (tuple, list)) else (output.args[0],)
    for mine, theirs in zip(outputs, results, strict=True):
        if views:
            mine, theirs = unviewed(mine), unviewed(theirs)
        if numbering.number(mine) != numbering.number(theirs):
            here, there = numbering.difference(mine, theirs) or (mine, theirs)
            raise Refusal(
                code,
                f"the model computes {describe(here)} where the pattern has {describe(there)}",
                canonical.source_of(here) if isinstance(here, fx.Node) else where,
            )
