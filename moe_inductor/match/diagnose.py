"""What is wrong with a block that is no spelling at all, where that has a name.

Read after every spelling has failed, so that a refusal says what the model does, and not which pattern it is not.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from moe_inductor.reasons import Code, Refusal
from moe_inductor.region.canonical import Canonical
from moe_inductor.region.distinct import are_distinct
from moe_inductor.region.find import Region, products_of
from moe_inductor.region.nodes import (
    is_floating,
    is_random,
    location,
    name_of,
    node_arg,
    uncast,
    value,
)
from moe_inductor.region.row_ops import PAIR_LINEAR
from moe_inductor.region.rows import hits
from moe_inductor.region.scaled import follows_a_projection, is_column
from moe_inductor.region.thresholds import beyond_threshold, kept_by_threshold

aten = torch.ops.aten

_PRODUCTS = (aten.mm.default, aten.bmm.default, aten._grouped_mm.default, PAIR_LINEAR)
_CHOICES = (aten.topk.default, aten.argmax.default, aten.max.dim, aten.sort.default)
# Operators that make a norm of rows, in torch and in ATen.
OVER_ROWS = frozenset(
    {
        "mean", "var_mean", "native_layer_norm", "_fused_rms_norm", "linalg_vector_norm", "layer_norm", "rms_norm",
        "normalize", "norm", "vector_norm",
    }
)  # fmt: skip
# Operators that nobody wants to hear of.
UNTOLD = frozenset(
    {"view", "permute", "_to_copy", "expand", "sym_size", "full", "to", "type", "float", "getitem"}
)
_SUMS = frozenset(
    {
        "index_add",
        "scatter_add",
        "index_put",
        "index_copy",
        "setitem",
        "index_add_",
        "scatter_add_",
        "index_put_",
    }
)
_PARTS = (aten.select_scatter.default, aten.select.int)
_NOT_DISTINCT = (
    "that a token has an expert at most once is not known: its ids are not what one top-k gives"
)
# How many operators a norm and what follows it have at most.
_AFTER = 24


def diagnose(canonical: Canonical) -> Refusal | None:
    """What stands out in ``canonical``, or None."""
    region = canonical.region
    return (
        kept_by_threshold(region.nodes)
        or beyond_threshold(region.nodes)
        or _random(canonical.graph)
        or _norm(region)
        or _buffer(canonical.graph)
        or _bias_not_scaled(canonical.graph)
        or _slots(canonical)
        or _other_mask(canonical.graph)
        or _other_column(canonical.graph)
        or _repeated(canonical.graph)
    )


def _slots(canonical: Canonical) -> Refusal | None:
    """Slots of which ``region/slots.py`` has nothing to say."""
    region = canonical.region
    if not region.has_slots or canonical.emitter.refused:
        return None
    words = (
        "tokens are sent to slots of the experts by products with masks (GShard): "
        "what is sent, or what it weighs, is not read from the masks"
    )
    return Refusal(Code.SPELLING, words, region.location)


def _random(graph: fx.Graph) -> Refusal | None:
    """Dropout in an expert, while it is trained; a router may draw noise for its scores."""
    scores = _behind([n for n in graph.nodes if n.target in _CHOICES])
    for node in graph.nodes:
        if node.target not in _PRODUCTS or node in scores:
            continue
        rows = [node, *_until_summed(node)]
        drawn = next((n for made in rows for n in made.users if is_random(n.target)), None)
        if drawn is not None:
            words = (
                f"the experts draw random numbers (`{name_of(drawn)}`): a fused kernel would draw others; "
                "without dropout, as in eval(), they may be fused"
            )
            return Refusal(Code.SPELLING, words, location(drawn) or location(node))
    return None


def _behind(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """All that ``nodes`` are made of."""
    found: set[fx.Node] = set()
    todo = list(nodes)
    while todo:
        new = [n for n in todo.pop().all_input_nodes if n not in found]
        found.update(new)
        todo += new
    return found


def _norm(region: Region) -> Refusal | None:
    """A norm between the last projections and the sum over the experts; it need not be in the region."""
    products = products_of(region)
    for node in products:
        between = _until_summed(node)
        norms = [n for n in between if name_of(n) in OVER_ROWS]
        if norms and not any(n in products for n in between):
            names = dict.fromkeys(f"`{name_of(n)}`" for n in between if name_of(n) not in UNTOLD)
            words = f"a norm stands between the experts and the sum over them ({', '.join(names)})"
            return Refusal(Code.SPELLING, words, location(norms[0]))
    return None


def _until_summed(product: fx.Node) -> list[fx.Node]:
    """What is made of the rows of ``product`` before they are added up."""
    found, todo = [], list(product.users)
    while todo and len(found) < _AFTER:
        node = todo.pop(0)
        rows = value(node)
        if node in found or not isinstance(rows, torch.Tensor) or name_of(node) in _SUMS:
            continue
        if name_of(node) == "sum" and rows.dim() < value(node.all_input_nodes[0]).dim():
            continue
        found.append(node)
        todo += node.users
    return found


def _buffer(graph: fx.Graph) -> Refusal | None:
    """Experts that take turns at a tensor [E, T, H] (nllb_moe), of which ``region/buffers.py`` has left something."""
    for node in graph.nodes:
        if node.target is not aten.select_scatter.default or not is_floating(node):
            continue
        part = node.args[1]
        is_read = any(u.op != "output" and u.target not in _PARTS for u in node.users)
        is_put = isinstance(part, fx.Node) and name_of(part) == "index_put"
        if value(node).dim() == 3 and is_put and is_read:
            words = (
                "experts read their tokens from a tensor [E, T, H], put their results there and it is summed over E: "
                "that what they do not put there is zero is not proved"
            )
            return Refusal(Code.SPELLING, words, location(node) or location(part))
    return None


def _bias_not_scaled(graph: fx.Graph) -> Refusal | None:
    """A weight between an expert's projections, where the last of them has a bias (Megatron-LM)."""
    for node in graph.nodes:
        if node.target is not aten.add.Tensor or not isinstance(node.args[1], fx.Node):
            continue
        given, bias = (uncast(node_arg(node, i)) for i in range(2))
        is_product = given.target is aten.mm.default
        scaled = (
            uncast(node_arg(given, 0)) if is_product else given
        )  # before the projection, or behind
        if scaled.target is not aten.mul.Tensor or not is_column(scaled.args[1]):
            continue
        rows = uncast(node_arg(scaled, 0))
        of_pairs = rows.target is PAIR_LINEAR and bias.target is aten.index.Tensor
        is_bias = value(bias).dim() == 1 or (of_pairs and bias.args[1] == [rows.args[1]])
        if is_bias and follows_a_projection(rows):
            words = "the routing weight scales what an expert computes, but not the bias of its last projection"
            return Refusal(Code.SPELLING, words, location(node) or location(rows))
    return None


def _other_mask(graph: fx.Graph) -> Refusal | None:
    """The weights of an expert's rows, found in these by a comparison that need not find one in each."""
    for node in graph.nodes:
        mask = node.args[0] if node.target is aten.nonzero.default else None
        if mask is None or mask.target is not aten.eq.Scalar:
            continue
        rows = node_arg(mask, 0)
        indices: Any = rows.args[1] if rows.target is aten.index.Tensor else []
        of_expert = hits(indices[0]) if len(indices) == 1 and indices[0] is not None else None
        if of_expert is None:
            continue
        (ids, e), where = of_expert, location(node) or location(mask)
        if e != mask.args[1]:
            words = f"expert {e} takes its weights where its tokens have the id {mask.args[1]}"
            return Refusal(Code.SPELLING, words, where)
        if rows.args[0] is not ids:
            words = f"expert {e} takes its weights by other ids than its tokens"
            return Refusal(Code.SPELLING, words, where)
        if not are_distinct(ids):
            return Refusal(Code.SPELLING, _NOT_DISTINCT, where)
    return None


def _other_column(graph: fx.Graph) -> Refusal | None:
    """An expert's rows are weighed by a column of the scores of all experts (``region/rows.py``)."""
    for node in graph.nodes:
        base = node_arg(node, 0) if node.target is aten.index.Tensor else node
        indices: Any = node.args[1] if base is not node else []
        if base.target is not aten.select.int or base.args[1] != 1 or len(indices) != 1:
            continue
        of_expert = hits(indices[0])
        if of_expert is not None and is_floating(base) and node.users:
            words = weighed_by_column(of_expert[1], base.args[2])
            return Refusal(Code.SPELLING, words, location(node) or location(base))
    return None


def weighed_by_column(e: Any, column: Any) -> str:
    """What is wrong with ``p [T, E][token, column]`` for the tokens of expert ``e``."""
    if column != e:
        return f"expert {e} is weighed by the score of expert {column}"
    return (
        "experts are weighed by the scores of all experts: "
        "that ids are those of a top-k among as many is not known"
    )


def _repeated(graph: fx.Graph) -> Refusal | None:
    """An expert's tokens are those that have its id anywhere, and may have it twice."""
    for node in graph.nodes:
        compared = node_arg(node, 0) if node.target is aten.any.dim else node
        if node is compared or compared.target is not aten.eq.Scalar:
            continue
        ids = node_arg(compared, 0)
        if value(ids).dim() == 2 and node.args[1] == 1 and not are_distinct(ids):
            return Refusal(Code.SPELLING, _NOT_DISTINCT, location(node) or location(compared))
    return None
