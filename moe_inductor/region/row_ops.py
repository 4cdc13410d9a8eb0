"""Operators on rows that the normal form needs and torch does not have.

``pair_linear`` multiplies each row by the matrix of its own expert.  ``all_rows`` claims how many rows there are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from moe_inductor.region.nodes import (
    has_unbacked,
    is_tensor,
    name_of,
    storages,
    unbacked,
    value,
)

_LIBRARY = torch.library.Library("moe_inductor_region", "DEF")
_LIBRARY.define("pair_linear(Tensor rows, Tensor expert_ids, Tensor weight) -> Tensor")
PAIR_LINEAR = torch.ops.moe_inductor_region.pair_linear.default


@torch.library.register_fake("moe_inductor_region::pair_linear", lib=_LIBRARY)
def _fake(rows: torch.Tensor, expert_ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return rows.new_empty((rows.shape[0], weight.shape[2]))


@torch.library.impl("moe_inductor_region::pair_linear", "CompositeExplicitAutograd", lib=_LIBRARY)
def _run(rows: torch.Tensor, expert_ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """rows [S, in], expert_ids [S], weight [E, in, out] -> [S, out]"""
    return torch.bmm(rows.unsqueeze(1), weight[expert_ids]).squeeze(1)


_LIBRARY.define("all_rows(Tensor rows, SymInt count) -> Tensor")
ALL_ROWS = torch.ops.moe_inductor_region.all_rows.default


@torch.library.register_fake("moe_inductor_region::all_rows", lib=_LIBRARY)
def _fake_all(rows: torch.Tensor, count: int) -> torch.Tensor:
    return rows.new_empty((count, *rows.shape[1:]))


@torch.library.impl("moe_inductor_region::all_rows", "CompositeExplicitAutograd", lib=_LIBRARY)
def _run_all(rows: torch.Tensor, count: int) -> torch.Tensor:
    raise AssertionError("moe_inductor: a graph on an unproved number of rows was run")


# How parts are put together again.
_JOINS = frozenset({"cat", "concat", "concatenate", "vstack", "row_stack"})


def restated(node: fx.Node, made: Any) -> Any:
    """``made``, the value of a Dynamo node that puts parts of data-dependent lengths together, of which it is claimed
    that they are parts of one tensor and together as long as that.  Torch only knows a sum, and shapes that are
    inferred from a sum are of no use.

    The claim is an operator in the graph.  It goes when the rows are unsorted, which shows it, and is in the way of
    every match until then.
    """
    if name_of(node) not in _JOINS or not isinstance(made, torch.Tensor) or not made.dim():
        return made
    if not unbacked(made.shape[0]):
        return made
    todo, seen = list(node.all_input_nodes), set()
    while todo:
        part = todo.pop(0)
        if part in seen or not has_unbacked(part):
            continue
        seen.add(part)
        for whole in part.all_input_nodes:
            if is_tensor(whole) and not has_unbacked(whole) and storages(whole) & storages(part):
                return ALL_ROWS(made, value(whole).shape[0])
        todo += part.all_input_nodes
    return made
