"""Rules about the first rows of an expert: a capacity after which tokens are dropped.

    (nonzero(ids == e)[:, 0])[:C]  =  nonzero(kept == e)[:, 0]

for ids [T, k] that are distinct in each row and in [0, E), where ``kept`` is ids with -1 in the place of those before
which C tokens chose the same expert:

    counted [T, E] = cumsum(sum(ids[.., None] == arange(E), 1), 0)
    kept = where(gather(counted, 1, ids) <= C, ids, -1)

The rows of ``nonzero`` are in the order of the tokens, and no token is listed twice, so the C first rows are those of
the tokens up to which at most C have chosen e.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from moe_inductor.region.distinct import are_distinct, chosen_from, kept_of
from moe_inductor.region.nodes import node_arg, value
from moe_inductor.region.normalise import Emitter, row_of, rule
from moe_inductor.region.rows import hits

aten = torch.ops.aten


@rule(aten.slice.Tensor, first=True)
def _first_rows(out: Emitter, node: fx.Node, args: tuple[Any, ...], kwargs: dict) -> Any:
    given = list(args[1:])
    tokens, (dim, start, end, step) = args[0], given + [0, None, None, 1][len(given) :]
    limited = dim == 0 and start in (None, 0) and type(end) is int and end > 0 and step == 1
    found = hits(tokens) if limited and value(tokens).dim() == 1 else None
    if found is not None and node_arg(node_arg(tokens, 0), 0).args[0] is not found[0]:
        return None  # slot by slot, and not token by token
    chosen = chosen_from(found[0]) if found is not None and kept_of(found[0]) is found[0] else None
    if found is None or chosen is None:
        return None
    (ids, e), scores = found, chosen[0]
    experts = value(scores).shape[chosen[1]]
    if type(experts) is not int or not are_distinct(ids, experts):
        return None
    made, origin = value(node), node.meta.get("stack_trace")
    kept = _kept(out, ids, experts, end, origin)
    hit = torch.empty_like(value(ids), dtype=torch.bool)
    compared = out.emit(aten.eq.Scalar, (kept, e), {}, hit, origin)
    pairs = out.emit(
        aten.nonzero.default, (compared,), {}, made.new_empty((*made.shape, 2)), origin
    )
    return row_of(out, pairs, 1, 0, made, origin)


def _kept(out: Emitter, ids: fx.Node, experts: int, capacity: int, origin: str | None) -> fx.Node:
    """``kept`` of the equation."""
    found = value(ids)
    tokens, top_k = found.shape
    column = out.view(ids, found.new_empty((tokens, top_k, 1)), origin)
    kwargs = {"dtype": torch.int64, "device": found.device}
    numbers = out.emit(
        aten.arange.default, (experts,), kwargs, found.new_empty(experts, dtype=torch.int64), origin
    )
    each = found.new_empty((tokens, top_k, experts), dtype=torch.bool)
    hit = out.emit(aten.eq.Tensor, (column, numbers), {}, each, origin)
    of_token = found.new_empty((tokens, experts), dtype=torch.int64)
    hit = out.emit(aten.sum.dim_IntList, (hit, [1]), {}, of_token, origin)
    counted = out.emit(aten.cumsum.default, (hit, 0), {}, of_token, origin)
    place = out.emit(aten.gather.default, (counted, 1, ids), {}, found, origin)
    fits = torch.empty_like(found, dtype=torch.bool)
    fits = out.emit(aten.le.Scalar, (place, capacity), {}, fits, origin)
    return out.emit(aten.where.ScalarOther, (fits, ids, -1), {}, found, origin)
