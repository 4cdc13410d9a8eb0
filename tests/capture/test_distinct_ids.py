"""A loop over the distinct ids does not say how many experts there are: an experts module that is given its ids.

Capture runs such a loop for T k experts, the most that there can be.  A module may have more of them, and the ids may
name any: what was traced is then only a part of the block, and must not be taken for the whole.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.capture.models import Expert, H
from tests.without_inductor import WithoutInductor

E = 8
TOKENS_AND_K = [(1, 2), (1, 3), (3, 2), (2, 4)]


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Expert() for _ in range(E))

    def forward(
        self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> torch.Tensor:
        out = torch.zeros_like(x)
        for e in topk_ids.unique():
            token, slot = torch.where(topk_ids == e)
            out.index_add_(0, token, self.experts[e](x[token]) * topk_weights[token, slot, None])
        return out


class Numbers(Experts):
    def forward(
        self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> torch.Tensor:
        out = torch.zeros_like(x)
        for e in topk_ids.unique().tolist():
            token, slot = torch.where(topk_ids == e)
            out.index_add_(0, token, self.experts[e](x[token]) * topk_weights[token, slot, None])
        return out


@pytest.mark.parametrize(("tokens", "k"), TOKENS_AND_K)
@pytest.mark.parametrize("kind", [Experts, Numbers])
def test_experts_that_are_given_ids(kind: type[nn.Module], tokens: int, k: int) -> None:
    torch.manual_seed(0)
    block = kind().eval()
    x, topk_weights = torch.randn(tokens, H), torch.rand(tokens, k)
    # The last experts are chosen: with them, a block of T k experts gives another result.
    topk_ids = torch.tensor([7, 5, 6, 4]).repeat(tokens)[: tokens * k].view(tokens, k)
    inputs = x, topk_ids, topk_weights
    backend = WithoutInductor()
    backend.install()
    with torch.no_grad():
        compiled = torch.compile(block, backend=backend)
        torch.testing.assert_close(compiled(*inputs), block(*inputs))
    blocks = [one for report in backend.reports for one in report.blocks]
    assert blocks
    assert not any(one.fused for one in blocks)
    assert "the list of the chosen experts" in blocks[0].why_not()
