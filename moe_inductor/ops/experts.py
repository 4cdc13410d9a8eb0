"""``moe_inductor::fused_experts``: all experts of one MoE block and the weighted sum over them, as one op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_inductor.ops import backward, cpu
from moe_inductor.ops.check import Call, check_experts_metadata
from moe_inductor.ops.library import LIBRARY, NAMESPACE, TAGS

_NAME = f"{NAMESPACE}::fused_experts"
_BACKWARD_NAME = f"{NAMESPACE}::fused_experts_backward"

_WEIGHTS = "Tensor[] gate_up_proj, Tensor[] up_proj, Tensor[] down_proj, str activation"
_INPUTS = f"Tensor hidden_states, Tensor topk_ids, Tensor topk_weights, {_WEIGHTS}"
_MORE = (
    "Tensor[] gate_up_bias, Tensor[] up_bias, Tensor[] down_bias,"
    " bool interleaved, bool weight_on_input"
)
_OPTIONS = f"ScalarType out_dtype, {_MORE}, bool batch_invariant"
# For an op that finds the ids and weights itself.
SCHEMA = f"Tensor hidden_states, {_WEIGHTS}, {_OPTIONS}"
LIBRARY.define(
    f"fused_experts({_INPUTS}, {_OPTIONS}) -> Tensor",
    tags=TAGS,
)
LIBRARY.define(
    f"fused_experts_backward(Tensor grad_output, {_INPUTS}, bool[] needs_grad, {_MORE}) -> Tensor[]",
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
    gate_up_bias: Sequence[Tensor] = (),
    up_bias: Sequence[Tensor] = (),
    down_bias: Sequence[Tensor] = (),
    interleaved: bool = False,
    weight_on_input: bool = False,
    batch_invariant: bool = False,
) -> Tensor:
    """``y[t] = sum_j topk_weights[t, j] * down_e(unit(gate_e x_t, up_e x_t))`` with ``e = topk_ids[t, j]``.

    The sum over j is taken in fp32 (fp64 for fp64 inputs) and rounded once, to ``out_dtype``.

    Args:
        hidden_states: [T, H], fp16, bf16, fp32 or fp64, any strides.
        topk_ids: [T, k], int64 or int32.  An id outside 0..E-1 contributes nothing, whatever its weight.
        topk_weights: [T, k], any of the float dtypes.
        gate_up_proj: stacked: one [E, 2I, H] (gate rows, then up rows) or, with ``up_proj`` or without a gate,
            one [E, I, H]; per expert: E of [2I, H] or of [I, H].  Transposed storage is passed as a transposed view.
        up_proj: empty, or as ``gate_up_proj``.
        down_proj: one [E, H, I] or E of [H, I].
        activation: the unit, in the language of ``moe_inductor.unit``; "silu" is ``silu(gate) * up``.
        out_dtype: dtype of the result.
        gate_up_bias, up_bias, down_bias: empty, or as many as there are weights, each without the last dimension.
        interleaved: ``gate_up_proj`` has rows gate, up, gate, up, ...
        weight_on_input: ``y[t] = sum_j expert_e(topk_weights[t, j] * x_t)``.
        batch_invariant: the bits of ``y[t]`` depend on token t alone, not on how many others there are.  Costs what
            the kernels for few tokens gain; on a CPU, tokens are computed one by one.  Gradients are not covered.

    Weights and biases have the dtype of ``hidden_states``.  No implementation copies, stacks or concatenates a weight.

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
        gate_up_bias,
        up_bias,
        down_bias,
        interleaved,
        weight_on_input,
        batch_invariant,
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
    gate_up_bias: Sequence[Tensor] = (),
    up_bias: Sequence[Tensor] = (),
    down_bias: Sequence[Tensor] = (),
    interleaved: bool = False,
    weight_on_input: bool = False,
) -> list[Tensor]:
    """The gradients of ``fused_experts`` that are needed, in the order of its tensor inputs.

    ``needs_grad`` holds one flag each for hidden_states, topk_weights, and every tensor of gate_up_proj,
    up_proj, down_proj, gate_up_bias, up_bias and down_bias; the result holds one gradient per true flag, with
    the dtype of its input.
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
        gate_up_bias,
        up_bias,
        down_bias,
        interleaved,
        weight_on_input,
    )


def _fake(*args: Any) -> Tensor:
    call = Call(*args)
    check_experts_metadata(call)
    return call.hidden_states.new_empty(call.hidden_states.shape, dtype=call.out_dtype)


def _fake_backward(grad_output: Tensor, *args: Any) -> list[Tensor]:
    # The same arguments, but for needs_grad in place of out_dtype.
    needs_grad = args[_OUT_DTYPE]
    call = Call(*args)._replace(out_dtype=grad_output.dtype)
    return [
        backward.empty_gradient(tensor)
        for tensor, needed in zip(backward.differentiable(call), needs_grad, strict=True)
        if needed
    ]


def _cuda(*args: Any) -> Tensor:
    # Imported here: Triton must not be needed to import the ops.
    from moe_inductor.ops import cuda

    return cuda.fused_experts(*args)


_OUT_DTYPE = Call._fields.index("out_dtype")
_LISTS = tuple(
    Call._fields.index(name)
    for name in ("gate_up_proj", "up_proj", "down_proj", "gate_up_bias", "up_bias", "down_bias")
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    call = Call(*inputs)
    ctx.activation = call.activation
    ctx.facts = (call.interleaved, call.weight_on_input)
    lists = [inputs[i] for i in _LISTS]
    ctx.lengths = [len(tensors) for tensors in lists]
    # Inputs only: gate and up are recomputed, because [T * k, 3I] of activations is what runs out first.
    ctx.save_for_backward(*call[:3], *(tensor for tensors in lists for tensor in tensors))


def _flags(needs: Any, length: int) -> list[bool]:
    """One flag per tensor of a list argument; an empty list has no flags, in whatever form torch says so."""
    return list(needs) if length else []


def _split(items: Sequence[Any], lengths: Sequence[int]) -> list[list[Any]]:
    parts, left = [], list(items)
    for length in lengths:
        parts.append(left[:length])
        left = left[length:]
    return parts


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    hidden_states, topk_ids, topk_weights, *tensors = ctx.saved_tensors
    *weights, gate_up_bias, up_bias, down_bias = _split(tensors, ctx.lengths)
    needs = ctx.needs_input_grad
    flags = [needs[0], needs[2]]
    for position, length in zip(_LISTS, ctx.lengths, strict=True):
        flags += _flags(needs[position], length)
    made = iter(
        torch.ops.moe_inductor.fused_experts_backward.default(
            grad_output,
            hidden_states,
            topk_ids,
            topk_weights,
            *weights,
            ctx.activation,
            flags,
            gate_up_bias,
            up_bias,
            down_bias,
            *ctx.facts,
        )
    )
    grad_hidden, grad_weights, *rest = [next(made) if flag else None for flag in flags]
    gradients: list[Any] = [None] * len(Call._fields)
    gradients[0], gradients[2] = grad_hidden, grad_weights
    for position, part in zip(_LISTS, _split(rest, ctx.lengths), strict=True):
        gradients[position] = part
    return tuple(gradients)


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
