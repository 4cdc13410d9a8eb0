"""The logits that a block's router is computed from, by whichever kernel makes them."""

from __future__ import annotations

import torch

from moe_inductor.kernels.configs import RouterRows, RouterTiles
from moe_inductor.kernels.router_logits import router_logits
from moe_inductor.kernels.router_pieces import router_pieces


def logits_by(
    plan: RouterRows | RouterTiles | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """[T, E] in the dtype of ``x`` [T, H].  Pieces of H are added up in the order in which ``route`` adds them."""
    if plan is None:
        return torch.nn.functional.linear(x, weight, bias)
    if isinstance(plan, RouterRows):
        return router_logits(x, weight, bias, plan)
    logits, *others = router_pieces(x, weight, plan).unbind()
    for piece in others:
        logits = logits + piece
    return (logits if bias is None else logits + bias.float()).to(x.dtype)
