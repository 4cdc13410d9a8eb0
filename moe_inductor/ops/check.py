"""Arguments of the ops, checked: a wrong call is a named error with the shapes in it, never a wrong number.

Two functions, by price.  ``check_experts_metadata`` looks at nothing that could be symbolic about the number
of tokens, so the fake implementation may call it; ``check_experts_sizes`` compares sizes and runs in the
kernels.  Both look at the first weight of each kind only: per-expert lists have hundreds of entries, and
the kernels check the entries that they use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moe_inductor.unit import Unit, parse

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ID_DTYPES = (torch.int64, torch.int32)
# Functions of all E logits that a choice or a weight is made of; each grows with its logit.
SCORES = ("softmax", "sigmoid", "sqrtsoftplus", "logits")


class Call(NamedTuple):
    """One call of ``fused_experts``: its arguments in the order of the schema."""

    hidden_states: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    gate_up_proj: Sequence[Tensor]
    up_proj: Sequence[Tensor]
    down_proj: Sequence[Tensor]
    activation: str
    out_dtype: torch.dtype
    gate_up_bias: Sequence[Tensor] = ()
    up_bias: Sequence[Tensor] = ()
    down_bias: Sequence[Tensor] = ()
    interleaved: bool = False
    weight_on_input: bool = False
    batch_invariant: bool = False

    @property
    def weights(self) -> dict[str, Sequence[Tensor]]:
        return {
            "gate_up_proj": self.gate_up_proj,
            "up_proj": self.up_proj,
            "down_proj": self.down_proj,
        }

    @property
    def biases(self) -> dict[str, Sequence[Tensor]]:
        return {
            "gate_up_bias": self.gate_up_bias,
            "up_bias": self.up_bias,
            "down_bias": self.down_bias,
        }


class Routing(NamedTuple):
    """One call of ``topk_routing``: its arguments in the order of the schema."""

    router_logits: Tensor
    k: int
    renormalise: bool
    weights_dtype: torch.dtype
    bias: Tensor | None = None
    score: str = "softmax"
    weight: str = "softmax"
    epsilon: float = 0.0
    minimum: float | None = None
    scale: float = 1.0
    groups: int = 1
    kept_groups: int = 1
    group_score: str = "max"
    fill: float = 0.0
    fill_weights: bool = False
    score_dtype: torch.dtype | None = None

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.float64 if self.router_logits.dtype == torch.float64 else torch.float32

    @property
    def compares_logits(self) -> bool:
        """Without a bias and groups, the order of the scores is the order of the logits."""
        return self.bias is None and self.groups == 1


class Sizes(NamedTuple):
    """Sizes of the experts.  ``inner_rows`` is 2I where gate and up are one weight, I otherwise."""

    num_experts: int
    hidden_size: int
    intermediate_size: int
    inner_rows: int
    stacked: bool


def _shape(tensor: Tensor) -> str:
    return "[" + ", ".join(str(size) for size in tensor.shape) + "]"


def _shapes(tensors: Sequence[Tensor]) -> str:
    if not tensors:
        return "nothing"
    more = f" and {len(tensors) - 1} more" if len(tensors) > 1 else ""
    return _shape(tensors[0]) + more


def check_experts_metadata(call: Call) -> Unit:
    """Ranks, dtypes, devices, list lengths.  Reads no size, so it adds no guard.  Returns the activation.

    Raises:
        ValueError: wrong rank, wrong number of weights, unknown activation, tensors on several devices.
        TypeError: a dtype that the op does not take.
    """
    try:
        unit = parse(call.activation)
    except ValueError as error:
        raise ValueError(f"fused_experts: activation: {error}") from error
    hidden_states, topk_ids, topk_weights = call[:3]
    gate_up_proj, up_proj, down_proj = call[3:6]
    if hidden_states.dim() != 2:
        raise ValueError(
            f"fused_experts: hidden_states must be [T, H], got {_shape(hidden_states)}"
        )
    if topk_ids.dim() != 2 or topk_weights.dim() != 2:
        raise ValueError(
            "fused_experts: topk_ids and topk_weights must both be [T, k], got "
            f"{_shape(topk_ids)} and {_shape(topk_weights)}"
        )
    if not gate_up_proj or not down_proj:
        raise ValueError(
            "fused_experts: gate_up_proj and down_proj must not be empty, got "
            f"{_shapes(gate_up_proj)} and {_shapes(down_proj)}"
        )
    if len(down_proj) != len(gate_up_proj) or len(up_proj) not in (0, len(gate_up_proj)):
        raise ValueError(
            "fused_experts: one weight per expert and projection, or one stacked weight per projection; got "
            f"{len(gate_up_proj)} gate_up_proj, {len(up_proj)} up_proj, {len(down_proj)} down_proj"
        )
    if (up_proj or call.interleaved) and not unit.gated:
        raise ValueError(
            f"fused_experts: activation {unit.text} has no gate, but there are gate and up"
        )
    if up_proj and call.interleaved:
        raise ValueError("fused_experts: gate and up are interleaved, but there is an up_proj")
    biased = bool(call.gate_up_bias or call.up_bias or call.down_bias)
    biases = zip(call.biases.items(), call.weights.values(), strict=True) if biased else ()
    for (name, bias), weight in biases:
        if len(bias) not in (0, len(weight)):
            raise ValueError(
                f"fused_experts: {len(bias)} {name} for {len(weight)} weights of that projection"
            )
    if up_proj and len(call.up_bias) != len(call.gate_up_bias):
        raise ValueError("fused_experts: gate_up_bias and up_bias come together")
    rank = gate_up_proj[0].dim()
    if rank not in (2, 3) or (rank == 3 and len(gate_up_proj) != 1):
        raise ValueError(
            "fused_experts: weights must be E matrices or one [E, out, in] tensor per projection, got "
            f"{_shapes(gate_up_proj)}"
        )
    if down_proj[0].dim() != rank or (up_proj and up_proj[0].dim() != rank):
        raise ValueError(
            "fused_experts: all projections must be stored in the same way, got gate_up_proj "
            f"{_shapes(gate_up_proj)}, up_proj {_shapes(up_proj)}, down_proj {_shapes(down_proj)}"
        )
    dtype = hidden_states.dtype
    if dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"fused_experts: hidden_states must be fp16, bf16, fp32 or fp64, got {dtype}"
        )
    if topk_ids.dtype not in ID_DTYPES:
        raise TypeError(f"fused_experts: topk_ids must be int64 or int32, got {topk_ids.dtype}")
    if topk_weights.dtype not in FLOAT_DTYPES or call.out_dtype not in FLOAT_DTYPES:
        raise TypeError(
            "fused_experts: topk_weights and out_dtype must be fp16, bf16, fp32 or fp64, got "
            f"{topk_weights.dtype} and {call.out_dtype}"
        )
    device = hidden_states.device
    for name, tensors in (call.weights | (call.biases if biased else {})).items():
        for tensor in tensors[:1]:
            if tensor.dtype != dtype:
                raise TypeError(
                    f"fused_experts: {name} is {tensor.dtype} and hidden_states is {dtype}; they must agree"
                )
            if tensor.device != device:
                raise ValueError(
                    f"fused_experts: {name} is on {tensor.device}, hidden_states on {device}"
                )
            if name.endswith("bias") and tensor.dim() != rank - 1:
                raise ValueError(
                    f"fused_experts: {name} is {_shape(tensor)}, which does not fit weights "
                    f"{_shapes(gate_up_proj)}"
                )
    if topk_ids.device != device or topk_weights.device != device:
        raise ValueError(
            f"fused_experts: topk_ids on {topk_ids.device} and topk_weights on {topk_weights.device}, "
            f"hidden_states on {device}"
        )
    return unit


def check_experts_sizes(call: Call, unit: Unit) -> Sizes:
    """Sizes against each other.  Needs metadata that already passed ``check_experts_metadata``.

    Raises:
        ValueError: sizes that do not fit, with all shapes in the text.
    """
    hidden_states, topk_ids, topk_weights = call[:3]
    gate_up_proj, up_proj, down_proj = call[3:6]
    first, down = gate_up_proj[0], down_proj[0]
    stacked = first.dim() == 3
    num_experts = first.shape[0] if stacked else len(gate_up_proj)
    inner_rows, hidden_size = first.shape[-2:]
    double = unit.gated and not up_proj
    intermediate_size = inner_rows // 2 if double else inner_rows
    good = (
        topk_ids.shape == topk_weights.shape
        and topk_ids.shape[0] == hidden_states.shape[0]
        and hidden_states.shape[1] == hidden_size
        and tuple(down.shape[-2:]) == (hidden_size, intermediate_size)
        and (not double or inner_rows % 2 == 0)
        and (not up_proj or up_proj[0].shape == first.shape)
        and (not stacked or down.shape[0] == num_experts)
    )
    if not good:
        inner = "[2I, H]" if double else "[I, H]"
        raise ValueError(
            "fused_experts: sizes do not fit.  Wanted hidden_states [T, H], topk_ids and topk_weights [T, k], "
            f"gate_up_proj {inner}, down_proj [H, I], each with E in front when stacked; got hidden_states "
            f"{_shape(hidden_states)}, topk_ids {_shape(topk_ids)}, topk_weights {_shape(topk_weights)}, "
            f"gate_up_proj {_shapes(gate_up_proj)}, up_proj {_shapes(up_proj)}, down_proj {_shapes(down_proj)}"
        )
    if not (call.gate_up_bias or call.down_bias):
        return Sizes(num_experts, hidden_size, intermediate_size, inner_rows, stacked)
    for (name, bias), weight in zip(call.biases.items(), call.weights.values(), strict=True):
        if bias and bias[0].shape != weight[0].shape[:-1]:
            raise ValueError(
                f"fused_experts: {name} is {_shapes(bias)}, its weight {_shapes(weight)}"
            )
    return Sizes(num_experts, hidden_size, intermediate_size, inner_rows, stacked)


def check_expert(expert: int, name: str, weight: Tensor, wanted: tuple[int, ...]) -> None:
    """One entry of a per-expert list against the first one.

    Raises:
        ValueError: shapes differ.
    """
    if weight.shape != wanted:
        raise ValueError(
            f"fused_experts: {name} of expert {expert} is {_shape(weight)}, of expert 0 {list(wanted)}"
        )


def check_routing(call: Routing) -> None:
    """Arguments of ``topk_routing``.

    Raises:
        ValueError: wrong rank or bias, k outside 1..E, groups that do not divide E, an unknown score.
        TypeError: a dtype that the op does not take.
    """
    router_logits, k = call.router_logits, call.k
    if router_logits.dim() != 2:
        raise ValueError(f"topk_routing: router_logits must be [T, E], got {_shape(router_logits)}")
    for dtype in (router_logits.dtype, call.weights_dtype, call.score_dtype or torch.float32):
        if dtype not in FLOAT_DTYPES:
            raise TypeError(
                "topk_routing: router_logits, weights_dtype and score_dtype must be fp16, bf16, fp32 or fp64, got "
                f"{router_logits.dtype}, {call.weights_dtype} and {call.score_dtype}"
            )
    experts = router_logits.shape[1]
    if not 1 <= k <= experts:
        raise ValueError(
            f"topk_routing: k must be in 1..{experts}, got {k}, "
            f"with router_logits {_shape(router_logits)}"
        )
    if call.score not in SCORES or call.weight not in (*SCORES, "softmax_of_chosen"):
        raise ValueError(
            f"topk_routing: score and weight must be one of {', '.join(SCORES)}, and weight may be "
            f"softmax_of_chosen, got {call.score} and {call.weight}"
        )
    bias = call.bias
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != experts):
        raise ValueError(f"topk_routing: bias must be [{experts}], got {_shape(bias)}")
    if bias is not None and bias.dtype not in FLOAT_DTYPES:
        raise TypeError(f"topk_routing: bias must be fp16, bf16, fp32 or fp64, got {bias.dtype}")
    _check_groups(call, experts)


def _check_groups(call: Routing, experts: int) -> None:
    groups, kept = call.groups, call.kept_groups
    if groups < 1 or experts % groups or not 1 <= kept <= groups:
        raise ValueError(
            f"topk_routing: {experts} experts in {groups} groups of equal size, of which 1..{groups} are kept; "
            f"got {kept}"
        )
    if call.group_score not in ("max", "top2"):
        raise ValueError(f"topk_routing: group_score must be max or top2, got {call.group_score}")
    if groups > 1 and call.group_score == "top2" and experts // groups < 2:
        raise ValueError("topk_routing: group_score top2 needs two experts in each group")
    if call.fill_weights and call.fill != 0:
        raise ValueError(f"topk_routing: fill_weights needs fill 0, got {call.fill}")
