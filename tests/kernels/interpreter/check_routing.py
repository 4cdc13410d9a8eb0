import pytest
import torch

from moe_inductor.ops.cuda import topk_routing


def reference(logits, k, renormalise):
    order = torch.sort(logits.float(), dim=-1, descending=True, stable=True)
    ids = order.indices[:, :k]
    weights = logits.double().softmax(-1).gather(1, ids)
    return weights / weights.sum(-1, keepdim=True) if renormalise else weights, ids


@pytest.mark.parametrize("E", [1, 2, 3, 8, 128, 255, 256, 257, 512, 1025])
@pytest.mark.parametrize("renormalise", [False, True])
def test_against_sort(E, renormalise):
    """Regression imp#2056, sglang#21610: experts beyond 255 and 1024 can win."""
    logits = torch.randn(3, E)
    logits[0, -1] = 9.0
    for k in {min(k, E) for k in (1, 2, 3, 8, 17)}:
        weights, ids = topk_routing(logits, k, renormalise, torch.float32)
        wanted, wanted_ids = reference(logits, k, renormalise)
        assert ids.dtype == torch.int64
        assert torch.equal(ids, wanted_ids)
        torch.testing.assert_close(weights.double(), wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("E", [5, 16, 33])
def test_every_expert(E):
    """k = E; regression candle-vllm#296: a kernel that assumed k = 8."""
    logits = torch.randn(2, E)
    _, ids = topk_routing(logits, E, True, torch.float32)
    assert torch.equal(ids, reference(logits, E, True)[1])


def test_ties_take_the_lowest_id():
    """Regression vllm#54403, sglang#13969."""
    logits = torch.tensor([[0.0, 1.0, -0.0, 1.0, 0.0], [2.0] * 5, [-0.0, 0.0, -0.0, 0.0, 0.0]])
    _, ids = topk_routing(logits, 4, True, torch.float32)
    assert ids.tolist() == [[1, 3, 0, 2], [0, 1, 2, 3], [0, 1, 2, 3]]


def test_nan_and_inf_rows():
    """Regression vllm#39391, sglang#30079: ids stay distinct and inside, other rows keep their bits."""
    nan, inf = float("nan"), float("inf")
    clean = torch.randn(6, 7)
    broken = clean.clone()
    broken[0], broken[1, 3], broken[2, 2], broken[3], broken[4, :3] = nan, nan, inf, -inf, -inf
    for renormalise in (False, True):
        weights, ids = topk_routing(broken, 3, renormalise, torch.float32)
        assert ids.min() >= 0
        assert ids.max() < 7
        assert all(len(set(row)) == 3 for row in ids.tolist())
        assert weights[:4].isnan().all()
        assert weights[4:].isfinite().all()
        good_weights, good_ids = topk_routing(clean, 3, renormalise, torch.float32)
        assert torch.equal(weights[5], good_weights[5])
        assert torch.equal(ids[5], good_ids[5])


def test_strided_logits_and_empty():
    """Regression flashinfer#4713: strided logits silently wrong."""
    wide = torch.randn(4, 20)
    for logits in (wide[:, 3:11], wide.T[:8].contiguous().T[:, :8], wide[::2, :8]):
        _, ids = topk_routing(logits, 2, True, torch.float32)
        assert torch.equal(ids, reference(logits, 2, True)[1])
    weights, ids = topk_routing(torch.randn(0, 8), 2, True, torch.float16)
    assert weights.shape == ids.shape == (0, 2)
    assert weights.dtype == torch.float16
