"""``moe_inductor::fused_experts``: all experts of one MoE block and the weighted sum over them, as one op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_inductor.ops import backward, cpu
from moe_inductor.ops.check import check_experts_metadata
from moe_inductor.ops.library import LIBRARY, NAMESPACE, TAGS

_NAME = f"{NAMESPACE}::fused_experts"
_BACKWARD_NAME = f"{NAMESPACE}::fused_experts_backward"

_INPUTS = (
    "Tensor hidden_states, Tensor topk_ids, Tensor topk_weights,"
    " Tensor[] gate_up_proj, Tensor[] up_proj, Tensor[] down_proj, str activation"
)
LIBRARY.define(f"fused_experts({_INPUTS}, ScalarType out_dtype) -> Tensor", tags=TAGS)
LIBRARY.define(
    f"fused_experts_backward(Tensor grad_output, {_INPUTS}, bool[] needs_grad) -> Tensor[]",
    tags=TAGS,
)


def fused_experts(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_proj: Sequence[Tensor],
    up_proj: Sequence[Tensor],
    down_proj: Sequence[Tensor],
    activation: str,
    out_dtype: torch.dtype,
) -> Tensor:
    """``y[t] = sum_j topk_weights[t, j] * down_e(silu(gate_e x_t) * up_e x_t)`` with ``e = topk_ids[t, j]``.

    The sum over j is taken in fp32 (fp64 for fp64 inputs) and rounded once, to ``out_dtype``.

    Args:
        hidden_states: [T, H], fp16, bf16, fp32 or fp64, any strides.
        topk_ids: [T, k], int64 or int32.  An id outside 0..E-1 contributes nothing, whatever its weight.
        topk_weights: [T, k], any of the float dtypes.
        gate_up_proj: stacked: one [E, 2I, H] (gate rows, then up rows) or, with ``up_proj``, one [E, I, H];
            per expert: E of [2I, H] or of [I, H].  Transposed storage is passed as a transposed view.
        up_proj: empty, or as ``gate_up_proj``.
        down_proj: one [E, H, I] or E of [H, I].
        activation: "silu".
        out_dtype: dtype of the result.

    Weights have the dtype of ``hidden_states``.  No implementation copies, stacks or concatenates a weight.

    Returns:
        [T, H] in ``out_dtype``, contiguous.

    Raises:
        ValueError: shapes, devices or numbers of weights that do not fit.
        TypeError: a dtype that the op does not take, or weights and hidden_states of different dtypes.
    """
    return torch.ops.moe_inductor.fused_experts.default(
        hidden_states,
        topk_ids,
        topk_weights,
        gate_up_proj,
        up_proj,
        down_proj,
        activation,
        out_dtype,
    )


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
    """The gradients of ``fused_experts`` that are needed, in the order of its tensor inputs.

    ``needs_grad`` holds one flag each for hidden_states, topk_weights, and every tensor of gate_up_proj,
    up_proj and down_proj; the result holds one gradient per true flag, with the dtype of its input.
    """
    return torch.ops.moe_inductor.fused_experts_backward.default(
        grad_output,
        hidden_states,
        topk_ids,
        topk_weights,
        gate_up_proj,
        up_proj,
        down_proj,
        activation,
        needs_grad,
    )


def _fake(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_proj: Sequence[Tensor],
    up_proj: Sequence[Tensor],
    down_proj: Sequence[Tensor],
    activation: str,
    out_dtype: torch.dtype,
) -> Tensor:
    check_experts_metadata(
        hidden_states,
        topk_ids,
        topk_weights,
        gate_up_proj,
        up_proj,
        down_proj,
        activation,
        out_dtype,
    )
    return hidden_states.new_empty(hidden_states.shape, dtype=out_dtype)


def _fake_backward(
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
    inputs = (hidden_states, topk_weights, *gate_up_proj, *up_proj, *down_proj)
    return [
        backward.empty_gradient(tensor)
        for tensor, needed in zip(inputs, needs_grad, strict=True)
        if needed
    ]


def _cuda(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_proj: Sequence[Tensor],
    up_proj: Sequence[Tensor],
    down_proj: Sequence[Tensor],
    activation: str,
    out_dtype: torch.dtype,
) -> Tensor:
    # Imported here: Triton must not be needed to import the ops.
    from moe_inductor.ops import cuda

    return cuda.fused_experts(
        hidden_states,
        topk_ids,
        topk_weights,
        gate_up_proj,
        up_proj,
        down_proj,
        activation,
        out_dtype,
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden_states, topk_ids, topk_weights, gate_up_proj, up_proj, down_proj, activation, _ = inputs
    ctx.activation = activation
    ctx.lengths = (len(gate_up_proj), len(up_proj), len(down_proj))
    # Inputs only: gate and up are recomputed, because [T * k, 3I] of activations is what runs out first.
    ctx.save_for_backward(
        hidden_states, topk_ids, topk_weights, *gate_up_proj, *up_proj, *down_proj
    )


def _flags(needs: Any, length: int) -> list[bool]:
    """One flag per tensor of a list argument; an empty list has no flags, in whatever form torch says so."""
    return list(needs) if length else []


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    hidden_states, topk_ids, topk_weights, *weights = ctx.saved_tensors
    n_gate_up, n_up, n_down = ctx.lengths
    gate_up_proj = weights[:n_gate_up]
    up_proj = weights[n_gate_up : n_gate_up + n_up]
    down_proj = weights[n_gate_up + n_up :]
    needs_hidden, _, needs_weights, *needs_lists = ctx.needs_input_grad[:6]
    flags = [
        needs_hidden,
        needs_weights,
        *_flags(needs_lists[0], n_gate_up),
        *_flags(needs_lists[1], n_up),
        *_flags(needs_lists[2], n_down),
    ]
    gradients = iter(
        torch.ops.moe_inductor.fused_experts_backward.default(
            grad_output,
            hidden_states,
            topk_ids,
            topk_weights,
            gate_up_proj,
            up_proj,
            down_proj,
            ctx.activation,
            flags,
        )
    )
    grad_hidden, grad_weights, *rest = [next(gradients) if flag else None for flag in flags]
    return (
        grad_hidden,
        None,
        grad_weights,
        rest[:n_gate_up],
        rest[n_gate_up : n_gate_up + n_up],
        rest[n_gate_up + n_up :],
        None,
        None,
    )


def _setup_no_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _no_double_backward(ctx: Any, *grads: Any) -> None:
    # Without this, torch would return gradients that silently leave the experts out.
    raise NotImplementedError("moe_inductor: fused_experts has no second derivative")


LIBRARY.impl("fused_experts", cpu.fused_experts, "CPU")
LIBRARY.impl("fused_experts", _cuda, "CUDA")
LIBRARY.impl("fused_experts_backward", backward.fused_experts_backward, "CPU")
LIBRARY.impl("fused_experts_backward", backward.fused_experts_backward, "CUDA")
torch.library.register_fake(_NAME, _fake, lib=LIBRARY)
torch.library.register_fake(_BACKWARD_NAME, _fake_backward, lib=LIBRARY)
torch.library.register_autograd(_NAME, _backward, setup_context=_setup_context, lib=LIBRARY)
torch.library.register_autograd(
    _BACKWARD_NAME, _no_double_backward, setup_context=_setup_no_context, lib=LIBRARY
)
