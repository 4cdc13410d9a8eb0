"""The fp64 oracle: what is right, and how wrong an implementation may be.

An absolute tolerance on small numbers passes an output of zeros (three peers' test suites do).  Here the
inputs have unit scale, the truth is computed in fp64, and an implementation may be twice as far from it as
the model's own eager code in the model's dtype, over the whole tensor and, with more room, in each row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

TOTAL_FACTOR = 2.0
ROW_FACTOR = 8.0
FLOOR = 1e-5
TIE_ULPS = 4


class Inputs(NamedTuple):
    """Inputs of ``fused_experts`` with stacked, concatenated weights."""

    hidden_states: Tensor  # [T, H]
    router_logits: Tensor  # [T, E]
    topk_ids: Tensor  # [T, k]
    topk_weights: Tensor  # [T, k]
    gate_up_proj: Tensor  # [E, 2I, H]
    down_proj: Tensor  # [E, H, I]


def unit_scale_inputs(
    tokens: int,
    experts: int,
    k: int,
    hidden: int,
    intermediate: int,
    *,
    dtype: torch.dtype = torch.float32,
    weights_dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> Inputs:
    """x ~ N(0, 1), weights ~ N(0, 1) / sqrt(fan_in), logits ~ N(0, 2): every intermediate is of order one.

    Drawn in fp64 on the CPU, so that all dtypes and devices get the same numbers up to rounding.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * scale

    hidden_states = draw(tokens, hidden)
    router_logits = draw(tokens, experts, scale=2.0)
    gate_up_proj = draw(experts, 2 * intermediate, hidden, scale=hidden**-0.5)
    down_proj = draw(experts, hidden, intermediate, scale=intermediate**-0.5)
    topk_weights, topk_ids = torch.topk(torch.softmax(router_logits, -1), k, dim=-1)
    topk_weights /= topk_weights.sum(-1, keepdim=True)
    return Inputs(
        hidden_states.to(device, dtype),
        router_logits.to(device, dtype),
        topk_ids.to(device),
        topk_weights.to(device, weights_dtype or dtype),
        gate_up_proj.to(device, dtype),
        down_proj.to(device, dtype),
    )


def storages(data: Inputs) -> dict[str, tuple[list[Tensor], list[Tensor], list[Tensor]]]:
    """``(gate_up_proj, up_proj, down_proj)`` in every form in which a model may hold them."""
    width = data.down_proj.shape[-1]
    gate, up = data.gate_up_proj[:, :width], data.gate_up_proj[:, width:]
    transposed = data.gate_up_proj.mT.contiguous().mT
    return {
        "stacked": ([data.gate_up_proj], [], [data.down_proj]),
        "stacked, two": ([gate], [up], [data.down_proj]),
        "stacked, transposed": ([transposed], [], [data.down_proj.mT.contiguous().mT]),
        "per expert": (list(data.gate_up_proj), [], list(data.down_proj)),
        "per expert, own memory": (
            [w.clone() for w in data.gate_up_proj],
            [],
            [w.clone() for w in data.down_proj],
        ),
        "per expert, two": (list(gate), list(up), list(data.down_proj)),
    }


def reference_experts(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_proj: Sequence[Tensor] | Tensor,
    up_proj: Sequence[Tensor] | Tensor,
    down_proj: Sequence[Tensor] | Tensor,
    activation: Callable[[Tensor], Tensor] = F.silu,
) -> Tensor:
    """The loop over experts as models write it, in the dtype of its inputs.  Differentiable.

    Weights are anything that gives expert e's [out, in] matrix when indexed with e.
    """
    result = torch.zeros_like(hidden_states)
    for expert in range(len(down_proj)):
        token, slot = torch.where(topk_ids == expert)
        x = hidden_states[token]
        if len(up_proj):
            gate, up = F.linear(x, gate_up_proj[expert]), F.linear(x, up_proj[expert])
        else:
            gate, up = F.linear(x, gate_up_proj[expert]).chunk(2, dim=-1)
        y = F.linear(activation(gate) * up, down_proj[expert]) * topk_weights[token, slot, None]
        result = result.index_add(0, token, y.to(result.dtype))
    return result


def reference_experts_fp64(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_proj: Sequence[Tensor] | Tensor,
    up_proj: Sequence[Tensor] | Tensor,
    down_proj: Sequence[Tensor] | Tensor,
    activation: Callable[[Tensor], Tensor] = F.silu,
) -> Tensor:
    """``reference_experts`` with every input taken to fp64 first.  Differentiable, [T, H] in fp64."""

    def double(weights: Sequence[Tensor] | Tensor) -> Sequence[Tensor] | Tensor:
        if isinstance(weights, Tensor):
            return weights.double()
        return [weight.double() for weight in weights]

    return reference_experts(
        hidden_states.double(),
        topk_ids,
        topk_weights.double(),
        double(gate_up_proj),
        double(up_proj),
        double(down_proj),
        activation,
    )


def reference_routing(
    router_logits: Tensor, k: int, renormalise: bool, compute: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """(topk_weights, topk_ids) as models write it, in ``compute``.  Differentiable."""
    scores = torch.softmax(router_logits, dim=-1, dtype=compute)
    weights, ids = torch.topk(scores, k, dim=-1)
    if renormalise:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights, ids


def _rmse(error: Tensor, *dim: int) -> Tensor:
    return error.square().mean(dim=dim or None).sqrt()


def assert_within_fp64_rule(ours: Tensor, eager: Tensor, fp64: Tensor, what: str = "") -> None:
    """``ours`` may be twice as far from ``fp64`` as ``eager`` is, plus 1e-5; a row eight times.

    Over the tensor: ``rmse(ours, fp64) <= 2 * rmse(eager, fp64) + 1e-5``.  In each row (last dimension):
    at most 8 times the row's own eager rmse or, where that happens to be small, 8 times the rmse of all of
    eager, plus 1e-5.  NaN never passes: where the truth is NaN, leave the row out before asking.
    """
    what = what or "result"
    assert ours.shape == eager.shape == fp64.shape, (
        f"{what}: shapes {list(ours.shape)}, {list(eager.shape)}, {list(fp64.shape)}"
    )
    if fp64.numel() == 0:
        return
    fp64 = fp64.double()
    errors = {"ours": ours.double() - fp64, "eager": eager.double() - fp64}
    for name, error in errors.items():
        bad = int((~error.isfinite()).sum())
        assert bad == 0, f"{what}: {bad} of {error.numel()} elements of {name} are not finite"
    total, limit = _rmse(errors["ours"]).item(), _rmse(errors["eager"]).item()
    assert total <= TOTAL_FACTOR * limit + FLOOR, (
        f"{what}: rmse {total:.3e} against fp64, eager has {limit:.3e}; "
        f"allowed {TOTAL_FACTOR * limit + FLOOR:.3e}"
    )
    if fp64.dim() < 2:
        return
    rows = _rmse(errors["ours"], -1)
    allowed = ROW_FACTOR * _rmse(errors["eager"], -1).clamp(min=limit) + FLOOR
    worst = int((rows - allowed).argmax())
    assert bool((rows <= allowed).all()), (
        f"{what}: row {worst} has rmse {rows.flatten()[worst]:.3e} against fp64, "
        f"allowed {allowed.flatten()[worst]:.3e}"
    )


def assert_routing_matches(
    router_logits: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    k: int,
    renormalise: bool,
    weights_dtype: torch.dtype,
) -> None:
    """Ids must be eager's where the k-th and the next score are more than 4 ulp of fp32 apart.

    Elsewhere any of the tied experts may be chosen, but the weights must belong to the ids chosen.  Weights
    may be as far from fp64 as two roundings to ``weights_dtype`` and fp32 arithmetic take them.
    """
    tokens, experts = router_logits.shape
    assert topk_ids.shape == topk_weights.shape == (tokens, k)
    assert topk_weights.dtype == weights_dtype
    if tokens == 0:
        return
    assert bool(((topk_ids >= 0) & (topk_ids < experts)).all()), "routing: id out of range"
    ordered = topk_ids.sort(-1).values
    assert bool((ordered[:, 1:] != ordered[:, :-1]).all()), "routing: an expert twice in one row"

    compute = torch.float64 if router_logits.dtype == torch.float64 else torch.float32
    scores = torch.softmax(router_logits, -1, dtype=compute)
    best = scores.sort(-1, descending=True).values
    ulp = torch.finfo(compute).eps * best[:, k - 1]
    clear = torch.ones(tokens, dtype=torch.bool, device=scores.device)
    if k < experts:
        clear = best[:, k - 1] - best[:, k] > TIE_ULPS * ulp
    _, expected = reference_routing(router_logits, k, renormalise, compute)
    assert torch.equal(topk_ids[clear].sort(-1).values, expected[clear].sort(-1).values), (
        "routing: other experts than eager's outside the tie band"
    )
    truth = torch.softmax(router_logits.double(), -1).gather(-1, topk_ids)
    if renormalise:
        truth = truth / truth.sum(-1, keepdim=True)
    eps = max(torch.finfo(weights_dtype).eps, torch.finfo(compute).eps)
    torch.testing.assert_close(topk_weights.double(), truth, rtol=8 * eps, atol=0.0)
