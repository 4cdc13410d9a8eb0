"""Experts that read slots which tokens were sent to by products with masks, as GShard and Switch of Mesh TensorFlow do.

    rows = einsum("tec,th->ech", dispatch, x)
    out = einsum("tec,ech->th", combine, experts(rows))

Such a block is a sparse one only if no two tokens are sent to the same slot of an expert; where slots are counted with
a cumulated sum of masks, that is a fact about the sum.  It is not proved here, so the block is named and left alone.
"""

from __future__ import annotations

from torch import fx

from moe_inductor.region.find import stacked_products, viewed
from moe_inductor.region.nodes import BATCHED_PRODUCTS, name_of

_PRODUCTS = BATCHED_PRODUCTS | {"linear", "mm", "addmm"}
_CHOICES = frozenset({"topk", "argmax", "one_hot"})


def sent_to_slots(graph: fx.Graph) -> fx.Node | None:
    """The product of masks and tokens that gives experts their rows, if there is one.  Changes nothing."""
    for node in stacked_products(graph):
        for rows in map(viewed, node.all_input_nodes):
            is_batched = rows.op.startswith("call") and name_of(rows) in BATCHED_PRODUCTS
            if is_batched and any(map(_is_of_choice, rows.all_input_nodes)):
                return rows
    return None


def _projects(product: fx.Node) -> bool:
    """Is it a product with a parameter, or of the tokens that are an input of the graph?"""
    return any(viewed(a).op in ("placeholder", "get_attr") for a in product.all_input_nodes[1:])


def _is_of_choice(node: fx.Node) -> bool:
    """Is it made of which experts were chosen, without a projection in between?"""
    todo, seen = [node], set()
    while todo:
        found = todo.pop()
        if found in seen or not found.op.startswith("call"):
            continue
        seen.add(found)
        if name_of(found) in _CHOICES:
            return True
        if name_of(found) not in _PRODUCTS or not _projects(found):
            todo += found.all_input_nodes
    return False
