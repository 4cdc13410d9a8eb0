"""Softmax over all experts, then top-k, then (or not) weights that sum to one: Mixtral, Qwen, OLMoE, Jamba, ..."""

import torch

from moe_inductor.match.api import RouterSpelling


def reference(router_logits, k, *, softmax, renormalise, cast):
    if softmax == "cast first":
        scores = torch.softmax(router_logits.float(), dim=-1)
    elif softmax == "dtype argument":
        scores = torch.softmax(router_logits, dim=-1, dtype=torch.float32)
    else:
        scores = torch.softmax(router_logits, dim=-1)
    topk_weights, topk_ids = torch.topk(scores, k, dim=-1)
    if renormalise:
        topk_weights = topk_weights / topk_weights.sum(dim=-1, keepdim=True)
    if cast:
        topk_weights = topk_weights.to(router_logits.dtype)
    return topk_weights, topk_ids


SOFTMAX_TOPK = RouterSpelling(
    name="softmax_topk",
    source="transformers: mixtral, qwen2_moe, qwen3_moe, olmoe, jamba (4.x and 5.x)",
    reference=reference,
    facts={
        "softmax": ("cast first", "dtype argument", "model dtype"),
        "renormalise": (True, False),
        "cast": (False, True),
    },
)
