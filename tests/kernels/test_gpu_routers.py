"""On a CUDA device: ``topk_routing`` for the routers of real models, forward and backward."""

import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from moe_inductor import ops
from moe_inductor.ops import cuda
from tests.oracle import assert_within_fp64_rule
from tests.routers import ROUTERS, call, compared, weights_of, without_ties, written

pytestmark = pytest.mark.gpu
NAMES = pytest.mark.parametrize("name", ROUTERS)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(T, E, dtype, bias_dtype=torch.float32):
    logits = (2 * torch.randn(T, E, device="cuda", dtype=torch.float64)).to(dtype)
    return logits, (0.3 * torch.randn(E, device="cuda")).to(bias_dtype)


@NAMES
@pytest.mark.parametrize(("T", "E", "k"), [(1, 16, 2), (300, 128, 8), (77, 160, 6), (64, 1024, 17)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_torch(name, T, E, k, dtype):
    facts = ROUTERS[name]
    logits, bias = draw(T, E, dtype)
    args, kwargs = call(logits, bias, facts, k)
    weights, ids = cuda.topk_routing(*args, **kwargs)
    choice = compared(logits.float(), bias, facts)
    clear = without_ties(choice, k)
    assert torch.equal(ids[clear], choice.topk(k, dim=-1).indices[clear])
    filled = compared(logits.double(), bias, facts) if facts.get("fill_weights") else None
    truth = weights_of(
        logits.double(), ids, facts, None if filled is None else filled.gather(-1, ids)
    )
    torch.testing.assert_close(weights.double()[clear], truth[clear], rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v4", "mistral4", "ernie4_5"])
def test_rounds_scores_as_the_model_does(name, bias_dtype):
    """The rounding moves few values across another; where exp itself rounds otherwise, one of a thousand."""
    logits, bias = draw(4000, 16, torch.bfloat16, bias_dtype)
    args, kwargs = call(logits, bias, ROUTERS[name])
    _, ids = cuda.topk_routing(*args, **kwargs, score_dtype=torch.bfloat16)
    choice = compared(logits, bias, ROUTERS[name])
    same = (choice.gather(-1, ids) == choice.topk(ids.shape[1], dim=-1).values).all(-1)
    assert same.float().mean() > 0.999


@NAMES
@pytest.mark.parametrize("dtype", DTYPES)
def test_training_against_fp64(name, dtype):
    logits, bias = draw(200, 16, dtype)
    facts = ROUTERS[name]
    args, kwargs = call(logits, bias, facts)
    chosen = [
        cuda.topk_routing(*args, **kwargs)[1],
        written(logits, bias, facts)[1],
        written(logits.double(), bias.double(), facts)[1],
    ]
    clear = (chosen[0] == chosen[2]).all(-1) & (chosen[1] == chosen[2]).all(-1)
    assert clear.float().mean() > 0.5
    logits = logits[clear]
    upstream = torch.randn(len(logits), chosen[0].shape[1], device="cuda")
    results = []
    for run, x in (
        (lambda x: ops.topk_routing(x, *args[1:], **kwargs)[0], logits),
        (lambda x: written(x, bias, facts)[0], logits),
        (lambda x: written(x, bias.double(), facts)[0], logits.double()),
    ):
        leaf = x.clone().requires_grad_()
        weights = run(leaf)
        (weights * upstream).sum().backward()
        results.append((weights.detach(), leaf.grad))
    for what, mine, eager, exact in zip(("weights", "d logits"), *results, strict=True):
        assert_within_fp64_rule(mine, eager, exact, what)


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v2, groups", "kolibri1"])
def test_bad_rows_stay_bad_alone(name):
    nan, inf = float("nan"), float("inf")
    clean, bias = draw(64, 128, torch.float32)
    broken = clean.clone()
    broken[0], broken[1, 3], broken[2, 2], broken[3] = nan, nan, inf, -inf
    args, kwargs = call(broken, bias, ROUTERS[name], 8)
    weights, ids = cuda.topk_routing(*args, **kwargs)
    assert ids.min() >= 0
    assert ids.max() < 128
    assert all(len(set(row)) == 8 for row in ids.tolist())
    good = cuda.topk_routing(clean, *args[1:], **kwargs)
    assert torch.equal(weights[4:], good[0][4:])
    assert torch.equal(ids[4:], good[1][4:])


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss"])
def test_cuda_graph(name):
    logits, bias = draw(32, 64, torch.bfloat16)
    args, kwargs = call(logits, bias, ROUTERS[name], 6)
    cuda.topk_routing(*args, **kwargs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        weights, ids = cuda.topk_routing(*args, **kwargs)
    logits.copy_(draw(32, 64, torch.bfloat16)[0])
    graph.replay()
    wanted = cuda.topk_routing(*args, **kwargs)
    assert torch.equal(weights, wanted[0])
    assert torch.equal(ids, wanted[1])
