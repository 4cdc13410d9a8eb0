"""A tile of gate and of up: gathered tokens times the columns of one expert, from wherever they are stored.

Two ways to read the weights, stacked or through a pointer table:
* pointers: any strides, two accumulators;
* boxes (box.py), where one dimension of a matrix is contiguous.  If a box can bring the gate and the up rows of the
  same columns, there is one wgmma of N = 2 * BLOCK_N, and the two parts are split in registers: neighbours if they are
  interleaved, halves if they are concatenated (not if they are stored ``[H, 2I]``).  Else there are two boxes and two
  wgmmas.

Without a gate ("plain") the up that comes back is not looked at.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .box import expert_place, load_columns, load_halves
from .common import expert_address


@triton.jit
def multiply_pointers(
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
    LAYOUT: tl.constexpr,
    SAME_STRIDES: tl.constexpr,
    FROM_TABLE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """fp32 ``[BLOCK_M, BLOCK_N]`` of gate and of up, by pointers: any strides."""
    ELEMENT: tl.constexpr = a_ptrs.dtype.element_ty
    gate_base = expert_address(gate_ptr, expert, stride_expert, ELEMENT, FROM_TABLE, ALIGNMENT)
    if LAYOUT == "concatenated" or LAYOUT == "interleaved":
        up_base = gate_base + up_offset
    else:
        up_base = expert_address(up_ptr, expert, up_stride_expert, ELEMENT, FROM_TABLE, ALIGNMENT)
    ks = tl.arange(0, BLOCK_K)
    offsets = columns.to(tl.int64)[:, None] * stride_out + ks[None, :] * stride_in
    gate_ptrs = gate_base + offsets
    if SAME_STRIDES:
        up_ptrs = up_base + offsets
        up_step = BLOCK_K * stride_in
    else:
        up_ptrs = (
            up_base + columns.to(tl.int64)[:, None] * up_stride_out + ks[None, :] * up_stride_in
        )
        up_step = BLOCK_K * up_stride_in
    column_used = (columns < I)[:, None]
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(0, H, BLOCK_K, num_stages=NUM_STAGES):
        inside = (ks < H - start)[None, :]
        if EVEN_K:
            a = tl.load(a_ptrs, mask=row_used[:, None], other=0.0)
        else:
            a = tl.load(a_ptrs, mask=row_used[:, None] & inside, other=0.0)
        if LAYOUT == "plain":
            if EVEN_K and EVEN_N:
                w_gate = tl.load(gate_ptrs)
            else:
                w_gate = tl.load(gate_ptrs, mask=column_used & inside, other=0.0)
            gate = tl.dot(a, w_gate.T, gate, input_precision=PRECISION)
        else:
            if EVEN_K and EVEN_N:
                w_gate = tl.load(gate_ptrs)
                w_up = tl.load(up_ptrs)
            elif EVEN_K:
                w_gate = tl.load(gate_ptrs, mask=column_used, other=0.0)
                w_up = tl.load(up_ptrs, mask=column_used, other=0.0)
            else:
                w_gate = tl.load(gate_ptrs, mask=column_used & inside, other=0.0)
                w_up = tl.load(up_ptrs, mask=column_used & inside, other=0.0)
            gate = tl.dot(a, w_gate.T, gate, input_precision=PRECISION)
            up = tl.dot(a, w_up.T, up, input_precision=PRECISION)
        a_ptrs += BLOCK_K
        gate_ptrs += BLOCK_K * stride_in
        up_ptrs += up_step
    return gate, up


@triton.jit
def multiply_boxes(
    a_ptrs,
    row_used,
    gate_box,
    up_box,
    gate_ptr,
    up_ptr,
    expert,
    column,
    H,
    I,
    LAYOUT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TWO: tl.constexpr,
    FROM_TABLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """fp32 ``[BLOCK_M, BLOCK_N]`` of gate and of up, by TMA.  TWO: not ``has_one_product``."""
    place = expert_place(gate_ptr, expert, FROM_TABLE)
    ks = tl.arange(0, BLOCK_K)
    COLUMNS: tl.constexpr = BLOCK_N if LAYOUT == "plain" or TWO else 2 * BLOCK_N
    gate = tl.zeros((BLOCK_M, COLUMNS), tl.float32)
    up = gate
    if LAYOUT == "separate":
        up_place, up_column = expert_place(up_ptr, expert, FROM_TABLE), column
    else:
        up_place, up_column = place, I + column
    if LAYOUT == "interleaved":
        column *= 2
    for start in tl.range(0, H, BLOCK_K, num_stages=NUM_STAGES):
        if EVEN_K:
            a = tl.load(a_ptrs, mask=row_used[:, None], other=0.0)
        else:
            a = tl.load(a_ptrs, mask=row_used[:, None] & (ks < H - start)[None, :], other=0.0)
        if LAYOUT == "concatenated" and not TWO:
            w = load_halves(gate_box, place, column, start, COLUMNS, BLOCK_K)
        else:
            w = load_columns(gate_box, place, column, start, COLUMNS, BLOCK_K, TRANSPOSED)
        gate = tl.dot(a, w, gate)
        if TWO:
            w_up = load_columns(up_box, up_place, up_column, start, COLUMNS, BLOCK_K, TRANSPOSED)
            up = tl.dot(a, w_up, up)
        a_ptrs += BLOCK_K
    if LAYOUT == "interleaved":
        gate, up = tl.split(tl.reshape(gate, (BLOCK_M, BLOCK_N, 2)))
    elif LAYOUT == "concatenated" and not TWO:
        gate, up = tl.split(tl.permute(tl.reshape(gate, (BLOCK_M, 2, BLOCK_N)), (0, 2, 1)))
    return gate, up
