"""Loops that leave out experts by how often each was chosen, with so few tokens that most experts have none."""

from __future__ import annotations

import pytest
import torch
from moe_inductor.patterns import _cut_rows, _limited_rows, chosen_test
from torch import nn

from tests.patterns.conftest import rewritten  # noqa: F401  (a fixture)

BLOCKS = (
    _cut_rows.Cut,
    _cut_rows.PastEqual,
    _cut_rows.PastEqualNumbers,
    _cut_rows.PastNotBefore,
    _cut_rows.ReducedUpToLast,
    _cut_rows.CountedUpToLast,
    chosen_test.CountedBefore,
    chosen_test.CountedInTensor,
)


def _step(run, module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    module.zero_grad()
    x = x.clone().requires_grad_()
    y = run(x)
    y.square().sum().backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in (x, *module.parameters())]
    return [y.detach(), *grads]


@pytest.mark.parametrize("block", BLOCKS)
def test_experts_without_tokens(block: type[nn.Module], rewritten) -> None:  # noqa: F811
    module = block()
    compiled = rewritten(module)
    for tokens in (2, 1):  # T is a symbol from the second on
        x = torch.randn(tokens, 32)
        ours, eager = _step(compiled, module, x), _step(module, module, x)
        for mine, theirs in zip(ours, eager, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert all(one.fused for one in compiled.blocks), [one.why_not() for one in compiled.blocks]


class OneEach(_limited_rows.Limited):
    capacity = 1


@pytest.mark.parametrize("tokens", [1, 3, 9])
def test_a_capacity_of_one(tokens: int, rewritten) -> None:  # noqa: F811
    module = OneEach()
    compiled = rewritten(module)
    x = torch.randn(tokens, 32)
    for mine, theirs in zip(_step(compiled, module, x), _step(module, module, x), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    (one,) = compiled.blocks
    assert one.fused


class ReadsLength(_cut_rows.CountedUpToLast):
    """How many counts there are is not how many experts there are."""

    def experts(self, x, topk_ids, topk_weights):
        y = super().experts(x, topk_ids, topk_weights)
        return y * len(self.counts(topk_ids))


class ReadsLengthInside(_cut_rows.CountedUpToLast):
    def experts(self, x, topk_ids, topk_weights):
        out, order = torch.zeros_like(x), topk_ids.view(-1).argsort()
        tokens, start = order // 2, 0
        counts = self.counts(topk_ids)
        for e, n in enumerate(counts):
            end = start + n
            token = tokens[start:end]
            self.add(out, token, self.mlps[e](x[token]) / len(counts))
            start = end
        return out


class ReadsLast(_cut_rows.CountedUpToLast):
    """The last count is that of the largest id, inside of the loop and behind it."""

    def experts(self, x, topk_ids, topk_weights):
        counts = self.counts(topk_ids)
        y = super().experts(x, topk_ids, topk_weights)
        return y * counts[-1]


@pytest.mark.parametrize("block", [ReadsLength, ReadsLengthInside, ReadsLast])
def test_the_length_of_counts_is_what_it_is(block: type[nn.Module], rewritten) -> None:  # noqa: F811
    module = block()
    compiled = rewritten(module)
    lengths = set()
    for _ in range(12):
        x = torch.randn(1, 32)
        lengths.add(int(module.route(module.gate(x))[1].max()))
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), module(x), rtol=1e-4, atol=1e-5)
    assert len(lengths) > 1


class DroppedOut(_limited_rows.Limited):
    def __init__(self):
        super().__init__()
        self.mlps = nn.ModuleList(nn.Sequential(mlp, nn.Dropout(0.1)) for mlp in self.mlps)

    def route(self, logits):
        return super().route(logits + torch.randn_like(logits))


def test_dropout_is_named(rewritten) -> None:  # noqa: F811
    module = DroppedOut()
    compiled = rewritten(module)
    compiled(torch.randn(9, 32))
    (one,) = compiled.blocks[:1]
    assert "the experts draw random numbers (`native_dropout`)" in one.why_not()
    torch._dynamo.reset()
    trained = rewritten(module.eval())
    trained(torch.randn(9, 32))
    assert trained.blocks[0].fused, trained.blocks[0].why_not()


def test_another_capacity_is_named(rewritten) -> None:  # noqa: F811
    compiled = rewritten(_limited_rows.LateTest())
    compiled(torch.randn(29, 32))
    assert "a capacity that is not `rows[:C]`" in compiled.blocks[0].why_not()
