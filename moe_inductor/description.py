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
Score = Literal["softmax", "sigmoid", "sqrtsoftplus", "logits"]
Weighing = Score | Literal["softmax_of_chosen"]
Layout = Literal["plain", "concatenated", "interleaved", "separate"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Groups:
    """Experts ``0..E-1`` in ``count`` groups of equal size, of which a token may choose from ``kept``.

    score: those with the largest maximum, or with the largest sum of their two largest.
    fill: what is compared for experts of the others; with fill_weights they also weigh that, which is 0.
    """

    count: int
    kept: int
    score: Literal["max", "top2"]
    fill: float
    fill_weights: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Router:
    """``router_logits [T, E] -> topk_weights [T, k], topk_ids [T, k]``.

    score: function of all E logits that the choice is made by.  bias: ``[E]``, added for the choice alone.
    weight: function of the logits that the weights of the chosen are; "softmax_of_chosen" is over these k.
    renormalise: divide the k weights by their sum, plus ``epsilon``, at least ``minimum``.  scale: of the result.
    score_dtype: dtype that the model holds the scores in, hence compares.  weights_dtype: of ``topk_weights``.
    """

    score: Score
    k: int
    renormalise: bool
    weights_dtype: torch.dtype
    weight: Weighing = "softmax"
    bias: bool = False
    groups: Groups | None = None
    epsilon: float = 0.0
    minimum: float | None = None
    scale: float = 1.0
    score_dtype: torch.dtype = torch.float32


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
    identities: so many further ids, from E on, belong to experts that give their input as it is (LongCat-Flash).
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
    identities: int = 0

    @property
    def num_choices(self) -> int:
        """What a router chooses among."""
        return self.num_experts + self.identities

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
    keeps_tokens: a token whose ids are all outside 0..E-1 gets ``x[t]``, not zeros; k is 1.
    out_dtype: dtype of ``y``.
    """

    weight_on: Literal["output", "input"] = "output"
    keeps_tokens: bool = False
    out_dtype: torch.dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoE:
    """One block.  ``router`` is None when the model's own router stays in front of the fused experts."""

    spelling: str
    top_k: int
    experts: Experts
    combine: Combine
    router: Router | None = None
