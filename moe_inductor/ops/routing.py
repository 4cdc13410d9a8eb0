"""``moe_inductor::topk_routing``: softmax over the experts, top-k, optional renormalisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_inductor.ops import cpu
from moe_inductor.ops.check import check_routing
from moe_inductor.ops.library import LIBRARY, NAMESPACE, TAGS

_NAME = f"{NAMESPACE}::topk_routing"

LIBRARY.define(
    "topk_routing(Tensor router_logits, int k, bool renormalise, ScalarType weights_dtype)"
    " -> (Tensor topk_weights, Tensor topk_ids)",
    tags=TAGS,
)


def topk_routing(
    router_logits: Tensor, k: int, renormalise: bool, weights_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``p = softmax(router_logits, -1)``, the k largest, divided by their sum if ``renormalise``.

    Computed in fp32 (fp64 for fp64 logits), sorted by falling weight, ties as ``torch.topk`` breaks them on
    that device.  A row with NaN gives k distinct ids in 0..E-1 and NaN weights; other rows do not notice.

    Args:
        router_logits: [T, E], fp16, bf16, fp32 or fp64, any strides.
        k: experts per token, 1..E.
        renormalise: divide the k weights by their sum.
        weights_dtype: dtype of the weights.

    Returns:
        topk_weights [T, k] in ``weights_dtype`` and topk_ids [T, k] int64, both contiguous.

    Raises:
        ValueError: wrong rank, or k outside 1..E.
        TypeError: a dtype that the op does not take.
    """
    return torch.ops.moe_inductor.topk_routing.default(router_logits, k, renormalise, weights_dtype)


def _fake(
    router_logits: Tensor, k: int, renormalise: bool, weights_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    check_routing(router_logits, k, weights_dtype)
    shape = (router_logits.shape[0], k)
    return (
        router_logits.new_empty(shape, dtype=weights_dtype),
        router_logits.new_empty(shape, dtype=torch.int64),
    )


def _cuda(
    router_logits: Tensor, k: int, renormalise: bool, weights_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    # Imported here: Triton must not be needed to import the ops.
    from moe_inductor.ops import cuda

    check_routing(router_logits, k, weights_dtype)
    return cuda.topk_routing(router_logits, k, renormalise, weights_dtype)


def routing_gradient(
    grad_weights: Tensor, router_logits: Tensor, topk_ids: Tensor, renormalise: bool
) -> Tensor:
    """Gradient of the logits from the gradient of ``topk_weights``, in plain ATen (AOTAutograd traces it).

    Without renormalisation ``w = p[ids]`` with ``p = softmax(l)``, whose Jacobian is
    ``dp_i/dl_j = p_i (delta_ij - p_j)``; so ``dl = scatter(ids, w * dw) - p * sum(w * dw)``.

    With it, ``w = p[ids] / sum(p[ids])`` is the softmax of the k selected logits alone, so
    ``dl[ids] = w * (dw - sum(w * dw))`` and zero elsewhere.

    Source of the Jacobian: the softmax derivative as in Goodfellow, Bengio, Courville, Deep Learning (2016),
    section 6.2.2.3; checked against ``torch.autograd.gradcheck`` in tests/ops.

    Args:
        grad_weights: [T, k].
        router_logits: [T, E].
        topk_ids: [T, k].

    Returns:
        [T, E] in the dtype of ``router_logits``.
    """
    compute = torch.float64 if router_logits.dtype == torch.float64 else torch.float32
    grad = grad_weights.to(compute)
    if renormalise:
        weights = torch.softmax(router_logits.gather(-1, topk_ids), -1, dtype=compute)
        weighted = grad * weights
        selected = weighted - weights * weighted.sum(-1, keepdim=True)
        zeros = torch.zeros_like(
            router_logits, dtype=compute, memory_format=torch.contiguous_format
        )
        result = zeros.scatter(-1, topk_ids, selected)
    else:
        scores = torch.softmax(router_logits, -1, dtype=compute)
        weighted = grad * scores.gather(-1, topk_ids)
        result = (scores * -weighted.sum(-1, keepdim=True)).scatter_add(-1, topk_ids, weighted)
    return result.to(router_logits.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    router_logits, _, ctx.renormalise, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(router_logits, output[1])


def _backward(
    ctx: Any, grad_weights: Tensor | None, grad_ids: Tensor | None
) -> tuple[Tensor | None, None, None, None]:
    if grad_weights is None or not ctx.needs_input_grad[0]:
        return None, None, None, None
    router_logits, topk_ids = ctx.saved_tensors
    return (
        routing_gradient(grad_weights, router_logits, topk_ids, ctx.renormalise),
        None,
        None,
        None,
    )


LIBRARY.impl("topk_routing", cpu.topk_routing, "CPU")
LIBRARY.impl("topk_routing", _cuda, "CUDA")
torch.library.register_fake(_NAME, _fake, lib=LIBRARY)
torch.library.register_autograd(_NAME, _backward, setup_context=_setup_context, lib=LIBRARY)
