"""Routers of real models: how ``topk_routing`` is called for them, and how their authors write them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

SIGMOID = {"score": "sigmoid", "weight": "sigmoid"}
CHOSEN = {"score": "logits", "weight": "softmax_of_chosen"}
DEEPSEEK = SIGMOID | {
    "renormalise": True, "epsilon": 1e-20, "scale": 2.5, "groups": 4, "kept_groups": 2, "group_score": "top2",
}  # fmt: skip
# biased: has a bias [E].  16 experts, 3 of them per token.
ROUTERS: dict[str, dict[str, Any]] = {
    "mixtral": {"renormalise": True},
    "olmoe": {},
    "flint": SIGMOID | {"renormalise": True},
    "llama4": {"score": "logits", "weight": "sigmoid"},
    "gpt_oss": CHOSEN,
    "deepseek_v2": {"scale": 16.0},
    "deepseek_v2, groups": {"scale": 16.0, "groups": 4, "kept_groups": 2, "fill_weights": True},
    "deepseek_v2, groups, renormalised": {
        "renormalise": True, "groups": 4, "kept_groups": 1, "fill_weights": True,
    },
    "deepseek_v3": DEEPSEEK | {"biased": True, "fill": float("-inf")},
    "deepseek_v3, fill 0": DEEPSEEK | {"biased": True},
    "deepseek_v3, one group kept": DEEPSEEK | {"biased": True, "kept_groups": 1},
    "deepseek_v4": {
        "score": "sqrtsoftplus", "weight": "sqrtsoftplus", "biased": True, "renormalise": True,
        "epsilon": 1e-20, "scale": 1.5,
    },
    "ernie4_5": {"biased": True, "renormalise": True, "minimum": 1e-12},
    "ernie4_5, minimum decides": {"biased": True, "renormalise": True, "minimum": 0.4},
    "kolibri1": {"score": "logits", "weight": "sigmoid", "biased": True, "renormalise": True},
    "lfm2, epsilon counts": SIGMOID | {"biased": True, "renormalise": True, "epsilon": 0.3},
    "mistral4": {
        "renormalise": True, "epsilon": 1e-20, "groups": 4, "kept_groups": 2, "group_score": "top2",
    },
    "softmax of chosen, biased": CHOSEN | {"biased": True, "scale": 0.5},
    "logits as they are": {"score": "logits", "weight": "logits", "biased": True},
}  # fmt: skip
EXPERTS, K = 16, 3


def call(logits: Tensor, bias: Tensor, facts: dict[str, Any], k: int = K, **more: Any) -> Any:
    """Arguments of ``topk_routing`` after the logits: (args, kwargs)."""
    facts = dict(facts)
    renormalise = facts.pop("renormalise", False)
    if facts.pop("biased", False):
        facts["bias"] = bias
    return (logits, k, renormalise, more.pop("weights_dtype", torch.float32)), facts | more


def _score(kind: str, x: Tensor) -> Tensor:
    return {
        "softmax": lambda: x.softmax(-1),
        "sigmoid": x.sigmoid,
        "sqrtsoftplus": lambda: F.softplus(x).sqrt(),
        "logits": lambda: x,
    }[kind]()


def compared(logits: Tensor, bias: Tensor, facts: dict[str, Any]) -> Tensor:
    """What the top-k compares, as models write it, in the dtype of ``logits``."""
    choice = _score(facts.get("score", "softmax"), logits)
    if facts.get("biased"):
        choice = choice + bias
    groups = facts.get("groups", 1)
    if groups == 1:
        return choice
    grouped = choice.view(len(choice), groups, -1)
    if facts.get("group_score") == "top2":
        rating = grouped.topk(2, dim=-1)[0].sum(dim=-1)
    else:
        rating = grouped.max(dim=-1).values
    index = torch.topk(rating, k=facts["kept_groups"], dim=-1, sorted=False)[1]
    mask = torch.zeros_like(rating).scatter_(1, index, 1).unsqueeze(-1).expand_as(grouped)
    return choice.masked_fill(~mask.reshape(choice.shape).bool(), facts.get("fill", 0.0))


def written(
    logits: Tensor, bias: Tensor, facts: dict[str, Any], k: int = K
) -> tuple[Tensor, Tensor]:
    """(topk_weights, topk_ids), differentiable."""
    choice = compared(logits, bias, facts)
    values, ids = torch.topk(choice, k, dim=-1)
    return weights_of(logits, ids, facts, values if facts.get("fill_weights") else None), ids


def weights_of(
    logits: Tensor, ids: Tensor, facts: dict[str, Any], weights: Tensor | None = None
) -> Tensor:
    """The weights of given experts."""
    kind = facts.get("weight", "softmax")
    if weights is None:
        if kind == "softmax_of_chosen":
            weights = logits.gather(-1, ids).softmax(-1)
        else:
            weights = _score(kind, logits).gather(-1, ids)
    if facts.get("renormalise"):
        total = weights.sum(dim=-1, keepdim=True) + facts.get("epsilon", 0.0)
        if "minimum" in facts:
            total = total.clamp(min=facts["minimum"])
        weights = weights / total
    return weights * facts.get("scale", 1.0)


def without_ties(choice: Tensor, k: int = K) -> Tensor:
    """Rows of ``choice`` in which all values are clearly apart."""
    best = choice.double().sort(-1, descending=True).values
    gaps = best[:, :k] - best[:, 1 : k + 1]
    return (gaps > 1e-5 * best[:, :k].abs().clamp(min=1e-6)).all(-1)
