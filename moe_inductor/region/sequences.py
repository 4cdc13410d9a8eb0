"""Hidden states [B, S, H] that stay in sequences: what is computed for each token is computed for [T, ..] and viewed.

    f(view(x [T, ..], [B, S, ..]), ..) = view(f(x, ..), [B, S, ..])

for an operator f that treats every token by itself.  So the rules about tokens [T, H] are all there have to be.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from moe_inductor.region.nodes import (
    STATES,
    is_floating,
    is_one,
    is_pointwise,
    node_arg,
    origin_of,
    role_of,
    value,
)
from moe_inductor.region.normalise import row_of, rule

if TYPE_CHECKING:
    from moe_inductor.region.normalise import Emitter

aten = torch.ops.aten

# Where the dimension stands among the arguments of operators that look along one, or several.
_ALONG: dict[Any, int] = {
    aten._softmax.default: 1, aten.sum.dim_IntList: 1, aten.mean.dim: 1, aten.any.dim: 1, aten.amax.default: 1,
    aten.argmax.default: 1, aten.max.dim: 1, aten.topk.default: 2, aten.sort.default: 1, aten.gather.default: 1,
    aten.scatter.src: 1, aten.scatter.value: 1, aten.select.int: 1, aten.slice.Tensor: 1, aten.stack.default: 1,
    aten.cumsum.default: 1, aten.split.Tensor: 2, aten.unbind.int: 1,
}  # fmt: skip
# Of which the dimension is one of the result.
_OF_RESULT = {aten.stack.default}
# Which look along the last dimension unless they are told otherwise.
_LAST = {aten.topk.default, aten.sort.default}


def enter(out: Emitter, states: fx.Node) -> None:
    """``states`` may be an input that is hidden states or scores of several sequences."""
    found = value(states)
    if role_of(states) != STATES or not is_floating(states) or found.dim() != 3:
        return
    if is_one(found.shape[1]):
        return  # [B, 1] would not be told from [T, 1]
    if out.lead is None:
        out.lead = found.shape[:2]
    if _leads(out, found):  # not sequences of another number or length
        out.sequences[states] = out.view(states, _flat(found), origin_of(states))


def note(out: Emitter, view: fx.Node, base: fx.Node) -> None:
    """``view`` of ``base`` may be what was computed for tokens [T, F], as [B, S, F]."""
    if out.lead is None or value(base).dim() != 2 or value(view).dim() != 3:
        return
    if out.same_sizes(value(view).shape, (*out.lead, value(base).shape[1])):
        out.sequences.setdefault(view, base)


def token_by_token(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """The left hand side of the equation, in the words of the right hand side; None if it is not one."""
    if node.target is operator.getitem:
        return _part(out, node, *args)
    given = [a for a in _nodes(args) if isinstance(value(a), torch.Tensor)]
    made = value(node)
    results = made if isinstance(made, (tuple, list)) else [made]
    if not any(a in out.sequences for a in given) or not all(_leads(out, r) for r in results):
        return None
    apply = _HANDLERS.get(node.target, _pointwise if _is_function(node.target) else None)
    return None if apply is None else apply(out, node, args, kwargs)


def _nodes(args: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(args, lambda a: found.append(a) or a)
    return found


def _leads(out: Emitter, made: Any) -> bool:
    return (
        isinstance(made, torch.Tensor)
        and made.dim() >= 2
        and out.lead is not None
        and out.same_sizes(made.shape[:2], out.lead)
    )


def _is_function(target: Any) -> bool:
    return target in (aten._to_copy.default, aten.detach.default) or is_pointwise(target)


def _flat(made: torch.Tensor) -> torch.Tensor:
    return made.reshape(-1, *made.shape[2:])


def _done(out: Emitter, flat: fx.Node, node: fx.Node) -> fx.Node:
    made = out.view(flat, value(node), origin_of(node))
    if made is not flat and made.target is aten.view.default:
        out.sequences[made] = flat
    return made


def _operand(out: Emitter, a: Any, rank: int) -> Any:
    """``a``, of so many dimensions, without the second.  Raises LookupError."""
    if not isinstance(a, fx.Node) or not isinstance(value(a), torch.Tensor):
        return a
    if value(a).dim() != rank:
        if value(a).dim() > rank - 2:
            raise LookupError
        return a  # the same for every token
    if _leads(out, value(a)):
        return out.view(a, _flat(value(a)), origin_of(a))
    raise LookupError


def _pointwise(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    made = value(node)
    try:
        inner = tuple(_operand(out, a, made.dim()) for a in args)
    except LookupError:
        return None
    result = out.apply(node.target, inner, kwargs, _flat(made), origin_of(node))
    return _done(out, result, node)


def _along(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    place, made = _ALONG[node.target], value(node)
    first = args[0][0] if isinstance(args[0], (list, tuple)) else args[0]
    rank = value(first).dim()
    inner = list(args)
    if len(inner) > place:
        dims, count = inner[place], rank + (node.target in _OF_RESULT)
        moved = [d % count - 1 for d in (dims if isinstance(dims, list) else [dims])]
        if min(moved) < 1:
            return None
        inner[place] = moved if isinstance(dims, list) else moved[0]
    elif rank < 3 or node.target not in _LAST:
        return None
    try:
        inner = [
            [_operand(out, piece, rank) for piece in a]
            if isinstance(a, (list, tuple)) and i != place
            else _operand(out, a, rank)
            for i, a in enumerate(inner)
        ]
    except LookupError:
        return None
    if isinstance(made, (tuple, list)):
        flat = tuple(_flat(part) for part in made)
        pack = out.apply(node.target, tuple(inner), kwargs, flat, origin_of(node))
        out.packs.add(pack)
        return pack
    return _done(
        out, out.apply(node.target, tuple(inner), kwargs, _flat(made), origin_of(node)), node
    )


def _part(out: Emitter, node: fx.Node, pack: Any, place: Any) -> Any:
    """One of several results, of which ``pack`` has those for [T, ..]."""
    if pack not in out.packs:
        return None
    flat = _flat(value(node))
    return _done(out, out.apply(operator.getitem, (pack, place), {}, flat, origin_of(node)), node)


def _viewed(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    flat = out.sequences.get(args[0])
    if flat is None:
        return None
    return _done(out, out.view(flat, _flat(value(node)), origin_of(node)), node)


def _expanded(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    made, flat = value(node), out.sequences.get(args[0])
    if flat is None or value(args[0]).dim() != made.dim():
        return None
    val = _flat(made)
    result = out.apply(aten.expand.default, (flat, out.sizes(val)), {}, val, origin_of(node))
    return _done(out, result, node)


def _permuted(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    made, flat = value(node), out.sequences.get(args[0])
    dims = args[1]
    if node.target is aten.transpose.int:
        dims = list(range(made.dim()))
        a, b = (d % made.dim() for d in args[1:3])
        dims[a], dims[b] = b, a
    if flat is None or list(dims[:2]) != [0, 1]:
        return None
    turned = out.permute(flat, [0, *(d - 1 for d in dims[2:])], _flat(made), origin_of(node))
    return _done(out, turned, node)


def _places(out: Emitter, indices: list[Any]) -> list[fx.Node] | None:
    """token, and slot as well, of (sequence, place in it, and slot) = nonzero(view(hit [T, k], [B, S, k]))"""
    columns = [i for i in indices if isinstance(i, fx.Node) and i.target is aten.select.int]
    listed = {node_arg(i, 0) for i in columns}
    if not len(columns) == len(indices) > 1 or len(listed) != 1:
        return None
    (pairs,) = listed
    hit = out.sequences.get(node_arg(pairs, 0)) if pairs.target is aten.nonzero.default else None
    if (
        hit is None
        or value(hit).dim() != 2
        or [c.args[1:] for c in columns] != [(1, place) for place in range(len(columns))]
    ):
        return None
    made, origin = value(pairs), origin_of(pairs)
    both = made.new_empty((made.shape[0], 2))
    places = out.apply(aten.nonzero.default, (hit,), {}, both, origin)
    out.note_rows(places)
    return [
        row_of(out, places, 1, place, both[:, place], origin) for place in range(len(columns) - 1)
    ]


@rule(aten.index.Tensor, aten.index_put.default, first=True)
def _indexed(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """index(view(x, [B, S, ..]), [sequence, place]) = index(x, [token]), and so for index_put and with the slot"""
    base, places = args[0], _places(out, list(args[1]))
    if places is None:
        return None
    made, origin = value(node), origin_of(node)
    try:
        flat = _operand(out, base, value(base).dim())
    except LookupError:
        return None
    if node.target is aten.index.Tensor:
        return out.apply(node.target, (flat, places), {}, made, origin)
    result = out.apply(node.target, (flat, places, *args[2:]), kwargs, _flat(made), origin)
    return _done(out, result, node)


_HANDLERS: dict[Any, Callable[[Emitter, fx.Node, tuple, dict], Any]] = {
    **dict.fromkeys(_ALONG, _along),
    **dict.fromkeys(
        (
            aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.unsqueeze.default,
            aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default,
        ),
        _viewed,
    ),
    aten.expand.default: _expanded,
    aten.permute.default: _permuted,
    aten.transpose.int: _permuted,
}  # fmt: skip
