"""Which weights are positive: a token is sent where its weight is not zero, and that has to be wherever it is kept.

Up to underflow: a softmax or a sigmoid may round to zero.  What is not sent then counts with that zero, and the
gradient of the logit is zero as well.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from moe_inductor.region.nodes import node_arg, same_sizes, value
from moe_inductor.region.sparse import matrix_of
from moe_inductor.region.sums import Dims, Factor, Sum, Term, Unread

aten = torch.ops.aten

Read = Callable[[fx.Node], Sum]


def is_positive(read: Read, term: Term) -> bool:
    """Is the product positive where its masks are 1?"""
    known = set(term.masks)
    return term.times > 0 and all(_is_positive(read, f, known) for f in term.numbers)


def _is_positive(read: Read, factor: Factor, known: set[Factor]) -> bool:
    """known: masks that are 1."""
    node = factor.node
    if node.target is aten.div.Tensor and len(node.args) == 2:
        over, under = (n for n in node.args)
        if not isinstance(over, fx.Node) or not isinstance(under, fx.Node):
            return False
        shape = value(node).shape
        if not same_sizes(value(over).shape, shape) or not positive(under):
            return False
        return positive(over) or _is_part(read, over, factor.dims, known)
    return positive(node) or _is_part(read, node, factor.dims, known)


def _is_part(read: Read, node: fx.Node, dims: Dims, known: set[Factor]) -> bool:
    """Is it one term of which all masks are 1, and the rest is positive?"""
    try:
        found = read(node).over(dims)
    except Unread:
        return False
    if len(found.terms) != 1 or not found.has_hits:
        return False
    (term,) = found.terms
    # What is summed over has one place where the mask is 1, and that is known.
    joined = Term(1, (*known, *term.factors), term.summed).merged()
    return (
        not joined.summed
        and term.times > 0
        and set(joined.masks) <= known
        and all(positive(f.node) for f in joined.numbers)
    )


_KEEPS_SIGN = frozenset(
    {
        aten.view.default, aten.permute.default, aten.expand.default, aten._to_copy.default, aten.gather.default,
        aten.select.int, aten.slice.Tensor, aten.sum.dim_IntList, aten.detach.default,
    }
)  # fmt: skip


def positive(node: Any) -> bool:
    """Is every element positive, up to underflow?"""
    if isinstance(node, (int, float)):
        return bool(node > 0)
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    target = node.target
    if target in (aten._softmax.default, aten.sigmoid.default, aten.exp.default):
        return True
    if target is aten.full.default:
        return positive(node.args[1])
    if target in _KEEPS_SIGN:
        return bool(value(node).dtype.is_floating_point) and positive(node.args[0])
    if target is operator.getitem:
        return bool(node.args[1] == 0) and _are_positive(node_arg(node, 0))
    if target in (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar):
        return len(node.args) == 2 and all(map(positive, node.args))
    if target in (aten.add.Tensor, aten.add.Scalar):
        return len(node.args) == 2 and all(map(positive, node.args))
    if target is aten.clamp.default:
        least = node.args[1]
        return isinstance(least, (int, float)) and least > 0 and len(node.args) == 2
    return False


def _are_positive(pack: fx.Node) -> bool:
    """The values of a top-k: of positive scores, or of those that are left of E when others have been set to 0."""
    if pack.target not in (aten.topk.default, aten.max.dim, aten.sort.default):
        return False
    scores = node_arg(pack, 0)
    if positive(scores):
        return True
    if pack.target is not aten.topk.default or scores.target is not aten.mul.Tensor:
        return False
    own, kept = scores.args
    if not isinstance(kept, fx.Node) or kept.target is not aten.rsub.Scalar or kept.args[1] != 1:
        return False
    gone, k = matrix_of(kept.args[0]), pack.args[1]
    shape = value(scores).shape
    if gone is None or gone.fill != 0 or gone.scores != 1 or not positive(own):
        return False
    if (pack.args[2:] or (len(shape) - 1,)) != (len(shape) - 1,):
        return False
    taken, experts = value(gone.ids).shape[-1], shape[-1]
    if not all(isinstance(n, int) for n in (k, taken, experts)):
        return False
    return bool(taken + k <= experts)
