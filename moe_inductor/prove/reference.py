"""The described expert MLPs in plain PyTorch: what a spelling's reference is given when it is traced for the proof."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.nn import functional as F

from moe_inductor.description import MoE
from moe_inductor.match.api import Linear

ACTIVATION_FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"silu": F.silu}


class DescribedExperts:
    """``match.api.Experts`` for a description and its weights.

    gate_up, up, down: one stacked tensor or E tensors each, as stored (``is_transposed`` is applied here);
    up is empty when gate and up are concatenated.  visited: expert ids in the order of the loop.
    """

    def __init__(
        self,
        moe: MoE,
        gate_up: Sequence[torch.Tensor],
        up: Sequence[torch.Tensor],
        down: Sequence[torch.Tensor],
        visited: Sequence[int],
    ) -> None:
        self.moe, self.gate_up, self.up, self.down, self.visited = moe, gate_up, up, down, visited
        self.num_experts = moe.experts.num_experts

    def __call__(self, rows: torch.Tensor, linear: Linear) -> torch.Tensor:
        return self._mlp(
            rows, linear, *((w[0] if w else None) for w in (self.gate_up, self.up, self.down))
        )

    def __iter__(self) -> Iterator[tuple[int, Callable[[torch.Tensor], torch.Tensor]]]:
        for e in self.visited:
            weights = [self._expert(w, e) for w in (self.gate_up, self.up, self.down)]
            yield e, lambda rows, weights=weights: self._mlp(rows, F.linear, *weights)

    def _expert(self, weight: Sequence[torch.Tensor], e: int) -> torch.Tensor | None:
        if not weight:
            return None
        return weight[0][e] if self.moe.experts.storage == "stacked" else weight[e]

    def _mlp(
        self,
        rows: torch.Tensor,
        linear: Linear,
        gate_up: torch.Tensor | None,
        up: torch.Tensor | None,
        down: torch.Tensor | None,
    ) -> torch.Tensor:
        activation = ACTIVATION_FUNCTIONS[self.moe.experts.activation]
        assert gate_up is not None
        assert down is not None
        if up is None:
            gate, linear_up = linear(rows, self._stored(gate_up)).chunk(2, dim=-1)
        else:
            gate, linear_up = linear(rows, self._stored(gate_up)), linear(rows, self._stored(up))
        return linear(activation(gate) * linear_up, self._stored(down))

    def _stored(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.transpose(-2, -1) if self.moe.experts.is_transposed else weight
