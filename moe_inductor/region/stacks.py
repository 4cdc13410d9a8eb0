"""Rules about what all experts compute for all tokens: the ways to lay that out become ``[E, T, ..]``.

The uniform spelling is ``sum(y [E, T, H] * scores [E, T, 1], 0)``, where ``scores`` is a view of
``permute(matrix [T, E], [1, 0])``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from moe_inductor.region.nodes import is_one, node_arg, same_sizes, value
from moe_inductor.region.normalise import RESHAPES, Emitter, arithmetic, row_of, rule
from moe_inductor.region.sparse import matrix_of

aten = torch.ops.aten


@rule(*RESHAPES, first=True)
def _rows(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """view(repeat(x [T, H], [E, 1]), [E, T, H]) = expand(x, [E, T, H])
    view(repeat(x, [E, 1]) * w [E T, 1], [E, T, H]) = expand(x, [E, T, H]) * view(w, [E, T, 1])"""
    made, source, origin = value(node), args[0], node.meta.get("stack_trace")
    whole = _repeated(out, source, made, origin)
    if whole is not None or source.target is not aten.mul.Tensor or made.dim() != 3:
        return whole
    a, b = source.args
    rows = _repeated(out, a, made, origin) if isinstance(b, fx.Node) else None
    if rows is None or value(b).dim() != 2 or not is_one(value(b).shape[1]):
        return None
    column = out.view(b, value(b).reshape(*made.shape[:2], 1), origin)
    return arithmetic(out, aten.mul.Tensor, rows, column, made, origin)


def _repeated(out: Emitter, source: Any, made: torch.Tensor, origin: str | None) -> fx.Node | None:
    if source.target is aten._to_copy.default:
        inner = node_arg(source, 0)
        rows = _repeated(out, inner, made.new_empty(made.shape, dtype=value(inner).dtype), origin)
        if rows is None:
            return None
        return out.emit(source.target, (rows,), dict(source.kwargs), made, origin)
    if source.target is not aten.repeat.default:
        return None
    base, (times, *rest) = source.args
    shape = (times, *value(base).shape)
    if rest != [1] or value(base).dim() != 2 or not same_sizes(made.shape, shape):
        return None
    return out.emit(aten.expand.default, (base, out.sizes(made)), {}, made, origin)


@rule(aten.expand.default, aten.repeat.default, first=True)
def _expanded(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """expand(view(x, [1, T, H]), [E, T, H]) = repeat(view(x), [E, 1, 1]) = expand(view(x, [T, H]), [E, T, H])"""
    made, base = value(node), args[0]
    if base.target is not aten.view.default or made.dim() != 3 or is_one(made.shape[0]):
        return None
    if not same_sizes(value(base).shape, (1, *made.shape[1:])):
        return None
    origin = node.meta.get("stack_trace")
    rows = out.view(base, value(base).squeeze(0), origin)
    return out.emit(aten.expand.default, (rows, out.sizes(made)), {}, made, origin)


@rule(aten.stack.default)
def _stack(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """stack(ys, -1) = stack(ys, d): d is not negative"""
    pieces, dim = (*args, 0)[:2]
    rest = (dim % value(node).dim(),) if dim % value(node).dim() else ()
    origin = node.meta.get("stack_trace")
    return out.emit(aten.stack.default, (pieces, *rest), {}, value(node), origin)


@rule(aten.cat.default, first=True)
def _joined(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """cat([view(y, [T, 1, H]) of each expert], 1) = stack(ys, 1)"""
    parts: list[fx.Node] = args[0]
    dim: int = (*args[1:], 0)[0]
    made, origin = value(node), node.meta.get("stack_trace")
    if len(parts) < 2 or made.dim() < 3 or not made.dtype.is_floating_point:
        return None
    if any(p.target is not aten.view.default or not is_one(value(p).shape[dim]) for p in parts):
        return None
    pieces = [out.view(p, value(p).squeeze(dim), origin) for p in parts]
    return out.emit(aten.stack.default, (pieces, *([dim] if dim else [])), {}, made, origin)


@rule(aten.sum.dim_IntList)
def _weighted(out: Emitter, node: fx.Node, args: tuple[Any, ...], kwargs: dict) -> Any:
    """sum(y [E, B, S, H] * w [E, B, S, 1], 0) = view(sum(view(y, [E, T, H]) * view(w, [E, T, 1]), 0)), and without w
    sum(permute(y, [1, 0, 2]) * w [T, E, 1], 1) = sum(y * view(permute(view(w)), [E, T, 1]), 0)"""
    if kwargs or len(args) != 2 or len(args[1]) != 1 or not value(node).dtype.is_floating_point:
        return None
    made, origin, (dim,) = value(node), node.meta.get("stack_trace"), args[1]
    source = args[0]
    product = source.target is aten.mul.Tensor and all(isinstance(a, fx.Node) for a in source.args)
    y, w = source.args if product else (source, None)
    shape = value(source).shape
    if not same_sizes(value(y).shape, shape):
        return None
    if w is not None and not same_sizes(value(w).shape, (*shape[:-1], 1)):
        return None
    if dim == 0 and len(shape) > 3 and (w is not None or source.target is aten.view.default):
        y = out.view(y, value(y).reshape(shape[0], -1, shape[-1]), origin)
        w = w if w is None else out.view(w, value(w).reshape(shape[0], -1, 1), origin)
        return out.view(_sum(out, y, w, origin), made, origin)
    if dim != 1 or len(shape) != 3 or w is None:
        return None
    matrix = out.view(w, value(w).squeeze(-1), origin)
    if (
        y.target is aten.permute.default
        and y.args[1] == [1, 0, 2]
        and matrix_of(matrix) is not None
    ):
        turned = out.permute(matrix, [1, 0], value(matrix).t(), origin)
        column = out.view(turned, value(turned).unsqueeze(-1), origin)
        return _sum(out, node_arg(y, 0), column, origin)
    return None


def _sum(out: Emitter, y: fx.Node, w: fx.Node | None, origin: str | None) -> fx.Node:
    if w is not None:
        made = value(y) * value(w)
        y = arithmetic(out, aten.mul.Tensor, y, w, made, origin)
    return out.emit(aten.sum.dim_IntList, (y, [0]), {}, value(y).sum(0), origin)


def chain(
    out: Emitter, ys: dict[int, fx.Node], matrix: fx.Node, made: torch.Tensor, origin: str | None
) -> fx.Node:
    """((0 + ys[0] * matrix[:, 0]) + ys[1] * matrix[:, 1]) + .., in the order of ``ys``"""
    kept = {"dtype": made.dtype, "device": made.device}
    total = out.emit(aten.full.default, (out.sizes(made), 0), kept, made, origin)
    for e, y in ys.items():
        column = value(matrix).select(1, e)
        score = row_of(out, matrix, 1, e, column, origin)
        score = out.view(score, column.unsqueeze(-1), origin)
        term = arithmetic(out, aten.mul.Tensor, y, score, made, origin)
        total = arithmetic(out, aten.add.Tensor, total, term, made, origin)
    return total


@rule(aten.slice.Tensor, first=True)
def _column(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """matrix[:, e:e + 1] = view(matrix[:, e], [T, 1])"""
    matrix, *rest = args
    if len(rest) != 3 or rest[0] != 1 or matrix_of(matrix) is None or value(matrix).dim() != 2:
        return None
    start, end = rest[1:]
    if type(start) is not int or end != start + 1 or not 0 <= start < value(matrix).shape[1]:
        return None
    origin = node.meta.get("stack_trace")
    row = row_of(out, matrix, 1, start, value(matrix).select(1, start), origin)
    return out.view(row, value(node), origin)


@rule(aten.add.Tensor, first=True)
def _from_nothing(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """0 + y * matrix[:, e] = zeros + y * matrix[:, e], for the number 0"""
    if len(args) != 2 or kwargs or args[1] != 0 or isinstance(args[1], fx.Node):
        return None
    first, made, origin = args[0], value(node), node.meta.get("stack_trace")
    if first.target is not aten.mul.Tensor or not _is_score(first.args[-1]):
        return None
    kept = {"dtype": made.dtype, "device": made.device}
    zeros = out.emit(aten.full.default, (out.sizes(made), 0), kept, made, origin)
    return arithmetic(out, aten.add.Tensor, zeros, first, made, origin)


def _is_score(node: Any) -> bool:
    if not isinstance(node, fx.Node) or node.target is not aten.view.default:
        return False
    column = node_arg(node, 0)
    return column.target is aten.select.int and matrix_of(column.args[0]) is not None
