"""Find experts that read slots which tokens were sent to by products with masks (GShard, Switch, nanoMoE).

    rows = einsum("tec,th->ech", dispatch, x)
    out = einsum("tec,ech->th", combine, experts(rows))

Both masks are made of one choice.  So what gives such a block away is a product of something that is made of a choice,
with no projection in between, and of something that a product with the same choice has sent through projections.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from torch import fx

from moe_inductor.region.nodes import BATCHED_PRODUCTS, is_floating, is_tensor, name_of, value

_PRODUCTS = BATCHED_PRODUCTS | {"linear", "mm", "addmm"}
_CHOICES = frozenset({"topk", "argmax", "max"})
_VIEWS = frozenset(
    {
        "view", "reshape", "unsqueeze", "squeeze", "flatten", "transpose", "permute", "t", "T", "mT", "expand",
        "contiguous", "clone", "to", "type", "float", "bfloat16", "half", "type_as", "getitem", "detach", "stack",
    }
)  # fmt: skip

# Between logits and masks there are that many nodes for each choice, and few choices.
_LIMIT = 512


@dataclasses.dataclass(frozen=True, eq=False)
class Sending:
    """roots: what chose the experts, first one first.  combine: the product that brings the tokens back.
    masks: what its weights are made of, back to the logits."""

    roots: list[fx.Node]
    combine: fx.Node
    masks: set[fx.Node]


@dataclasses.dataclass(frozen=True)
class _State:
    """Choices that a node is made of; those that were multiplied with something; those whose product was projected."""

    chosen: frozenset[fx.Node] = frozenset()
    sent: frozenset[fx.Node] = frozenset()
    projected: frozenset[fx.Node] = frozenset()


def find_sent(graph: fx.Graph) -> list[Sending]:
    """Every such block.  Changes nothing; in a graph without a choice nothing is looked at."""
    found: list[Sending] = []
    states: dict[fx.Node, _State] = {}
    order: dict[fx.Node, int] = {}
    for node in graph.nodes:
        order[node] = len(order)
        is_root = _is_choice(node)
        before = [states[a] for a in node.all_input_nodes if a in states]
        if node.op == "output" or not (is_root or before):
            continue
        chosen, sent, projected = (
            _all(getattr(s, name) for s in before) for name in ("chosen", "sent", "projected")
        )
        if is_root:
            states[node] = _State(chosen | {node})
        elif name_of(node) not in _PRODUCTS:
            states[node] = _State(chosen, sent, projected)
        elif (mask := _meets(node, states)) is not None:
            roots = sorted(states[mask].chosen, key=order.__getitem__)
            found.append(Sending(roots, node, _made_of(mask)))
        elif any(map(_is_input, node.all_input_nodes)) and (sent or projected or not chosen):
            states[node] = _State(projected=sent | projected)
        else:
            states[node] = _State(chosen, chosen | sent, projected)
    return found


def _all(parts: Iterable[frozenset[fx.Node]]) -> frozenset[fx.Node]:
    return frozenset().union(*parts)


def _meets(product: fx.Node, states: dict[fx.Node, _State]) -> fx.Node | None:
    """The operand that is made of a choice, if what was sent by that one and projected is the other."""
    nothing = _State()
    operands = {a: states.get(a, nothing) for a in product.all_input_nodes}
    for node, mask in operands.items():
        for rows in operands.values():
            if rows is not mask and not mask.projected and mask.chosen & rows.projected:
                return node
    return None


def _made_of(mask: fx.Node) -> set[fx.Node]:
    """``mask`` and what leads to it from the last projections and random numbers."""
    found: set[fx.Node] = set()
    todo = [mask]
    while todo and len(found) < _LIMIT:
        node = todo.pop()
        name = name_of(node)
        is_end = name in _PRODUCTS and any(map(_is_input, node.all_input_nodes[1:]))
        if node in found or not node.op.startswith("call") or is_end or "rand" in name:
            continue
        found.add(node)
        todo += node.all_input_nodes
    return found


def _is_choice(node: fx.Node) -> bool:
    """Positions along the last dimension, which is that of the experts."""
    name = name_of(node)
    if name not in _CHOICES or not node.all_input_nodes:
        return False
    scores = node.all_input_nodes[0]
    if not is_tensor(scores) or value(scores).dim() < 2 or not is_floating(scores):
        return False
    place, unsaid = (2, -1) if name == "topk" else (1, None)
    dim = node.kwargs.get("dim", node.args[place] if len(node.args) > place else unsaid)
    return dim in (-1, value(scores).dim() - 1)


def _is_input(node: fx.Node) -> bool:
    """An input of the graph, or what is stored there in another way."""
    while node.op.startswith("call") and name_of(node) in _VIEWS and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node.op in ("placeholder", "get_attr")
