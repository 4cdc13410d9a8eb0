import pytest
import torch

from moe_inductor.ops.cuda import topk_routing
from tests.routers import EXPERTS, ROUTERS, K, call, compared, weights_of, without_ties

NAMES = pytest.mark.parametrize("name", ROUTERS)


def check(logits, bias, facts, k=K, **more):
    args, kwargs = call(logits, bias, facts, k, **more)
    weights, ids = topk_routing(*args, **kwargs)
    choice = compared(logits, bias, facts)
    # Groups are compared too: rows in which two of them are alike, or values, are left out.
    clear = without_ties(choice, k)
    wanted = choice.topk(k, dim=-1).indices
    assert clear.float().mean() > 0.5
    assert torch.equal(ids[clear], wanted[clear])
    filled = None
    if facts.get("fill_weights"):
        filled = compared(logits.double(), bias, facts).gather(-1, ids)
    truth = weights_of(logits.double(), ids, facts, filled)
    torch.testing.assert_close(weights.double()[clear], truth[clear], rtol=2e-5, atol=1e-7)


@NAMES
def test_against_torch(name):
    logits = 2 * torch.randn(20, EXPERTS)
    check(logits, 0.3 * torch.randn(EXPERTS), ROUTERS[name])


@NAMES
@pytest.mark.parametrize(("groups", "size"), [(3, 5), (5, 3), (1, 9), (8, 20)])
def test_sizes_that_are_no_powers_of_two(name, groups, size):
    facts = ROUTERS[name]
    if "groups" in facts:
        facts = facts | {"groups": groups, "kept_groups": min(2, groups)}
    logits = 2 * torch.randn(8, groups * size)
    check(logits, 0.3 * torch.randn(groups * size), facts, k=4)


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v4"])
def test_rounds_scores_as_the_model_does(name):
    """fp16 and scores close to each other, so that it shows; Triton's interpreter does not round to bf16, it cuts."""
    facts = ROUTERS[name]
    logits = (6 + 0.2 * torch.randn(60, EXPERTS)).half()
    bias = 0.003 * torch.randn(EXPERTS)
    args, kwargs = call(logits, bias, facts)
    choice = compared(logits, bias, facts)
    best = choice.topk(K, dim=-1).values
    _, ids = topk_routing(*args, **kwargs, score_dtype=torch.float16)
    assert torch.equal(choice.gather(-1, ids), best)  # among ties any will do
    _, unrounded = topk_routing(*args, **kwargs)
    assert not torch.equal(choice.gather(-1, unrounded), best)


def test_small_softplus():
    logits = torch.tensor([[-60.0, -40.0, -17.0, 0.0, 19.9, 20.1, 90.0]])
    weights, ids = topk_routing(
        logits, 7, False, torch.float32, score="sqrtsoftplus", weight="sqrtsoftplus"
    )
    wanted = torch.nn.functional.softplus(logits.double()).sqrt().gather(-1, ids)
    torch.testing.assert_close(weights.double(), wanted, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v2, groups", "kolibri1"])
def test_bad_rows_stay_bad_alone(name):
    """Ids stay distinct and inside whatever a row holds; other rows keep their bits."""
    nan, inf = float("nan"), float("inf")
    clean, bias = torch.randn(6, EXPERTS), torch.randn(EXPERTS)
    broken = clean.clone()
    broken[0], broken[1, 3], broken[2, 2], broken[3] = nan, nan, inf, -inf
    args, kwargs = call(broken, bias, ROUTERS[name])
    weights, ids = topk_routing(*args, **kwargs)
    assert ids.min() >= 0
    assert ids.max() < EXPERTS
    assert all(len(set(row)) == K for row in ids.tolist())
    good = topk_routing(clean, *args[1:], **kwargs)
    assert torch.equal(weights[4:], good[0][4:])
    assert torch.equal(ids[4:], good[1][4:])
