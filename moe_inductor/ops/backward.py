"""The backward of the experts, in ATen per expert, the same code for CPU and CUDA."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_inductor.ops.check import Call, Sizes, check_experts_metadata, check_experts_sizes


def empty_gradient(tensor: Tensor) -> Tensor:
    """A tensor for the gradient of ``tensor``: same shape, dtype and order of dimensions, without holes.

    Keeping the order matters for transposed weights: the gradient of the view then is a plain gradient of
    the parameter, without another copy.
    """
    return torch.empty_like(tensor, memory_format=torch.preserve_format)


def fused_experts_backward(
    grad_output: Tensor,
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_proj: Sequence[Tensor],
    up_proj: Sequence[Tensor],
    down_proj: Sequence[Tensor],
    activation: str,
    needs_grad: Sequence[bool],
    gate_up_bias: Sequence[Tensor] = (),
    up_bias: Sequence[Tensor] = (),
    down_bias: Sequence[Tensor] = (),
    interleaved: bool = False,
    weight_on_input: bool = False,
) -> list[Tensor]:
    """See ``moe_inductor.ops.fused_experts_backward``.

    Per expert, with ``x`` its rows, ``w`` their routing weights and ``dy`` their output gradients:

        gate = x Wg^T + bg,  up = x Wu^T + bu,  h = unit(gate, up),  y = h Wd^T + bd      (recomputed)
        dw     = sum(dy * y)                 = sum(h * (dy Wd)) + sum(dy * bd), which needs no y
        dh     = w * (dy Wd)
        dgate, dup = dh * unit'(gate, up)
        dx    += dgate Wg + dup Wu,  dWg = dgate^T x,  dWu = dup^T x,  dWd = (w * dy)^T h
        dbg    = sum(dgate),  dbu = sum(dup),  dbd = sum(w * dy)              over the rows

    With the routing weight on the input, ``x`` is ``w`` times the row, ``dy`` is not weighted, and what comes
    out as ``dx`` gives ``dw = sum(dx * row)`` and ``w * dx`` for the row.

    Elementwise maths and the sums into ``hidden_states``, ``topk_weights`` and biases are fp32 (fp64 for fp64
    inputs).  An expert without rows gets exact zeros.

    On CUDA this reads the row counts back to the host: one synchronisation per call, so it cannot be
    captured into a CUDA graph.  Fused backward kernels will remove it.

    Raises:
        ValueError, TypeError: as ``fused_experts``; also a ``needs_grad`` of the wrong length.
    """
    call = Call(
        hidden_states,
        topk_ids,
        topk_weights,
        gate_up_proj,
        up_proj,
        down_proj,
        activation,
        grad_output.dtype,
        gate_up_bias,
        up_bias,
        down_bias,
        interleaved,
        weight_on_input,
    )
    unit = check_experts_metadata(call)
    sizes = check_experts_sizes(call, unit)
    if grad_output.shape != hidden_states.shape:
        raise ValueError(
            f"fused_experts_backward: grad_output is {list(grad_output.shape)}, "
            f"hidden_states {list(hidden_states.shape)}"
        )
    inputs = differentiable(call)
    if len(needs_grad) != len(inputs):
        raise ValueError(
            f"fused_experts_backward: needs_grad has {len(needs_grad)} flags for {len(inputs)} inputs"
        )
    gradients = [
        empty_gradient(t) if needed else None for t, needed in zip(inputs, needs_grad, strict=True)
    ]
    grad_hidden, grad_weights, *rest = gradients
    by_expert: dict[str, Sequence[Tensor | None]] = {}
    for name, tensors in (call.weights | call.biases).items():
        mine, rest = rest[: len(tensors)], rest[len(tensors) :]
        by_expert[name] = _by_expert(mine, tensors, sizes)

    dtype = hidden_states.dtype
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    k = topk_ids.shape[1]
    flat_ids = topk_ids.reshape(-1)
    sorted_ids, order = torch.sort(flat_ids, stable=True)
    experts = torch.arange(sizes.num_experts + 1, dtype=flat_ids.dtype, device=flat_ids.device)
    bounds = torch.searchsorted(sorted_ids, experts).tolist()  # the one host synchronisation
    tokens_of_rows = order.div(k, rounding_mode="floor") if k else order
    flat_weights = topk_weights.reshape(-1)
    sum_hidden = (
        None
        if grad_hidden is None
        else torch.zeros(hidden_states.shape, dtype=compute, device=hidden_states.device)
    )
    sum_weights = (
        None
        if grad_weights is None
        else torch.zeros(flat_weights.shape, dtype=compute, device=hidden_states.device)
    )

    for e in range(sizes.num_experts):
        start, end = bounds[e], bounds[e + 1]
        d = {name: parts[e] for name, parts in by_expert.items()}
        if start == end:
            for gradient in d.values():
                if gradient is not None:
                    gradient.zero_()
            continue
        needs_x = sum_hidden is not None or (weight_on_input and sum_weights is not None)
        needs_inner = needs_x or any(
            d[n] is not None for n in ("gate_up_proj", "up_proj", "gate_up_bias", "up_bias")
        )
        needs_down = d["down_proj"] is not None or d["down_bias"] is not None
        if not needs_inner and sum_weights is None and not needs_down:
            continue

        slots = order[start:end]
        tokens = tokens_of_rows[start:end]
        row = hidden_states.index_select(0, tokens)
        w = flat_weights.index_select(0, slots).to(compute).unsqueeze(-1)
        x = (row.to(compute) * w).to(dtype) if weight_on_input else row
        weight = {name: _expert(tensors, e) for name, tensors in call.weights.items()}
        bias = {name: _vector(tensors, e) for name, tensors in call.biases.items()}
        w_gate_up, w_up, w_down = weight.values()
        assert w_gate_up is not None
        assert w_down is not None
        both = _linear(x, w_gate_up, bias["gate_up_bias"]).to(compute)
        if w_up is not None:
            gate, up = both, _linear(x, w_up, bias["up_bias"]).to(compute)
        elif interleaved:
            gate, up = both[:, ::2], both[:, 1::2]
        elif unit.gated:
            gate, up = both.chunk(2, -1)
        else:
            gate, up = both, None
        dy = grad_output.index_select(0, tokens)
        w_dy = dy.to(compute) if weight_on_input else dy.to(compute) * w
        if d["down_bias"] is not None:
            d["down_bias"].copy_(w_dy.sum(0))
        dy_down = (dy.to(dtype) @ w_down).to(compute)
        h, dgate, dup = unit.backward(
            gate, up, lambda _, dy=dy_down, w=w: dy if weight_on_input else dy * w
        )
        if d["down_proj"] is not None:
            torch.mm(w_dy.to(dtype).t(), h.to(dtype), out=d["down_proj"])
        if sum_weights is not None and not weight_on_input:
            dw = (dy_down * h).sum(-1)
            if bias["down_bias"] is not None:
                dw += dy.to(compute) @ bias["down_bias"].to(compute)
            sum_weights.index_copy_(0, slots, dw)
        if not needs_inner:
            continue
        dx = torch.zeros((), dtype=compute, device=x.device)
        for name, matrix, inner in (
            ("up", w_up, dup),
            ("gate_up", w_gate_up, dgate if w_up is not None else _joined(dgate, dup, interleaved)),
        ):
            if matrix is None or inner is None:
                continue
            grad_bias, grad_matrix = d[f"{name}_bias"], d[f"{name}_proj"]
            if grad_bias is not None:
                grad_bias.copy_(inner.sum(0))
            inner = inner.to(dtype)
            if grad_matrix is not None:
                torch.mm(inner.t(), x, out=grad_matrix)
            if needs_x:
                dx = dx + (inner @ matrix).to(compute)
        if weight_on_input:
            if sum_weights is not None:
                sum_weights.index_copy_(0, slots, (dx * row).sum(-1))
            dx = dx * w
        if sum_hidden is not None:
            # A token is here once unless ids repeat in its row: no two adds race, the sum is deterministic.
            sum_hidden.index_add_(0, tokens, dx)

    if grad_hidden is not None and sum_hidden is not None:
        grad_hidden.copy_(sum_hidden)
    if grad_weights is not None and sum_weights is not None:
        grad_weights.copy_(sum_weights.view(topk_weights.shape))
    return [gradient for gradient in gradients if gradient is not None]


def differentiable(call: Call) -> list[Tensor]:
    """The inputs that a flag of ``needs_grad`` stands for, in order."""
    lists = (*call.weights.values(), *call.biases.values())
    return [
        call.hidden_states,
        call.topk_weights,
        *(tensor for tensors in lists for tensor in tensors),
    ]


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())


def _joined(dgate: Tensor, dup: Tensor | None, interleaved: bool) -> Tensor:
    """Gradient of a first projection's result from those of its gate and up columns."""
    if dup is None:
        return dgate
    if interleaved:
        return torch.stack((dgate, dup), -1).flatten(1)
    return torch.cat((dgate, dup), -1)


def _expert(weights: Sequence[Tensor], expert: int) -> Tensor | None:
    if not weights:
        return None
    return weights[0][expert] if weights[0].dim() == 3 else weights[expert]


def _vector(biases: Sequence[Tensor], expert: int) -> Tensor | None:
    if not biases:
        return None
    return biases[0][expert] if biases[0].dim() == 2 else biases[expert]


def _by_expert(
    gradients: Sequence[Tensor | None], tensors: Sequence[Tensor], sizes: Sizes
) -> Sequence[Tensor | None]:
    """One gradient view per expert, whatever the storage."""
    if not tensors:
        return [None] * sizes.num_experts
    if not sizes.stacked:
        return gradients
    (first,) = gradients
    return [None] * sizes.num_experts if first is None else first.unbind(0)
