"""Rules about tokens that a map [T, E] of who goes where selects: they become the tokens that a sort by expert gives.

Of ``map[t, e] = (e is among ids[t])`` the true places, expert after expert, are the (token, choice) pairs sorted by
expert, and those of one expert in the order of their tokens: what a stable sort of the ids does, whose ids are distinct
in each row.  So

    masked_select(expand(arange(T), [E, T]), map.T) = order // k
    masked_select(scatter(zeros, 1, ids, w).T, map.T) = w.view(-1)[order]        with order = argsort(ids.view(-1))

and there are T k of them.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from moe_inductor.region.counts import choices
from moe_inductor.region.nodes import node_arg, same_sizes, value
from moe_inductor.region.normalise import Emitter, rule
from moe_inductor.region.sparse import matrix_of

aten = torch.ops.aten


@rule(aten.masked_select.default)
def _selected(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    base, mask = args
    ids = _chosen(mask)
    made, origin = value(node), node.meta.get("stack_trace")
    if ids is None or not same_sizes(value(base).shape, value(mask).shape):
        return None
    pairs = value(ids).reshape(-1)
    scores = _scores_of(base, ids)
    if scores is None and not _are_tokens(base):
        return None
    flat = out.view(ids, pairs, origin)
    values = (pairs, torch.empty_like(pairs))
    pack = out.emit(aten.sort.stable, (flat,), {"stable": True}, values, origin)
    order = out.emit(operator.getitem, (pack, 1), {}, values[1], origin)
    out.note_equal(made.shape[0], pairs.shape[0])
    if scores is None:
        k = value(ids).shape[-1]
        return out.apply(aten.floor_divide.default, (order, k), {}, values[1], origin)
    found = value(scores).reshape(-1)
    flat = out.view(scores, found, origin)
    return out.apply(aten.index.Tensor, (flat, [order]), {}, found, origin)


def _chosen(mask: fx.Node) -> fx.Node | None:
    """ids [T, k], where ``mask [E, T]`` is true for the tokens of each expert."""
    if mask.target is not aten.permute.default or value(mask).dim() != 2:
        return None
    found = matrix_of(node_arg(mask, 0))
    if found is None or found.fill != 0 or isinstance(found.scores, fx.Node) or found.scores != 1:
        return None
    ids = found.ids
    experts = value(mask).shape[0]
    return ids if value(ids).dim() == 2 and choices(ids) == experts else None


def _scores_of(base: fx.Node, ids: fx.Node) -> fx.Node | None:
    """w [T, k], where ``base [E, T]`` is scatter(.., 1, ids, w).T"""
    if base.target is not aten.permute.default:
        return None
    found = matrix_of(node_arg(base, 0))
    if found is None or found.ids is not ids or not isinstance(found.scores, fx.Node):
        return None
    return found.scores


def _are_tokens(base: fx.Node) -> bool:
    """arange(T), for each expert"""
    if base.target is not aten.expand.default:
        return False
    row = node_arg(base, 0)
    if row.target is aten.view.default:
        row = node_arg(row, 0)
    if row.target is not aten.arange.default or len(row.args) != 1 or value(row).dim() != 1:
        return False
    return same_sizes(value(row).shape, value(base).shape[1:])
