import pytest
import torch

from moe_inductor.kernels.align import SMALL_SLOTS, align, max_row_blocks


def check(topk_ids: torch.Tensor, E: int, block_m: int) -> None:
    slots = topk_ids.numel()
    result = align(topk_ids, E, block_m)
    padded = int(result.num_tokens_post_padded)
    ids = topk_ids.flatten()
    used = (ids >= 0) & (ids < E)
    counts = torch.bincount(ids[used], minlength=E)
    blocks = (counts + block_m - 1) // block_m
    assert padded == int(blocks.sum()) * block_m
    assert padded <= result.sorted_token_ids.numel()
    owners = [e for e, n in enumerate(blocks.tolist()) for _ in range(n)]
    assert result.expert_ids[: padded // block_m].tolist() == owners
    assert not result.finished[: padded // block_m].any()
    rows = result.sorted_token_ids[:padded]
    # Stable: expert after expert, slots ascending, padding at the end of each expert.
    wanted = []
    for expert, number in enumerate(blocks):
        mine = torch.where(ids == expert)[0].tolist()
        wanted += mine + [slots] * (int(number) * block_m - len(mine))
    assert rows.tolist() == wanted


@pytest.mark.parametrize(
    ("E", "T"),
    [(E, T) for E in (1, 3, 8) for T in (1, 15, 16, 17, 127, 129)]
    + [(128, 17), (256, 1), (257, 17)],
)
def test_small(E, T, poisoned_workspaces):
    k = min(E, 3)
    ids = torch.rand(T, E).topk(k).indices
    check(ids, E, 16 if T % 2 else 64)


@pytest.mark.parametrize("E", [1, 31])
@pytest.mark.parametrize("slots", [SMALL_SLOTS + 1, 3 * 1024, 3 * 1024 + 127])
def test_large(E, slots, poisoned_workspaces):
    check(torch.randint(0, E, (slots, 1)), E, 128)


@pytest.mark.parametrize("slots", [40, SMALL_SLOTS + 5, 32 * 300])
def test_one_expert_takes_all_and_int32_ids(slots, poisoned_workspaces):
    check(torch.full((slots, 1), 4, dtype=torch.int32), 11, 32)


@pytest.mark.parametrize("slots", [50, SMALL_SLOTS + 50])
def test_ids_outside_appear_nowhere(slots, poisoned_workspaces):
    """Regression aiter#4636: negative ids of expert parallelism."""
    ids = torch.randint(-2, 9, (slots, 1))
    ids[3], ids[5] = 2**31 + 1, -(2**40)
    check(ids, 7, 16)


@pytest.mark.parametrize("slots", [33, SMALL_SLOTS + 1])
def test_no_valid_id(slots, poisoned_workspaces):
    check(torch.full((slots, 1), -1), 5, 16)


def test_max_row_blocks_is_reached_and_never_passed():
    for slots in range(1, 40):
        for E in (1, 2, 5, 50):
            bound = max_row_blocks(slots, E, 16)
            active = min(slots, E)
            worst = (active - 1) + -(-(slots - active + 1) // 16)
            assert worst <= bound
