"""What is known about ids: are those of a token different experts?

They are where one top-k chose them, and where what was chosen before is out of the question for a further choice:

    second = argmax(scores.masked_fill(one_hot(first), -inf))

Scores are taken for finite numbers.  Scores that are multiplied with ``1 - one_hot(first)`` are another matter: where a
softmax rounds to zero for all experts but one, that one is the first and may be the second, too.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from moe_inductor.region.nodes import is_one, node_arg, same_sizes, uncast, unviewed, value

aten = torch.ops.aten


def are_distinct(ids: fx.Node, below: Any = None) -> bool:
    """Are the ids [.., k] of a token all different, and in ``[0, below)``, apart from negative ones?"""
    ids = kept_of(ids)
    if below is None and value(ids).shape[-1] == 1:
        return True
    while ids.target is aten.view.default and _keeps_last(ids):
        ids = node_arg(ids, 0)
    parts = parts_of(ids)
    if parts is not None:
        return _are_apart(parts, below)
    source = chosen_from(ids)
    if source is None:
        return False
    scores, dim = source
    return below is None or same_sizes([value(scores).shape[dim]], [below])


def kept_of(ids: fx.Node) -> fx.Node:
    """``ids`` where some have been replaced by -1."""
    while ids.target is aten.where.ScalarOther and ids.args[2] == -1:
        ids = node_arg(ids, 1)
    return ids


def _keeps_last(view: fx.Node) -> bool:
    return same_sizes(value(view).shape[-1:], value(node_arg(view, 0)).shape[-1:])


def chosen_from(ids: fx.Node) -> tuple[fx.Node, int] | None:
    """(scores, dim) of a top-k along the last dimension, or of an argmax, whose positions ``ids`` are."""
    if ids.target is aten.view.default and value(ids).shape[-1] == 1:
        ids = node_arg(ids, 0)
    pack = ids.args[0] if ids.target is operator.getitem and ids.args[1] == 1 else ids
    if not isinstance(pack, fx.Node):
        return None
    args: list[Any] = [*pack.args]
    if pack.target is aten.topk.default:
        dim = args[2] if len(args) > 2 else -1
    elif pack.target in (aten.argmax.default, aten.max.dim) and len(args) > 1:
        dim = args[1]
    else:
        return None
    rank = value(args[0]).dim()
    return (args[0], dim % rank) if dim % rank == rank - 1 else None


# -- choices that were made one after the other ----------------------------------------------------------------------


def parts_of(ids: fx.Node) -> list[fx.Node] | None:
    """The choices [.., n] that were put next to each other as ``ids [.., k]``, or those of one expert each, [..]."""
    if ids.target not in (aten.cat.default, aten.stack.default):
        return None
    parts, dim = (*ids.args, 0)[:2]
    rank = value(ids).dim()
    return list(parts) if dim % rank == rank - 1 else None  # type: ignore[operator, arg-type]


def _are_apart(parts: Sequence[fx.Node], below: Any) -> bool:
    """Was each of the ``parts`` chosen from as many scores, among what the ones before had left?"""
    sources = [chosen_from(kept_of(part)) for part in parts]
    if None in sources:
        return False
    scores = [source[0] for source in sources if source is not None]
    E = value(scores[0]).shape[-1]
    if any(not same_sizes(value(s).shape, value(scores[0]).shape) for s in scores):
        return False
    if not isinstance(E, int) or (below is not None and not same_sizes([E], [below])):
        return False
    width = sum(
        value(p).shape[-1] if value(p).dim() == value(scores[0]).dim() else 1 for p in parts
    )
    if not isinstance(width, int) or width > E:
        return False
    return all(
        any(unviewed(gone) is unviewed(kept_of(one)) for gone in _excluded(later))
        for (one, _), (_, later) in itertools.combinations(zip(parts, scores, strict=True), 2)
    )


def _excluded(scores: fx.Node) -> Iterator[fx.Node]:
    """Ids [.., k] at which ``scores [.., E]`` are below all others."""
    args: Any = scores.args
    mask: Any = None
    low: Any = None
    rest: Any = None
    if scores.target is aten.masked_fill.Scalar:
        rest, mask, low = args
    elif scores.target in (aten.where.ScalarSelf, aten.where.self):
        mask, low, rest = args
    elif scores.target is aten.scatter.src and args[1] == value(scores).dim() - 1:
        yield from [args[2]] if _is_least(args[3], args[0]) else []
        yield from _excluded(args[0])
        return
    if mask is None:
        return
    found = _places(mask)
    if found is not None and same_sizes(value(mask).shape, value(scores).shape):
        yield from [found] if _is_least(low, rest) else []
    yield from _excluded(rest)


def _is_least(low: Any, scores: fx.Node) -> bool:
    """Is the number below all ``scores``?"""
    from moe_inductor.region.positive import positive  # it needs what stands above

    if isinstance(low, fx.Node):
        low = low.args[1] if low.target is aten.full.default else None
    if not isinstance(low, (int, float)):
        return False
    return low <= torch.finfo(value(scores).dtype).min or (low < 0 and positive(scores))


def _places(mask: fx.Node) -> fx.Node | None:
    """ids [.., k], where ``mask`` is ``one_hot(ids)`` or the sum of several: not 0 at these, and 0 elsewhere."""
    mask = uncast(mask)
    args: Any = mask.args
    if mask.target is aten.eq.Tensor and isinstance(args[1], fx.Node):
        ids, numbers = args
        counts = numbers.target is aten.arange.default and len(numbers.args) == 1
        return ids if counts and is_one(value(ids).shape[-1]) else None
    if mask.target is aten.scatter.src and args[1] == value(mask).dim() - 1:
        base, _, ids, given = args
        fills = [n.args[1] if n.target is aten.full.default else None for n in (base, given)]
        return ids if None not in fills and not fills[0] and fills[1] else None
    return None
