"""Weights that are applied to the sum of the experts' rows: in the fused op, and the router with them, where that is
the same; outside, as the model has them, where it is not."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

T, H, I, E, K = 33, 16, 24, 4, 2


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(H, I), nn.Linear(I, H)

    def forward(self, x):
        return self.down(F.relu(self.up(x)))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = nn.Linear(H, E)
        self.experts = nn.ModuleList(MLP() for _ in range(E))


class Switch(Block):
    """transformers' switch_transformers, without its capacity."""

    def chosen(self, x):
        scores = self.router(x).softmax(-1)
        mask = F.one_hot(scores.argmax(-1), E).bool()
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            y[mask[:, e]] = expert(x[mask[:, e]])
        return y, scores.max(-1).values.unsqueeze(-1)

    def forward(self, x):
        y, weights = self.chosen(x)
        return weights * y


class Capacity(Switch):
    """No more than so many tokens for an expert, the first ones, and the ids as a result of their own."""

    def forward(self, x):
        scores = self.router(x.view(3, T // 3, H)).softmax(-1)
        ids = scores.argmax(-1)
        mask = F.one_hot(ids, E)
        mask = (mask * (mask.cumsum(-2) <= 4)).bool().view(T, E)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            y[mask[:, e]] = expert(x[mask[:, e]])
        return scores.max(-1).values.view(T, 1) * y, ids.double()


class AlsoRead(Switch):
    """What the experts give is a result of its own as well."""

    def forward(self, x):
        y, weights = self.chosen(x)
        return weights * y, y


class OfTokens(Switch):
    """Weights of another shape: one for each column."""

    def forward(self, x):
        y, _ = self.chosen(x)
        return y * x[:1]


class Stopped(Switch):
    """No gradient for the experts; their weights have one."""

    def forward(self, x):
        scores = self.router(x).softmax(-1)
        weights = scores.max(-1).values.unsqueeze(-1)
        with torch.no_grad():
            y, _ = self.chosen(x)
        return weights * y


class Rows(Block):
    """DeepSeek-V2 in training: a row for each of a token's experts."""

    def rows(self, x):
        weights, ids = self.router(x).softmax(-1).topk(K, dim=-1)
        flat = ids.view(-1)
        rows = x.repeat_interleave(K, dim=0)
        y = torch.empty_like(rows)
        for e, expert in enumerate(self.experts):
            y[flat == e] = expert(rows[flat == e])
        return y.view(*weights.shape, -1), weights

    def forward(self, x):
        y, weights = self.rows(x)
        return (y * weights.unsqueeze(-1)).sum(dim=1)


class Largest(Rows):
    """Not a sum."""

    def forward(self, x):
        y, weights = self.rows(x)
        return (y * weights.unsqueeze(-1)).amax(dim=1)


class OverRows(Rows):
    """A sum over tokens for each slot."""

    def forward(self, x):
        y, weights = self.rows(x)
        return (y * weights.unsqueeze(-1)).sum(dim=0)


class InTurns(Rows):
    """The rows of all tokens' first experts come first."""

    def rows(self, x):
        weights, ids = self.router(x).softmax(-1).topk(K, dim=-1)
        flat, rows = ids.view(-1), x.repeat(K, 1)
        y = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            y[flat == e] = expert(rows[flat == e])
        return y.view(*weights.shape, -1), weights


@pytest.mark.parametrize(
    ("build", "inside"),
    [
        (Switch, True),
        (Capacity, True),
        (Rows, True),
        (AlsoRead, False),
        (OfTokens, False),
        (Stopped, False),
        (Largest, False),
        (OverRows, False),
        (InTurns, False),
    ],
)
def test_weights(build, inside, rewritten):
    torch.manual_seed(0)
    module = build().double()
    compiled = rewritten(module)
    results = []
    for run in (module, compiled):
        x = torch.randn(T, H, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        x.requires_grad_()
        module.zero_grad()
        out = run(x)
        outs = out if isinstance(out, tuple) else (out,)
        sum((o * (i + o.detach().cos())).sum() for i, o in enumerate(outs)).backward()
        grads = [p.grad for p in (x, *module.parameters())]
        results.append([*outs, *(torch.zeros(1) if g is None else g for g in grads)])
    for mine, theirs in zip(*results[::-1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
    block = compiled.blocks[-1]  # mixed grad modes take a second capture
    assert block.fused, block.why_not()
    assert block.router_fused == inside, block.router_reason
    assert block.moe.top_k == (K if build is Rows else 1)
