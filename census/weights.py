"""Weights of unit scale, made the same way for every model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class without_garbage(TorchFunctionMode):
    """``torch.empty`` gives zeros: models leave to a checkpoint what a checkpoint will bring."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.empty:
            func = torch.zeros
            kwargs = {k: v for k, v in (kwargs or {}).items() if k != "memory_format"}
        return func(*args, **(kwargs or {}))


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Matrices N(0, 1/fan_in), embeddings N(0, 1), vectors and biases of routers around their value.  In place.

    With the small weights that models are created with, an MoE adds next to nothing to its residual.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.dtype)

    embeddings = {m.weight for m in module.modules() if isinstance(m, nn.Embedding)}
    with torch.no_grad():
        for p in module.parameters():
            if p.dim() < 2:
                p.add_(0.1 * draw(p))
            else:
                p.copy_(draw(p) if p in embeddings else draw(p) * p.shape[-1] ** -0.5)
        for name, buffer in module.named_buffers():
            if "bias" in name and buffer.is_floating_point():
                buffer.add_(0.1 * draw(buffer))
            if name.endswith("tid2eid"):  # DeepSeek-V4: token id -> experts, all different
                scores = torch.rand(len(buffer), 6, generator=generator)
                buffer.copy_(scores.topk(buffer.shape[1]).indices)
    return module
