"""Grouped gate/up GEMM: gathers tokens, multiplies, adds biases, applies the unit, in one kernel.

    array                   shape                    dtype        written by  read by
    hidden_states           T, H                     model dtype  caller      _gate_up
    gate weight             [E][I or 2I, H]          model dtype  caller      _gate_up
    up weight               [E][I, H]                model dtype  caller      _gate_up (not if concatenated)
    sorted_token_ids        rows                     int32        align       _gate_up
    expert_ids              rows / BLOCK_M           int32        align       _gate_up
    num_tokens_post_padded  1                        int32        align       _gate_up
    intermediate            rows, padded(I)          model dtype  _gate_up    down

``intermediate[r] = unit(gate_e x, up_e x)`` for the token x in sorted row r.  Rows of padding are not written.
A routing weight on the input scales the two products instead: ``W (w x) = w (W x)``.

LAYOUT is "concatenated", "interleaved", "separate" or, without a gate, "plain".  Two ways to read the weights:
* pointers: any strides, stacked or through a pointer table, two accumulators;
* box: concatenated stacked weights seen as ``[E, 2, I, H]``, one 4-D TMA box ``[1, 2, BLOCK_N, BLOCK_K]`` brings
  the gate and the up rows of the same columns as one tile, so there is one wgmma of N = 2 * BLOCK_N and the two
  halves are split in registers.  Plain weights are ``[E, 1, I, H]``.  With a pointer table the kernel makes a
  descriptor of ``[2, I, H]`` per tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_inductor.unit import Unit

from .align import Alignment
from .common import expert_address, load_biases, tile_order
from .configs import GemmConfig
from .early import begin, next_may_begin
from .launch import allow_device_descriptors, launch
from .unit import evaluate
from .weights import Projection, layout_of


@triton.jit
def _multiply_pointers(
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
def _multiply_box(
    a_ptrs,
    row_used,
    box,
    gate_ptr,
    expert,
    first_column,
    H,
    I,
    stride_out,
    up_offset,
    LAYOUT: tl.constexpr,
    FROM_TABLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    PARTS: tl.constexpr = 2 if LAYOUT == "concatenated" else 1
    if FROM_TABLE:
        address = expert_address(gate_ptr, expert, 0, a_ptrs.dtype.element_ty, FROM_TABLE, 16)
        own_box = tl.make_tensor_descriptor(
            address,
            [PARTS, I, H],
            [up_offset, stride_out, 1],
            [PARTS, BLOCK_N, BLOCK_K],
        )
    ks = tl.arange(0, BLOCK_K)
    both = tl.zeros((BLOCK_M, PARTS * BLOCK_N), tl.float32)
    for start in tl.range(0, H, BLOCK_K, num_stages=NUM_STAGES):
        if EVEN_K:
            a = tl.load(a_ptrs, mask=row_used[:, None], other=0.0)
        else:
            a = tl.load(a_ptrs, mask=row_used[:, None] & (ks < H - start)[None, :], other=0.0)
        if FROM_TABLE:  # noqa: SIM108 (own_box exists only here)
            w = own_box.load([0, first_column, start])
        else:
            w = box.load([expert, 0, first_column, start])
        both = tl.dot(a, w.reshape(PARTS * BLOCK_N, BLOCK_K).T, both)
        a_ptrs += BLOCK_K
    if LAYOUT == "concatenated":
        gate, up = tl.split(tl.permute(tl.reshape(both, (BLOCK_M, 2, BLOCK_N)), (0, 2, 1)))
    else:
        gate, up = both, both
    return gate, up


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
    box,
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
        gate, up = _multiply_box(
            a_ptrs,
            row_used,
            box,
            gate_ptr,
            expert,
            n * BLOCK_N,
            H,
            I,
            stride_out,
            up_offset,
            LAYOUT,
            FROM_TABLE,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            EVEN_K,
            NUM_STAGES,
        )
    else:
        gate, up = _multiply_pointers(
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
            gate_bias_ptr, up_bias_ptr, expert, columns, I, columns < I, LAYOUT
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
    box,
    intermediate_ptr,
    sorted_token_ids_ptr,
    expert_ids_ptr,
    num_tokens_post_padded_ptr,
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
):
    begin(EARLY)
    next_may_begin(EARLY)
    num_m = tl.load(num_tokens_post_padded_ptr) // BLOCK_M
    num_n = tl.cdiv(I, BLOCK_N)
    # Without PERSISTENT there is one program per possible tile, and the loop runs once or not at all.
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0), flatten=PERSISTENT):
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
            box,
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
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            EVEN_N,
            EVEN_K,
            NUM_STAGES,
            PRECISION,
        )


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
) -> None:
    """``up`` is None when ``gate`` holds gate and up rows, or when there is no gate.

    input_weights: routing weights, where they scale the input.
    """
    T, H = hidden_states.shape
    I = intermediate_size
    layout = layout_of(gate, up, unit)
    strides, up_offset = gate.halves
    block_n, block_k = config.block_n, config.block_k
    box = None
    if config.weights_by_tma and gate.from_table:
        allow_device_descriptors()
    elif config.weights_by_tma:
        stacked = gate.storage
        stride_e, stride_out, _ = stacked.stride()
        parts = 2 if layout == "concatenated" else 1
        box = TensorDescriptor(
            stacked,
            [stacked.shape[0], parts, I, H],
            [stride_e, I * stride_out, stride_out, 1],
            [1, parts, block_n, block_k],
        )
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
        box,
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
        BLOCK_M=config.block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        GROUP_M=config.group_m,
        EVEN_N=I % block_n == 0,
        EVEN_K=H % block_k == 0,
        NUM_STAGES=config.num_stages,
        PRECISION=config.precision,
        PERSISTENT=config.persistent,
        early=config.early,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
