"""Ordered combine: ``out[t] = sum over j of slot_outputs[t * k + j]``, j ascending, fp32.

    array         shape   dtype         written by        read by
    slot_outputs  T*k, H  model dtype   down (weighted)   _combine
    topk_ids      T, k    int32/int64   caller            _combine
    out           T, H    out_dtype     _combine          caller

The order of the sum is fixed, so the result has the same bits on every run.  Slots whose id is outside [0, E)
were never written by ``down``; they are skipped here, not read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .early import begin
from .launch import launch


@triton.jit
def _combine(slot_outputs_ptr, topk_ids_ptr, out_ptr, H, E, K: tl.constexpr, BLOCK: tl.constexpr,
             EARLY: tl.constexpr):  # fmt: skip
    begin(EARLY)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < H
    acc = tl.zeros((BLOCK,), tl.float32)
    for j in tl.range(0, K, loop_unroll_factor=K if K <= 16 else 4):
        slot = token * K + j
        expert = tl.load(topk_ids_ptr + slot)
        length = tl.where((expert >= 0) & (expert < E), H, 0)
        value = tl.load(slot_outputs_ptr + slot * H + column, mask=column < length, other=0.0)
        acc += value.to(tl.float32)
    tl.store(out_ptr + token * H + column, acc.to(out_ptr.dtype.element_ty), mask=inside)


def combine(
    slot_outputs: torch.Tensor, topk_ids: torch.Tensor, out: torch.Tensor, num_experts: int
) -> None:
    T, H = out.shape
    block = min(1024, triton.next_power_of_2(H))
    launch(
        _combine,
        (T, triton.cdiv(H, block)),
        slot_outputs,
        topk_ids,
        out,
        H,
        num_experts,
        K=topk_ids.shape[1],
        BLOCK=block,
        num_warps=4,
    )
