"""``topk_routing`` for the routers of real models: ids, weights and gradients."""

import pytest
import torch
from oracle import assert_within_fp64_rule
from routers import EXPERTS, ROUTERS, K, call, written

from moe_inductor import ops

NAMES = pytest.mark.parametrize("name", ROUTERS)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(dtype, tokens=40, bias_dtype=None):
    torch.manual_seed(0)
    logits = (2 * torch.randn(tokens, EXPERTS, dtype=torch.float64)).to(dtype)
    return logits, (0.3 * torch.randn(EXPERTS, dtype=torch.float64)).to(bias_dtype or dtype)


@NAMES
@pytest.mark.parametrize("bias_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_chooses_what_the_model_chooses(name, dtype, bias_dtype):
    """Bit by bit, in whatever dtype the model holds its scores: every rounding before the choice counts."""
    logits, bias = draw(dtype, 200, bias_dtype)
    args, facts = call(logits, bias, ROUTERS[name])
    _, ids = ops.topk_routing(*args, **facts, score_dtype=dtype)
    assert torch.equal(ids, written(logits, bias, ROUTERS[name])[1])


@NAMES
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_and_gradients_against_fp64(name, dtype):
    logits, bias = draw(dtype)
    exact_ids = written(logits.double(), bias.double(), ROUTERS[name])[1]
    clear = (exact_ids == written(logits, bias, ROUTERS[name])[1]).all(-1)
    logits = logits[clear]
    upstream = torch.randn(len(logits), K)
    args, facts = call(logits, bias, ROUTERS[name])
    results = []
    for run, x in (
        (lambda x: ops.topk_routing(x, *args[1:], **facts, score_dtype=dtype)[0], logits),
        (lambda x: written(x, bias, ROUTERS[name])[0], logits),
        (lambda x: written(x, bias.double(), ROUTERS[name])[0], logits.double()),
    ):
        leaf = x.clone().requires_grad_()
        weights = run(leaf)
        (weights * upstream).sum().backward()
        results.append((weights.detach(), leaf.grad))
    for what, mine, eager, exact in zip(("weights", "d logits"), *results, strict=True):
        assert_within_fp64_rule(mine, eager, exact, what)


@NAMES
def test_gradcheck(name):
    logits, bias = draw(torch.float64, 4)
    logits.requires_grad_()

    def run(logits):
        args, facts = call(logits, bias, ROUTERS[name], weights_dtype=torch.float64)
        return ops.topk_routing(*args, **facts)[0]

    assert torch.autograd.gradcheck(run, [logits])


@pytest.mark.parametrize("name", ["deepseek_v3", "ernie4_5", "deepseek_v2, groups"])
def test_opcheck(name):
    logits, bias = draw(torch.float32, 5)
    args, facts = call(logits.requires_grad_(), bias, ROUTERS[name])
    torch.library.opcheck(torch.ops.moe_inductor.topk_routing.default, args, facts)


def test_fill_of_zero_beats_negative_scores():
    """DeepSeek-V3 of 4.57: experts of dropped groups have 0, which is more than a biased score may be."""
    logits = torch.tensor([[1.0, 2.0, -1.0, -2.0]])
    bias = torch.full((4,), -5.0)
    facts = {"bias": bias, "score": "sigmoid", "weight": "sigmoid", "groups": 2}
    ids = {
        fill: ops.topk_routing(logits, 2, False, torch.float32, fill=fill, **facts)[1].sort().values
        for fill in (0.0, float("-inf"))
    }
    assert ids[0.0].tolist() == [[2, 3]]
    assert ids[float("-inf")].tolist() == [[0, 1]]


def test_the_bias_has_no_gradient():
    logits, bias = draw(torch.float32)
    bias.requires_grad_()
    weights, _ = ops.topk_routing(
        logits.requires_grad_(), 2, True, torch.float32, bias, "sigmoid", "sigmoid"
    )
    weights.square().sum().backward()
    assert bias.grad is None
    assert logits.grad is not None


@pytest.mark.parametrize(
    ("facts", "error", "words"),
    [
        ({"bias": torch.zeros(3)}, ValueError, r"bias must be \[4\], got \[3\]"),
        ({"bias": torch.zeros(4, dtype=torch.int64)}, TypeError, "int64"),
        ({"groups": 3}, ValueError, "4 experts in 3 groups"),
        ({"groups": 2, "kept_groups": 3}, ValueError, "got 3"),
        ({"groups": 4, "group_score": "top2"}, ValueError, "two experts in each group"),
        ({"groups": 2, "group_score": "mean"}, ValueError, "mean"),
        ({"groups": 2, "fill": 1.0, "fill_weights": True}, ValueError, "fill 0, got 1.0"),
        ({"score": "tanh"}, ValueError, "tanh"),
        ({"score": "softmax_of_chosen"}, ValueError, "softmax_of_chosen"),
        ({"score_dtype": torch.int8}, TypeError, "int8"),
    ],
)
def test_wrong_arguments(facts, error, words):
    with pytest.raises(error, match=f"topk_routing: .*{words}"):
        ops.topk_routing(torch.randn(2, 4), 2, False, torch.float32, **facts)
