"""The backward of the ops on a GPU against fp64 autograd, for every weight storage."""

from __future__ import annotations

import pytest
import torch

from moe_inductor import ops
from tests.oracle import assert_within_fp64_rule, unit_scale_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def _experts(x, ids, weights, gate_up, down):
    """Plain PyTorch in the dtype of its inputs, expert by expert."""
    out = torch.zeros_like(x)
    for e in range(gate_up.shape[0]):
        token, slot = torch.where(ids == e)
        gate, up = (x[token] @ gate_up[e].T).chunk(2, dim=-1)
        y = (torch.nn.functional.silu(gate) * up) @ down[e].T
        out = out.index_add(0, token, (y * weights[token, slot, None]).to(x.dtype))
    return out


def _step(run, *tensors):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = run(*leaves)
    out.backward(torch.ones_like(out))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("storage", ["stacked", "per_expert", "separate", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tokens", [1, 37])
def test_gradients(storage, dtype, tokens):
    one = unit_scale_inputs(tokens, 6, 2, 64, 48, dtype=dtype, device="cuda", seed=tokens)
    ids = one.topk_ids
    tensors = (one.hidden_states, one.topk_weights, one.gate_up_proj, one.down_proj)

    def ours(x, weights, gate_up, down):
        if storage == "per_expert":
            lists = list(gate_up.unbind(0)), [], list(down.unbind(0))
        elif storage == "separate":
            lists = [gate_up[:, :48]], [gate_up[:, 48:]], [down]
        elif storage == "transposed":
            stored = [w.transpose(1, 2).contiguous().transpose(1, 2) for w in (gate_up, down)]
            lists = [stored[0]], [], [stored[1]]
        else:
            lists = [gate_up], [], [down]
        return ops.fused_experts(x, ids, weights, *lists, "silu", x.dtype)

    def plain(x, weights, gate_up, down):
        return _experts(x, ids, weights, gate_up, down)

    mine = _step(ours, *tensors)
    eager = _step(plain, *tensors)
    truth = _step(plain, *(t.double() for t in tensors))
    for name, a, b, c in zip(
        ["y", "x", "topk_weights", "gate_up", "down"], mine, eager, truth, strict=True
    ):
        assert_within_fp64_rule(a, b, c, what=name)


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_routing_gradient(renormalise, dtype):
    # Every row is a permutation of the same distinct numbers: no ties, whose order is nobody's promise.
    order = torch.rand(33, 16, generator=torch.Generator().manual_seed(0)).argsort(-1)
    logits = torch.linspace(-3, 3, 16)[order].to("cuda", dtype)
    wanted_ids = logits.float().topk(4, dim=-1).indices

    def plain(x):
        weights = x.softmax(-1).gather(1, wanted_ids)
        return weights / weights.sum(-1, keepdim=True) if renormalise else weights

    def ours(x):
        weights, ids = torch.ops.moe_inductor.topk_routing(x, 4, renormalise, torch.float32)
        assert torch.equal(ids, wanted_ids)
        return weights

    pull = torch.randn(33, 4, device="cuda", generator=torch.Generator("cuda").manual_seed(0))

    def step(run, x):
        leaf = x.detach().clone().requires_grad_()
        (run(leaf) * pull).sum().backward()
        return leaf.grad

    mine, eager, truth = (
        step(ours, logits),
        step(plain, logits.float()).to(dtype),
        step(plain, logits.double()),
    )
    assert_within_fp64_rule(mine, eager, truth, what="router_logits")
