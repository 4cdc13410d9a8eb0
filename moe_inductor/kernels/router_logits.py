"""The router's product: ``router_logits = router_input @ router_weight^T (+ router_bias)``, in one launch.

    array          shape   dtype        written by      read by
    router_input   T, H    model dtype  caller          _router_logits
    router_weight  E, H    model dtype  caller          _router_logits
    router_bias    E       model dtype  caller          _router_logits (if there is one)
    router_logits  T, E    model dtype  _router_logits  route

A library's GEMM takes 4 to 8 us for so few columns, mostly starting and adding up pieces of H, and the kernel behind
it cannot start early.  Here a program reads one expert's row whole, for up to 4 tokens.  Accumulated in fp32 and
rounded once, as a GEMM does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .configs import RouterRows
from .early import begin, next_may_begin
from .launch import launch, scratch


# T changes and must not cause a new compilation at 1 or at multiples of 16.
@triton.jit(do_not_specialize=["T"])
def _router_logits(
    x_ptr,
    weight_ptr,
    bias_ptr,
    logits_ptr,
    T,
    E,
    H,
    stride_token,
    stride_expert,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    EVEN_H: tl.constexpr,
    EARLY: tl.constexpr,
):
    begin(EARLY)
    next_may_begin(EARLY)
    expert = tl.program_id(0)
    tokens = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = tokens < T
    hs = tl.arange(0, BLOCK_H)
    w_ptrs = weight_ptr + expert.to(tl.int64) * stride_expert + hs
    x_ptrs = x_ptr + tokens.to(tl.int64)[:, None] * stride_token + hs[None, :]
    acc = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
    for start in tl.range(0, H, BLOCK_H):
        if EVEN_H:
            w = tl.load(w_ptrs)
            x = tl.load(x_ptrs, mask=inside[:, None], other=0.0)
        else:
            used = hs < H - start
            w = tl.load(w_ptrs, mask=used, other=0.0)
            x = tl.load(x_ptrs, mask=inside[:, None] & used[None, :], other=0.0)
        acc += x.to(tl.float32) * w.to(tl.float32)[None, :]
        w_ptrs += BLOCK_H
        x_ptrs += BLOCK_H
    logits = tl.sum(acc, 1)
    if bias_ptr is not None:
        logits += tl.load(bias_ptr + expert).to(tl.float32)
    tl.store(
        logits_ptr + tokens.to(tl.int64) * E + expert,
        logits.to(logits_ptr.dtype.element_ty),
        mask=inside,
    )


def router_logits(
    router_input: torch.Tensor,
    router_weight: torch.Tensor,
    router_bias: torch.Tensor | None,
    plan: RouterRows,
) -> torch.Tensor:
    """[T, E] in the dtype of ``router_input`` [T, H], whose rows and those of ``router_weight`` [E, H] are contiguous.

    The result is scratch memory of the call (``launch.scratch``).
    """
    T, H = router_input.shape
    E = router_weight.shape[0]
    logits = scratch((T, E), router_input.dtype, router_input.device)
    launch(
        _router_logits,
        (E, triton.cdiv(T, plan.block_t)),
        router_input,
        router_weight,
        router_bias,
        logits,
        T,
        E,
        H,
        router_input.stride(0),
        router_weight.stride(0),
        BLOCK_T=plan.block_t,
        BLOCK_H=plan.block_h,
        EVEN_H=H % plan.block_h == 0,
        num_warps=4,
        first=True,
    )
    return logits
