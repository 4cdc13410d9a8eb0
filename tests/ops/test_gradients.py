"""Backward of both ops on the CPU."""

import itertools

import pytest
import torch
from oracle import (
    assert_within_fp64_rule,
    reference_experts,
    reference_experts_fp64,
    reference_routing,
    storages,
    unit_scale_inputs,
)

from moe_inductor import ops


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """New memory holds NaN, so that reading a row nobody wrote is an error on every run."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def leaves(tensors):
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize("per_expert", [False, True])
def test_gradcheck_experts(per_expert, two):
    data = unit_scale_inputs(3, 3, 2, 4, 2, dtype=torch.float64)
    gate_up, up = (data.gate_up_proj, None)
    if two:
        gate_up, up = data.gate_up_proj.chunk(2, 1)
    inputs = leaves(
        [data.hidden_states, data.topk_weights, gate_up, data.down_proj, *([up] if two else [])]
    )

    def run(x, weights, gate_up, down, *up):
        pick = list if per_expert else lambda tensor: [tensor]
        return ops.fused_experts(
            x,
            data.topk_ids,
            weights,
            pick(gate_up),
            pick(up[0]) if up else [],
            pick(down),
            "silu",
            torch.float64,
        )

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("renormalise", [False, True])
def test_gradcheck_routing(renormalise, k):
    logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)

    def run(logits):
        return ops.topk_routing(logits, k, renormalise, torch.float64)[0]

    assert torch.autograd.gradcheck(run, [logits])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("renormalise", [False, True])
def test_routing_gradient_in_low_precision(renormalise, dtype):
    logits = torch.randn(20, 8).to(dtype)
    upstream = torch.randn(20, 2)
    grads = []
    for run, x in (
        (lambda x: ops.topk_routing(x, 2, renormalise, torch.float32)[0], logits),
        (lambda x: reference_routing(x, 2, renormalise)[0], logits),
        (lambda x: reference_routing(x, 2, renormalise, torch.float64)[0], logits.double()),
    ):
        leaf = x.clone().requires_grad_()
        (run(leaf) * upstream).sum().backward()
        grads.append(leaf.grad)
    assert grads[0].dtype == dtype
    assert_within_fp64_rule(*grads, "d logits")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("storage", list(storages(unit_scale_inputs(1, 1, 1, 2, 1))))
def test_gradients_against_fp64(storage, dtype):
    data = unit_scale_inputs(17, 6, 2, 24, 16, dtype=dtype)
    # Expert 4 gets no token.
    data = data._replace(topk_ids=torch.where(data.topk_ids == 4, 5, data.topk_ids))
    upstream = torch.randn(17, 24).to(dtype)
    names = ["hidden_states", "topk_weights", "gate_up_proj", "up_proj", "down_proj"]
    lists = storages(data)[storage]

    def gradients(run, convert):
        x, weights = (convert(t).requires_grad_() for t in (data.hidden_states, data.topk_weights))
        gate_up, up, down = (
            [convert(t).detach().requires_grad_() for t in tensors] for tensors in lists
        )
        y = run(x, weights, gate_up, up, down)
        (y * upstream.to(y.dtype)).sum().backward()
        groups = [[x], [weights], gate_up, up, down]
        return [[tensor.grad for tensor in group] for group in groups]

    def ours(x, weights, gate_up, up, down):
        return ops.fused_experts(x, data.topk_ids, weights, gate_up, up, down, "silu", dtype)

    def reference(x, weights, gate_up, up, down):
        pick = (lambda group: group[0] if group else []) if "stacked" in storage else list
        return reference_experts(x, data.topk_ids, weights, pick(gate_up), pick(up), pick(down))

    same = gradients(ours, lambda t: t.detach().clone())
    eager = gradients(reference, lambda t: t.detach().clone())
    truth = gradients(reference, lambda t: t.detach().double())
    for name, *triples in zip(names, same, eager, truth, strict=True):
        for ours_, eager_, truth_ in zip(*triples, strict=True):
            assert ours_.dtype == dtype
            eager_ = torch.zeros_like(ours_) if eager_ is None else eager_
            truth_ = torch.zeros_like(ours_) if truth_ is None else truth_
            assert_within_fp64_rule(ours_, eager_, truth_, f"d {name}")
    for group in same[2:]:
        if group:
            empty = group[0][4] if "stacked" in storage else group[4]
            assert torch.equal(empty, torch.zeros_like(empty))


def test_only_what_is_needed():
    data = unit_scale_inputs(9, 3, 2, 16, 8)
    names = ("x", "weights", "gate_up", "down")
    tensors = (data.hidden_states, data.topk_weights, data.gate_up_proj, data.down_proj)
    full = None
    for needed in itertools.product([True, False], repeat=4):
        if not any(needed):
            continue
        x, weights, gate_up, down = (
            t.clone().requires_grad_(flag) for t, flag in zip(tensors, needed, strict=True)
        )
        y = ops.fused_experts(x, data.topk_ids, weights, [gate_up], [], [down], "silu", x.dtype)
        y.square().sum().backward()
        grads = [x.grad, weights.grad, gate_up.grad, down.grad]
        full = full or grads
        for name, grad, reference, flag in zip(names, grads, full, needed, strict=True):
            assert (grad is not None) == flag, name
            if flag:
                assert torch.equal(grad, reference), name


def test_one_frozen_expert_of_a_list():
    data = unit_scale_inputs(9, 3, 2, 16, 8)
    gate_up, down = leaves(data.gate_up_proj), leaves(data.down_proj)
    gate_up[1].requires_grad_(False)
    down[2].requires_grad_(False)
    y = ops.fused_experts(
        data.hidden_states,
        data.topk_ids,
        data.topk_weights,
        gate_up,
        [],
        down,
        "silu",
        torch.float32,
    )
    y.sum().backward()
    assert [w.grad is not None for w in gate_up] == [True, False, True]
    assert [w.grad is not None for w in down] == [True, True, False]


def test_ids_out_of_range_have_no_gradient():
    data = unit_scale_inputs(6, 4, 2, 16, 8)
    ids = data.topk_ids.clone()
    ids[:, 1] = torch.tensor([-1, 4, 9, -5, 4, -1])
    x, weights = leaves([data.hidden_states, data.topk_weights])
    args = ([data.gate_up_proj], [], [data.down_proj], "silu", torch.float32)
    ops.fused_experts(x, ids, weights, *args).square().sum().backward()
    x2, weights2 = leaves([data.hidden_states, data.topk_weights[:, :1].contiguous()])
    ops.fused_experts(x2, ids[:, :1].contiguous(), weights2, *args).square().sum().backward()
    torch.testing.assert_close(x.grad, x2.grad)
    torch.testing.assert_close(weights.grad[:, :1], weights2.grad)
    assert torch.equal(weights.grad[:, 1], torch.zeros(6))


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens):
    data = unit_scale_inputs(tokens, 3, 2, 16, 8)
    inputs = leaves([data.hidden_states, data.topk_weights, data.gate_up_proj, data.down_proj])
    x, weights, gate_up, down = inputs
    y = ops.fused_experts(x, data.topk_ids, weights, [gate_up], [], [down], "silu", x.dtype)
    y.sum().backward()
    for leaf in inputs:
        assert leaf.grad.shape == leaf.shape
        assert bool(leaf.grad.isfinite().all())


def test_expanded_upstream_gradient():
    data = unit_scale_inputs(5, 3, 2, 16, 8, dtype=torch.float64)
    (x,) = leaves([data.hidden_states])
    args = (data.gate_up_proj, data.down_proj)
    y = ops.fused_experts(
        x, data.topk_ids, data.topk_weights, args[:1], [], args[1:], "silu", x.dtype
    )
    y.sum().backward()
    (x2,) = leaves([data.hidden_states])
    reference_experts_fp64(
        x2, data.topk_ids, data.topk_weights, args[0], [], args[1]
    ).sum().backward()
    torch.testing.assert_close(x.grad, x2.grad)


def test_second_derivative_is_refused():
    data = unit_scale_inputs(5, 3, 2, 16, 8)
    (x,) = leaves([data.hidden_states])
    y = ops.fused_experts(
        x,
        data.topk_ids,
        data.topk_weights,
        [data.gate_up_proj],
        [],
        [data.down_proj],
        "silu",
        x.dtype,
    )
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        grad.sum().backward()
