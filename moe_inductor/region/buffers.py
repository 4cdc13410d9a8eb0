"""Tensors [E, T, H] with a part for each expert, where it puts its results and from where it may read its tokens.

    xs = einsum("th,te->eth", x, mask)                  # nllb_moe
    for e in range(E):
        xs[e, mask[:, e]] = expert[e](xs[e, mask[:, e]]) * scores[mask[:, e], e, None]
    out = xs.sum(0)

In the uniform spelling an expert reads rows of x, and what experts give is added up by ``index_add``.  Part e starts
with the tokens of e, and zeros elsewhere, so that nothing is left of it but the rows that are written.

Assumed: a number times zero is zero, as in ``region/sparse.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from moe_inductor.region.axes import axes_of
from moe_inductor.region.nodes import (
    is_one,
    is_tensor,
    node_arg,
    origin_of,
    same_sizes,
    uncast,
    value,
)
from moe_inductor.region.normalise import Emitter, arithmetic, cast, rule
from moe_inductor.region.rows import hits, occur_once, rows_of
from moe_inductor.region.sparse import matrix_of, scattered

aten = torch.ops.aten


# -- parts ------------------------------------------------------------------------------------------------------------


def _place(scatter: fx.Node) -> tuple[int, Any]:
    """d and i of ``select_scatter(m, v, d, i)``, none of them negative where they are known."""
    dim: Any = scatter.args[2]
    i: Any = scatter.args[3]
    size = value(scatter).shape[dim]
    return dim % value(scatter).dim(), i + size if type(i) is type(size) is int and i < 0 else i


@rule(aten.select.int, first=True)
def _part(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """select(select_scatter(m, v, d, i), d, i) = v
    select(select_scatter(m, v, d, i), d, j) = select(m, d, j) for two numbers i and j
    select(zeros, d, j) = zeros"""
    base, dim, j = args
    if base.target is aten.full.default and base.args[1] == 0:
        sizes, made = out.sizes(value(node)), value(node)
        return out.emit(aten.full.default, (sizes, 0), dict(base.kwargs), made, origin_of(node))
    if base.target is not aten.select_scatter.default:
        return None
    found, size = _place(base), value(base).shape[dim]
    if type(j) is not int or type(size) is not int or type(found[1]) is not int:
        return None
    if found[0] != dim % value(base).dim():
        return None
    if found[1] == j % size:
        return base.args[1]
    return out.apply(aten.select.int, (base.args[0], dim, j), {}, value(node), origin_of(node))


def is_part(node: fx.Node) -> bool:
    """Is it put into such a tensor?"""
    return any(
        user.target is aten.select_scatter.default and user.args[1] is node for user in node.users
    )


def _parts(node: fx.Node, dim: int) -> list[fx.Node] | None:
    """The parts along ``dim``, each of which was put there."""
    if node.target is aten.stack.default:
        parts, *at = node.args
        return list(parts) if (at or [0]) == [dim] else None  # type: ignore[arg-type]
    size, found = value(node).shape[dim], {}
    while node.target is aten.select_scatter.default:
        at, i = _place(node)
        if at != dim or type(i) is not int:
            return None
        found.setdefault(i, node_arg(node, 1))
        node = node_arg(node, 0)
    whole = type(size) is int and found.keys() == set(range(size))
    return [found[i] for i in range(size)] if whole else None


@rule(aten.sum.dim_IntList, first=True)
def _added_up(out: Emitter, node: fx.Node, args: tuple[Any, ...], kwargs: dict) -> Any:
    """sum(the parts p_e, their dimension) = 0 + p_0 + p_1 + .., where the rows of an expert were put into zeros"""
    base, made = args[0], value(node)
    if kwargs or len(args) != 2 or len(args[1]) != 1 or value(base).dtype != made.dtype:
        return None
    if base.target not in (aten.stack.default, aten.select_scatter.default):
        return None
    parts = _parts(base, args[1][0] % value(base).dim())
    if parts is None or not all(map(_are_rows, parts)):
        return None
    options = {"dtype": made.dtype, "device": made.device}
    total = out.emit(aten.full.default, (out.sizes(made), 0), options, made, origin_of(node))
    for part in parts:
        total = out.apply(aten.add.Tensor, (total, part), {}, made, origin_of(part))
    return total


def _are_rows(part: fx.Node) -> bool:
    """Rows of an expert, put into zeros."""
    if part.target is not aten.index_put.default or len(part.args) != 3:
        return False
    base, indices, _ = part.args
    rows = indices[0] if len(indices) == 1 else None  # type: ignore[arg-type, index]
    is_zero = base.target is aten.full.default and base.args[1] == 0  # type: ignore[union-attr]
    return (
        bool(is_zero) and isinstance(rows, fx.Node) and hits(rows) is not None and occur_once(rows)
    )


# -- tokens that a mask has set to zero -------------------------------------------------------------------------------


@rule(aten.select.int, first=True)
def _of_expert(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """select(expand(x, [E, T, H]) * view(permute(m [T, E])) [E, T, 1], 0, e) = x * view(select(m, 1, e), [T, 1])
    for a mask or a routing matrix m, and so for a view of the product"""
    source, dim, e = args
    axes = axes_of(source) if type(e) is int else None
    if axes is None or axes.base.target is not aten.mul.Tensor or value(axes.base).dim() != 3:
        return None
    rest = [a for i, d in enumerate(axes.dims) if i != dim for a in d]
    if axes.dims[dim] != axes.of(0) or rest != [a for a in axes.order if a.dim]:
        return None
    rows, mask = axes.base.args[:2]
    if not isinstance(rows, fx.Node) or not isinstance(mask, fx.Node) or not is_tensor(mask):
        return None
    own = _column_of(out, mask, e, origin_of(node))
    if rows.target is not aten.expand.default or own is None:
        return None
    tokens, made = node_arg(rows, 0), value(axes.base).select(0, 0)
    if not same_sizes(value(tokens).shape, made.shape) or value(tokens).dtype != made.dtype:
        return None
    product = arithmetic(out, aten.mul.Tensor, tokens, own, made, origin_of(node))
    return out.view(product, value(node), origin_of(node))


def _column_of(out: Emitter, mask: fx.Node, e: int, origin: str | None) -> fx.Node | None:
    """``mask [E, T, 1]``, a view of a matrix [.., E], for expert e as [T, 1]"""
    axes = axes_of(uncast(mask))
    if axes is None or (value(axes.base).dtype != torch.bool and matrix_of(axes.base) is None):
        return None
    matrix, last = axes.base, value(axes.base).dim() - 1
    if axes.dims[0] != axes.of(last) or axes.dims[1:] != ((*axes.order[:-1],), ()):
        return None
    narrow = value(matrix).select(last, 0)
    own = out.apply(aten.select.int, (matrix, last, e), {}, narrow, origin)
    column = narrow.reshape(-1, 1)
    own = out.view(own, column, origin)
    return cast(out, own, torch.empty_like(column, dtype=value(mask).dtype), origin)


def _as_mask(out: Emitter, column: fx.Node) -> fx.Node | None:
    """``column [T]`` as booleans: a mask, or a column of a routing matrix of 0 and 1."""
    made = value(column)
    if made.dtype == torch.bool or column.target is not aten.select.int:
        return column if made.dtype == torch.bool else None
    matrix, dim, e = column.args
    found, origin = matrix_of(matrix), origin_of(column)
    if found is None or found.fill != 0:
        return None
    kept = uncast(found.scores) if isinstance(found.scores, fx.Node) else found.scores == 1
    if kept is False or (isinstance(kept, fx.Node) and value(kept).dtype != torch.bool):
        return None
    whole = torch.empty_like(value(matrix), dtype=torch.bool)  # type: ignore[arg-type]
    booleans = scattered(out, False, found.ids, kept, whole, origin)
    made = torch.empty_like(made, dtype=torch.bool)
    return out.apply(aten.select.int, (booleans, dim, e), {}, made, origin)


def _masked(out: Emitter, product: fx.Node, rows: fx.Node) -> fx.Node | None:
    """x, where ``product`` is x at the ``rows`` (numbers, or a mask), and zero elsewhere."""
    if product.target is not aten.mul.Tensor or len(product.args) != 2:
        return None
    x, column = product.args
    if not isinstance(x, fx.Node) or not isinstance(column, fx.Node) or not is_tensor(column):
        return None
    mask = uncast(column)
    if mask.target is aten.view.default:
        mask = node_arg(mask, 0)
    mask = _as_mask(out, mask)
    if mask is None or not same_sizes(value(mask).shape, value(x).shape[:1]):
        return None
    is_column = value(column).dim() == 2 or is_one(value(x).shape[0])  # of one token it is a number
    if not is_column or value(x).dtype != value(product).dtype:
        return None
    if value(rows).dtype != torch.bool:
        listed = value(rows).new_empty((*value(rows).shape, 1))
        mask = rows_of(out, mask, listed, origin_of(rows))
    return x if rows is mask else None


@rule(aten.index.Tensor, first=True)
def _read(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """index(x * view(m, [T, 1]), [the rows of m]) = index(x, [the rows of m])"""
    base, indices = args[0], list(args[1])
    if len(indices) != 1 or not isinstance(indices[0], fx.Node) or value(indices[0]).dim() != 1:
        return None
    x = _masked(out, base, indices[0])
    if x is None:
        return None
    return out.apply(aten.index.Tensor, (x, indices), {}, value(node), origin_of(node))


@rule(aten.index_put.default, first=True)
def _written(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """index_put(x * view(m, [T, 1]), [the rows of m], y) = index_put(zeros, [the rows of m], y)"""
    base, indices, given = args[0], list(args[1]), args[2]
    if len(args) != 3 or len(indices) != 1 or not isinstance(indices[0], fx.Node):
        return None
    if value(indices[0]).dim() != 1 or _masked(out, base, indices[0]) is None:
        return None
    made, origin = value(node), origin_of(node)
    options = {"dtype": made.dtype, "device": made.device}
    zeros = out.emit(aten.full.default, (out.sizes(made), 0), options, made, origin)
    return out.apply(aten.index_put.default, (zeros, indices, given), {}, made, origin)
