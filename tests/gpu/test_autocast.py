"""Blocks under ``torch.autocast("cuda")``, whose lists of operators are not the CPU's."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.oracle import assert_within_fp64_rule
from tests.without_inductor import WithoutInductor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def _step(run, module, x):
    module.zero_grad()
    x = x.clone().requires_grad_()
    out = run(x)
    out.float().square().sum().backward() if out.dtype != torch.float64 else out.square().sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in module.parameters() if p.grad is not None)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spelling", ["loop", "batched", "plain"])
def test_fused_under_autocast(spelling, dtype):
    from moe_inductor.patterns import _blocks
    from moe_inductor.patterns.expert_loop import Loop
    from moe_inductor.patterns.hf_batched_mm import Batched

    from moe_inductor.capture import scope

    plain = {"gated": False, "act": _blocks.VARIANTS["plain_relu_power"]["act"]}
    build = {"loop": Loop, "batched": Batched, "plain": type("Plain", (Batched,), plain)}[spelling]
    for seed in range(20):
        torch.manual_seed(seed)
        block = build().cuda()
        exact, x = copy.deepcopy(block).double(), torch.randn(50, 32, device="cuda")
        with torch.no_grad(), torch.autocast("cuda", dtype):
            mine = block.route(block.gate(x))[1]
        if torch.equal(mine, exact.route(exact.gate(x.double()))[1]):
            break
    torch._dynamo.reset()
    backend = WithoutInductor()
    scope.install(backend)
    compiled = torch.compile(block, backend=backend)
    with torch.autocast("cuda", dtype):
        eager = _step(block, block, x)
        ours = _step(compiled, block, x)
    truth = _step(exact, exact, x.double())
    (report,) = [b for r in backend.reports for b in r.blocks]
    assert report.fused, report.why_not()
    assert report.moe.experts.compute_dtype == dtype
    for i, (mine, theirs, exactly) in enumerate(zip(ours, eager, truth, strict=True)):
        scale = exactly.square().mean().sqrt().clamp(min=1.0)
        assert_within_fp64_rule(mine / scale, theirs / scale, exactly / scale, f"tensor {i}")
