"""Grouped gate/up GEMM: gathers tokens, multiplies, adds biases, applies the unit, in one kernel.

    array                   shape                    dtype        written by  read by
    hidden_states           T, H                     model dtype  caller      _gate_up
    gate weight             [E][I or 2I, H]          model dtype  caller      _gate_up
    up weight               [E][I, H]                model dtype  caller      _gate_up (not if concatenated)
    sorted_token_ids        rows                     int32        align       _gate_up
    expert_ids              rows / BLOCK_M           int32        align       _gate_up
    num_tokens_post_padded  1                        int32        align       _gate_up
    finished                rows / BLOCK_M           int32        align: 0    _gate_up (if OVERLAPPED), down
    intermediate            rows, padded(I)          model dtype  _gate_up    down

``intermediate[r] = unit(gate_e x, up_e x)`` for the token x in sorted row r.  Rows of padding are not written.
A routing weight on the input scales the two products instead: ``W (w x) = w (W x)``.

LAYOUT is "concatenated", "interleaved", "separate" or, without a gate, "plain".  How a tile is multiplied is in
gate_up_products.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_inductor.unit import Unit

from .align import Alignment
from .box import box_of
from .common import load_biases, tile_order, tiles_of_program
from .configs import GemmConfig
from .early import begin, next_may_begin
from .gate_up_products import multiply_boxes, multiply_pointers
from .launch import launch
from .overlap import before_overlap, finish_tile
from .unit import evaluate
from .weights import Projection, has_one_product, layout_of


@triton.jit
def _gate_up_tile(
    m,
    n,
    hidden_states_ptr,
    gate_ptr,
    up_ptr,
    gate_bias_ptr,
    up_bias_ptr,
    topk_weights_ptr,
    gate_box,
    up_box,
    intermediate_ptr,
    sorted_token_ids_ptr,
    expert_ids_ptr,
    num_slots,
    k,
    H,
    I,
    stride_token,
    stride_expert,
    stride_out,
    stride_in,
    up_stride_expert,
    up_stride_out,
    up_stride_in,
    up_offset,
    stride_intermediate,
    ACTIVATION: tl.constexpr,
    LAYOUT: tl.constexpr,
    SAME_STRIDES: tl.constexpr,
    FROM_TABLE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    USE_BOX: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TWO: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    expert = tl.load(expert_ids_ptr + m)
    rows = m * BLOCK_M + tl.arange(0, BLOCK_M)
    slots = tl.load(sorted_token_ids_ptr + rows)
    row_used = slots < num_slots
    tokens = tl.where(row_used, slots // k, 0).to(tl.int64)
    columns = n * BLOCK_N + tl.arange(0, BLOCK_N)
    a_ptrs = hidden_states_ptr + tokens[:, None] * stride_token + tl.arange(0, BLOCK_K)[None, :]
    if USE_BOX:
        gate, up = multiply_boxes(
            a_ptrs,
            row_used,
            gate_box,
            up_box,
            gate_ptr,
            up_ptr,
            expert,
            n * BLOCK_N,
            H,
            I,
            LAYOUT,
            TRANSPOSED,
            TWO,
            FROM_TABLE,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            EVEN_K,
            NUM_STAGES,
        )
    else:
        gate, up = multiply_pointers(
            a_ptrs,
            row_used,
            gate_ptr,
            up_ptr,
            expert,
            columns,
            H,
            I,
            stride_expert,
            stride_out,
            stride_in,
            up_stride_expert,
            up_stride_out,
            up_stride_in,
            up_offset,
            LAYOUT,
            SAME_STRIDES,
            FROM_TABLE,
            ALIGNMENT,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            EVEN_N,
            EVEN_K,
            NUM_STAGES,
            PRECISION,
        )
    if topk_weights_ptr is not None:
        scale = tl.load(topk_weights_ptr + slots, mask=row_used, other=0.0).to(tl.float32)
        gate *= scale[:, None]
        up *= scale[:, None]
    if gate_bias_ptr is not None:
        gate_bias, up_bias = load_biases(
            gate_bias_ptr, up_bias_ptr, expert, n * BLOCK_N, I, BLOCK_N, LAYOUT
        )
        gate += gate_bias[None, :]
        up += up_bias[None, :]
    value = evaluate(gate, up, ACTIVATION)
    tl.store(
        intermediate_ptr + rows.to(tl.int64)[:, None] * stride_intermediate + columns[None, :],
        value.to(intermediate_ptr.dtype.element_ty),
        mask=row_used[:, None] & (columns < I)[None, :],
    )


# num_slots and k change with T and must not cause a new compilation at 1 or at multiples of 16.
@triton.jit(do_not_specialize=["num_slots", "k"])
def _gate_up(
    hidden_states_ptr,
    gate_ptr,
    up_ptr,
    gate_bias_ptr,
    up_bias_ptr,
    topk_weights_ptr,
    gate_box,
    up_box,
    intermediate_ptr,
    sorted_token_ids_ptr,
    expert_ids_ptr,
    num_tokens_post_padded_ptr,
    finished_ptr,
    num_slots,
    k,
    H,
    I,
    stride_token,
    stride_expert,
    stride_out,
    stride_in,
    up_stride_expert,
    up_stride_out,
    up_stride_in,
    up_offset,
    stride_intermediate,
    ACTIVATION: tl.constexpr,
    LAYOUT: tl.constexpr,
    SAME_STRIDES: tl.constexpr,
    FROM_TABLE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    USE_BOX: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TWO: tl.constexpr,
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
    OVERLAPPED: tl.constexpr,
):
    begin(EARLY)
    if OVERLAPPED:
        before_overlap(EARLY)
    next_may_begin(EARLY)
    num_m = tl.load(num_tokens_post_padded_ptr) // BLOCK_M
    num_n = tl.cdiv(I, BLOCK_N)
    first, last, step = tiles_of_program(num_m * num_n, PERSISTENT)
    for tile in tl.range(first, last, step, flatten=PERSISTENT):
        m, n = tile_order(tile, num_m, num_n, GROUP_M)
        _gate_up_tile(
            m,
            n,
            hidden_states_ptr,
            gate_ptr,
            up_ptr,
            gate_bias_ptr,
            up_bias_ptr,
            topk_weights_ptr,
            gate_box,
            up_box,
            intermediate_ptr,
            sorted_token_ids_ptr,
            expert_ids_ptr,
            num_slots,
            k,
            H,
            I,
            stride_token,
            stride_expert,
            stride_out,
            stride_in,
            up_stride_expert,
            up_stride_out,
            up_stride_in,
            up_offset,
            stride_intermediate,
            ACTIVATION,
            LAYOUT,
            SAME_STRIDES,
            FROM_TABLE,
            ALIGNMENT,
            USE_BOX,
            TRANSPOSED,
            TWO,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            EVEN_N,
            EVEN_K,
            NUM_STAGES,
            PRECISION,
        )
        if OVERLAPPED:
            finish_tile(finished_ptr, m, EARLY)


def gate_up(
    hidden_states: torch.Tensor,
    gate: Projection,
    up: Projection | None,
    alignment: Alignment,
    k: int,
    unit: Unit,
    intermediate: torch.Tensor,
    intermediate_size: int,
    config: GemmConfig,
    num_programs: int,
    input_weights: torch.Tensor | None = None,
    overlapped: bool = False,
) -> None:
    """``up`` is None when ``gate`` holds gate and up rows, or when there is no gate.

    input_weights: routing weights, where they scale the input.
    overlapped: ``down`` runs beside the last tiles (``overlap.py``).
    """
    T, H = hidden_states.shape
    I = intermediate_size
    layout = layout_of(gate, up, unit)
    strides, up_offset = gate.gate_and_up
    block_n, block_k = config.block_n, config.block_k
    two = not has_one_product(layout, gate)
    gate_box = up_box = None
    if config.weights_by_tma:
        halves = layout == "concatenated" and not two
        columns = 2 * block_n if halves or layout == "interleaved" else block_n
        gate_box = box_of(gate, columns, block_k, halves)
        up_box = box_of(up, columns, block_k) if up else gate_box
    tiles = alignment.expert_ids.shape[0] * triton.cdiv(I, block_n)
    launch(
        _gate_up,
        (min(tiles, num_programs) if config.persistent else tiles,),
        hidden_states,
        gate.storage,
        (up or gate).storage,
        gate.bias,
        up.bias if up else None,
        input_weights,
        gate_box,
        up_box,
        intermediate,
        *alignment,
        T * k,
        k,
        H,
        I,
        hidden_states.stride(0),
        *strides,
        *(up.strides if up else strides),
        up_offset,
        intermediate.stride(0),
        ACTIVATION=unit.text,
        LAYOUT=layout,
        SAME_STRIDES=up is None or up.strides == gate.strides,
        FROM_TABLE=gate.from_table,
        ALIGNMENT=min(gate.alignment, (up or gate).alignment),
        USE_BOX=config.weights_by_tma,
        TRANSPOSED=config.weights_by_tma and gate.transposed,
        TWO=config.weights_by_tma and two,
        BLOCK_M=config.block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        GROUP_M=config.group_m,
        EVEN_N=I % block_n == 0,
        EVEN_K=H % block_k == 0,
        NUM_STAGES=config.num_stages,
        PRECISION=config.precision,
        PERSISTENT=config.persistent,
        OVERLAPPED=overlapped,
        early=config.early or overlapped,
        first=not config.early,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
