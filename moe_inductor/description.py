"""The typed description of one mixture-of-experts block: where patterns and kernels meet.

A pattern only has to produce one of these; a kernel only has to read one.  Field names follow Hugging Face's
``use_experts_implementation`` facts where those exist (``is_concatenated``, ``has_gate``).

Dimensions: ``T`` tokens, ``E`` experts, ``k`` experts per token, ``H`` hidden size, ``I`` intermediate size.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch

Activation = Literal["silu"]
Storage = Literal["stacked", "per_expert"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Router:
    """``router_logits [T, E] -> topk_weights [T, k], topk_ids [T, k]``.

    score: applied over all E logits before the top-k, computed in fp32.
    renormalise: divide the k selected scores by their sum.
    weights_dtype: dtype of ``topk_weights``.
    """

    score: Literal["softmax"]
    k: int
    renormalise: bool
    weights_dtype: torch.dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experts:
    """The expert MLP, ``x [T, H] -> y [T, H]``: ``down(act(gate(x)) * up(x))``.

    storage: "stacked" is one ``[E, ...]`` tensor per projection, "per_expert" is E tensors per projection.
    is_concatenated: gate and up rows live in one ``[.., 2I, H]`` weight, gate first; else in two weights.
    is_transposed: weights are stored ``[.., in, out]`` instead of ``[.., out, in]``.
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    activation: Activation
    has_gate: bool = True
    is_concatenated: bool
    is_transposed: bool = False
    storage: Storage
    weight_dtype: torch.dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class Combine:
    """``y[t] = sum_j topk_weights[t, j] * expert_{topk_ids[t, j]}(x[t])``; the kernels sum in fp32.

    out_dtype: dtype of ``y``.
    """

    weight_on: Literal["output"] = "output"
    out_dtype: torch.dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoE:
    """One block.  ``router`` is None when the model's own router stays in front of the fused experts."""

    spelling: str
    top_k: int
    experts: Experts
    combine: Combine
    router: Router | None = None
