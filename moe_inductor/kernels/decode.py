"""Few tokens: two GEMV kernels instead of align, grouped GEMMs and combine.

    array          shape           dtype        written by       read by
    hidden_states  T, H            model dtype  caller           _decode_gate_up
    gate, up       [E][I, H]       model dtype  caller           _decode_gate_up
    topk_ids       T*k             int32/int64  caller           both
    topk_weights   T*k             float        caller           _decode_down, or _decode_gate_up (on the input)
    intermediate   T*k, padded(I)  model dtype  _decode_gate_up  _decode_down
    down           [E][H, I]       model dtype  caller           _decode_down
    out            T, H            out_dtype    _decode_down     caller

Every slot reads its expert's weights once, so this wins only while hardly any expert is hit twice.  The products
run on CUDA cores with fp32 accumulators as large as the tile, reduced once at the end.  A slot whose id is outside
[0, E) reads no weight and adds zero.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_inductor.unit import Unit

from .common import expert_address, load_bias, load_biases
from .configs import GemvConfig
from .early import begin, next_may_begin
from .launch import launch
from .unit import evaluate
from .weights import Projection, layout_of

MAX_SLOTS = 8  # experts of a token that _decode_down reads at a time


@triton.jit
def _decode_gate_up(
    hidden_states_ptr,
    gate_ptr,
    up_ptr,
    gate_bias_ptr,
    up_bias_ptr,
    topk_weights_ptr,
    intermediate_ptr,
    topk_ids_ptr,
    E,
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
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LAYOUT: tl.constexpr,
    FROM_TABLE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):
    begin(EARLY)
    slot = tl.program_id(1)
    expert = tl.load(topk_ids_ptr + slot)
    valid = (expert >= 0) & (expert < E)
    expert = tl.where(valid, expert, 0)
    length = tl.where(valid, H, 0)
    ELEMENT: tl.constexpr = hidden_states_ptr.dtype.element_ty
    # Interleaved gate and up are read as what they are, neighbours, and parted when they are summed.
    PAIRS: tl.constexpr = LAYOUT == "interleaved"
    TWO: tl.constexpr = LAYOUT == "concatenated" or LAYOUT == "separate"
    ROWS: tl.constexpr = 2 * BLOCK_N if PAIRS else BLOCK_N
    gate_base = expert_address(gate_ptr, expert, stride_expert, ELEMENT, FROM_TABLE, ALIGNMENT)
    if LAYOUT == "separate":
        up_base = expert_address(up_ptr, expert, up_stride_expert, ELEMENT, FROM_TABLE, ALIGNMENT)
    else:  # looked at only where gate and up follow each other
        up_base = gate_base + up_offset
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_used = (rows < (2 * I if PAIRS else I))[:, None]
    ks = tl.arange(0, BLOCK_K)
    wide = rows.to(tl.int64)[:, None]
    gate_ptrs = gate_base + wide * stride_out + ks[None, :] * stride_in
    up_ptrs = up_base + wide * up_stride_out + ks[None, :] * up_stride_in
    x_ptrs = hidden_states_ptr + (slot // K).to(tl.int64) * stride_token + ks
    gate = tl.zeros((ROWS, BLOCK_K), tl.float32)
    up = tl.zeros((ROWS, BLOCK_K), tl.float32)
    for start in tl.range(0, length, BLOCK_K, num_stages=NUM_STAGES):
        inside = ks < length - start
        used = row_used & inside[None, :]
        if EVEN_K and EVEN_N:
            w_gate = tl.load(gate_ptrs, eviction_policy="evict_first")
            if TWO:
                w_up = tl.load(up_ptrs, eviction_policy="evict_first")
        else:
            w_gate = tl.load(gate_ptrs, mask=used, other=0.0, eviction_policy="evict_first")
            if TWO:
                w_up = tl.load(up_ptrs, mask=used, other=0.0, eviction_policy="evict_first")
        x = tl.load(x_ptrs) if EVEN_K else tl.load(x_ptrs, mask=inside, other=0.0)
        x = x.to(tl.float32)[None, :]
        gate += w_gate.to(tl.float32) * x
        if TWO:
            up += w_up.to(tl.float32) * x
        gate_ptrs += BLOCK_K * stride_in
        up_ptrs += BLOCK_K * up_stride_in
        x_ptrs += BLOCK_K
    next_may_begin(EARLY)
    if PAIRS:
        gate_row, up_row = tl.split(tl.reshape(tl.sum(gate, 1), (BLOCK_N, 2)))
    else:
        gate_row, up_row = tl.sum(gate, 1), tl.sum(up, 1)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if topk_weights_ptr is not None:
        scale = tl.load(topk_weights_ptr + slot).to(tl.float32)
        gate_row *= scale
        up_row *= scale
    if gate_bias_ptr is not None:
        # For an id outside [0, E) these are expert 0's; _decode_down does not read such a row.
        gate_bias, up_bias = load_biases(
            gate_bias_ptr, up_bias_ptr, expert, tl.program_id(0) * BLOCK_N, I, BLOCK_N, LAYOUT
        )
        gate_row += gate_bias
        up_row += up_bias
    value = evaluate(gate_row, up_row, ACTIVATION)
    tl.store(
        intermediate_ptr + slot.to(tl.int64) * stride_intermediate + columns,
        value.to(intermediate_ptr.dtype.element_ty),
        mask=columns < I,
    )


@triton.jit
def _decode_down(
    intermediate_ptr,
    weight_ptr,
    bias_ptr,
    topk_weights_ptr,
    topk_ids_ptr,
    out_ptr,
    E,
    H,
    I,
    stride_intermediate,
    stride_expert,
    stride_out,
    stride_in,
    K: tl.constexpr,
    FROM_TABLE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    SLOTS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One token.  Its experts are one dimension of the tile, so that all their loads are in flight together."""
    token = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin(EARLY)
    ks = tl.arange(0, BLOCK_K)
    offsets = columns.to(tl.int64)[:, None] * stride_out + ks[None, :] * stride_in
    acc = tl.zeros((SLOTS, BLOCK_N, BLOCK_K), tl.float32)
    biases = tl.zeros((SLOTS, BLOCK_N), tl.float32)
    for first in tl.range(0, K, SLOTS):
        choice = first + tl.arange(0, SLOTS)
        slots = token * K + choice
        expert = tl.load(topk_ids_ptr + slots, mask=choice < K, other=-1)
        valid = (expert >= 0) & (expert < E)
        expert = tl.where(valid, expert, 0)
        if topk_weights_ptr is not None:
            weights = tl.load(topk_weights_ptr + slots, mask=valid, other=0.0).to(tl.float32)
        else:
            weights = valid.to(tl.float32)
        if bias_ptr is not None:
            inside_bias = valid[:, None] & (columns < H)[None, :]
            bias = load_bias(bias_ptr, expert[:, None], H, columns[None, :], inside_bias)
            biases += weights[:, None] * bias
        base = expert_address(
            weight_ptr,
            expert,
            stride_expert,
            intermediate_ptr.dtype.element_ty,
            FROM_TABLE,
            ALIGNMENT,
        )
        w_ptrs = base[:, None, None] + offsets[None, :, :]
        h_ptrs = intermediate_ptr + slots.to(tl.int64)[:, None] * stride_intermediate + ks[None, :]
        used = valid[:, None, None]
        if not EVEN_N:
            used = used & (columns < H)[None, :, None]
        for start in tl.range(0, I, BLOCK_K, num_stages=NUM_STAGES):
            if EVEN_K:
                w = tl.load(w_ptrs, mask=used, other=0.0, eviction_policy="evict_first")
                h = tl.load(h_ptrs, mask=valid[:, None], other=0.0)
            else:
                inside = ks < I - start
                w = tl.load(
                    w_ptrs,
                    mask=used & inside[None, None, :],
                    other=0.0,
                    eviction_policy="evict_first",
                )
                h = tl.load(h_ptrs, mask=valid[:, None] & inside[None, :], other=0.0)
            h = h.to(tl.float32) * weights[:, None]
            acc += w.to(tl.float32) * h[:, None, :]
            w_ptrs += BLOCK_K * stride_in
            h_ptrs += BLOCK_K
    total = tl.sum(tl.sum(acc, 2), 0)
    if bias_ptr is not None:
        total += tl.sum(biases, 0)
    tl.store(
        out_ptr + token.to(tl.int64) * H + columns,
        total.to(out_ptr.dtype.element_ty),
        mask=columns < H,
    )


def decode_gate_up(
    hidden_states: torch.Tensor,
    gate: Projection,
    up: Projection | None,
    topk_ids: torch.Tensor,
    unit: Unit,
    intermediate: torch.Tensor,
    intermediate_size: int,
    config: GemvConfig,
    input_weights: torch.Tensor | None = None,
) -> None:
    """See ``gate_up.gate_up``."""
    T, H = hidden_states.shape
    k = topk_ids.shape[1]
    I = intermediate_size
    strides = gate.strides
    launch(
        _decode_gate_up,
        (triton.cdiv(I, config.block_n), T * k),
        hidden_states,
        gate.storage,
        (up or gate).storage,
        gate.bias,
        up.bias if up else None,
        input_weights,
        intermediate,
        topk_ids,
        gate.num_experts,
        H,
        I,
        hidden_states.stride(0),
        *strides,
        *(up.strides if up else strides),
        I * gate.stride_out,
        intermediate.stride(0),
        K=k,
        ACTIVATION=unit.text,
        LAYOUT=layout_of(gate, up, unit),
        FROM_TABLE=gate.from_table,
        ALIGNMENT=min(gate.alignment, (up or gate).alignment),
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        EVEN_N=I % config.block_n == 0,
        EVEN_K=H % config.block_k == 0,
        NUM_STAGES=config.num_stages,
        num_warps=config.num_warps,
    )


def decode_down(
    intermediate: torch.Tensor,
    intermediate_size: int,
    weight: Projection,
    topk_weights: torch.Tensor | None,
    topk_ids: torch.Tensor,
    out: torch.Tensor,
    config: GemvConfig,
) -> None:
    """``topk_weights`` is None where the input was weighted."""
    T, H = out.shape
    k = topk_ids.shape[1]
    I = intermediate_size
    launch(
        _decode_down,
        (triton.cdiv(H, config.block_n), T),
        intermediate,
        weight.storage,
        weight.bias,
        topk_weights,
        topk_ids,
        out,
        weight.num_experts,
        H,
        I,
        intermediate.stride(0),
        *weight.strides,
        K=k,
        FROM_TABLE=weight.from_table,
        ALIGNMENT=weight.alignment,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        EVEN_N=H % config.block_n == 0,
        EVEN_K=I % config.block_k == 0,
        NUM_STAGES=config.num_stages,
        SLOTS=min(MAX_SLOTS, triton.next_power_of_2(k)),
        num_warps=config.num_warps,
    )
