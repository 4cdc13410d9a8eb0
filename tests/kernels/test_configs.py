"""Plans that must hold whatever the tiles are."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from moe_inductor.kernels.configs import DecodePlan, GroupedPlan, Problem, choose_plan

TOKENS = (1, 2, 3, 8, 17, 40, 100, 500, 2000, 16384)


def plans(**facts):
    problem = Problem(1, 64, 8, 2048, 1024, torch.bfloat16, (9, 0), gate_up_tma=True, down_tma=True)
    problem = dataclasses.replace(problem, **facts)
    return [choose_plan(dataclasses.replace(problem, T=T)) for T in TOKENS]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (0, 0)])
def test_batch_invariant_plans(capability, dtype):
    """No GEMV, whose sums are in another order; and one tile for all T where the order may depend on the tile."""
    facts = {"capability": capability, "dtype": dtype}
    assert isinstance(plans(**facts)[0], DecodePlan)
    invariant = plans(**facts, batch_invariant=True)
    assert all(isinstance(plan, GroupedPlan) for plan in invariant)
    if capability[0] not in (8, 9) and dtype != torch.float32:
        assert len(set(invariant)) == 1
