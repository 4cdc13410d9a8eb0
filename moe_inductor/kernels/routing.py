"""Softmax routing: ``router_logits [T, E] -> topk_weights [T, k], topk_ids [T, k]`` in one launch.

    array          shape   dtype          written by   read by
    router_logits  T, E    bf16/fp16/fp32 caller       _route
    topk_weights   T, k    weights_dtype  _route       combine / decode (through the caller)
    topk_ids       T, k    int64          _route       align / decode (through the caller)

Experts are ordered by their logit, not by their rounded probability: the order is the same wherever the
probabilities differ, and where they do not it does not depend on how exp rounds.  Equal logits: lowest id first.
NaN counts as the largest value, as in ``torch.topk``; ids are distinct and inside [0, E) for any input.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import launch


@triton.jit
def _route(
    logits_ptr,
    weights_ptr,
    ids_ptr,
    stride_token,
    E,
    K: tl.constexpr,
    PADDED_E: tl.constexpr,
    PADDED_K: tl.constexpr,
    RENORMALISE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, PADDED_E)
    exists = lane < E
    logits = tl.load(logits_ptr + token * stride_token + lane, mask=exists, other=float("-inf")).to(
        tl.float32
    )
    logits = tl.where(logits == 0.0, 0.0, logits)  # -0.0 ties with 0.0

    # One int64 key per expert, so that one max finds the largest logit, lowest id first, exactly.  The high
    # half orders like the float (negative floats have their magnitude bits flipped), the low half is -id.  The
    # winner's logit is read back from its key, which saves a second reduction per choice.
    bits = logits.to(tl.int32, bitcast=True)
    bits = tl.where(logits != logits, 0x7FFFFFFF, bits)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    TAKEN: tl.constexpr = -(2**63)
    keys = tl.where(exists, (ordered << 32) | (PADDED_E - 1 - lane).to(tl.int64), TAKEN)

    largest = tl.max(logits, 0)
    column = tl.arange(0, PADDED_K)
    top_scores = tl.zeros((PADDED_K,), tl.float32)
    top_ids = tl.zeros((PADDED_K,), tl.int32)
    for j in range(K):
        best = tl.max(keys, 0)
        expert = (PADDED_E - 1 - (best & 0xFFFFFFFF)).to(tl.int32)
        best_bits = (best >> 32).to(tl.int32)
        best_bits = tl.where(best_bits < 0, best_bits ^ 0x7FFFFFFF, best_bits)
        score = tl.exp(best_bits.to(tl.float32, bitcast=True) - largest)
        top_scores = tl.where(column == j, score, top_scores)
        top_ids = tl.where(column == j, expert, top_ids)
        keys = tl.where(lane == expert, TAKEN, keys)

    total = (
        tl.sum(top_scores, 0)
        if RENORMALISE
        else tl.sum(tl.where(exists, tl.exp(logits - largest), 0.0), 0)
    )
    kept = column < K
    out = token * K + column
    weights = top_scores / total
    tl.store(weights_ptr + out, weights.to(weights_ptr.dtype.element_ty), mask=kept)
    tl.store(ids_ptr + out, top_ids.to(tl.int64), mask=kept)


def topk_routing(
    router_logits: torch.Tensor, k: int, renormalise: bool, weights_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    T, E = router_logits.shape
    topk_weights = torch.empty((T, k), dtype=weights_dtype, device=router_logits.device)
    topk_ids = torch.empty((T, k), dtype=torch.int64, device=router_logits.device)
    if T == 0 or k == 0:
        return topk_weights, topk_ids
    if router_logits.stride(1) != 1:
        router_logits = router_logits.contiguous()
    launch(
        _route,
        (T,),
        router_logits,
        topk_weights,
        topk_ids,
        router_logits.stride(0),
        E,
        K=k,
        PADDED_E=triton.next_power_of_2(E),
        PADDED_K=triton.next_power_of_2(k),
        RENORMALISE=renormalise,
        num_warps=1 if E <= 512 else 4,
    )
    return topk_weights, topk_ids
