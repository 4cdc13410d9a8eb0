"""Grouped down GEMM: adds the bias, multiplies by the routing weight and scatters each row to its slot.

    array                   shape            dtype        written by      read by
    intermediate            rows, padded(I)  model dtype  gate_up         _down
    down weight             [E][H, I]        model dtype  caller          _down
    bias                    E, H             model dtype  caller          _down (if there is one)
    topk_weights            T*k              float        caller          _down (not if they weight the input)
    sorted_token_ids        rows             int32        align           _down
    expert_ids              rows / BLOCK_M   int32        align           _down
    num_tokens_post_padded  1                int32        align           _down
    finished                rows / BLOCK_M   int32        align, gate_up  _down (if it overlaps)
    slot_outputs            T*k, H           model dtype  _down           combine

Rows of padding in ``intermediate`` hold whatever was there before: rows of a matrix product do not mix, and the
result of a padding row is not stored.

GATE_UP_BLOCK_N is that of gate_up's tiles, where this kernel runs beside the last of them (overlap.py); else 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .align import Alignment
from .box import box_of, expert_place, load_columns
from .common import expert_address, load_bias, tile_order, tiles_of_program
from .configs import GemmConfig
from .early import begin, next_may_begin
from .launch import launch
from .overlap import after_overlap, wait_until_finished
from .weights import Projection


@triton.jit
def _down_tile(
    m,
    ready_m,
    n,
    intermediate_ptr,
    intermediate_box,
    weight_ptr,
    weight_box,
    bias_ptr,
    topk_weights_ptr,
    slot_outputs_ptr,
    sorted_token_ids_ptr,
    expert_ids_ptr,
    num_slots,
    H,
    I,
    stride_intermediate,
    stride_expert,
    stride_out,
    stride_in,
    FROM_TABLE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    USE_BOX: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``ready_m`` is m, known when the row block is finished: ``intermediate`` is read by it, all else by ``m``."""
    expert = tl.load(expert_ids_ptr + m)
    rows = m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if USE_BOX:
        place = expert_place(weight_ptr, expert, FROM_TABLE)
        for start in tl.range(0, I, BLOCK_K, num_stages=NUM_STAGES):
            a = intermediate_box.load([ready_m * BLOCK_M, start])
            w = load_columns(weight_box, place, n * BLOCK_N, start, BLOCK_N, BLOCK_K, TRANSPOSED)
            acc = tl.dot(a, w, acc)
    else:
        ks = tl.arange(0, BLOCK_K)
        ready = ready_m * BLOCK_M + tl.arange(0, BLOCK_M)
        a_ptrs = intermediate_ptr + ready.to(tl.int64)[:, None] * stride_intermediate + ks[None, :]
        base = expert_address(
            weight_ptr,
            expert,
            stride_expert,
            intermediate_ptr.dtype.element_ty,
            FROM_TABLE,
            ALIGNMENT,
        )
        w_ptrs = base + columns.to(tl.int64)[:, None] * stride_out + ks[None, :] * stride_in
        column_used = (columns < H)[:, None]
        for start in tl.range(0, I, BLOCK_K, num_stages=NUM_STAGES):
            inside = (ks < I - start)[None, :]
            a = tl.load(a_ptrs) if EVEN_K else tl.load(a_ptrs, mask=inside, other=0.0)
            if EVEN_K and EVEN_N:
                w = tl.load(w_ptrs)
            elif EVEN_K:
                w = tl.load(w_ptrs, mask=column_used, other=0.0)
            else:
                w = tl.load(w_ptrs, mask=column_used & inside, other=0.0)
            acc = tl.dot(a, w.T, acc, input_precision=PRECISION)
            a_ptrs += BLOCK_K
            w_ptrs += BLOCK_K * stride_in
    slots = tl.load(sorted_token_ids_ptr + rows)
    row_used = slots < num_slots
    if bias_ptr is not None:
        acc += load_bias(bias_ptr, expert, H, columns, columns < H)[None, :]
    if topk_weights_ptr is not None:
        weights = tl.load(topk_weights_ptr + slots, mask=row_used, other=0.0).to(tl.float32)
        acc *= weights[:, None]
    tl.store(
        slot_outputs_ptr + slots.to(tl.int64)[:, None] * H + columns[None, :],
        acc.to(slot_outputs_ptr.dtype.element_ty),
        mask=row_used[:, None] & (columns < H)[None, :],
    )


# num_slots changes with T and must not cause a new compilation at 1 or at multiples of 16.
@triton.jit(do_not_specialize=["num_slots"])
def _down(
    intermediate_ptr,
    intermediate_box,
    weight_ptr,
    weight_box,
    bias_ptr,
    topk_weights_ptr,
    slot_outputs_ptr,
    sorted_token_ids_ptr,
    expert_ids_ptr,
    num_tokens_post_padded_ptr,
    finished_ptr,
    num_slots,
    H,
    I,
    stride_intermediate,
    stride_expert,
    stride_out,
    stride_in,
    FROM_TABLE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    USE_BOX: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    PERSISTENT: tl.constexpr,
    EARLY: tl.constexpr,
    GATE_UP_BLOCK_N: tl.constexpr,
    NEXT_EARLY: tl.constexpr,
):
    if GATE_UP_BLOCK_N == 0:  # else each row block is waited for
        begin(EARLY)
    next_may_begin(EARLY and NEXT_EARLY)
    num_m = tl.load(num_tokens_post_padded_ptr) // BLOCK_M
    num_n = tl.cdiv(H, BLOCK_N)
    first, last, step = tiles_of_program(num_m * num_n, PERSISTENT)
    for tile in tl.range(first, last, step, flatten=PERSISTENT):
        m, n = tile_order(tile, num_m, num_n, GROUP_M)
        ready_m = m
        if GATE_UP_BLOCK_N:
            gate_up_tiles = tl.cdiv(I, GATE_UP_BLOCK_N)
            ready_m = wait_until_finished(finished_ptr, m, gate_up_tiles, EARLY)
        _down_tile(
            m,
            ready_m,
            n,
            intermediate_ptr,
            intermediate_box,
            weight_ptr,
            weight_box,
            bias_ptr,
            topk_weights_ptr,
            slot_outputs_ptr,
            sorted_token_ids_ptr,
            expert_ids_ptr,
            num_slots,
            H,
            I,
            stride_intermediate,
            stride_expert,
            stride_out,
            stride_in,
            FROM_TABLE,
            ALIGNMENT,
            USE_BOX,
            TRANSPOSED,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            EVEN_N,
            EVEN_K,
            NUM_STAGES,
            PRECISION,
        )
    if GATE_UP_BLOCK_N:
        after_overlap(EARLY)


def down(
    intermediate: torch.Tensor,
    intermediate_size: int,
    weight: Projection,
    topk_weights: torch.Tensor | None,
    alignment: Alignment,
    slot_outputs: torch.Tensor,
    config: GemmConfig,
    num_programs: int,
    gate_up_block_n: int = 0,
) -> None:
    """``topk_weights`` is None where the input was weighted.

    gate_up_block_n: of gate_up's tiles, where it was launched as ``overlapped``; else 0.
    """
    num_slots, H = slot_outputs.shape
    I = intermediate_size
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    intermediate_box = weight_box = None
    if config.weights_by_tma:
        # The box stops at I, not at the row's padding: what is beyond I reads as zero.
        intermediate_box = TensorDescriptor(
            intermediate,
            [intermediate.shape[0], I],
            [intermediate.stride(0), 1],
            [block_m, block_k],
        )
        weight_box = box_of(weight, block_n, block_k)
    tiles = alignment.expert_ids.shape[0] * triton.cdiv(H, block_n)
    launch(
        _down,
        (min(tiles, num_programs) if config.persistent else tiles,),
        intermediate,
        intermediate_box,
        weight.storage,
        weight_box,
        weight.bias,
        topk_weights,
        slot_outputs,
        *alignment,
        num_slots,
        H,
        I,
        intermediate.stride(0),
        *weight.strides,
        FROM_TABLE=weight.from_table,
        ALIGNMENT=weight.alignment,
        USE_BOX=config.weights_by_tma,
        TRANSPOSED=config.weights_by_tma and weight.transposed,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        GROUP_M=config.group_m,
        EVEN_N=H % block_n == 0,
        EVEN_K=I % block_k == 0,
        NUM_STAGES=config.num_stages,
        PRECISION=config.precision,
        PERSISTENT=config.persistent,
        GATE_UP_BLOCK_N=gate_up_block_n,
        NEXT_EARLY=config.early,
        early=config.early or gate_up_block_n > 0,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
