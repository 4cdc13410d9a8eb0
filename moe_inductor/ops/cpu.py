"""CPU implementations, in ATen: rows grouped by expert, only experts that have rows, no padding.

How ``fused_experts`` spends its time was measured (2 cores of an AMD EPYC with AVX-512, torch 2.13):

* The weighted sum over the k experts of a token is one ``embedding_bag``: gather, scale and add in one pass,
  in fp32 inside.  Spelt as gather, multiply, sum it costs 40 times as much at 512 tokens.
* The gate/up activations live in a scratch buffer that is reused from one block of experts to the next, so
  they stay in cache and the allocator does not touch fresh pages.
* fp32 matrix products of 2 to 4 rows are up to 3.5 times faster as ``W @ x^T``, and fp32 weights of 2^16
  elements and more are 1.1 to 1.5 times faster through oneDNN than through the BLAS behind ``torch.mm``.
  Not so where that BLAS is MKL on an Intel processor (2 cores of a Xeon with AMX): there ``torch.mm`` is 1.5 to
  3 times faster than either up to 8 rows, and within a tenth of the fastest for more.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_inductor.ops.check import (
    Call,
    Routing,
    Sizes,
    check_expert,
    check_experts_metadata,
    check_experts_sizes,
    check_routing,
)
from moe_inductor.ops.scores import (
    chosen_scores,
    denominator,
    group_mask,
    scores,
    scores_for_choice,
)
from moe_inductor.unit import Unit

# Up to this many (token, expert) pairs are grouped by Python, which then beats three calls into ATen.
_FEW_SLOTS = 128
# From this many experts on, the loop over them is left to torch where it has one: for stacked bf16 weights.
_MANY_EXPERTS = 16
# Elements of gate/up activations per block of experts: 4 MB in fp32, two cores' L2 and a share of L3.
_BLOCK_ELEMENTS = 1 << 20
# From this many elements of one expert's weight on, oneDNN beats BLAS in fp32; below, its call costs more.
_ONEDNN_ELEMENTS = 1 << 16

# One expert's share of the sorted rows: (expert, first row, end row).
_Group = tuple[int, int, int]


def topk_routing(*args: Any, **facts: Any) -> tuple[Tensor, Tensor]:
    """See ``moe_inductor.ops.topk_routing``.  The ATen calls that the models make, so the same ids; for k = 1 those
    that promise which of equal values they give."""
    call = Routing(*args, **facts)
    check_routing(call)
    compute = call.compute_dtype
    choice = scores_for_choice(call)
    if call.k == 1:  # of equal scores max and argmax promise the lowest id, topk leaves it open
        values, ids = choice.max(dim=-1, keepdim=True)
    else:
        values, ids = torch.topk(choice, call.k, dim=-1)
    if call.compares_logits and call.score == call.weight and choice.dtype == compute:
        weights = values
    else:
        weights = chosen_scores(call, ids)
        if call.fill_weights:
            weights = weights.masked_fill(~group_mask(call, scores(call)).gather(-1, ids), 0)
    if call.renormalise:
        weights = weights / denominator(call, weights)
    if call.scale != 1:
        weights = weights * call.scale
    return weights.to(call.weights_dtype), ids


def fused_experts(*args: Any) -> Tensor:
    """See ``moe_inductor.ops.fused_experts``."""
    call = Call(*args)
    unit = check_experts_metadata(call)
    sizes = check_experts_sizes(call, unit)
    hidden_states, topk_ids, topk_weights = call[:3]
    tokens, k = topk_ids.shape
    slots = tokens * k
    if slots == 0:
        return hidden_states.new_zeros(hidden_states.shape, dtype=call.out_dtype)
    if call.batch_invariant and tokens > 1:
        # BLAS chooses its kernel, and with it the order of a sum, by the number of rows.
        rows = (t.split(1) for t in (hidden_states, topk_ids, topk_weights))
        return torch.cat([fused_experts(*row, *call[3:]) for row in zip(*rows, strict=True)])
    if tokens == 1 and not (call.weight_on_input or call.gate_up_bias or call.down_bias):
        experts = topk_ids[0].tolist()
        if all(0 <= expert < sizes.num_experts for expert in experts):
            return _one_token(call, unit, sizes, experts)

    groups, tokens_of_rows, row_of_slot = _group(topk_ids, sizes.num_experts)
    used = groups[-1][2] if groups else 0
    rows = hidden_states.index_select(0, tokens_of_rows)
    if call.weight_on_input:
        flat = topk_weights.reshape(-1)
        scales = torch.empty_like(flat).index_copy_(0, row_of_slot, flat)[:used]
        rows = (rows * scales.unsqueeze(-1)).to(rows.dtype)
        topk_weights = torch.ones_like(topk_weights)
    result = _experts(call, unit, sizes, rows, slots, groups)
    if used < slots:
        # Slots whose id is outside 0..E-1: nothing may reach the sum, not even NaN times zero.
        result[used:].zero_()
        invalid = (topk_ids < 0) | (topk_ids >= sizes.num_experts)
        topk_weights = topk_weights.masked_fill(invalid, 0)
    return _combine(result, row_of_slot, topk_weights, call.out_dtype)


def _one_token(call: Call, unit: Unit, sizes: Sizes, experts: list[int]) -> Tensor:
    """The same for one row: nothing to sort, and a tensor less per step is what one token can still save."""
    hidden, width = sizes.hidden_size, sizes.intermediate_size

    def project(rows: Sequence[Tensor], name: str, shape: tuple[int, int]) -> Tensor:
        weights = _used(getattr(call, name), name, experts, shape)
        first = weights[0]
        large = first.dtype == torch.float32 and first.numel() >= _ONEDNN_ELEMENTS
        onednn = large and not _mkl_on_intel()
        linear = (_onednn_linear() if onednn and first.is_contiguous() else None) or F.linear
        return torch.cat([linear(row, w) for row, w in zip(rows, weights, strict=True)])

    same = [call.hidden_states] * len(experts)
    if call.up_proj:
        gate = project(same, "gate_up_proj", (width, hidden))
        up: Tensor | None = project(same, "up_proj", (width, hidden))
    else:
        both = project(same, "gate_up_proj", (sizes.inner_rows, hidden))
        gate, up = _halves(both, unit, call.interleaved)
    inner = unit.into(gate, up, gate.new_empty((len(experts), width)))
    result = project(inner.split(1), "down_proj", (hidden, width))
    dtype = _sum_dtype(result, call.topk_weights.dtype, call.out_dtype)
    return (call.topk_weights.to(dtype) @ result.to(dtype)).to(call.out_dtype)


def _group(topk_ids: Tensor, num_experts: int) -> tuple[list[_Group], Tensor, Tensor]:
    """Slots ``t * k + j`` ordered by expert: each used expert's rows, each row's token, each slot's row.

    Slots whose id is outside 0..E-1 get the last rows, which belong to no group and to no token.
    """
    slots, k = topk_ids.numel(), topk_ids.shape[1]
    groups: list[_Group] = []
    if slots <= _FEW_SLOTS:
        ids = topk_ids.reshape(-1).tolist()
        ordered = [slot for slot in range(slots) if 0 <= ids[slot] < num_experts]
        ordered.sort(key=ids.__getitem__)
        used = len(ordered)
        start = 0
        for row in range(1, used + 1):
            if row == used or ids[ordered[row]] != ids[ordered[start]]:
                groups.append((ids[ordered[start]], start, row))
                start = row
        tokens_of_rows = torch.tensor([slot // k for slot in ordered], dtype=torch.int64)
        if used < slots:
            ordered += [slot for slot in range(slots) if not 0 <= ids[slot] < num_experts]
        row_of_slot = [0] * slots
        for row, slot in enumerate(ordered):
            row_of_slot[slot] = row
        return groups, tokens_of_rows, torch.tensor(row_of_slot)

    flat = topk_ids.reshape(-1)
    # Negative ids become too large ones, which sort to the end.
    sorted_ids, order = torch.sort(flat.where(flat >= 0, num_experts), stable=True)
    experts = torch.arange(num_experts + 1, dtype=sorted_ids.dtype)
    bounds = torch.searchsorted(sorted_ids, experts).tolist()
    for expert in range(num_experts):
        if bounds[expert] < bounds[expert + 1]:
            groups.append((expert, bounds[expert], bounds[expert + 1]))
    row_of_slot = torch.empty_like(order).scatter_(0, order, torch.arange(slots))
    return groups, order[: bounds[-1]] // k, row_of_slot


def _experts(
    call: Call, unit: Unit, sizes: Sizes, rows: Tensor, slots: int, groups: list[_Group]
) -> Tensor:
    """``down_e(unit(gate_e row, up_e row))`` for every row of every group, as [slots, H].

    Rows after the last group are not written.
    """
    hidden, width = sizes.hidden_size, sizes.intermediate_size
    wide = (2 if unit.gated else 1) * width
    blocks = _blocks(groups, wide)
    biased = bool(call.gate_up_bias or call.down_bias)
    grouped = (
        len(groups) >= _MANY_EXPERTS
        and not biased
        and _grouped_mm_takes(rows, (*call.gate_up_proj, *call.up_proj, *call.down_proj))
    )
    if grouped and len(blocks) == 1 and rows.shape[0] == slots:
        return _grouped_block(call, unit, rows, groups)

    result = rows.new_empty((slots, hidden))
    scratch_rows = max((groups[b - 1][2] - groups[a][1] for a, b in blocks), default=0)
    scratch = rows.new_empty((scratch_rows, wide))
    products = rows.new_empty((scratch_rows, width))
    for first, end in blocks:
        block = groups[first:end]
        start, stop = block[0][1], block[-1][2]
        # One split instead of a slice per expert: with many experts, Python is what costs (and of the
        # two spellings of split, the other one is 8 us of Python).
        counts = [group[2] - group[1] for group in block]
        x = rows[start:stop].split_with_sizes(counts)
        both = scratch[: stop - start]
        gate, up = _halves(both, unit, call.interleaved)

        if call.up_proj:
            assert up is not None
            _project(call, "gate_up", block, x, gate, (width, hidden))
            _project(call, "up", block, x, up, (width, hidden))
        else:
            _project(call, "gate_up", block, x, both, (sizes.inner_rows, hidden))
        # Into its own rows: oneDNN is slower on the strided half of a wider buffer.
        inner = unit.into(gate, up, products[: stop - start])
        hs = inner.split_with_sizes(counts)
        _project(call, "down", block, hs, result[start:stop], (hidden, width))
    return result


def _project(
    call: Call,
    name: str,
    block: list[_Group],
    inputs: Sequence[Tensor],
    out: Tensor,
    shape: tuple[int, int],
) -> None:
    """One projection of a block of experts, written to the rows of ``out``."""
    linear = _linears_fp32 if out.dtype == torch.float32 else _linears
    outs = out.split_with_sizes([x.shape[0] for x in inputs])
    weights, biases = getattr(call, f"{name}_proj"), getattr(call, f"{name}_bias")
    used = _used(weights, f"{name}_proj", [expert for expert, _, _ in block], shape)
    linear(inputs, used, outs)
    if biases:
        for each, (expert, _, _) in zip(outs, block, strict=True):
            each += _bias(biases, f"{name}_bias", expert, shape[0])


def _halves(both: Tensor, unit: Unit, interleaved: bool) -> tuple[Tensor, Tensor | None]:
    """Gate and up columns of a first projection's result."""
    if not unit.gated:
        return both, None
    if interleaved:
        return both[:, ::2], both[:, 1::2]
    width = both.shape[1] // 2
    return both[:, :width], both[:, width:]


def _bias(biases: Sequence[Tensor], name: str, expert: int, width: int) -> Tensor:
    if biases[0].dim() == 2:
        return biases[0][expert]
    check_expert(expert, name, biases[expert], (width,))
    return biases[expert]


def _grouped_mm_takes(rows: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether ``torch.nn.functional.grouped_mm`` takes these: stacked bf16, rows of whole 16 bytes."""
    return rows.dtype == torch.bfloat16 and all(
        weight.dim() == 3
        and weight.is_contiguous()
        and weight.shape[-1] % 8 == 0
        and weight.shape[-2] % 16 == 0
        and weight.data_ptr() % 16 == 0
        for weight in weights
    )


def _grouped_block(call: Call, unit: Unit, rows: Tensor, groups: list[_Group]) -> Tensor:
    """The same products as the loop over experts makes, with that loop in C++."""
    ends = [0] * call.gate_up_proj[0].shape[0]
    for expert, first, end in groups:
        ends[expert] = end - first
    offsets = torch.tensor(list(itertools.accumulate(ends)), dtype=torch.int32)
    gate = F.grouped_mm(rows, call.gate_up_proj[0].mT, offs=offsets)
    if call.up_proj:
        up: Tensor | None = F.grouped_mm(rows, call.up_proj[0].mT, offs=offsets)
    else:
        gate, up = _halves(gate, unit, call.interleaved)
    inner = unit.into(gate, up, torch.empty_like(gate, memory_format=torch.contiguous_format))
    return F.grouped_mm(inner, call.down_proj[0].mT, offs=offsets)


def _used(
    weights: Sequence[Tensor], name: str, experts: list[int], shape: tuple[int, int]
) -> list[Tensor]:
    """The weights of these experts, each [out, in]."""
    if weights[0].dim() == 3:
        return [weights[0].select(0, expert) for expert in experts]
    for expert in experts:
        check_expert(expert, name, weights[expert], shape)
    return [weights[expert] for expert in experts]


def _blocks(groups: list[_Group], width: int) -> list[tuple[int, int]]:
    """Consecutive groups whose activations fit into cache together, as ranges of group numbers.

    Small enough to stay in cache, large enough that one call per activation serves many experts.
    """
    rows = max(1, _BLOCK_ELEMENTS // max(1, width))
    blocks, first = [], 0
    for i in range(1, len(groups)):
        if groups[i][2] - groups[first][1] > rows:
            blocks.append((first, i))
            first = i
    if groups:
        blocks.append((first, len(groups)))
    return blocks


def _linears(xs: Sequence[Tensor], weights: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
    """``out[:] = x @ weight.T`` for each expert; ``weight`` is [out, in]."""
    mm = torch.mm
    for x, weight, out in zip(xs, weights, outs, strict=True):
        mm(x, weight.t(), out=out)


def _linears_fp32(xs: Sequence[Tensor], weights: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
    """The same by the product that is fastest for these sizes."""
    if _mkl_on_intel():
        return _linears(xs, weights, outs)
    mm = torch.mm
    large = weights[0].numel() >= _ONEDNN_ELEMENTS
    onednn = _onednn_linear() if large and weights[0].stride(1) == 1 else None
    few = 4 if large else 8
    for x, weight, out in zip(xs, weights, outs, strict=True):
        if 2 <= x.shape[0] <= few:
            # Contiguous: with x^T stored row by row this product is five times slower, not faster.
            out.copy_(mm(weight, x.contiguous().t()).t())
        elif onednn is not None:
            out.copy_(onednn(x, weight))
        else:
            mm(x, weight.t(), out=out)


@functools.cache
def _mkl_on_intel() -> bool:
    """Whether ``torch.mm`` is MKL on a processor of MKL's maker, by whose name it chooses its fast kernels."""
    if not torch.backends.mkl.is_available():
        return False
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as info:
            return "GenuineIntel" in info.read(1024)
    except OSError:
        return False


@functools.cache
def _onednn_linear() -> Callable[[Tensor, Tensor], Tensor] | None:
    # Imported late: _compat imports Dynamo and Inductor, which the ops do not need otherwise.
    from moe_inductor import _compat

    return _compat.onednn_linear()


def _combine(
    result: Tensor, row_of_slot: Tensor, topk_weights: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """``y[t] = sum_j topk_weights[t, j] * result[row of slot (t, j)]``, summed in fp32 or fp64."""
    tokens, k = topk_weights.shape
    dtype = _sum_dtype(result, topk_weights.dtype, out_dtype)
    return torch.embedding_bag(
        result.to(dtype),
        row_of_slot,
        torch.arange(0, tokens * k, k),
        mode=0,
        per_sample_weights=topk_weights.reshape(-1).to(dtype),
    )[0].to(out_dtype)


def _sum_dtype(result: Tensor, weights_dtype: torch.dtype, out_dtype: torch.dtype) -> torch.dtype:
    """One dtype for rows, weights and sum that rounds none of them."""
    if result.dtype == weights_dtype == out_dtype:
        return result.dtype
    return torch.float64 if torch.float64 in (result.dtype, weights_dtype) else torch.float32
