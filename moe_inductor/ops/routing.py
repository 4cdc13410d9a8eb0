"""``moe_inductor::topk_routing``: from router logits to the k chosen experts and their weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_inductor.ops import cpu
from moe_inductor.ops.check import Routing, check_routing
from moe_inductor.ops.library import LIBRARY, NAMESPACE, TAGS
from moe_inductor.ops.scores import gradient

_NAME = f"{NAMESPACE}::topk_routing"

_REQUIRED = "int k, bool renormalise, ScalarType weights_dtype"
_DEFAULTS = {
    "Tensor? bias": "None",
    "str score": "'softmax'",
    "str weight": "'softmax'",
    "float epsilon": "0.0",
    "float? minimum": "None",
    "float scale": "1.0",
    "int groups": "1",
    "int kept_groups": "1",
    "str group_score": "'max'",
    "float fill": "0.0",
    "bool fill_weights": "False",
    "ScalarType? score_dtype": "None",
}
# What follows the logits, without defaults, for an op that goes on behind it.
SCHEMA = ", ".join([_REQUIRED, *_DEFAULTS])
LIBRARY.define(
    f"topk_routing(Tensor router_logits, {_REQUIRED}, "
    + ", ".join(f"{name}={default}" for name, default in _DEFAULTS.items())
    + ") -> (Tensor topk_weights, Tensor topk_ids)",
    tags=TAGS,
)


def topk_routing(
    router_logits: Tensor,
    k: int,
    renormalise: bool,
    weights_dtype: torch.dtype,
    bias: Tensor | None = None,
    score: str = "softmax",
    weight: str = "softmax",
    epsilon: float = 0,
    minimum: float | None = None,
    scale: float = 1,
    groups: int = 1,
    kept_groups: int = 1,
    group_score: str = "max",
    fill: float = 0,
    fill_weights: bool = False,
    score_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The k experts with the largest ``score(router_logits) + bias``, and the weights of these.

        choice  = score(router_logits) + bias        fill in all but the kept_groups best of the groups
        ids     = the k largest of choice
        u       = weight(router_logits)[ids]         with fill_weights, 0 where choice has fill
        weights = scale * u / max(sum(u) + epsilon, minimum)             if renormalise, else scale * u

    Computed in fp32 (fp64 for fp64 logits), sorted by falling choice, ties as ``torch.topk`` breaks them on
    that device; for k = 1 the lowest id, as in ``torch.max`` and ``torch.argmax``.  A row with NaN gives k distinct
    ids in 0..E-1; other rows do not notice.

    Args:
        router_logits: [T, E], fp16, bf16, fp32 or fp64, any strides.
        k: experts per token, 1..E.
        renormalise: divide the k weights by their sum.
        weights_dtype: dtype of the weights.
        bias: [E], for the choice alone; it has no gradient.
        score, weight: "softmax", "sigmoid", "sqrtsoftplus" (the root of softplus) or "logits"; weight may
            be "softmax_of_chosen", over the k chosen logits.
        epsilon: added to the sum.  minimum: the sum is at least that.  scale: of the weights, in the end.
        groups: E experts in order, in so many groups of equal size.  kept_groups: how many of them can be chosen
            from: those with the largest maximum ("max") or sum of their two largest ("top2", group_score).
        fill: what is compared for experts of other groups.
        score_dtype: dtype in which the model holds its scores: choice is rounded to it where it decides.

    Returns:
        topk_weights [T, k] in ``weights_dtype`` and topk_ids [T, k] int64, both contiguous.

    Raises:
        ValueError: wrong rank or bias, k outside 1..E, groups that do not divide E, an unknown score.
        TypeError: a dtype that the op does not take.
    """
    # 0 and 1 and not 0.0 and 1.0 above: under dynamic=True Dynamo leaves float defaults open and compiles once more.
    return torch.ops.moe_inductor.topk_routing.default(
        router_logits, k, renormalise, weights_dtype, bias, score, weight, epsilon, minimum, scale, groups,
        kept_groups, group_score, fill, fill_weights, score_dtype,
    )  # fmt: skip


def _fake(*args: Any) -> tuple[Tensor, Tensor]:
    call = Routing(*args)
    check_routing(call)
    shape = (call.router_logits.shape[0], call.k)
    return (
        call.router_logits.new_empty(shape, dtype=call.weights_dtype),
        call.router_logits.new_empty(shape, dtype=torch.int64),
    )


def _cuda(*args: Any) -> tuple[Tensor, Tensor]:
    # Imported here: Triton must not be needed to import the ops.
    from moe_inductor.ops import cuda

    check_routing(Routing(*args))
    return cuda.topk_routing(*args)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    call = Routing(*inputs)
    ctx.call = call._replace(bias=None)[1:]
    ctx.mark_non_differentiable(output[1])
    # A weight that was filled with zero has no gradient, and can be told by its value.
    ctx.save_for_backward(call.router_logits, output[1], output[0] if call.fill_weights else None)


def _backward(
    ctx: Any, grad_weights: Tensor | None, grad_ids: Tensor | None
) -> tuple[Tensor | None, ...]:
    nothing = [None] * (len(Routing._fields) - 1)
    if grad_weights is None or not ctx.needs_input_grad[0]:
        return None, *nothing
    router_logits, topk_ids, filled = ctx.saved_tensors
    return gradient(Routing(router_logits, *ctx.call), grad_weights, topk_ids, filled), *nothing


LIBRARY.impl("topk_routing", cpu.topk_routing, "CPU")
LIBRARY.impl("topk_routing", _cuda, "CUDA")
torch.library.register_fake(_NAME, _fake, lib=LIBRARY)
torch.library.register_autograd(_NAME, _backward, setup_context=_setup_context, lib=LIBRARY)
