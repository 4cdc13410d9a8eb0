"""Weights that the model applies when all experts are done.

    T tokens, one expert each       y = experts(x, ids [T, 1]);  y * w [T, 1]                     Switch
    a row for each (token, slot)    y = experts(x of each row, ids [T * k, 1]);
                                    (y.view(T, k, H) * w [T, k, 1]).sum(1)                        DeepSeek-V2, training

The experts alone are a block whose experts all count with weight 1.  With what follows they are the usual one: what an
expert gives is multiplied by a weight either way.  So nothing has to be proved beyond the block without weights, and
the shapes that are read here.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import torch
from torch import fx

from moe_inductor.match.bind import Bound
from moe_inductor.region.nodes import is_tensor, same_sizes, unviewed, value

aten = torch.ops.aten


def weighted(bound: Bound) -> Bound | None:
    """The proved block ``bound`` together with the weights that its output is multiplied by, if there are any."""
    moe = bound.moe
    plain = moe.combine.weight_on == "output" and not moe.combine.keeps_tokens
    if bound.topk_weights is not None or moe.top_k != 1 or moe.experts.identities or not plain:
        return None
    return next(itertools.chain(_each_token(bound), _each_row(bound)), None)


def _each_token(bound: Bound) -> Iterator[Bound]:
    """y * w, w [T, 1]"""
    tokens = value(bound.output).shape[0]
    for product, weights in _products(bound.output):
        if same_sizes(value(weights).shape, (tokens, 1)):
            yield _with(bound, product, weights)


def _each_row(bound: Bound) -> Iterator[Bound]:
    """(y.view(T, k, H) * w [T, k, 1]).sum(1), where the rows of a token follow each other"""
    rows = unviewed(bound.x)
    if rows.target is not aten.expand.default:
        return
    x = rows.args[0]
    tokens, k, hidden = value(rows).shape if value(rows).dim() == 3 else (0, 0, 0)
    if not isinstance(x, fx.Node) or not isinstance(k, int):
        return
    if not same_sizes(value(x).shape, (tokens, 1, hidden)):
        return
    for view in bound.output.users:
        if view.target is not aten.view.default:
            continue
        if not same_sizes(value(view).shape, (tokens, k, hidden)):
            continue
        for product, weights in _products(view):
            if not same_sizes(value(weights).shape, (tokens, k, 1)):
                continue
            for total in product.users:
                over_slots = total.target is aten.sum.dim_IntList and total.args[1:] == ([1],)
                if over_slots and not total.kwargs:
                    yield dataclasses.replace(_with(bound, total, weights, k), x=unviewed(x))


def _products(made: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Products of ``made`` with something else, and that."""
    for product in made.users:
        if product.target is aten.mul.Tensor and not product.kwargs:
            others = [a for a in product.args if a is not made]
            if len(others) == 1 and isinstance(others[0], fx.Node) and is_tensor(others[0]):
                yield product, others[0]


def _with(bound: Bound, output: fx.Node, weights: fx.Node, k: int = 1) -> Bound:
    combine = dataclasses.replace(bound.moe.combine, out_dtype=value(output).dtype)
    return dataclasses.replace(
        bound,
        moe=dataclasses.replace(bound.moe, top_k=k, combine=combine),
        output=output,
        topk_ids=unviewed(bound.topk_ids),
        topk_weights=unviewed(weights),
    )
