"""The typed description of one mixture-of-experts block: where patterns and kernels meet.

A pattern only has to produce one of these; a kernel only has to read one.  Field names follow Hugging Face's
``use_experts_implementation`` facts where those exist (``is_transposed``, ``has_gate``).

Dimensions: ``T`` tokens, ``E`` experts, ``k`` experts per token, ``H`` hidden size, ``I`` intermediate size.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch

Storage = Literal["stacked", "per_expert"]
Layout = Literal["plain", "concatenated", "interleaved", "separate"]


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
    """The expert MLP, ``x [T, H] -> y [T, H]``: ``down(unit(gate(x), up(x)))``, each projection with or without a bias.

    activation: the unit between the projections, in the language of ``unit.py``.
    layout: how gate and up are stored.  "plain": there is only one first projection.  "concatenated": one weight
        ``[.., 2I, H]``, gate rows first.  "interleaved": one weight, rows gate, up, gate, up, ...
        "separate": two weights ``[.., I, H]``.
    storage: "stacked" is one ``[E, ...]`` tensor per projection, "per_expert" is E tensors per projection.
    gate_up_transposed, down_transposed: stored ``[.., in, out]`` instead of ``[.., out, in]``.
    weight_dtype: as stored.  compute_dtype: of the operands of the GEMMs; another one under autocast.
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    activation: str
    layout: Layout
    storage: Storage
    gate_up_transposed: bool = False
    down_transposed: bool = False
    gate_up_bias: bool = False
    down_bias: bool = False
    weight_dtype: torch.dtype
    compute_dtype: torch.dtype

    @property
    def has_gate(self) -> bool:
        return self.layout != "plain"

    @property
    def first_rows(self) -> int:
        """Rows of the first projection's weight."""
        double = self.layout in ("concatenated", "interleaved")
        return self.intermediate_size * (2 if double else 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Combine:
    """``y[t] = sum_j topk_weights[t, j] * expert_{topk_ids[t, j]}(x[t])``; the kernels sum in fp32.

    weight_on: "input" is ``expert(topk_weights[t, j] * x[t])`` instead (Llama 4).
    out_dtype: dtype of ``y``.
    """

    weight_on: Literal["output", "input"] = "output"
    out_dtype: torch.dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoE:
    """One block.  ``router`` is None when the model's own router stays in front of the fused experts."""

    spelling: str
    top_k: int
    experts: Experts
    combine: Combine
    router: Router | None = None
