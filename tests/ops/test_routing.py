"""Forward of ``topk_routing`` on the CPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_routing_matches, reference_routing

from moe_inductor import ops

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("weights_dtype", FLOATS)
def test_equal_to_eager(dtype, weights_dtype, renormalise):
    logits = (torch.randn(33, 16, dtype=torch.float64) * 2).to(dtype)
    weights, ids = ops.topk_routing(logits, 4, renormalise, weights_dtype)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    expected, expected_ids = reference_routing(logits, 4, renormalise, compute)
    assert torch.equal(ids, expected_ids)
    assert torch.equal(weights, expected.to(weights_dtype))
    assert_routing_matches(logits, weights, ids, 4, renormalise, weights_dtype)


@pytest.mark.parametrize("k", [1, 2, 3, 7, 8, 16, 17, 32])
def test_every_k(k):
    logits = torch.randn(9, 32)
    assert_routing_matches(
        logits, *ops.topk_routing(logits, k, True, torch.float32), k, True, torch.float32
    )


@pytest.mark.parametrize("experts", [255, 256, 257, 512, 1025])
def test_the_last_expert_can_win(experts):
    logits = torch.randn(3, experts)
    logits[:, -1] = 9
    _, ids = ops.topk_routing(logits, 2, True, torch.float32)
    assert ids[:, 0].tolist() == [experts - 1] * 3


def test_bad_rows_stay_bad_alone():
    logits = torch.randn(7, 12)
    clean = ops.topk_routing(logits, 3, True, torch.float32)
    logits[1], logits[2, 5] = float("nan"), float("nan")
    logits[3], logits[4] = float("-inf"), float("inf")
    weights, ids = ops.topk_routing(logits, 3, True, torch.float32)
    assert bool(((ids >= 0) & (ids < 12)).all())
    assert all(len(set(row)) == 3 for row in ids.tolist())
    rest = [0, 5, 6]
    assert torch.equal(weights[rest], clean[0][rest])
    assert torch.equal(ids[rest], clean[1][rest])


def test_ties_are_broken_as_eager_breaks_them():
    logits = torch.zeros(6, 8)
    _, ids = ops.topk_routing(logits, 3, True, torch.float32)
    assert torch.equal(ids, reference_routing(logits, 3, True)[1])


def test_of_ties_the_first_is_the_one_expert():
    """torch.max and torch.argmax promise it, torch.topk nothing."""
    logits = torch.zeros(6, 8)
    logits[:, 4:] = 1.0
    _, ids = ops.topk_routing(logits, 1, True, torch.float32)
    assert torch.equal(ids, logits.argmax(dim=-1, keepdim=True))


def test_strides():
    logits = torch.randn(10, 40)
    for view in (logits[:, 3:19], logits[::2], logits[:, :16].t(), logits[:1, :16].expand(5, -1)):
        ours = ops.topk_routing(view, 2, True, torch.float32)
        expected = ops.topk_routing(view.contiguous(), 2, True, torch.float32)
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
        assert all(tensor.is_contiguous() for tensor in ours)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, 40),
    experts=st.integers(1, 40),
    data=st.data(),
    renormalise=st.booleans(),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 2**31),
)
def test_random_sizes(tokens, experts, data, renormalise, dtype, seed):
    k = data.draw(st.integers(1, experts))
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(tokens, experts, generator=generator) * 2).to(dtype)
    weights, ids = ops.topk_routing(logits, k, renormalise, torch.float32)
    assert_routing_matches(logits, weights, ids, k, renormalise, torch.float32)


@pytest.mark.parametrize(
    ("logits", "k", "dtype", "error", "words"),
    [
        (torch.randn(4), 1, torch.float32, ValueError, r"\[4\]"),
        (torch.randn(4, 3), 4, torch.float32, ValueError, r"k must be in 1..3, got 4"),
        (torch.randn(4, 3), 0, torch.float32, ValueError, r"got 0"),
        (torch.ones(4, 3, dtype=torch.int64), 2, torch.float32, TypeError, "int64"),
        (torch.randn(4, 3), 2, torch.int32, TypeError, "int32"),
    ],
)
def test_wrong_arguments(logits, k, dtype, error, words):
    with pytest.raises(error, match=f"topk_routing: .*{words}"):
        ops.topk_routing(logits, k, False, dtype)
