"""The CUDA implementation of the ops: chooses a plan, allocates workspaces, launches the kernels.

Imported lazily by the ops, because it imports Triton.  Never synchronises; every size comes from T, k, E, the
weights' shapes and the block sizes, so the launches can be captured in a CUDA graph.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import torch

from moe_inductor.kernels.align import align
from moe_inductor.kernels.combine import combine
from moe_inductor.kernels.configs import DecodePlan, GroupedPlan, Plan, Problem, choose_plan
from moe_inductor.kernels.decode import decode_down, decode_gate_up
from moe_inductor.kernels.down import down
from moe_inductor.kernels.gate_up import gate_up
from moe_inductor.kernels.routing import topk_routing as _topk_routing
from moe_inductor.kernels.weights import Projection
from moe_inductor.unit import Unit, parse

Weights = Sequence[torch.Tensor]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def topk_routing(
    router_logits: torch.Tensor, *args: Any, **facts: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``moe_inductor.ops.topk_routing``: ``(topk_weights [T, k], topk_ids int64 [T, k])``."""
    with _on_device_of(router_logits):
        return _topk_routing(router_logits, *args, **facts)


def fused_experts(
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    gate_up_proj: Weights,
    up_proj: Weights,
    down_proj: Weights,
    activation: str,
    out_dtype: torch.dtype,
    gate_up_bias: Weights = (),
    up_bias: Weights = (),
    down_bias: Weights = (),
    interleaved: bool = False,
    weight_on_input: bool = False,
) -> torch.Tensor:
    """``y[t] = sum_j topk_weights[t, j] * down_e(unit(gate_e x, up_e x))``, ``e = topk_ids[t, j]``.

    Weights are a single ``[E, out, in]`` tensor or E ``[out, in]`` tensors, any strides; ``up_proj`` is empty
    when ``gate_up_proj`` holds gate and up rows, or when there is no gate.  Ids outside [0, E) contribute nothing.
    """
    unit = parse(activation)
    if torch.float64 in unit.casts:
        raise NotImplementedError(f"activation {unit.text}: no fp64 on a GPU")
    if hidden_states.dtype not in DTYPES:
        raise NotImplementedError(f"dtype {hidden_states.dtype}")
    with _on_device_of(hidden_states):
        gate = Projection.of(gate_up_proj, gate_up_bias, interleaved)
        up = Projection.of(up_proj, up_bias) if up_proj else None
        down_ = Projection.of(down_proj, down_bias)
        for projection in (gate, up or gate, down_):
            if projection.dtype != hidden_states.dtype:
                raise NotImplementedError(
                    f"weights are {projection.dtype}, hidden_states {hidden_states.dtype}"
                )
        T, H = hidden_states.shape
        problem = Problem(
            T=T,
            E=down_.num_experts,
            k=topk_ids.shape[1],
            H=H,
            I=down_.in_features,
            dtype=hidden_states.dtype,
            capability=_capability(hidden_states.device),
            unit_stride=all(p.stride_in == 1 for p in (gate, up or gate, down_)),
            gate_up_tma=up is None and not interleaved and gate.tma_ready,
            down_tma=down_.tma_ready,
            from_table=down_.from_table,
        )
        out = torch.empty((T, H), dtype=out_dtype, device=hidden_states.device)
        if out.numel() == 0:
            return out
        if problem.k == 0 or problem.I == 0 or problem.E == 0:
            return out.zero_()
        run_plan(
            choose_plan(problem),
            problem,
            hidden_states if hidden_states.stride(1) == 1 else hidden_states.contiguous(),
            topk_ids.contiguous(),
            topk_weights.contiguous(),
            gate,
            up,
            down_,
            unit,
            out,
            weight_on_input,
        )
        return out


def run_plan(
    plan: Plan,
    problem: Problem,
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    gate: Projection,
    up: Projection | None,
    down_: Projection,
    unit: Unit,
    out: torch.Tensor,
    weight_on_input: bool = False,
) -> None:
    """Fill ``out`` with the given plan; ``fused_experts`` after its checks.  Tests call it with every plan."""
    I = problem.I
    # Rows of h are padded to 16 elements, so that a row starts aligned whatever I is.
    stride = -(-I // 16) * 16
    before, after = (topk_weights, None) if weight_on_input else (None, topk_weights)
    if isinstance(plan, DecodePlan):
        intermediate = hidden_states.new_empty((problem.slots, stride))
        decode_gate_up(
            hidden_states, gate, up, topk_ids, unit, intermediate, I, plan.gate_up, before
        )
        decode_down(intermediate, I, down_, after, topk_ids, out, plan.down)
        return
    assert isinstance(plan, GroupedPlan)
    num_programs = _num_multiprocessors(hidden_states.device)
    alignment = align(topk_ids, problem.E, plan.gate_up.block_m)
    intermediate = hidden_states.new_empty((alignment.sorted_token_ids.numel(), stride))
    slot_outputs = hidden_states.new_empty((problem.slots, problem.H))
    gate_up(
        hidden_states,
        gate,
        up,
        alignment,
        problem.k,
        unit,
        intermediate,
        I,
        plan.gate_up,
        num_programs,
        before,
    )
    down(intermediate, I, down_, after, alignment, slot_outputs, plan.down, num_programs)
    combine(slot_outputs, topk_ids, out, problem.E)


def _on_device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    # Triton launches on the current device.  Switching costs a few us, so only where it is needed.
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    # (0, 0) is portable tiles: for Triton's interpreter, which runs the kernels on CPU tensors in the tests, and
    # for AMD GPUs, whose "capability" is numbered like NVIDIA's (gfx942 calls itself 9.4) but means other things.
    if device.type != "cuda" or torch.version.hip is not None:
        return (0, 0)
    return torch.cuda.get_device_capability(device)


@functools.cache
def _num_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count
