"""What ``topk_routing`` computes, step by step in ATen: for the CPU, and for the gradient everywhere."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_inductor.ops.check import Routing


def scores(call: Routing) -> Tensor:
    """What the choice starts from, [T, E], rounded to ``score_dtype`` as often as the model rounds; plus the bias."""
    compute = call.compute_dtype
    dtype = call.score_dtype or compute
    found = call.router_logits.to(compute)
    if call.score == "softmax":
        found = torch.softmax(found, -1)
    elif call.score == "sigmoid":
        found = torch.sigmoid(found)
    elif call.score == "sqrtsoftplus":
        found = F.softplus(found).to(dtype).to(compute).sqrt()
    found = found.to(dtype)
    return found if call.bias is None else found + call.bias


def scores_for_choice(call: Routing) -> Tensor:
    """What the top-k compares, [T, E]: the experts of groups that are not kept have ``fill``."""
    found = scores(call)
    if call.groups == 1:
        return found
    return found.masked_fill(~group_mask(call, found), call.fill)


def group_mask(call: Routing, found: Tensor) -> Tensor:
    """Is the expert in one of the ``kept_groups`` groups with the largest score?  [T, E], bool."""
    grouped = found.reshape(found.shape[0], call.groups, -1)
    best = grouped.topk(1 if call.group_score == "max" else 2, dim=-1).values
    rating = best.sum(-1)
    kept = torch.zeros_like(rating, dtype=torch.bool)
    kept = kept.scatter(1, rating.topk(call.kept_groups, dim=-1, sorted=False).indices, True)
    return kept.unsqueeze(-1).expand_as(grouped).reshape(found.shape)


def chosen_scores(call: Routing, ids: Tensor) -> Tensor:
    """The weights before they are renormalised and scaled, [T, k], not rounded."""
    logits = call.router_logits.to(call.compute_dtype)
    if call.weight == "softmax":
        return torch.softmax(logits, -1).gather(-1, ids)
    chosen = logits.gather(-1, ids)
    if call.weight == "softmax_of_chosen":
        return torch.softmax(chosen, -1)
    if call.weight == "sigmoid":
        return torch.sigmoid(chosen)
    return F.softplus(chosen).sqrt() if call.weight == "sqrtsoftplus" else chosen


def denominator(call: Routing, weights: Tensor) -> Tensor:
    """What ``weights`` [T, k] are divided by, [T, 1]."""
    total = weights.sum(-1, keepdim=True)
    if call.epsilon:
        total = total + call.epsilon
    return total if call.minimum is None else total.clamp(min=call.minimum)


def gradient(call: Routing, grad: Tensor, ids: Tensor, weights: Tensor | None) -> Tensor:
    """Gradient of the logits from ``grad`` [T, k], that of ``topk_weights``: the choice has none.

    With ``u`` the chosen scores, ``s`` their sum and ``d`` what they are divided by (``s + epsilon``, or constant
    where ``minimum`` is larger), ``w = scale * u / d`` and

        du = scale / d * (dw - sum(dw * u / d))          the sum only where d depends on s
        softmax            dl = scatter(ids, p du) - p sum(p du)      p = softmax(l), of which u are k elements
        softmax_of_chosen  dl[ids] = u (du - sum(u du))
        sigmoid            dl[ids] = du u (1 - u)
        sqrtsoftplus       dl[ids] = du sigmoid(l) / (2 u)
        logits             dl[ids] = du

    A softmax divided by the sum of the chosen is the softmax of the chosen, which does not lose small sums.

    Source of the Jacobian of softmax: Goodfellow, Bengio, Courville, Deep Learning (2016), section 6.2.2.3; all of
    it is checked against ``torch.autograd.gradcheck`` in tests/ops.

    weights: the weights that the forward gave, where it filled some with zero; these have no gradient.
    """
    compute, logits = call.compute_dtype, call.router_logits
    grad = grad.to(compute) * call.scale
    kind, renormalise = call.weight, call.renormalise
    if kind == "softmax" and renormalise and not call.epsilon and call.minimum is None:
        kind, renormalise = (
            ("softmax" if weights is not None else "softmax_of_chosen"),
            weights is not None,
        )
    u = chosen_scores(call._replace(weight=kind), ids)
    if weights is not None:
        u = u.masked_fill(weights == 0, 0)
    if renormalise:
        d = denominator(call, u)
        mean = (grad * u).sum(-1, keepdim=True) / d
        if call.minimum is not None:
            total = u.sum(-1, keepdim=True) + call.epsilon
            mean = mean.masked_fill(total < call.minimum, 0)
        grad = (grad - mean) / d
    if weights is not None:
        grad = grad.masked_fill(weights == 0, 0)
    if kind == "softmax":
        p = torch.softmax(logits, -1, dtype=compute)
        weighted = grad * p.gather(-1, ids)
        result = (p * -weighted.sum(-1, keepdim=True)).scatter_add(-1, ids, weighted)
        return result.to(logits.dtype)
    if kind == "softmax_of_chosen":
        weighted = grad * u
        selected = weighted - u * weighted.sum(-1, keepdim=True)
    elif kind == "sigmoid":
        selected = grad * u * (1 - u)
    elif kind == "sqrtsoftplus":
        selected = grad * torch.sigmoid(logits.gather(-1, ids).to(compute)) / (2 * u)
    else:
        selected = grad
    zeros = torch.zeros_like(logits, dtype=compute, memory_format=torch.contiguous_format)
    return zeros.scatter(-1, ids, selected).to(logits.dtype)
