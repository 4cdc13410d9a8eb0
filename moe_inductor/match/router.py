"""Propose a router for a matched block: from ``topk_weights`` back to the logits."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from moe_inductor.description import Groups, Router, Score
from moe_inductor.match.api import RouterSpelling, combinations
from moe_inductor.match.bind import Bound, BoundRouter
from moe_inductor.match.pieces import Shapes, router_piece
from moe_inductor.match.router_steps import (
    CHOICE,
    FINISH,
    SCORES,
    Cast,
    Corrected,
    Elementwise,
    Limited,
    Renormalised,
    Scaled,
    Softmax,
    Step,
    read,
)
from moe_inductor.reasons import Code, Refusal
from moe_inductor.region.canonical import Canonical
from moe_inductor.region.nodes import name_of, unviewed, value

_SCORES: dict[tuple[Step, ...], Score] = {
    (): "logits",
    (Softmax(),): "softmax",
    (Softmax(widened=True),): "softmax",
    (Elementwise("sigmoid"),): "sigmoid",
    (Elementwise("softplus"), Elementwise("sqrt")): "sqrtsoftplus",
}


def propose_routers(
    canonical: Canonical, bound: Bound, spellings: list[RouterSpelling]
) -> list[BoundRouter]:
    """Every known router that ``bound.topk_weights`` could be.  Raises Refusal(ROUTER) when there is none."""
    where = canonical.source_of(bound.topk_ids)
    if bound.topk_weights is None:
        raise Refusal(Code.ROUTER, "router not recognised (weights are applied elsewhere)", where)
    found: list[BoundRouter] = []
    refused: list[Refusal] = []
    finish, chosen = read(unviewed(bound.topk_weights), FINISH)
    chosen = unviewed(chosen)
    tokens = value(chosen).shape[0]
    shapes = Shapes(
        x_dtype=torch.float32,
        weight_dtype=torch.float32,
        routing_dtype=torch.float32,
        device=value(chosen).device,
        num_tokens=1 if isinstance(tokens, int) and tokens == 1 else 7,
        top_k=1 if bound.moe.top_k == 1 else 2,
    )
    for spelling in spellings:
        for facts in combinations(spelling.facts):
            pattern, root = router_piece(spelling, tuple(sorted(facts.items())), shapes)
            if chosen.target is not root:
                continue
            match = pattern.match(chosen)
            if not match:
                continue
            tensors: dict[str, fx.Node] = match.kwargs  # type: ignore[union-attr]
            try:
                choice, scores = tensors["choice"], tensors.get("scores")
                found.append(_bind(bound, spelling, facts, choice, scores, finish, where))
            except Refusal as refusal:
                refused.append(refusal)
    if found:
        return found
    if refused:
        raise refused[-1]
    names = ", ".join(f"`{n}`" for n in _named_steps(bound.topk_weights))
    names = names or "its weights reach the block as an input"
    raise Refusal(Code.ROUTER, f"router not recognised ({names})", where)


def before_drops(bound: Bound) -> Bound:
    """The block as its router sees it, where some of the chosen are dropped afterwards: ``where(kept, ids, -1)``."""
    ids = unviewed(bound.topk_ids)
    if ids.target is not torch.ops.aten.where.ScalarOther or ids.args[2] != -1:
        return bound
    assert isinstance(ids.args[1], fx.Node)
    return dataclasses.replace(bound, topk_ids=ids.args[1])


def _bind(
    bound: Bound,
    spelling: RouterSpelling,
    facts: dict[str, Any],
    choice: fx.Node,
    weighed: fx.Node | None,
    finish: tuple[Step, ...],
    where: str,
) -> BoundRouter:
    """weighed: what the weights are taken from, None where the spelling takes them from ``choice``."""
    assert bound.topk_weights is not None
    choosing, base = read(choice, CHOICE)
    scoring, logits = read(base, SCORES)
    weighing, start = (None, logits)
    if weighed is not None and weighed is not choice:
        weighing, start = read(weighed, SCORES)
    if start is not logits:
        raise _refusal("the weights are not made of the logits that the choice is made of", where)
    experts = value(logits).shape[-1]
    if experts != bound.moe.experts.num_choices:
        raise Refusal(
            Code.ROUTER,
            f"the router chooses among {experts} experts, of which "
            f"{bound.moe.experts.num_choices} are there",
            where,
        )
    biases = [step.bias for step in choosing if isinstance(step, Corrected)]
    limits = [step for step in choosing if isinstance(step, Limited)]
    bias = biases[0] if biases else None
    if weighing is None and bias is not None:
        raise _refusal("the bias is part of the weights", where)
    if weighing is None and limits and limits[0].fill != 0:
        raise _refusal(f"experts of other groups weigh {limits[0].fill}", where)
    score_dtype = value(base).dtype
    if all(isinstance(step, Cast) for step in scoring):  # logits are what they are cast to
        casts = itertools.takewhile(lambda step: isinstance(step, Cast), choosing)
        score_dtype = next(
            (c.dtype for c in reversed([*casts]) if isinstance(c, Cast)), score_dtype
        )
    if biases or limits:
        _check_order(choosing, score_dtype, value(choice).dtype, bias, where)
    score = _score(scoring, "the choice", where)
    router = _finished(
        Router(
            score=score,
            weight=score if weighing is None else _score(weighing, "a weight", where),
            k=bound.moe.top_k,
            bias=bias is not None,
            groups=_groups(limits[0], weighing is None) if limits else None,
            renormalise=False,
            score_dtype=score_dtype,
            weights_dtype=value(bound.topk_weights).dtype,
        ),
        finish,
        where,
    )
    return BoundRouter(spelling, facts, router, logits, bias, scoring, weighing, choosing, finish)


def _score(steps: Sequence[Step], what: str, where: str) -> Score:
    kept = list(steps)
    while kept and isinstance(kept[0], Cast):
        del kept[0]
    while kept and isinstance(kept[-1], Cast):
        del kept[-1]
    if tuple(kept) not in _SCORES:
        raise _refusal(f"{what} is {_words(kept)} of the logits", where)
    return _SCORES[tuple(kept)]


def _finished(router: Router, finish: Sequence[Step], where: str) -> Router:
    """``router``, whose weights are those before ``finish``.  Its casts are roundings that ours does not make."""
    steps = [step for step in finish if not isinstance(step, Cast)]
    late = []
    while steps and isinstance(steps[0], (Softmax, Elementwise)):
        late.append(steps.pop(0))
    if late:
        if router.weight != "logits":
            raise _refusal(f"a weight is {_words(late)} of {router.weight}", where)
        kind = _score(late, "a weight", where)
        router = dataclasses.replace(
            router, weight="softmax_of_chosen" if kind == "softmax" else kind
        )
    if steps and isinstance(by := steps[0], Renormalised):
        del steps[0]
        if by.norm is not None and (by.norm != 1 or router.weight == "logits"):
            raise _refusal(f"renormalised by the {by.norm}-norm", where)
        epsilon = float(by.epsilon or 0.0)
        router = dataclasses.replace(router, renormalise=True, epsilon=epsilon, minimum=by.minimum)
    for step in steps:
        if not isinstance(step, Scaled):
            raise _refusal(f"{_words([step])} where the weights are complete", where)
        scale = router.scale / step.by if step.divided else router.scale * step.by
        router = dataclasses.replace(router, scale=scale)
    return router


def _check_order(
    choosing: Sequence[Step],
    scores: torch.dtype,
    compared: torch.dtype,
    bias: fx.Node | None,
    where: str,
) -> None:
    """A bias, then groups, with no roundings but those of the scores and of the sum."""
    order = [type(step) for step in choosing if not isinstance(step, Cast)]
    if order not in ([Corrected], [Limited], [Corrected, Limited]):
        raise _refusal("the choice is not scores, a bias, groups in this order", where)
    if compared != (scores if bias is None else torch.promote_types(scores, value(bias).dtype)):
        raise _refusal("the scores are cast on the way to the choice", where)


def _groups(limit: Limited, fill_weights: bool) -> Groups:
    return Groups(
        count=limit.count,
        kept=limit.kept,
        score="top2" if limit.score == "top2" else "max",
        fill=float(limit.fill),
        fill_weights=fill_weights,
    )


def _refusal(message: str, where: str) -> Refusal:
    return Refusal(Code.ROUTER, f"router not supported: {message}", where)


def _words(steps: Sequence[Step]) -> str:
    names = [s.name if isinstance(s, Elementwise) else type(s).__name__.lower() for s in steps]
    return " of ".join(reversed(names)) or "nothing"


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
