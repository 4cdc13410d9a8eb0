"""Every pattern that is found: its samples are fused and right, its near misses are refused and untouched.

Nothing here names a pattern.  A new file in patterns/ is tested because it is there.
"""

from __future__ import annotations

import copy
import glob
import itertools
import os
import zlib
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe_inductor import patterns
from moe_inductor.match.api import (
    ChosenSpelling,
    ExpertsSpelling,
    HitListSpelling,
    RouterSpelling,
    Sample,
    discover,
)
from moe_inductor.reasons import Code
from tests.oracle import assert_within_fp64_rule
from tests.patterns.conftest import require

aten = torch.ops.aten

SPELLINGS = discover()
MODES = {
    (pass_, shapes): (pass_ == "training", shapes == "dynamic")
    for pass_ in ("inference", "training")
    for shapes in ("static", "dynamic")
}
SAMPLES = [
    pytest.param(
        s, sample, dtype, *mode, id=f"{s.name}-{sample.name}-{str(dtype)[6:]}-{'-'.join(name)}"
    )
    for s in SPELLINGS
    for sample in s.samples
    for dtype in sample.dtypes
    for name, mode in MODES.items()
    if not sample.brief or name == ("training", "static")
]
NEAR_MISSES = [
    pytest.param(s, miss, id=f"{s.name}-{miss.name}") for s in SPELLINGS for miss in s.near_misses
]
SOURCES = {os.path.basename(file) for file in glob.glob(f"{patterns.__path__[0]}/*.py")}
T = 29
# So few that some experts have none: what is done for these is what a hit list is about.
FEW = 2


def _floats(output: object) -> list[torch.Tensor]:
    return [
        t for t in tree_leaves(output) if isinstance(t, torch.Tensor) and t.dtype.is_floating_point
    ]


def _step(run: object, module: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """One training step: the outputs and the gradients of the input and of every parameter."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    outputs = _floats(run(x))  # type: ignore[operator]
    loss = sum(o.square().sum() for o in outputs if o.requires_grad)
    if isinstance(
        loss, torch.Tensor
    ):  # a block that skipped every expert has nothing to differentiate
        loss.backward()
    return [o.detach() for o in outputs] + [
        torch.zeros_like(p) if p.grad is None else p.grad for p in (x, *module.parameters())
    ]


class _NearBounds(TorchDispatchMode):
    """Is anything that is clamped so near to a bound that rounding decides on which side of it?"""

    found = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default):
            for bound in (b for b in args[1:] if b is not None):
                self.found |= bool(((args[0] - bound).abs() < 2**-7 * abs(bound)).any())
        return func(*args, **(kwargs or {}))


def _inputs(
    sample: Sample, dtype: torch.dtype
) -> tuple[torch.nn.Module, torch.nn.Module, torch.Tensor]:
    """The block in ``dtype``, the same block in fp64, and tokens for which rounding decides nothing.

    Which experts are chosen, and which gradients a clamp lets through, is discrete.  Where two experts score alike, or
    a number is the bound up to rounding, eager is as likely to be wrong as we are, and comparing means nothing.
    """
    torch.manual_seed(zlib.crc32(sample.name.encode()))
    module = sample.build().to(dtype)
    exact = copy.deepcopy(module).double()
    tokens = torch.randn(16 * T, 32, dtype=dtype)

    def near_bounds(tokens: torch.Tensor) -> bool:
        with _NearBounds() as bounds:
            exact(tokens.double())
        return bounds.found

    with torch.no_grad():
        mine = module.route(module.gate(tokens))[1]
        truth = exact.route(exact.gate(tokens.double()))[1]
        tokens = tokens[(mine == truth).flatten(1).all(1)]
        if near_bounds(tokens):
            clear = (token for token in tokens.split(1) if not near_bounds(token))
            tokens = torch.cat(list(itertools.islice(clear, T)))
    assert len(tokens) >= T, "not enough tokens without ties"
    return module, exact, tokens[:T]


@pytest.mark.parametrize(("spelling", "sample", "dtype", "training", "dynamic"), SAMPLES)
def test_sample_is_fused_and_right(spelling, sample, dtype, training, dynamic, rewritten):
    require(spelling)
    module, exact_module, x = _inputs(sample, dtype)
    compiled = rewritten(module, dynamic=dynamic)

    def forward(run, module, x):
        with torch.no_grad():
            return _floats(run(x))

    run = _step if training else forward
    eager = run(module, module, x)
    exact = run(exact_module, exact_module, x.double())
    ours = run(compiled, module, x)

    (block,) = compiled.blocks
    assert block.fused, block.why_not()
    assert len(compiled.backend.reports) == 1, "one graph"
    calls = [op for op in compiled.backend.ops if "moe_inductor.fused_experts" in op]
    assert len(calls) == 1, "the fused op is in the graph that ran"
    if isinstance(spelling, ExpertsSpelling):
        assert block.spelling == spelling.name
    elif isinstance(spelling, RouterSpelling):
        assert block.router_fused, block.router_reason
    for i, (mine, theirs, truth) in enumerate(zip(ours, eager, exact, strict=True)):
        assert_within_fp64_rule(mine, theirs, truth, what=f"tensor {i}")


@pytest.mark.parametrize(("spelling", "miss"), NEAR_MISSES)
def test_near_miss_is_refused_with_its_reason(spelling, miss, rewritten):
    require(spelling)
    torch.manual_seed(zlib.crc32(miss.name.encode()))
    dtype = torch.bfloat16 if spelling.samples[0].dtypes == (torch.bfloat16,) else torch.float32
    module = miss.build().to(dtype)
    x = torch.randn(
        FEW if isinstance(spelling, (HitListSpelling, ChosenSpelling)) else T, 32, dtype=dtype
    )
    compiled = rewritten(module)
    eager = _step(module, module, x)
    ours = _step(compiled, module, x)

    # A loop that is given up is traced again, in pieces: nothing is fused in any of these.
    block, *later = compiled.blocks
    ops = " ".join(compiled.backend.ops)
    assert not any(b.fused for b in later)
    assert "moe_inductor.topk_routing" not in ops
    if isinstance(spelling, RouterSpelling) or miss.code == Code.ROUTER.name:
        assert block.fused, block.why_not()
        assert not block.router_fused
        reason, tolerance = block.router_reason, 1e-5
    else:
        assert not block.fused
        assert "moe_inductor" not in ops
        reason, tolerance = block.reason, 0.0  # nothing was touched: the same bits
    assert reason.code is Code[miss.code], f"{reason.code}: {reason}"
    assert reason.location.split(":")[0] in SOURCES, "a refusal names the model's source line"
    outputs = len(_floats(module(x)))
    for i, (mine, theirs) in enumerate(zip(ours, eager, strict=True)):
        # The backward of an index adds up in an order that varies from run to run.
        bound = tolerance if i < outputs else max(tolerance, 1e-4)
        torch.testing.assert_close(mine, theirs, rtol=bound, atol=bound)


def test_every_family_of_patterns_has_near_misses():
    """25 of structure each, besides those of the activation, which is read for all of them by the same code.

    Routers are one family: what is done to scores before and after the choice is read by the same code as well.
    """
    counted: Counter[str] = Counter()
    for s in SPELLINGS:
        family = "router" if isinstance(s, RouterSpelling) else s.name
        counted[family] += sum(miss.code != Code.ACTIVATION.name for miss in s.near_misses)
    assert min(counted.values()) >= 25, counted


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda spelling: spelling.name)
def test_no_near_miss_is_another(spelling):
    for tests in (spelling.samples, spelling.near_misses):
        assert len({t.name for t in tests}) == len({t.build for t in tests}) == len(tests)
