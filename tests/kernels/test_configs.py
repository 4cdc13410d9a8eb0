"""Plans that must hold whatever the tiles are."""

import dataclasses
import itertools

import pytest
import torch

pytest.importorskip("triton")

from moe_inductor.kernels.configs import (
    DecodePlan,
    GemmConfig,
    GroupedPlan,
    Problem,
    RouterRows,
    RouterTiles,
    choose_plan,
    router_plan,
)

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


def test_down_runs_beside_gate_up():
    """Only where that was measured: on Hopper, with TMA, and not where small experts have many rows."""
    grouped = [plan for plan in plans() if isinstance(plan, GroupedPlan)]
    assert [plan.overlap for plan in grouped] == sorted((p.overlap for p in grouped), reverse=True)
    assert {plan.overlap for plan in grouped} == {True, False}
    for facts in (
        {"capability": (8, 0)},
        {"capability": (10, 0)},
        {"gate_up_tma": False},
        {"down_tma": False},
        {"dtype": torch.float32},
    ):
        assert not any(getattr(plan, "overlap", False) for plan in plans(**facts))
    by_pointers = GemmConfig(16, 32, 32)
    with pytest.raises(ValueError, match="TMA"):
        GroupedPlan(by_pointers, by_pointers, overlap=True)


def test_router_in_tiles():
    """Enough programs for a GPU and not many more, no piece empty, no tile larger than what there is to multiply."""
    sizes = itertools.product((8, 9, 64, 300, 1024), (8, 16, 33, 128, 256), (130, 1088, 2048, 7168))
    plans = {size: router_plan(*size, torch.bfloat16) for size in sizes}
    tiles = {size: plan for size, plan in plans.items() if isinstance(plan, RouterTiles)}
    assert len(tiles) > 40
    for (T, E, H), plan in tiles.items():
        blocks = -(-H // plan.block_h)
        assert 1 <= plan.pieces <= 16
        assert -(-blocks // -(-blocks // plan.pieces)) == plan.pieces
        assert plan.block_t < 2 * max(T, 16)
        assert plan.block_e < 2 * max(E, 16)
        programs = -(-T // plan.block_t) * -(-E // plan.block_e) * plan.pieces
        assert programs >= 48
        assert programs <= 128 or (
            plan.pieces <= 4 and plan.block_t * plan.block_e >= 64 * min(64, E)
        )


@pytest.mark.parametrize(
    ("T", "E", "H", "kind"),
    [
        (1, 128, 2048, RouterRows),
        (7, 128, 2048, RouterRows),
        (8, 128, 2048, RouterTiles),
        (1024, 128, 2048, RouterTiles),
        (1025, 128, 2048, type(None)),
        (512, 256, 7168, RouterTiles),
        (1024, 256, 7168, type(None)),  # too large
        (32, 8, 4096, RouterRows),  # too few programs
        (7, 256, 7168, type(None)),
    ],
)
def test_how_the_router_is_multiplied(T, E, H, kind):
    assert type(router_plan(T, E, H, torch.bfloat16)) is kind
    assert not isinstance(router_plan(T, E, H, torch.float32), RouterTiles)
