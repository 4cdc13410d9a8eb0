"""Group the T*k slots by expert and pad each expert to whole row blocks of BLOCK_M.

    array                    shape              dtype  written by      read by
    topk_ids                 T*k                int    caller          _align_*, _count_experts
    chunk_counts             chunks, PADDED_E   int32  _count_experts  _align_large
    sorted_token_ids         max_blocks*BM      int32  _align_*        gate_up, down
    expert_ids               max_blocks         int32  _align_*        gate_up, down
    num_tokens_post_padded   1                  int32  _align_*        gate_up, down
    finished                 max_blocks         int32  _align_*: 0     gate_up, down (overlap.py)

``sorted_token_ids`` holds slot numbers, expert after expert, ascending inside an expert (so every run is the
same); padding holds the number of slots, T*k.  Row block b (rows b*BM..) belongs to ``expert_ids[b]``.  Only the
first ``num_tokens_post_padded`` rows and their blocks are written; kernels must not look further.  A slot whose id
is outside [0, E) appears nowhere.

Few slots: one program per expert, each counts all slots for itself, so that one launch is enough.
Many slots: programs count chunks first, then each places one chunk or finishes one expert.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .early import begin, next_may_begin
from .launch import launch, scratch

SMALL_SLOTS = 2048  # up to here every program reads all ids; beyond, chunks are counted first
RANK_BLOCK = 128  # slots ranked at a time by comparing all pairs


class Alignment(NamedTuple):
    sorted_token_ids: torch.Tensor
    expert_ids: torch.Tensor
    num_tokens_post_padded: torch.Tensor
    finished: torch.Tensor


@triton.jit
def _load_experts(topk_ids_ptr, slots, num_slots, E, PADDED_E: tl.constexpr):
    """Expert of each slot; everything without an expert goes to the last bin, which is no expert's."""
    expert = tl.load(topk_ids_ptr + slots, mask=slots < num_slots, other=-1)
    # Compare before narrowing: an int64 id far outside must not wrap into [0, E).
    return tl.where((expert >= 0) & (expert < E), expert, PADDED_E - 1).to(tl.int32)


@triton.jit
def _block_starts(counts, E, PADDED_E: tl.constexpr, BLOCK_M: tl.constexpr):
    """``(blocks, ends)`` per expert: how many row blocks it has, and the inclusive prefix sum of them."""
    is_expert = tl.arange(0, PADDED_E) < E
    blocks = tl.where(is_expert, (counts + BLOCK_M - 1) // BLOCK_M, 0)
    return blocks, tl.cumsum(blocks, 0)


@triton.jit
def _pick(vector, index, SIZE: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, SIZE) == index, vector, 0), 0)


@triton.jit
def _finish_expert(
    expert,
    first_block,
    num_blocks,
    count,
    sorted_token_ids_ptr,
    expert_ids_ptr,
    finished_ptr,
    num_slots,
    BLOCK_M: tl.constexpr,
    FILL: tl.constexpr,
):
    """Write one expert's ``expert_ids``, the padding behind its slots, and that no tile of it is finished."""
    for start in range(0, num_blocks, FILL):
        block = start + tl.arange(0, FILL)
        tl.store(expert_ids_ptr + first_block + block, expert, mask=block < num_blocks)
        tl.store(finished_ptr + first_block + block, 0, mask=block < num_blocks)
    row = (num_blocks - 1) * BLOCK_M + tl.arange(0, BLOCK_M)  # only the last block has padding
    rows = first_block * BLOCK_M + row
    # Without blocks, every ``row`` is negative and nothing is stored.
    tl.store(sorted_token_ids_ptr + rows, num_slots, mask=row >= count)


@triton.jit(do_not_specialize=["num_slots"])
def _align_small(
    topk_ids_ptr,
    sorted_token_ids_ptr,
    expert_ids_ptr,
    num_tokens_post_padded_ptr,
    finished_ptr,
    num_slots,
    E,
    PADDED_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
    FILL: tl.constexpr,
    EARLY: tl.constexpr,
):
    begin(EARLY)
    next_may_begin(EARLY)
    expert = tl.program_id(0)
    counts = tl.zeros((PADDED_E,), tl.int32)
    for start in range(0, num_slots, BLOCK):
        slots = start + tl.arange(0, BLOCK)
        counts += tl.histogram(_load_experts(topk_ids_ptr, slots, num_slots, E, PADDED_E), PADDED_E)
    blocks, ends = _block_starts(counts, E, PADDED_E, BLOCK_M)
    num_blocks = _pick(blocks, expert, PADDED_E)
    first_block = _pick(ends, expert, PADDED_E) - num_blocks
    count = _pick(counts, expert, PADDED_E)
    if expert == 0:
        tl.store(num_tokens_post_padded_ptr, tl.sum(blocks, 0) * BLOCK_M)
    if num_blocks > 0:
        _finish_expert(
            expert,
            first_block,
            num_blocks,
            count,
            sorted_token_ids_ptr,
            expert_ids_ptr,
            finished_ptr,
            num_slots,
            BLOCK_M,
            FILL,
        )
        row = first_block * BLOCK_M
        for start in range(0, num_slots, BLOCK):
            slots = start + tl.arange(0, BLOCK)
            mine = _load_experts(topk_ids_ptr, slots, num_slots, E, PADDED_E) == expert
            taken = mine.to(tl.int32)
            rank = tl.cumsum(taken, 0) - 1
            tl.store(sorted_token_ids_ptr + row + rank, slots, mask=mine)
            row += tl.sum(taken, 0)


@triton.jit(do_not_specialize=["num_slots"])
def _count_experts(
    topk_ids_ptr,
    chunk_counts_ptr,
    num_slots,
    E,
    PADDED_E: tl.constexpr,
    CHUNK: tl.constexpr,
    EARLY: tl.constexpr,
):
    begin(EARLY)
    next_may_begin(EARLY)
    chunk = tl.program_id(0)
    slots = chunk * CHUNK + tl.arange(0, CHUNK)
    counts = tl.histogram(_load_experts(topk_ids_ptr, slots, num_slots, E, PADDED_E), PADDED_E)
    tl.store(chunk_counts_ptr + chunk * PADDED_E + tl.arange(0, PADDED_E), counts)


@triton.jit(do_not_specialize=["num_slots", "num_chunks"])
def _align_large(
    topk_ids_ptr,
    chunk_counts_ptr,
    sorted_token_ids_ptr,
    expert_ids_ptr,
    num_tokens_post_padded_ptr,
    finished_ptr,
    num_slots,
    num_chunks,
    E,
    PADDED_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    CHUNKS_AT_ONCE: tl.constexpr,
    FILL: tl.constexpr,
    EARLY: tl.constexpr,
):
    begin(EARLY)
    next_may_begin(EARLY)
    chunk = tl.program_id(0)
    lane = tl.arange(0, PADDED_E)
    counts = tl.zeros((PADDED_E,), tl.int32)
    earlier = tl.zeros((PADDED_E,), tl.int32)  # slots of each expert in the chunks before this one
    for start in range(0, num_chunks, CHUNKS_AT_ONCE):
        other = start + tl.arange(0, CHUNKS_AT_ONCE)
        part = tl.load(
            chunk_counts_ptr + other[:, None] * PADDED_E + lane[None, :],
            mask=(other < num_chunks)[:, None],
            other=0,
        )
        counts += tl.sum(part, 0)
        earlier += tl.sum(tl.where((other < chunk)[:, None], part, 0), 0)
    blocks, ends = _block_starts(counts, E, PADDED_E, BLOCK_M)
    first_blocks = ends - blocks
    if chunk == 0:
        tl.store(num_tokens_post_padded_ptr, tl.sum(blocks, 0) * BLOCK_M)

    # The programs behind the chunks finish one expert each.
    if chunk >= num_chunks:
        owned = chunk - num_chunks
        _finish_expert(
            owned,
            _pick(first_blocks, owned, PADDED_E),
            _pick(blocks, owned, PADDED_E),
            _pick(counts, owned, PADDED_E),
            sorted_token_ids_ptr,
            expert_ids_ptr,
            finished_ptr,
            num_slots,
            BLOCK_M,
            FILL,
        )

    next_row = first_blocks * BLOCK_M + earlier
    within = tl.arange(0, RANK_BLOCK)
    for start in range(chunk * CHUNK, min((chunk + 1) * CHUNK, num_slots), RANK_BLOCK):
        slots = start + within
        expert = _load_experts(topk_ids_ptr, slots, num_slots, E, PADDED_E)
        # The same ids again along the other axis: cheaper to load than to convert between layouts.
        expert_across = _load_experts(topk_ids_ptr, start + within, num_slots, E, PADDED_E)
        before = (expert_across[None, :] == expert[:, None]) & (within[None, :] < within[:, None])
        rank = tl.sum(before.to(tl.int32), 1)
        rows = tl.gather(next_row, expert, 0) + rank
        tl.store(sorted_token_ids_ptr + rows, slots, mask=expert < E)
        next_row += tl.histogram(expert, PADDED_E)


def max_row_blocks(num_slots: int, num_experts: int, block_m: int) -> int:
    """Most row blocks that any routing can need."""
    active = min(num_slots, num_experts)
    return (num_slots + active * (block_m - 1)) // block_m


def align(topk_ids: torch.Tensor, num_experts: int, block_m: int) -> Alignment:
    num_slots = topk_ids.numel()
    device = topk_ids.device
    num_blocks = max_row_blocks(num_slots, num_experts, block_m)
    result = Alignment(
        scratch((num_blocks * block_m,), torch.int32, device),
        scratch((num_blocks,), torch.int32, device),
        scratch((1,), torch.int32, device),
        scratch((num_blocks,), torch.int32, device),
    )
    padded_e = max(
        16, triton.next_power_of_2(num_experts + 1)
    )  # + 1: the bin of slots without an expert
    if num_slots <= SMALL_SLOTS:
        launch(
            _align_small,
            (num_experts,),
            topk_ids,
            *result,
            num_slots,
            num_experts,
            PADDED_E=padded_e,
            BLOCK_M=block_m,
            BLOCK=max(128, triton.next_power_of_2(num_slots)),  # all at once
            FILL=128,
            num_warps=4 if num_slots <= 1024 else 8,
        )
        return result
    # Small chunks are placed sooner, but everybody reads the counts of all chunks.
    chunk = (
        128
        if num_slots <= 2**13
        else 256
        if num_slots <= 2**14
        else 512
        if num_slots <= 2**17
        else 2048
    )
    num_chunks = triton.cdiv(num_slots, chunk)
    chunk_counts = scratch((num_chunks, padded_e), torch.int32, device)
    launch(
        _count_experts,
        (num_chunks,),
        topk_ids,
        chunk_counts,
        num_slots,
        num_experts,
        PADDED_E=padded_e,
        CHUNK=chunk,
        num_warps=4,
    )
    launch(
        _align_large,
        (num_chunks + num_experts,),
        topk_ids,
        chunk_counts,
        *result,
        num_slots,
        num_chunks,
        num_experts,
        PADDED_E=padded_e,
        BLOCK_M=block_m,
        CHUNK=chunk,
        RANK_BLOCK=RANK_BLOCK,
        CHUNKS_AT_ONCE=max(1, min(32, 16384 // padded_e)),
        FILL=128,
        num_warps=4,  # two programs on a multiprocessor, so that all run at once
    )
    return result
