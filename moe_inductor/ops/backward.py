"""The backward of the experts, in ATen per expert, the same code for CPU and CUDA."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_inductor.ops.check import check_experts_metadata, check_experts_sizes


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
) -> list[Tensor]:
    """See ``moe_inductor.ops.fused_experts_backward``.

    Per expert, with ``x`` its rows, ``w`` their routing weights and ``dy`` their output gradients:

        gate = x Wg^T,  up = x Wu^T,  s = silu(gate),  h = s * up,  y = h Wd^T      (recomputed)
        dw     = sum(dy * y)                 = sum(h * (dy Wd)), which needs no y
        dh     = w * (dy Wd)
        dup    = dh * s
        dgate  = dh * up * silu'(gate),      silu'(g) = sigmoid(g) * (1 + g * (1 - sigmoid(g)))
        dx    += dgate Wg + dup Wu,  dWg = dgate^T x,  dWu = dup^T x,  dWd = (w * dy)^T h

    The derivative of silu is the product rule on ``g * sigmoid(g)`` (Elfwing, Uchibe, Doya, 2017,
    "Sigmoid-weighted linear units", eq. 5).  Elementwise maths and the sums into ``hidden_states`` and
    ``topk_weights`` are fp32 (fp64 for fp64 inputs).  An expert without rows gets exact zeros.

    On CUDA this reads the row counts back to the host: one synchronisation per call, so it cannot be
    captured into a CUDA graph.  Fused backward kernels will remove it.

    Raises:
        ValueError, TypeError: as ``fused_experts``; also a ``needs_grad`` of the wrong length.
    """
    check_experts_metadata(
        hidden_states,
        topk_ids,
        topk_weights,
        gate_up_proj,
        up_proj,
        down_proj,
        activation,
        grad_output.dtype,
    )
    sizes = check_experts_sizes(
        hidden_states, topk_ids, topk_weights, gate_up_proj, up_proj, down_proj
    )
    if grad_output.shape != hidden_states.shape:
        raise ValueError(
            f"fused_experts_backward: grad_output is {list(grad_output.shape)}, "
            f"hidden_states {list(hidden_states.shape)}"
        )
    inputs = (hidden_states, topk_weights, *gate_up_proj, *up_proj, *down_proj)
    if len(needs_grad) != len(inputs):
        raise ValueError(
            f"fused_experts_backward: needs_grad has {len(needs_grad)} flags for {len(inputs)} inputs"
        )
    gradients = [
        empty_gradient(t) if needed else None for t, needed in zip(inputs, needs_grad, strict=True)
    ]
    grad_hidden, grad_weights = gradients[:2]
    n = len(gate_up_proj)
    per_expert = sizes.num_experts
    grad_gate_up = _by_expert(gradients[2 : 2 + n], per_expert)
    grad_up = _by_expert(gradients[2 + n : 2 + n + len(up_proj)], per_expert)
    grad_down = _by_expert(gradients[2 + n + len(up_proj) :], per_expert)

    dtype = hidden_states.dtype
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    k = topk_ids.shape[1]
    flat_ids = topk_ids.reshape(-1)
    sorted_ids, order = torch.sort(flat_ids, stable=True)
    experts = torch.arange(per_expert + 1, dtype=flat_ids.dtype, device=flat_ids.device)
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

    for e in range(per_expert):
        start, end = bounds[e], bounds[e + 1]
        d_gate_up, d_up, d_down = grad_gate_up[e], grad_up[e], grad_down[e]
        if start == end:
            for gradient in (d_gate_up, d_up, d_down):
                if gradient is not None:
                    gradient.zero_()
            continue
        needs_inner = sum_hidden is not None or d_gate_up is not None or d_up is not None
        if not needs_inner and sum_weights is None and d_down is None:
            continue

        slots = order[start:end]
        tokens = tokens_of_rows[start:end]
        x = hidden_states.index_select(0, tokens)
        w = flat_weights.index_select(0, slots).to(compute).unsqueeze(-1)
        w_gate_up, w_up, w_down = (_expert(p, e) for p in (gate_up_proj, up_proj, down_proj))
        assert w_gate_up is not None
        assert w_down is not None
        inner = x @ w_gate_up.t()
        gate, up = inner.chunk(2, -1) if w_up is None else (inner, x @ w_up.t())
        gate, up = gate.to(compute), up.to(compute)
        sigmoid = torch.sigmoid(gate)
        s = gate * sigmoid
        h = s * up
        dy = grad_output.index_select(0, tokens)
        if d_down is not None:
            torch.mm((dy.to(compute) * w).to(dtype).t(), h.to(dtype), out=d_down)
        if not needs_inner and sum_weights is None:
            continue
        dy_down = (dy.to(dtype) @ w_down).to(compute)
        if sum_weights is not None:
            sum_weights.index_copy_(0, slots, (dy_down * h).sum(-1))
        if not needs_inner:
            continue
        dh = dy_down * w
        dup = (dh * s).to(dtype)
        dgate = (dh * up * (sigmoid * (1 + gate * (1 - sigmoid)))).to(dtype)
        if w_up is None:
            both = torch.cat((dgate, dup), -1)
            if d_gate_up is not None:
                torch.mm(both.t(), x, out=d_gate_up)
            dx = None if sum_hidden is None else both @ w_gate_up
        else:
            if d_gate_up is not None:
                torch.mm(dgate.t(), x, out=d_gate_up)
            if d_up is not None:
                torch.mm(dup.t(), x, out=d_up)
            dx = None if sum_hidden is None else (dgate @ w_gate_up).to(compute) + dup @ w_up
        if sum_hidden is not None and dx is not None:
            # A token is here once unless ids repeat in its row: no two adds race, the sum is deterministic.
            sum_hidden.index_add_(0, tokens, dx.to(compute))

    if grad_hidden is not None and sum_hidden is not None:
        grad_hidden.copy_(sum_hidden)
    if grad_weights is not None and sum_weights is not None:
        grad_weights.copy_(sum_weights.view(topk_weights.shape))
    return [gradient for gradient in gradients if gradient is not None]


def _expert(weights: Sequence[Tensor], expert: int) -> Tensor | None:
    if not weights:
        return None
    return weights[0][expert] if weights[0].dim() == 3 else weights[expert]


def _by_expert(gradients: Sequence[Tensor | None], num_experts: int) -> Sequence[Tensor | None]:
    """One gradient view per expert, whatever the storage."""
    if not gradients:
        return [None] * num_experts
    first = gradients[0]
    if len(gradients) == 1 and (first is None or first.dim() == 3):
        return [None] * num_experts if first is None else first.unbind(0)
    return gradients
