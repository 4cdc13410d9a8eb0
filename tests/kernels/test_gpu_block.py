"""On a CUDA device: a whole block as one op, against fp64 and against its parts."""

import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from torch._inductor.utils import run_and_get_code

from moe_inductor.kernels.configs import RouterRows, RouterTiles, router_plan
from moe_inductor.kernels.router_pieces import router_pieces
from moe_inductor.kernels.routing import topk_routing
from moe_inductor.ops import cuda
from moe_inductor.ops.block import Block
from moe_inductor.ops.check import Call, Routing
from tests.oracle import assert_within_fp64_rule, reference_experts, reference_experts_fp64
from tests.router_product import logits_by

pytestmark = pytest.mark.gpu
bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [bf16, fp16, fp32])
@pytest.mark.parametrize(
    ("E", "H"), [(1, 64), (8, 4096), (128, 2048), (257, 7168), (32, 2880), (5, 33)]
)
def test_router_logits(E, H, dtype):
    weight = (torch.randn(E, H, device="cuda") / H**0.5).to(dtype)
    bias = torch.randn(E, device="cuda", dtype=dtype)
    for T in (1, 2, 3, 4, 7, 8, 17, 33, 200):
        x = torch.randn(T, H, device="cuda", dtype=dtype)
        exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
        eager = torch.nn.functional.linear(x, weight, bias)
        plans = {router_plan(T, E, H, dtype), RouterRows(1, 8192), RouterRows(8, 512)}
        if dtype != fp32:
            plans |= {RouterTiles(16, 16, 16, num_stages=2), RouterTiles(64, 64, 4, 64)}
        for plan in plans:
            assert_within_fp64_rule(logits_by(plan, x, weight, bias), eager, exact)


def block(T, E, k, H, I, dtype, per_expert=False, biased=False, **facts):
    x = torch.randn(T, H, device="cuda", dtype=dtype)
    router = (torch.randn(E, H, device="cuda") / H**0.5).to(dtype)
    router_bias = torch.randn(E, device="cuda", dtype=dtype) if biased else None
    gate_up = (torch.randn(E, 2 * I, H, device="cuda") / H**0.5).to(dtype)
    down = (torch.randn(E, H, I, device="cuda") / I**0.5).to(dtype)
    routing = Routing(x, k, True, dtype, **facts)
    weights = (list(gate_up.unbind()), list(down.unbind())) if per_expert else ([gate_up], [down])
    experts = Call(x, x, x, weights[0], [], weights[1], "silu", dtype)
    return x, router, router_bias, gate_up, down, routing, experts


@pytest.mark.parametrize("dtype", [bf16, fp16, fp32])
@pytest.mark.parametrize("per_expert", [False, True])
@pytest.mark.parametrize("T", [1, 2, 5, 30, 300, 3000])
def test_block(T, per_expert, dtype):
    for facts in (
        {},
        {"score": "sigmoid", "weight": "sigmoid", "bias": torch.rand(16, device="cuda")},
        {"bias": None},
    ):
        x, router, router_bias, gate_up, down, routing, experts = block(
            T, 16, 3, 256, 128, dtype, per_expert, "bias" in facts, **facts
        )
        arguments = Block.of(x, router, router_bias, routing, experts)
        plan = router_plan(T, *router.shape, dtype)
        logits = logits_by(plan, x, router, router_bias)
        topk_weights, topk_ids = cuda.topk_routing(logits, *routing[1:])
        exact = reference_experts_fp64(x, topk_ids, topk_weights, gate_up, [], down)
        eager = reference_experts(x, topk_ids, topk_weights, gate_up, [], down)
        first = cuda.fused_moe(*arguments)
        assert_within_fp64_rule(first, eager, exact)
        for _ in range(3):  # written down, and repeated
            assert torch.equal(cuda.fused_moe(*arguments), first)


@pytest.mark.parametrize("dtype", [bf16, fp16])
@pytest.mark.parametrize("T", [8, 9, 64, 300, 1024])
@pytest.mark.parametrize(("E", "H"), [(128, 2048), (256, 7168), (100, 2880)])
@pytest.mark.parametrize("biased", [False, True])
def test_pieces_are_added_up(E, H, T, biased, dtype):
    """The routing of pieces is the routing of the logits that they make, bit by bit."""
    x = torch.randn(T, H, device="cuda", dtype=dtype)
    router = (torch.randn(E, H, device="cuda") / H**0.5).to(dtype)
    router_bias = 30 * torch.randn(E, device="cuda", dtype=dtype) if biased else None
    plan = router_plan(T, E, H, dtype)
    if plan is None:
        pytest.skip("the library's")
    assert isinstance(plan, RouterTiles)
    logits = logits_by(plan, x, router, router_bias)
    facts = (4, False, fp32, None, "softmax", "logits")
    wanted = cuda.topk_routing(logits, *facts)
    sums = router_pieces(x, router, plan)
    given = topk_routing(sums, *facts, first=False, router_bias=router_bias, logits_dtype=dtype)
    assert all(map(torch.equal, given, wanted))


class Model(torch.nn.Module):
    def __init__(self, E=16, k=2, H=256, I=128):
        super().__init__()
        self.k, self.gate = k, torch.nn.Linear(H, E, bias=False)
        self.gate_up = torch.nn.Parameter(torch.randn(E, 2 * I, H) / H**0.5)
        self.down = torch.nn.Parameter(torch.randn(E, H, I) / I**0.5)

    def forward(self, x):
        weights, ids = self.gate(x).softmax(-1).topk(self.k, dim=-1)
        out = torch.zeros_like(x)
        for e in range(self.gate_up.shape[0]):
            token, slot = torch.where(ids == e)
            gate, up = torch.nn.functional.linear(x[token], self.gate_up[e]).chunk(2, -1)
            y = torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, self.down[e])
            out.index_add_(0, token, y * weights[token, slot, None])
        return out


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_through_torch_compile(mode):
    torch._dynamo.reset()
    model = Model().cuda()
    compiled = torch.compile(model, backend="moe_inductor", mode=mode)
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        for T in (1, 4, 64):
            x = torch.randn(T, 256, device="cuda")
            out, codes = run_and_get_code(compiled, x)
            for _ in range(4):
                out = compiled(x)
            if codes:
                assert any("moe_inductor.ops.cuda.fused_moe(" in code for code in codes)
            exact = Model.forward(model.double(), x.double())
            eager = model.float()(x)
            assert_within_fp64_rule(out, eager, exact)
