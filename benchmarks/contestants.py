"""The block, router logits to output, as each contestant computes it: ``f(Inputs) -> [T, H]``."""

from __future__ import annotations

import types
from collections.abc import Callable
from unittest import mock

import torch

from moe_inductor.ops.cuda import fused_experts, topk_routing

from .cells import Inputs, Shape, Weights, make_inputs

Block = Callable[[Inputs], torch.Tensor]


def ours(shape: Shape, weights: Weights, batch_invariant: bool = False) -> Block:
    gate_up, down = [weights.gate_up], [weights.down]

    def block(one: Inputs) -> torch.Tensor:
        x = one.hidden_states
        topk_weights, topk_ids = topk_routing(one.router_logits, shape.k, True, x.dtype)
        return fused_experts(
            x, topk_ids, topk_weights, gate_up, [], down, "silu", x.dtype,
            batch_invariant=batch_invariant,
        )  # fmt: skip

    return block


def ours_per_expert(shape: Shape, weights: Weights) -> Block:
    """The same weights as E separate tensors, read through a pointer table."""
    gate_up, down = list(weights.gate_up.unbind(0)), list(weights.down.unbind(0))

    def block(one: Inputs) -> torch.Tensor:
        x = one.hidden_states
        topk_weights, topk_ids = topk_routing(one.router_logits, shape.k, True, x.dtype)
        return fused_experts(x, topk_ids, topk_weights, gate_up, [], down, "silu", x.dtype)

    return block


def hugging_face(shape: Shape, weights: Weights, implementation: str) -> Block:
    """The installed transformers' Qwen3-MoE experts over our weights, behind its router's own formula.

    implementation: "grouped_mm" or "eager".
    """
    from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(
        num_experts=shape.E,
        num_experts_per_tok=shape.k,
        hidden_size=shape.H,
        moe_intermediate_size=shape.I,
        hidden_act="silu",
        norm_topk_prob=True,
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        experts = Qwen3MoeExperts(config)
    experts.gate_up_proj = torch.nn.Parameter(weights.gate_up, requires_grad=False)
    experts.down_proj = torch.nn.Parameter(weights.down, requires_grad=False)

    def forward(hidden_states: torch.Tensor, router_logits: torch.Tensor) -> torch.Tensor:
        probabilities = torch.nn.functional.softmax(router_logits, dtype=torch.float, dim=-1)
        topk_weights, topk_ids = torch.topk(probabilities, shape.k, dim=-1)
        topk_weights /= topk_weights.sum(dim=-1, keepdim=True)
        topk_weights = topk_weights.to(router_logits.dtype)
        return experts(hidden_states, topk_ids, topk_weights)

    if implementation != "eager":
        forward = torch.compile(forward)
    return torch.no_grad()(lambda one: forward(one.hidden_states, one.router_logits))


def triton_kernels(shape: Shape, weights: Weights) -> Block:
    """The installed triton_kernels (of the 3.5 line: ``matmul_ogs``): its routing, its fused SwiGLU, its defaults.

    It takes gate and up interleaved and computes ``silu(gate) * (up + 1)``: the same work on the same weights, and
    ``reference`` knows of it.
    """
    import triton_kernels.swiglu
    from triton_kernels.matmul_ogs import FnSpecs, FusedActivation, matmul_ogs
    from triton_kernels.routing import routing

    specs = FnSpecs("swiglu", triton_kernels.swiglu.swiglu_fn, ("alpha", "limit"))
    activation = FusedActivation(specs, (1.0, None), 2)
    gate_up, down = weights.gate_up.mT, weights.down.mT

    def block(one: Inputs) -> torch.Tensor:
        chosen, gather, scatter = routing(one.router_logits, shape.k)
        h = matmul_ogs(
            one.hidden_states,
            gate_up,
            None,
            chosen,
            gather_indx=gather,
            fused_activation=activation,
        )
        return matmul_ogs(
            h, down, None, chosen, scatter_indx=scatter, gammas=chosen.gate_scal
        ).view(one.hidden_states.shape)

    return block


def vllm(shape: Shape, weights: Weights) -> Block:
    """The installed vLLM's Triton experts behind its own top-k, with the tuned configurations that it ships."""
    from vllm.model_executor.layers.fused_moe import fused_experts, fused_topk

    def block(one: Inputs) -> torch.Tensor:
        x = one.hidden_states
        topk_weights, topk_ids, *_ = fused_topk(x, one.router_logits, shape.k, True)
        return fused_experts(x, weights.gate_up, weights.down, topk_weights, topk_ids)

    return block


def quack(shape: Shape, weights: Weights) -> Block:
    """The installed SonicMoE over QuACK's GEMMs, which it tunes for each size at the first call.

    Its block multiplies by the router's weight itself.  All contestants start from router logits, so the logits stand
    in for that product; nothing else of it is changed.
    """
    from sonicmoe import functional

    gate_up, down = weights.gate_up.permute(1, 2, 0), weights.down.permute(1, 2, 0)

    device = weights.gate_up.device
    tuned: set[int] = set()

    @torch.no_grad()
    def layer(one: Inputs) -> torch.Tensor:
        given = types.SimpleNamespace(linear=lambda x, router_weight: one.router_logits)
        with mock.patch.object(functional, "F", given):
            out, *_ = functional.moe_TC_softmax_topk_layer(
                one.hidden_states,
                one.router_logits.mT,
                gate_up,
                None,
                down,
                None,
                shape.k,
                0,
                "swiglu",
                is_inference_mode_enabled=True,
                is_softmax_over_topk=True,
                concat_layout=True,
            )
        return out

    def block(one: Inputs) -> torch.Tensor:
        T = one.hidden_states.shape[0]
        if T in tuned:
            return layer(one)
        tuned.add(T)
        # Tuning draws random numbers, on which the cells' data must not depend.
        with torch.random.fork_rng([device]):
            return layer(one)

    # Its weighted sum is tuned once per H and k, at whatever T comes first.
    with torch.random.fork_rng([device]):
        block(make_inputs(shape, 2048, str(device), weights.gate_up.dtype)[0])
    return block


# Peers are measured where they are installed.
PEERS = {"triton_kernels": triton_kernels, "vllm": vllm, "quack": quack}


def reference(
    shape: Shape, weights: Weights, one: Inputs, rows: torch.Tensor, name: str = ""
) -> torch.Tensor:
    """fp64 result of some rows, by the formula that contestant ``name`` computes."""
    x = one.hidden_states[rows].double()
    probabilities = one.router_logits[rows].double().softmax(-1)
    topk_weights, topk_ids = probabilities.topk(shape.k, dim=-1)
    topk_weights = topk_weights / topk_weights.sum(-1, keepdim=True)
    y = torch.zeros_like(x)
    for expert in topk_ids.unique().tolist():
        row, column = torch.where(topk_ids == expert)
        both = x[row] @ weights.gate_up[expert].double().T
        gate, up = both.chunk(2, dim=-1)
        if name == "triton_kernels":
            gate, up = both[:, ::2], both[:, 1::2] + 1
        h = torch.nn.functional.silu(gate) * up
        out = h @ weights.down[expert].double().T
        y.index_add_(0, row, out * topk_weights[row, column, None])
    return y
