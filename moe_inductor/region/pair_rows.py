"""Rules about an expert's pairs that are listed by their place among all (token, choice) pairs.

    pair = nonzero(view(ids, [T k]) == e)        token = pair // k        slot = pair % k

In the uniform spelling (token, slot) = nonzero(ids == e), for ids [T, k].
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from moe_inductor.region.nodes import node_arg, origin_of, same_sizes, value
from moe_inductor.region.normalise import Emitter, row_of, rule
from moe_inductor.region.orders import Order, are_tokens_of_pairs, quotient
from moe_inductor.region.rows import hits, index_of

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True, eq=False)
class _Pairs:
    """``listed``, the list as above, for more than one choice.  flat: view(ids, [T k, 1])."""

    listed: fx.Node
    flat: fx.Node
    ids: fx.Node
    expert: Any


def _pairs(listed: Any) -> _Pairs | None:
    of_expert = hits(listed) if isinstance(listed, fx.Node) else None
    if of_expert is None:
        return None
    flat, e = of_expert
    ids = node_arg(flat, 0) if flat.target is aten.view.default else flat
    k = value(ids).shape[-1]
    if value(ids).dim() != 2 or not isinstance(k, int) or k < 2:
        return None
    if not same_sizes(value(flat).shape, [value(ids).numel(), 1]):
        return None
    return _Pairs(listed, flat, ids, e)


def _places(out: Emitter, pairs: _Pairs) -> tuple[fx.Node, fx.Node]:
    """Their tokens and slots."""
    made, origin = value(pairs.listed), origin_of(pairs.listed)
    hit = torch.empty_like(value(pairs.ids), dtype=torch.bool)
    compared = out.emit(aten.eq.Scalar, (pairs.ids, pairs.expert), {}, hit, origin)
    both = made.new_empty((made.shape[0], 2))
    places = out.emit(aten.nonzero.default, (compared,), {}, both, origin)
    out.note_rows(places)
    token, slot = (row_of(out, places, 1, which, made, origin) for which in (0, 1))
    return token, slot


@rule(aten.floor_divide.default, aten.div.Tensor_mode, aten.div.Scalar_mode, aten.remainder.Scalar)
def _divided(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """pair // k = token,  pair % k = slot"""
    pairs = _pairs(args[0])
    if pairs is None or args[1] != value(pairs.ids).shape[1]:
        return None
    is_remainder = node.target is aten.remainder.Scalar
    if not is_remainder and quotient(node) is None:
        return None
    token, slot = _places(out, pairs)
    return slot if is_remainder else token


@rule(aten.index.Tensor, first=True)
def _of_pairs(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """index(the token of each pair [T k], [pair]) = token
    index(view(w [T, k], [T k]), [pair]) = index(w, [token, slot])"""
    base, indices = args[0], list(args[1])
    pairs = _pairs(indices[0]) if len(indices) == 1 else None
    if pairs is None:
        return None
    if are_tokens_of_pairs(base, Order(pairs.flat, pairs.ids, 0)):
        return _places(out, pairs)[0]
    scores = node_arg(base, 0) if base.target is aten.view.default else base
    flat = value(base).dim() == 1 or same_sizes(value(base).shape[1:], [1])
    if not flat or not same_sizes(value(scores).shape, value(pairs.ids).shape):
        return None
    gathered = value(node) if value(node).dim() == 1 else value(node).squeeze(-1)
    made = index_of(out, scores, [*_places(out, pairs)], gathered, origin_of(node))
    return out.view(made, value(node), origin_of(node))
