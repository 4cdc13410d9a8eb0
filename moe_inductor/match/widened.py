"""Experts that cast their tokens to a wider dtype for the products, which no fused kernel does."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from moe_inductor.reasons import Code, Refusal
from moe_inductor.region.nodes import location, uncast, value

aten = torch.ops.aten

_PRODUCTS = (aten.mm.default, aten.bmm.default)


def widened(graph: fx.Graph) -> Iterator[Refusal]:
    """A product with chosen rows that are stored in fewer bits than it computes in: why the block is not fused."""
    for node in graph.nodes:
        if node.target not in _PRODUCTS:
            continue
        for rows in map(uncast, node.all_input_nodes):
            made, stored = value(node).dtype, value(rows).dtype
            if rows.target is aten.index.Tensor and stored.itemsize < made.itemsize:
                words = f"the experts cast {_short(stored)} to {_short(made)} for their products"
                yield Refusal(
                    Code.DTYPE, f"{words}: a fused kernel would round more", location(node)
                )
                return


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
