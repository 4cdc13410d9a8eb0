"""Routing: ``router_logits [T, E] -> topk_weights [T, k], topk_ids [T, k]`` in one launch.

    array          shape   dtype           written by   read by
    router_logits  T, E    bf16/fp16/fp32  caller       _route
    bias           E       bf16/fp16/fp32  caller       _route
    topk_weights   T, k    weights_dtype   _route       combine / decode (through the caller)
    topk_ids       T, k    int64           _route       align / decode (through the caller)

Or, instead of the logits, ``sums [pieces, T, E]`` of router_pieces.py and ``router_bias [E]``, which make them.

Without a bias and without groups experts are ordered by their logit, not by their rounded score: the order is the
same wherever the scores differ, and where they do not it does not depend on how exp rounds.  With them scores are
computed, rounded as often as the model rounds them, and compared.  Equal values: lowest id first.
NaN counts as the largest value, as in ``torch.topk``; ids are distinct and inside [0, E) for any input.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from .early import begin, next_may_begin
from .launch import fresh, launch

_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def _softplus(x):
    """log(1 + exp(x)); x itself from 20 on, as in torch.  log(1 + u) = log(w) u / (w - 1) with w = 1 + u rounded
    keeps small u."""
    u = tl.exp(tl.minimum(x, 20.0))
    w = 1.0 + u
    log1p = tl.where(w == 1.0, u, tl.log(w) * u / tl.where(w == 1.0, 1.0, w - 1.0))
    return tl.where(x > 20.0, x, tl.where(x != x, x, log1p))


@triton.jit
def _elementwise(x, KIND: tl.constexpr, DTYPE: tl.constexpr):
    """A score that is a function of its own logit, with ``DTYPE`` for results in between."""
    if KIND == "sigmoid":
        return 1.0 / (1.0 + tl.exp(-x))
    elif KIND == "sqrtsoftplus":
        return tl.sqrt(_softplus(x).to(DTYPE).to(tl.float32))
    else:
        return x


@triton.jit
def _ordered(x):
    """int64 whose high half orders like the fp32 ``x`` (negative floats have their magnitude bits flipped)."""
    x = tl.where(x == 0.0, 0.0, x)  # -0.0 ties with 0.0
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(x != x, 0x7FFFFFFF, bits)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) << 32


@triton.jit
def _kept(choice, exists, GROUPS: tl.constexpr, KEPT: tl.constexpr, TOP2: tl.constexpr,
          PADDED_G: tl.constexpr, PADDED_S: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """1 for the experts of the ``KEPT`` best groups, as a row of PADDED_G * PADDED_S."""
    TAKEN: tl.constexpr = -(2**63)
    member = tl.arange(0, PADDED_G * PADDED_S) % PADDED_S
    keys = tl.where(exists, _ordered(choice) | (PADDED_S - 1 - member).to(tl.int64), TAKEN)
    keys = tl.reshape(keys, (PADDED_G, PADDED_S))
    values = tl.reshape(choice, (PADDED_G, PADDED_S))
    best = tl.max(keys, 1)
    first = tl.sum(tl.where(keys == best[:, None], values, 0.0), 1)
    if TOP2:
        keys = tl.where(keys == best[:, None], TAKEN, keys)
        second = tl.max(keys, 1)
        rating = first + tl.sum(tl.where(keys == second[:, None], values, 0.0), 1)
        rating = rating.to(DTYPE).to(tl.float32)
    else:
        rating = first
    group = tl.arange(0, PADDED_G)
    left = tl.where(group < GROUPS, _ordered(rating) | (PADDED_G - 1 - group).to(tl.int64), TAKEN)
    kept = tl.zeros((PADDED_G,), tl.int32)
    for _ in range(KEPT):
        winner = left == tl.max(left, 0)
        kept = tl.where(winner, 1, kept)
        left = tl.where(winner, TAKEN, left)
    return tl.reshape(tl.broadcast_to(kept[:, None], (PADDED_G, PADDED_S)), (PADDED_G * PADDED_S,))


# stride_piece changes with T and must not cause a new compilation at multiples of 16.
@triton.jit(do_not_specialize=["stride_piece"])
def _route(
    logits_ptr,
    router_bias_ptr,
    bias_ptr,
    weights_ptr,
    ids_ptr,
    stride_piece,
    stride_token,
    E,
    PIECES: tl.constexpr,
    LOGITS_DTYPE: tl.constexpr,
    K: tl.constexpr,
    PADDED_K: tl.constexpr,
    RENORMALISE: tl.constexpr,
    SCORE: tl.constexpr,
    WEIGHT: tl.constexpr,
    EPSILON: tl.constexpr,
    MINIMUM: tl.constexpr,
    SCALE: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    TOP2: tl.constexpr,
    FILL: tl.constexpr,
    FILL_WEIGHTS: tl.constexpr,
    SCORE_DTYPE: tl.constexpr,
    CHOICE_DTYPE: tl.constexpr,
    PADDED_G: tl.constexpr,
    PADDED_S: tl.constexpr,
    EARLY: tl.constexpr,
):
    begin(EARLY)
    next_may_begin(EARLY)
    # Every group has PADDED_S lanes; without groups all experts are one group and a lane is an expert.
    LANES: tl.constexpr = PADDED_G * PADDED_S
    token = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    if GROUPS > 1:
        size = E // GROUPS
        expert_of = (lane // PADDED_S) * size + lane % PADDED_S
        exists = (lane % PADDED_S < size) & (lane // PADDED_S < GROUPS)
    else:
        expert_of = lane
        exists = lane < E
    logits_ptrs = logits_ptr + token * stride_token + expert_of
    logits = tl.load(logits_ptrs, mask=exists, other=float("-inf")).to(tl.float32)
    if PIECES > 0:  # sums of products that nobody has rounded yet
        for piece in tl.static_range(1, PIECES):
            logits += tl.load(logits_ptrs + piece * stride_piece, mask=exists, other=0.0)
        if router_bias_ptr is not None:
            logits += tl.load(router_bias_ptr + expert_of, mask=exists, other=0.0).to(tl.float32)
        logits = logits.to(LOGITS_DTYPE).to(tl.float32)
    largest = tl.max(logits, 0)

    BY_LOGIT: tl.constexpr = GROUPS == 1 and bias_ptr is None
    if BY_LOGIT:
        choice = logits
    else:
        if SCORE == "softmax":
            choice = tl.exp(logits - largest)
            choice = choice / tl.sum(choice, 0)
        else:
            choice = _elementwise(logits, SCORE, SCORE_DTYPE)
        choice = choice.to(SCORE_DTYPE).to(tl.float32)
        if bias_ptr is not None:
            choice += tl.load(bias_ptr + expert_of, mask=exists, other=0.0).to(tl.float32)
            choice = choice.to(CHOICE_DTYPE).to(tl.float32)
        if GROUPS > 1:
            kept = _kept(choice, exists, GROUPS, KEPT, TOP2, PADDED_G, PADDED_S, CHOICE_DTYPE)
            choice = tl.where(kept == 1, choice, FILL)

    # One int64 key per expert, so that one max finds the largest value, lowest id first, exactly: the low half is
    # -id.  Where it is the logit that decides it is read back from the key, which saves a second reduction.
    TAKEN: tl.constexpr = -(2**63)
    keys = tl.where(exists, _ordered(choice) | (LANES - 1 - lane).to(tl.int64), TAKEN)
    column = tl.arange(0, PADDED_K)
    top_logits = tl.full((PADDED_K,), float("-inf"), tl.float32)
    top_lanes = tl.zeros((PADDED_K,), tl.int32)
    top_kept = tl.zeros((PADDED_K,), tl.int32)
    for j in range(K):
        best = tl.max(keys, 0)
        winner = (LANES - 1 - (best & 0xFFFFFFFF)).to(tl.int32)
        if BY_LOGIT:
            bits = (best >> 32).to(tl.int32)
            bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
            logit = bits.to(tl.float32, bitcast=True)
        else:
            logit = tl.sum(tl.where(lane == winner, logits, 0.0), 0)
        if FILL_WEIGHTS:
            top_kept = tl.where(column == j, tl.sum(tl.where(lane == winner, kept, 0), 0), top_kept)
        top_logits = tl.where(column == j, logit, top_logits)
        top_lanes = tl.where(column == j, winner, top_lanes)
        keys = tl.where(lane == winner, TAKEN, keys)

    used = column < K
    # A softmax divided by the sum of the chosen is the softmax of the chosen.
    DIVIDED: tl.constexpr = RENORMALISE and EPSILON == 0.0 and MINIMUM is None and not FILL_WEIGHTS
    OF_CHOSEN: tl.constexpr = WEIGHT == "softmax_of_chosen" or (WEIGHT == "softmax" and DIVIDED)
    if OF_CHOSEN:
        if not BY_LOGIT:
            largest = tl.max(top_logits, 0)
        weights = tl.exp(top_logits - largest)
        weights = weights / tl.sum(weights, 0)
    elif WEIGHT == "softmax":
        weights = tl.exp(top_logits - largest)
        weights = weights / tl.sum(tl.where(exists, tl.exp(logits - largest), 0.0), 0)
    else:
        weights = _elementwise(top_logits, WEIGHT, tl.float32)
    if FILL_WEIGHTS:
        weights = tl.where(top_kept == 1, weights, 0.0)
    if RENORMALISE and not (OF_CHOSEN and DIVIDED):
        total = tl.sum(tl.where(used, weights, 0.0), 0) + EPSILON
        if MINIMUM is not None:
            total = tl.where(total < MINIMUM, MINIMUM, total)
        weights = weights / total
    if SCALE != 1.0:
        weights = weights * SCALE
    out = token * K + column
    top_ids = top_lanes
    if GROUPS > 1:
        top_ids = (top_lanes // PADDED_S) * size + top_lanes % PADDED_S
    tl.store(weights_ptr + out, weights.to(weights_ptr.dtype.element_ty), mask=used)
    tl.store(ids_ptr + out, top_ids.to(tl.int64), mask=used)


def topk_routing(
    router_logits: torch.Tensor,
    k: int,
    renormalise: bool,
    weights_dtype: torch.dtype,
    bias: torch.Tensor | None = None,
    score: str = "softmax",
    weight: str = "softmax",
    epsilon: float = 0.0,
    minimum: float | None = None,
    scale: float = 1.0,
    groups: int = 1,
    kept_groups: int = 1,
    group_score: str = "max",
    fill: float = 0.0,
    fill_weights: bool = False,
    score_dtype: torch.dtype | None = None,
    first: bool = True,
    allocate: Callable[..., torch.Tensor] = fresh,
    router_bias: torch.Tensor | None = None,
    logits_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``moe_inductor.ops.topk_routing`` on checked arguments.

    router_logits may be fp32 [pieces, T, E] (``router_pieces``): the logits are the sum of the pieces and of
    router_bias [E], which may be None, rounded to logits_dtype.

    first: no kernel of the same call runs before.  allocate: where the results come from (``launch.scratch``).
    """
    *pieces, T, E = router_logits.shape
    topk_weights = allocate((T, k), weights_dtype, router_logits.device)
    topk_ids = allocate((T, k), torch.int64, router_logits.device)
    if T == 0 or k == 0:
        return topk_weights, topk_ids
    if router_logits.stride(-1) != 1:
        router_logits = router_logits.contiguous()
    score_dtype = choice_dtype = score_dtype or torch.float32
    if bias is not None:
        bias = bias.contiguous()
        choice_dtype = torch.promote_types(score_dtype, bias.dtype)
    launch(
        _route,
        (T,),
        router_logits,
        router_bias,
        bias,
        topk_weights,
        topk_ids,
        router_logits.stride(0) if pieces else 0,
        router_logits.stride(-2),
        E,
        PIECES=pieces[0] if pieces else 0,
        LOGITS_DTYPE=_TYPES[logits_dtype or torch.float32],
        K=k,
        PADDED_K=triton.next_power_of_2(k),
        RENORMALISE=renormalise,
        SCORE=score,
        WEIGHT=weight,
        EPSILON=epsilon,
        MINIMUM=minimum,
        SCALE=scale,
        GROUPS=groups,
        KEPT=kept_groups,
        TOP2=group_score == "top2",
        FILL=fill,
        FILL_WEIGHTS=fill_weights and groups > 1,
        SCORE_DTYPE=_TYPES[score_dtype],
        CHOICE_DTYPE=_TYPES[choice_dtype],
        PADDED_G=triton.next_power_of_2(groups),
        PADDED_S=triton.next_power_of_2(E // groups),
        num_warps=1 if E <= 512 else 4,
        first=first,
    )
    return topk_weights, topk_ids
