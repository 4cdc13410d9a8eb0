"""Scores of all experts at the ids that were chosen, for a model that asks for them expert by expert.

Such a model has ``p [T, E]`` and reads ``p[token, e]``; it may never have seen ``gather(p, 1, ids)``.  What it does to
all E scores of a token alike is done to the chosen ones, so that a router is what it is where they are looked up first:

    gather(cast(p), 1, ids) = cast(gather(p, 1, ids))
    gather(p / s, 1, ids) = gather(p, 1, ids) / s for s [T, 1] or a number, and so for p * s
    gather(p, 1, ids) = w where (w, ids) = topk(p, k) and the model reads w
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from moe_inductor.region.distinct import are_distinct, kept_of, parts_of
from moe_inductor.region.nodes import is_one, node_arg, same_sizes, unviewed, value
from moe_inductor.region.normalise import Emitter, arithmetic, cast

aten = torch.ops.aten


def scores_at(out: Emitter, scores: fx.Node, ids: fx.Node, origin: str | None) -> fx.Node | None:
    """``gather(scores [T, E], 1, ids [T, k])`` for ids that were chosen from E: no other has a score everywhere."""
    if value(scores).dim() != 2 or value(ids).dim() != 2:
        return None
    tokens, experts = value(scores).shape
    if not same_sizes(value(ids).shape[:1], [tokens]):
        return None
    if any(kept_of(part) is not part for part in parts_of(unviewed(ids)) or ()):
        return None  # -1 has no score
    return _at(out, scores, ids, origin) if are_distinct(ids, experts) else None


def _at(out: Emitter, scores: fx.Node, ids: fx.Node, origin: str | None) -> fx.Node:
    args: Any = scores.args
    made = torch.empty_like(value(ids), dtype=value(scores).dtype)
    if scores.target is aten._to_copy.default and scores.kwargs.keys() == {"dtype"}:
        return cast(out, _at(out, args[0], ids, origin), made, origin)
    if scores.target in (aten.div.Tensor, aten.mul.Tensor) and not scores.kwargs:
        source, by = args
        if _is_of_token(by) and same_sizes(value(source).shape, value(scores).shape):
            picked = _at(out, source, ids, origin)
            if not isinstance(by, fx.Node):
                return out.emit(scores.target, (picked, by), {}, made, origin)
            return arithmetic(out, scores.target, picked, by, made, origin)
    chosen = _chosen(scores, ids)
    if chosen is not None:
        return chosen
    return out.emit(aten.gather.default, (scores, 1, ids), {}, made, origin)


def _is_of_token(item: Any) -> bool:
    if not isinstance(item, fx.Node):
        return True
    return value(item).dim() == 2 and is_one(value(item).shape[1])


def _chosen(scores: fx.Node, ids: fx.Node) -> fx.Node | None:
    """What the top-k gives besides ``ids``, where that is read: if not, the model may not have kept it, or without its
    gradient alone."""
    if ids.target is not operator.getitem or ids.args[1] != 1:
        return None
    pack = node_arg(ids, 0)
    if pack.target is not aten.topk.default or pack.args[0] is not scores:
        return None
    return next((n for n in pack.users if n.args[1] == 0 and _is_read(n)), None)


def _is_read(node: fx.Node) -> bool:
    """For its numbers; a view may be there for nobody (``region/sequences.py``)."""
    return any(
        _is_read(user)
        if user.target is aten.view.default
        else user.target is not aten.detach.default
        for user in node.users
    )
