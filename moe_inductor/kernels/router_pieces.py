"""The router's product on tensor cores, H in pieces: ``sums[p] = router_input[:, p] @ router_weight[:, p]^T``.

    array          shape         dtype        written by      read by
    router_input   T, H          model dtype  caller          _router_pieces
    router_weight  E, H          model dtype  caller          _router_pieces
    sums           pieces, T, E  fp32         _router_pieces  route

So few columns make too few tiles to fill a GPU, and each would read all of H behind one another.  A library's GEMM
splits H as well, but needs a second kernel to add up.  Here ``route`` does, in the order of the pieces, adds the
router's bias and rounds once to the model's dtype, as a GEMM does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .configs import RouterTiles
from .early import begin, next_may_begin
from .launch import launch, scratch


# T changes and must not cause a new compilation at 1 or at multiples of 16.
@triton.jit(do_not_specialize=["T"])
def _router_pieces(
    x_ptr,
    weight_ptr,
    sums_ptr,
    T,
    E,
    H,
    piece_size,
    stride_token,
    stride_expert,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr,
    EVEN_H: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):
    begin(EARLY)
    next_may_begin(EARLY)
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    experts = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    piece = tl.program_id(2)
    first = piece * piece_size
    hs = first + tl.arange(0, BLOCK_H)
    is_token, is_expert = tokens < T, experts < E
    x_ptrs = x_ptr + tokens.to(tl.int64)[:, None] * stride_token + hs[None, :]
    w_ptrs = weight_ptr + experts.to(tl.int64)[:, None] * stride_expert + hs[None, :]
    acc = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for start in tl.range(first, min(first + piece_size, H), BLOCK_H, num_stages=NUM_STAGES):
        if EVEN_H:
            x = tl.load(x_ptrs, mask=is_token[:, None], other=0.0)
            w = tl.load(w_ptrs, mask=is_expert[:, None], other=0.0)
        else:
            inside = (tl.arange(0, BLOCK_H) < H - start)[None, :]
            x = tl.load(x_ptrs, mask=is_token[:, None] & inside, other=0.0)
            w = tl.load(w_ptrs, mask=is_expert[:, None] & inside, other=0.0)
        acc = tl.dot(x, w.T, acc)
        x_ptrs += BLOCK_H
        w_ptrs += BLOCK_H
    rows = piece.to(tl.int64) * T + tokens
    sum_ptrs = sums_ptr + rows[:, None] * E + experts[None, :]
    tl.store(sum_ptrs, acc, mask=is_token[:, None] & is_expert[None, :])


def router_pieces(
    router_input: torch.Tensor, router_weight: torch.Tensor, plan: RouterTiles
) -> torch.Tensor:
    """fp32 [pieces, T, E] of ``router_input`` [T, H] and ``router_weight`` [E, H], bf16 or fp16 with contiguous rows.

    The result is scratch memory of the call (``launch.scratch``).
    """
    T, H = router_input.shape
    E = router_weight.shape[0]
    # Whole blocks, so that no block belongs to two pieces.
    piece_size = triton.cdiv(triton.cdiv(H, plan.pieces), plan.block_h) * plan.block_h
    pieces = triton.cdiv(H, piece_size)
    sums = scratch((pieces, T, E), torch.float32, router_input.device)
    launch(
        _router_pieces,
        (triton.cdiv(T, plan.block_t), triton.cdiv(E, plan.block_e), pieces),
        router_input,
        router_weight,
        sums,
        T,
        E,
        H,
        piece_size,
        router_input.stride(0),
        router_weight.stride(0),
        BLOCK_T=plan.block_t,
        BLOCK_E=plan.block_e,
        BLOCK_H=plan.block_h,
        EVEN_H=H % plan.block_h == 0,
        NUM_STAGES=plan.num_stages,
        num_warps=4,
        num_stages=plan.num_stages,
        first=True,
    )
    return sums
