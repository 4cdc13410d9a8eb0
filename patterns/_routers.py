"""A block whose router is what a pattern is about, and pieces of routers."""

import torch
from moe_inductor.patterns._blocks import NUM_EXPERTS
from moe_inductor.patterns.hf_batched_mm import Batched
from torch import nn


class Routed(Batched):
    """``route(logits [T, E]) -> topk_weights, topk_ids``; ``bias [E]`` is a buffer for it, of either sign."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Buffer(torch.tensor([0.3, -0.4, 0.1, -0.2])[:NUM_EXPERTS])


def limited(scores, count, kept, fill, rate, largest=True):
    """``scores`` with ``fill`` for all but the ``kept`` groups that ``rate(groups [T, count, size])`` likes best."""
    group_scores = rate(scores.view(-1, count, scores.shape[-1] // count))
    group_idx = torch.topk(group_scores, k=kept, dim=-1, sorted=False, largest=largest)[1]
    group_mask = torch.zeros_like(group_scores)
    group_mask.scatter_(1, group_idx, 1)
    score_mask = (
        group_mask.unsqueeze(-1)
        .expand(-1, count, scores.shape[-1] // count)
        .reshape(-1, scores.shape[-1])
    )
    return scores.masked_fill(~score_mask.bool(), fill)


def two_largest(groups):
    return groups.topk(2, dim=-1)[0].sum(dim=-1)
