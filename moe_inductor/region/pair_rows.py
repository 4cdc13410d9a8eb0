"""Rules about an expert's pairs that are listed by their place among all (token, choice) pairs.

    pair = nonzero(view(ids, [T k]) == e)        token = pair // k        slot = pair % k

In the uniform spelling (token, slot) = nonzero(ids == e), for ids [T, k].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from moe_inductor.region.nodes import node_arg, origin_of, same_sizes, value
from moe_inductor.region.normalise import Emitter, row_of, rule
from moe_inductor.region.pairs import Order, are_tokens_of_pairs
from moe_inductor.region.rows import hits, index_of

aten = torch.ops.aten


def _ids_of_pairs(pair: Any) -> tuple[fx.Node, Any] | None:
    """(ids [T, k], e) where ``pair`` is as above, for more than one choice."""
    of_expert = hits(pair) if isinstance(pair, fx.Node) else None
    if of_expert is None:
        return None
    flat, e = of_expert
    ids = node_arg(flat, 0) if flat.target is aten.view.default else flat
    k = value(ids).shape[-1]
    if value(ids).dim() != 2 or not isinstance(k, int) or k < 2:
        return None
    return (ids, e) if same_sizes(value(flat).shape, [value(ids).numel(), 1]) else None


def _place(out: Emitter, pair: fx.Node, ids: fx.Node, e: Any, which: int) -> fx.Node:
    """The tokens (0) or the slots (1) of the pairs."""
    hit = torch.empty_like(value(ids), dtype=torch.bool)
    compared = out.emit(aten.eq.Scalar, (ids, e), {}, hit, origin_of(pair))
    listed = value(pair).new_empty((value(pair).shape[0], 2))
    places = out.emit(aten.nonzero.default, (compared,), {}, listed, origin_of(pair))
    out.note_rows(places)
    return row_of(out, places, 1, which, value(pair), origin_of(pair))


@rule(aten.floor_divide.default, aten.div.Tensor_mode, aten.div.Scalar_mode, aten.remainder.Scalar)
def _divided(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """pair // k = token,  pair % k = slot"""
    of_pairs = _ids_of_pairs(args[0])
    if of_pairs is None or args[1] != value(of_pairs[0]).shape[1]:
        return None
    if kwargs and kwargs.get("rounding_mode") not in ("floor", "trunc"):
        return None
    is_remainder = node.target is aten.remainder.Scalar
    return _place(out, args[0], *of_pairs, 1 if is_remainder else 0)


@rule(aten.index.Tensor, first=True)
def _of_pairs(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """index(the token of each pair [T k], [pair]) = token
    index(view(w [T, k], [T k]), [pair]) = index(w, [token, slot])"""
    base, indices = args[0], list(args[1])
    of_pairs = _ids_of_pairs(indices[0]) if len(indices) == 1 else None
    if of_pairs is None:
        return None
    ids, (pair,) = of_pairs[0], indices
    if are_tokens_of_pairs(base, Order(hits(pair)[0], ids, 0)):
        return _place(out, pair, *of_pairs, 0)
    scores = node_arg(base, 0) if base.target is aten.view.default else base
    flat = value(base).dim() == 1 or same_sizes(value(base).shape[1:], [1])
    if not flat or not same_sizes(value(scores).shape, value(ids).shape):
        return None
    places = [_place(out, pair, *of_pairs, which) for which in (0, 1)]
    gathered = value(node) if value(node).dim() == 1 else value(node).squeeze(-1)
    made = index_of(out, scores, places, gathered, origin_of(node))
    return out.view(made, value(node), origin_of(node))
