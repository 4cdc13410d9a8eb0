"""The described expert MLPs in plain PyTorch: what a spelling's reference is given when it is traced for the proof."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from moe_inductor.description import MoE
from moe_inductor.match.api import Linear
from moe_inductor.unit import parse


@dataclasses.dataclass(frozen=True)
class Projection:
    """Tensors of one projection, one stacked or E, as stored; no biases where it has none."""

    weights: Sequence[torch.Tensor]
    biases: Sequence[torch.Tensor]
    is_stacked: bool
    is_transposed: bool

    def whole(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One stack of all experts, however they are stored."""
        weight, *biases = (
            t[0] if self.is_stacked else torch.stack(list(t))
            for t in (self.weights, self.biases)
            if t
        )
        return self._stored(weight), biases[0] if biases else None

    def of(self, expert: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Expert by number, or by a symbolic index; then the first of E tensors is the one that was traced."""

        def pick(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
            if not tensors:
                return None
            if self.is_stacked:
                return tensors[0].select(0, expert)
            return tensors[expert if isinstance(expert, int) else 0]

        weight = pick(self.weights)
        assert weight is not None
        return self._stored(weight), pick(self.biases)

    def _stored(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.transpose(-2, -1) if self.is_transposed else weight


class DescribedExperts:
    """``match.api.Experts`` for a description and its weights.

    up: None where the first projection is one GEMM.  visited: expert ids in the order of the loop, symbolic or not;
    those of identities are from num_experts on.
    """

    def __init__(
        self,
        moe: MoE,
        gate_up: Projection,
        up: Projection | None,
        down: Projection,
        visited: Sequence[Any],
    ) -> None:
        self.moe, self.visited = moe, visited
        self.projections = [p for p in (gate_up, up, down) if p is not None]
        self.num_experts = moe.experts.num_experts

    def __call__(self, rows: torch.Tensor, linear: Linear) -> torch.Tensor:
        return self._mlp(rows, linear, *(p.whole() for p in self.projections))

    def __iter__(self) -> Iterator[tuple[int, Callable[[torch.Tensor], torch.Tensor]]]:
        for e in self.visited:
            if isinstance(e, int) and e >= self.num_experts:
                yield e, lambda rows: rows
                continue
            weights = [p.of(e) for p in self.projections]
            yield e, lambda rows, weights=weights: self._mlp(rows, F.linear, *weights)

    def _mlp(
        self,
        rows: torch.Tensor,
        linear: Linear,
        *weights: tuple[torch.Tensor, torch.Tensor | None],
    ) -> torch.Tensor:
        *first, down = weights
        results = [linear(rows, *weight) for weight in first]
        unit, layout = parse(self.moe.experts.activation), self.moe.experts.layout
        gate, up = results[0], results[-1]
        if layout == "concatenated":
            gate, up = gate.chunk(2, dim=-1)
        elif layout == "interleaved":
            gate, up = gate[..., ::2], gate[..., 1::2]
        return linear(unit(gate, up if unit.gated else None), *down)
