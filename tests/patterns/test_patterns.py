"""Every pattern that is found: its samples are fused and right, its near misses are refused and untouched.

Nothing here names a pattern.  A new file in patterns/ is tested because it is there.
"""

from __future__ import annotations

import glob
import itertools
import os
import zlib
from collections import Counter

import pytest
import torch

from moe_inductor import patterns
from moe_inductor.match.api import (
    ChosenSpelling,
    HitListSpelling,
    RouterSpelling,
    discover,
)
from moe_inductor.reasons import Code
from tests.patterns.conftest import require
from tests.patterns.samples import T, check, floats, step, ways

SPELLINGS = discover()
SAMPLES = [
    pytest.param(
        s,
        sample,
        dtype,
        training,
        dynamic,
        id=f"{s.name}-{sample.name}-{str(dtype)[6:]}-"
        f"{'training' if training else 'inference'}-{'dynamic' if dynamic else 'static'}",
    )
    for s in SPELLINGS
    for sample in s.samples
    for dtype, training, dynamic in itertools.islice(ways(sample), 1, None)
]
NEAR_MISSES = [
    pytest.param(s, miss, id=f"{s.name}-{miss.name}") for s in SPELLINGS for miss in s.near_misses
]
SOURCES = {os.path.basename(file) for file in glob.glob(f"{patterns.__path__[0]}/*.py")}
# So few that some experts have none: what is done for these is what a hit list is about.
FEW = 2


@pytest.mark.parametrize(("spelling", "sample", "dtype", "training", "dynamic"), SAMPLES)
def test_sample_is_fused_and_right(spelling, sample, dtype, training, dynamic, rewritten):
    require(spelling)
    check(spelling, sample, dtype, training, dynamic)


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
    eager = step(module, module, x)
    ours = step(compiled, module, x)

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
    outputs = len(floats(module(x)))
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
