"""The CUDA implementation of the ops: chooses a plan, allocates workspaces, launches the kernels.

The second call with the same shapes is written down as a program, later ones run it (``kernels/launch.py``).

Imported lazily by the ops, because it imports Triton.  Never synchronises; every size comes from T, k, E, the
weights' shapes and the block sizes, so the launches can be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from moe_inductor.kernels.align import align
from moe_inductor.kernels.combine import combine
from moe_inductor.kernels.configs import (
    DecodePlan,
    GroupedPlan,
    Plan,
    Problem,
    RouterTiles,
    choose_plan,
    router_plan,
)
from moe_inductor.kernels.decode import decode_down, decode_gate_up
from moe_inductor.kernels.down import down
from moe_inductor.kernels.gate_up import gate_up
from moe_inductor.kernels.launch import Programs, repeatable, scratch
from moe_inductor.kernels.router_logits import router_logits
from moe_inductor.kernels.router_pieces import router_pieces
from moe_inductor.kernels.routing import topk_routing as _topk_routing
from moe_inductor.kernels.weights import (
    Listed,
    Projection,
    Stored,
    come_by_tma,
    has_one_product,
    layout_of,
    stacked_bias,
)
from moe_inductor.ops.block import Block
from moe_inductor.ops.check import Routing
from moe_inductor.unit import Unit, parse

Weights = Sequence[torch.Tensor]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


_PROGRAMS = Programs()
_BIAS = Routing._fields.index("bias")


def topk_routing(
    router_logits: torch.Tensor, *args: Any, **facts: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``moe_inductor.ops.topk_routing``: ``(topk_weights [T, k], topk_ids int64 [T, k])``."""
    if _is_elsewhere(router_logits):
        with torch.cuda.device(router_logits.device):
            return topk_routing(router_logits, *args, **facts)
    call = Routing(router_logits, *args, **facts)
    if not repeatable(router_logits):
        return _topk_routing(*call)
    what = (*call[1:_BIAS], *call[_BIAS + 1 :])
    weights, ids = _PROGRAMS.run(what, [router_logits, call.bias], _topk_routing, *call)
    return weights, ids


class _Experts(NamedTuple):
    """What the kernels read of the experts, as ``Programs`` wants to know it.

    tensors: of gate (or gate and up), of up and of down ``Stored.tensor`` and ``Stored.lowest``; then the biases of
        the three, each [E, out].  None where there is none.
    of_lists: ``Stored.of_list`` of the three.
    """

    tensors: list[torch.Tensor | None]
    of_lists: tuple[Listed | None, ...]

    @staticmethod
    def of(
        gate_up_proj: Weights, up_proj: Weights, down_proj: Weights, *biases: Weights
    ) -> _Experts:
        gate, gate_lowest, gate_list = Stored.of(gate_up_proj)
        up, up_lowest, up_list = Stored.of(up_proj) if up_proj else (None, None, None)
        down_, down_lowest, down_list = Stored.of(down_proj)
        tensors = [gate, gate_lowest, up, up_lowest, down_, down_lowest]
        for bias in biases:
            tensors.append(stacked_bias(bias) if bias else None)
        return _Experts(tensors, (gate_list, up_list, down_list))

    def projections(self, interleaved: bool) -> tuple[Projection, Projection | None, Projection]:
        """gate (or gate and up), up, down."""
        gate, gate_lowest, up, up_lowest, down_, down_lowest, *biases = self.tensors
        gate_list, up_list, down_list = self.of_lists
        assert gate is not None
        assert down_ is not None
        return (
            Projection.of(Stored(gate, gate_lowest, gate_list), biases[0], interleaved),
            None if up is None else Projection.of(Stored(up, up_lowest, up_list), biases[1]),
            Projection.of(Stored(down_, down_lowest, down_list), biases[2]),
        )


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
    batch_invariant: bool = False,
) -> torch.Tensor:
    """``y[t] = sum_j topk_weights[t, j] * down_e(unit(gate_e x, up_e x))``, ``e = topk_ids[t, j]``.

    Weights are a single ``[E, out, in]`` tensor or E ``[out, in]`` tensors, any strides; ``up_proj`` is empty
    when ``gate_up_proj`` holds gate and up rows, or when there is no gate.  Ids outside [0, E) contribute nothing.
    """
    if _is_elsewhere(hidden_states):
        with torch.cuda.device(hidden_states.device):
            return fused_experts(
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
    facts = (activation, out_dtype, interleaved, weight_on_input, batch_invariant)
    experts = _Experts.of(gate_up_proj, up_proj, down_proj, gate_up_bias, up_bias, down_bias)
    arguments = (hidden_states, topk_ids, topk_weights, experts, *facts)
    if not repeatable(hidden_states):
        return _fused_experts(*arguments)[0]
    inputs = [hidden_states, topk_ids, topk_weights, *experts.tensors]
    return _PROGRAMS.run((facts, experts.of_lists), inputs, _fused_experts, *arguments)[0]


def fused_moe(*args: Any) -> torch.Tensor:
    """``moe_inductor::fused_moe``: the router's product, ``topk_routing`` and ``fused_experts`` in a row.

    Arguments as ``ops.block.Block`` has them; [T, H] in ``out_dtype``.
    """
    call = Block(*args)
    x = call.router_input
    if _is_elsewhere(x):
        with torch.cuda.device(x.device):
            return fused_moe(*args)
    biases = (call.gate_up_bias, call.up_bias, call.down_bias)
    experts = _Experts.of(call.gate_up_proj, call.up_proj, call.down_proj, *biases)
    if not repeatable(x):
        return _fused_moe(call, experts)[0]
    # Everything that is no tensor.
    what = (
        call[3:_ROUTING_BIAS],
        call[_ROUTING_BIAS + 1 : _HIDDEN],
        (call.activation, call.out_dtype, call.interleaved, call.weight_on_input),
        call.batch_invariant,
        x is call.hidden_states,  # a program knows one tensor by one address
        experts.of_lists,
    )
    inputs = [*call[:3], call.bias, call.hidden_states, *experts.tensors]
    return _PROGRAMS.run(what, inputs, _fused_moe, call, experts)[0]


_ROUTING_BIAS, _HIDDEN = Block._fields.index("bias"), Block._fields.index("hidden_states")


def _fused_moe(call: Block, experts: _Experts) -> list[torch.Tensor]:
    x, weight, bias = call[:3]
    E, H = weight.shape
    plan = router_plan(x.shape[0], E, H, x.dtype) if x.dtype in DTYPES else None
    # What the kernels do not take goes to the library, which takes it or raises.
    rows = (x.dtype, x.shape[1]) == (weight.dtype, H) and x.stride(1) == weight.stride(1) == 1
    dense = bias is None or ((bias.dtype, bias.shape) == (x.dtype, (E,)) and bias.stride(0) == 1)
    if plan is None or not rows or not dense or x.shape[0] == 0:
        topk_weights, topk_ids = topk_routing(F.linear(x, weight, bias), *call.routing)
        return [fused_experts(call.hidden_states, topk_ids, topk_weights, *call.experts)]
    if isinstance(plan, RouterTiles):
        logits = router_pieces(x, weight, plan)
        rounding = {"router_bias": bias, "logits_dtype": x.dtype}
    else:
        logits, rounding = router_logits(x, weight, bias, plan), {}
    topk_weights, topk_ids = _topk_routing(
        logits, *call.routing, first=False, allocate=scratch, **rounding
    )
    flags = (call.interleaved, call.weight_on_input, call.batch_invariant)
    return _fused_experts(
        call.hidden_states,
        topk_ids,
        topk_weights,
        experts,
        call.activation,
        call.out_dtype,
        *flags,
    )


def _fused_experts(
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    experts: _Experts,
    activation: str,
    out_dtype: torch.dtype,
    interleaved: bool,
    weight_on_input: bool,
    batch_invariant: bool,
) -> list[torch.Tensor]:
    """What it decides depends only on its arguments but the tensors' contents; ``Programs`` relies on that."""
    unit = parse(activation)
    if torch.float64 in unit.casts:
        raise NotImplementedError(f"activation {unit.text}: no fp64 on a GPU")
    if hidden_states.dtype not in DTYPES:
        raise NotImplementedError(f"dtype {hidden_states.dtype}")
    gate, up, down_ = experts.projections(interleaved)
    for projection in (gate, up or gate, down_):
        if projection.dtype != hidden_states.dtype:
            raise NotImplementedError(
                f"weights are {projection.dtype}, hidden_states {hidden_states.dtype}"
            )
    if up is not None and up.from_table != gate.from_table:
        raise ValueError("gate and up must both be stacked or both be lists")
    T, H = hidden_states.shape
    problem = problem_of(
        T,
        topk_ids.shape[1],
        gate,
        up,
        down_,
        unit,
        _capability(hidden_states.device),
        batch_invariant,
    )
    out = torch.empty((T, H), dtype=out_dtype, device=hidden_states.device)
    if out.numel() == 0:
        return [out]
    if problem.k == 0 or problem.I == 0 or problem.E == 0:
        return [out.zero_()]
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
    return [out]


def problem_of(
    T: int,
    k: int,
    gate: Projection,
    up: Projection | None,
    down_: Projection,
    unit: Unit,
    capability: tuple[int, int],
    batch_invariant: bool = False,
) -> Problem:
    """What a plan for ``T`` tokens and ``k`` choices depends on, of these weights.  Tests ask for it too."""
    layout = layout_of(gate, up, unit)
    return Problem(
        T=T,
        E=down_.num_experts,
        k=k,
        H=down_.out_features,
        I=down_.in_features,
        dtype=down_.dtype,
        capability=capability,
        unit_stride=all(p.stride_in == 1 for p in (gate, up or gate, down_)),
        gate_up_tma=come_by_tma(layout, gate, up),
        down_tma=down_.tma_ready,
        one_product=has_one_product(layout, gate),
        batch_invariant=batch_invariant,
    )


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
    dtype, device = hidden_states.dtype, hidden_states.device
    before, after = (topk_weights, None) if weight_on_input else (None, topk_weights)
    if isinstance(plan, DecodePlan):
        intermediate = scratch((problem.slots, stride), dtype, device)
        decode_gate_up(
            hidden_states, gate, up, topk_ids, unit, intermediate, I, plan.gate_up, before
        )
        decode_down(intermediate, I, down_, after, topk_ids, out, plan.down)
        return
    assert isinstance(plan, GroupedPlan)
    num_programs = _num_multiprocessors(hidden_states.device)
    alignment = align(topk_ids, problem.E, plan.gate_up.block_m)
    intermediate = scratch((alignment.sorted_token_ids.numel(), stride), dtype, device)
    slot_outputs = scratch((problem.slots, problem.H), dtype, device)
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
        plan.overlap,
    )
    down(
        intermediate,
        I,
        down_,
        after,
        alignment,
        slot_outputs,
        plan.down,
        num_programs,
        plan.gate_up.block_n if plan.overlap else 0,
    )
    combine(slot_outputs, topk_ids, out, problem.E)


def _is_elsewhere(tensor: torch.Tensor) -> bool:
    """Triton launches on the current device.  Switching costs a few us, so only where it is needed."""
    return tensor.is_cuda and tensor.get_device() != torch.cuda.current_device()


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
