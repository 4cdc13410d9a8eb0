"""Find the mixture-of-experts regions of a Dynamo graph, by data flow and not by syntax.

A region belongs to one *root*: the node that chose the experts (a top-k, an argmax, a lookup of token ids in a table,
or, when only the experts are in the graph, the integer input that carries ``topk_ids``).  Its *anchors* are what no
other code has: a grouped GEMM, a batched GEMM over gathered weights, or rows selected by a data-dependent index.  The
region is everything between the two, and everything after the anchors that reads nothing but the region: that ends
where the residual stream comes in.  It may be too large, never too small to see: the match, made on the canonical
form, decides what the block is; the region only has to contain it.
"""

from __future__ import annotations

import dataclasses
import heapq
import operator
from collections.abc import Iterator
from typing import Any

from torch import fx

from moe_inductor.region.dense import find_dense
from moe_inductor.region.nodes import (
    has_unbacked,
    is_floating,
    is_integral,
    is_tensor,
    location,
    mutated,
    name_of,
    storages,
    tensors,
    unbacked,
    value,
)
from moe_inductor.region.sent import find_sent

_GROUPED_GEMMS = frozenset({"_grouped_mm", "grouped_mm", "grouped_mm_fallback"})
_BATCHED_GEMMS = frozenset({"bmm", "matmul", "einsum", "baddbmm"})
_GEMMS = (
    _GROUPED_GEMMS
    | _BATCHED_GEMMS
    | {
        "linear",
        "mm",
        "addmm",
        "addbmm",
        "__matmul__",
        "_scaled_mm",
        "conv1d",
        "conv2d",
        "bilinear",
    }
)
# Reading rows of something computed outside is how experts get their tokens.
_GATHERS = frozenset({"getitem", "index_select", "gather", "take_along_dim", "embedding", "take"})
_ADDS_ROWS = frozenset({"index_add", "scatter_add"})
# Pulled into a region when they only prepare one of its operands: no arithmetic, cheap to trace twice.
_VIEWS = frozenset(
    {
        "view", "reshape", "unsqueeze", "squeeze", "flatten", "transpose", "permute", "t", "T", "mT", "expand",
        "contiguous", "clone", "to", "type", "float", "bfloat16", "half", "double", "int", "long", "bool", "type_as",
        "repeat_interleave", "chunk", "split", "unbind", "select", "narrow", "getattr", "expand_as", "view_as",
        "detach", "getitem", "size", "sym_size", "repeat", "tile", "broadcast_to",
    }
)  # fmt: skip
_CONSTRUCTORS = frozenset(
    {
        "zeros", "zeros_like", "new_zeros", "empty", "empty_like", "new_empty", "arange", "full", "full_like",
        "new_full", "ones", "ones_like", "new_ones",
    }
)  # fmt: skip
_LIKE_ANOTHER = frozenset({"type_as", "view_as", "expand_as", "reshape_as"})
# A router between its logits and its top-k has a handful of nodes; a longer walk left the router.
_ROUTER_LIMIT = 64


@dataclasses.dataclass(eq=False)
class Region:
    """One candidate block.

    nodes: members in graph order.  inputs: nodes outside that members read, or passes of a loop that were not traced.
    root: what chose the experts.  anchor: the first node that made us look.
    has_slots: tokens are sent to slots of the experts by products with masks.
    """

    graph: fx.Graph
    nodes: list[fx.Node]
    root: fx.Node
    anchor: fx.Node
    read_by_others: list[fx.Node] = dataclasses.field(default_factory=list)
    has_slots: bool = False

    def __post_init__(self) -> None:
        self.refresh()

    def refresh(self) -> None:
        """Look again at the graph: an earlier region's rewrite may have erased shared nodes or changed inputs."""
        alive = set(self.graph.nodes)
        self.nodes = [n for n in self.nodes if n in alive]
        members = set(self.nodes)
        read = [a for n in self.nodes for a in n.all_input_nodes if a not in members]
        self.inputs = list(dict.fromkeys((*read, *self.read_by_others)))

    def give_up(self, nodes: list[fx.Node]) -> bool:
        """Leave ``nodes`` and all that depends on them to the model.  False, and nothing done, if the root or an
        anchor is among them."""
        order = {node: i for i, node in enumerate(self.graph.nodes)}
        gone = _downstream(self.graph, nodes, order) | set(nodes)
        left = [n for n in self.nodes if n not in gone]
        if not nodes or self.root in gone or any(n in gone and _is_anchor(n) for n in self.nodes):
            return False
        self.nodes = left
        self.refresh()
        return True

    @property
    def location(self) -> str:
        return location(self.anchor) or location(self.root)


def looks_like_moe(graph: fx.Graph) -> bool:
    """Cheap pre-check, linear in the graph: false for every model without experts, which then costs nothing."""
    return any(_is_anchor(node) for node in graph.nodes)


def find_regions(graph: fx.Graph) -> list[Region]:
    """All candidate blocks of ``graph``, in order; empty for a graph without anchors."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    by_root: dict[fx.Node, list[fx.Node]] = {}
    writers = _writers(graph)
    for node in graph.nodes:
        if not _is_anchor(node):
            continue
        root = _root_of(node, order, writers)
        # Rows of unknown number are nothing special by themselves: somebody must have chosen experts.
        if root is not None and not (root.op == "placeholder" and multiplies_some_rows(node)):
            by_root.setdefault(root, []).append(node)
    experts: dict[fx.Node, set[fx.Node]] = {}
    roots, with_slots = set(by_root), set()
    for sent in find_sent(graph):
        if roots.isdisjoint(sent.roots):
            by_root[sent.roots[0]], experts[sent.roots[0]] = [sent.combine], sent.masks
            roots.update(sent.roots)
            with_slots.add(sent.roots[0])
    for block in find_dense(graph, roots):
        by_root[block.root] = block.anchors
        experts[block.root] = block.experts
    regions = []
    for root, anchors in by_root.items():
        later = _downstream(graph, [r for r in by_root if order[r] > order[root]], order)
        region = _grow(graph, root, anchors, order, later, experts.get(root, set()))
        region.has_slots = root in with_slots
        regions.append(region)
    return sorted(regions, key=lambda region: order[region.nodes[0]])


def router_only(graph: fx.Graph) -> fx.Node | None:
    """What stock capture leaves of an MoE whose loop it could not take: ``one_hot(topk_ids [T, k])``, turned so that an
    expert's row comes first, in a graph where nothing computes with it.  Returns the node to name the line of."""
    for node in graph.nodes:
        if (
            name_of(node) == "one_hot"
            and is_tensor(node)
            and value(node).dim() == 3
            and any(name_of(user) in ("permute", "transpose", "movedim") for user in node.users)
        ):
            return node
    return None


def dense_only(graph: fx.Graph) -> fx.Node | None:
    """Experts that are all computed for every token: ``bmm(x [E, T, H], weight [E, H, I])`` in a graph where a top-k
    chooses among E scores.  Returns the node to name the line of."""
    return next(stacked_products(graph), None)


def stacked_products(graph: fx.Graph) -> Iterator[fx.Node]:
    """Products with the matrices ``[E, ..]`` of all experts, in a graph where something is chosen of E."""
    scores = {
        str(value(node.all_input_nodes[0]).shape[-1])
        for node in graph.nodes
        if name_of(node) in ("topk", "argmax") and node.all_input_nodes and _scores(node)
    }
    for node in graph.nodes if scores else ():
        if name_of(node) in _BATCHED_GEMMS and any(
            is_tensor(a)
            and value(a).dim() == 3
            and viewed(a).op in ("placeholder", "get_attr")
            and str(value(a).shape[0]) in scores
            for a in node.all_input_nodes[1:]
        ):
            yield node


def _scores(node: fx.Node) -> bool:
    source = node.all_input_nodes[0]
    return is_tensor(source) and value(source).dim() >= 2


def _is_anchor(node: fx.Node) -> bool:
    if node.op not in ("call_function", "call_method"):
        return False
    name = name_of(node)
    if name in _GROUPED_GEMMS:
        return True
    if name in _BATCHED_GEMMS and any(map(_is_gathered_weight, node.all_input_nodes)):
        return True
    if multiplies_some_rows(node):
        return True
    return is_tensor(node) and has_unbacked(node) and _selects_rows(node)


def products_of(region: Region) -> list[fx.Node]:
    """The products of the region that only experts make: of rows, or with matrices, that were chosen."""
    return [n for n in region.nodes if _is_anchor(n) and name_of(n) in _GEMMS]


def multiplies_some_rows(node: fx.Node) -> bool:
    """A product of rows whose number depends on the data: ``linear(tokens.split(counts)[e], weight[e])``."""
    return (
        name_of(node) in _GEMMS
        and is_tensor(node)
        and bool(unbacked(value(node).shape[:-1]))
        and any(is_tensor(a) and not has_unbacked(a) for a in node.all_input_nodes[1:])
    )


def _is_gathered_weight(node: fx.Node) -> bool:
    """``weight[topk_ids]``: whole matrices picked by an integer tensor."""
    while name_of(node) in _VIEWS and name_of(node) != "getitem" and node.all_input_nodes:
        node = node.all_input_nodes[0]
    if name_of(node) not in ("getitem", "index_select", "embedding") or not is_tensor(node):
        return False
    source, *rest = node.all_input_nodes
    return (
        is_tensor(source)
        and value(source).dim() >= 3
        and any(is_integral(index) for index in rest)
        and not _is_product(source)
    )


def _is_product(node: fx.Node) -> bool:
    """What a GEMM gave, or several of them put together, with a bias or without: no weight."""
    todo = [node]
    while todo:
        node = viewed(todo.pop())
        if node.op.startswith("call") and name_of(node) in _GEMMS:
            return True
        if name_of(node) in ("stack", "cat", "add"):
            todo += node.all_input_nodes
    return False


def _selects_rows(node: fx.Node) -> bool:
    """``hidden_states[token_idx]`` with a data-dependent ``token_idx``."""
    return bool(chosen_rows(node))


def chosen_rows(node: fx.Node) -> list[fx.Node]:
    """The data-dependent index by which ``node`` selects rows, if it does."""
    if name_of(node) not in _GATHERS:
        return []
    return [a for a in node.all_input_nodes[1:] if is_integral(a) and has_unbacked(a)]


def _is_root(node: fx.Node) -> bool:
    """Does ``node`` turn scores into a choice of experts?"""
    name = name_of(node)
    if node.op == "placeholder":
        return is_integral(node) and value(node).dim() >= 1
    if name in ("topk", "multinomial") or _is_lookup(node):
        return True
    if name in ("argmax", "argmin", "sort", "argsort", "max"):
        return bool(node.all_input_nodes) and any(
            t.dtype.is_floating_point for t in tensors(node.all_input_nodes[0])
        )
    return False


def _is_lookup(node: fx.Node) -> bool:
    """``table[input_ids]``: experts that are chosen by token id (DeepSeek-V4's hash layers).  Neither the table nor the
    ids lead to the layer: token ids lead to everything in the model."""
    if name_of(node) not in _GATHERS or not is_integral(node) or has_unbacked(node):
        return False
    inputs = [viewed(a) for a in node.all_input_nodes]
    return len(set(inputs)) == 2 and all(
        a.op in ("placeholder", "get_attr") and is_integral(a) for a in inputs
    )


def _root_of(
    anchor: fx.Node, order: dict[fx.Node, int], writers: dict[int, list[fx.Node]]
) -> fx.Node | None:
    """The latest node that chose experts among everything the anchor depends on.

    "Latest" because an anchor of layer 7 depends on the top-k of layers 0..6 as well, through the residual stream.
    Rows that were selected say by their index who chose them: the weights that are selected may come from a node
    that only looks like another choice (phimoe's router takes three maxima per expert).
    """
    heap, seen = [(-order[anchor], anchor.name, anchor)], {anchor}
    while heap:
        _, _, node = heapq.heappop(heap)
        if _is_root(node):
            return node
        before = [w for s in storages(node) for w in writers.get(s, ()) if order[w] < order[anchor]]
        for arg in (*(chosen_rows(node) or node.all_input_nodes), *before):
            if arg not in seen:
                seen.add(arg)
                heapq.heappush(heap, (-order[arg], arg.name, arg))
    return None


def _writers(graph: fx.Graph) -> dict[int, list[fx.Node]]:
    found: dict[int, list[fx.Node]] = {}
    for node in graph.nodes:
        for target in mutated(node):
            for storage in storages(target):
                found.setdefault(storage, []).append(node)
    return found


def _downstream(graph: fx.Graph, roots: list[fx.Node], order: dict[fx.Node, int]) -> set[fx.Node]:
    """``roots`` and everything that depends on them, through values or through tensors changed in place."""
    found = set(roots)
    if not found:
        return found
    first = min(order[root] for root in roots)
    dirty: set[int] = set()
    for node in graph.nodes:
        if order[node] < first or node.op in ("output", "placeholder"):
            continue
        if node in found or any(a in found or storages(a) & dirty for a in node.all_input_nodes):
            found.add(node)
            for target in mutated(node):
                dirty |= storages(target)
    return found


def _grow(
    graph: fx.Graph,
    root: fx.Node,
    anchors: list[fx.Node],
    order: dict[fx.Node, int],
    of_later_blocks: set[fx.Node],
    experts: set[fx.Node],
) -> Region:
    """experts: what they compute before they meet the choice, which ``root`` does not lead to."""
    after = [
        n
        for n in graph.nodes
        if order[n] > order[root]
        and n.op not in ("output", "placeholder")
        and n not in of_later_blocks
        and not _runs_a_graph(n)
    ]
    last_anchor = max(order[a] for a in anchors)
    chosen = _downstream(graph, [root], order) - of_later_blocks

    # What leads to an anchor ...
    leads: set[fx.Node] = set(anchors)

    def is_read(node: fx.Node) -> bool:
        return any(u in leads for u in node.users)

    for node in reversed(after):
        if order[node] > last_anchor or node not in chosen:
            continue
        if is_read(node) or any(m in leads or is_read(m) for m in mutated(node)):
            leads.add(node)

    # ... and what follows from the region alone.
    members = {root} | leads | experts
    reach = _Reach(members, chosen_count(root))
    for node in after:
        if node in chosen and node not in members and reach.admits(node):
            reach.add(node)
    for node in (
        after
    ):  # an index computed for a later step may have been refused before its reader came in
        of_a_pack = any(
            isinstance(value(a), (tuple, list)) and a not in members for a in node.all_input_nodes
        )  # one result of another top-k is an input of its own
        if (
            node in chosen
            and node not in members
            and not of_a_pack
            and any(u in members for u in node.users)
        ):
            members.add(node)

    _add_router(root, members)
    _add_earlier_choices(graph, root, members)
    _add_operands(members)
    # The ids may be an input of the graph.
    nodes = [n for n in graph.nodes if n in members and n.op != "placeholder"]
    return Region(graph, nodes, root, anchors[0])


class _Reach:
    """How far a region goes on after its anchors.  ``members`` is extended in place.

    choices: the number of token-expert pairs, T*k, as a string; "" when unknown.
    """

    def __init__(self, members: set[fx.Node], choices: str) -> None:
        self.members, self.choices = members, choices
        self.written = {s for m in members for target in mutated(m) for s in storages(target)}

    def add(self, node: fx.Node) -> None:
        self.members.add(node)
        self.written |= {s for target in mutated(node) for s in storages(target)}

    def admits(self, node: fx.Node) -> bool:
        """``node`` reads the region, and otherwise only parameters, fresh tensors, gathered rows or one number per
        choice.  What reads a whole other activation is not part of the experts: the residual stream comes in there."""
        inputs = node.all_input_nodes
        if any(unbacked(value(a)) for a in inputs) or has_unbacked(node):
            return True
        if name_of(node) in _LIKE_ANOTHER:
            inputs = inputs[:1]  # of the other only its dtype or its shape
        if not any(map(self._inside, inputs)):
            return False
        if name_of(node) in _GEMMS:  # a product with the weights sums up what the experts gave
            return len(inputs) > 1 and all(map(self._inside, inputs))
        if _adds_rows(node):  # to what another part of the layer gave: shared experts
            return len(inputs) > 1 and all(map(self._inside, inputs[1:]))
        if not all(self._inside(target) or _is_fresh(target) for target in mutated(node)):
            return (
                False  # a counter that the model keeps: it stays where it is and reads the region
            )
        if name_of(node) in _GATHERS:
            source, *index = inputs
            return self._inside(source) or all(self._inside(a) or _is_made_here(a) for a in index)
        return all(
            self._inside(a) or _is_source(a) or self._is_weight(a) or not list(tensors(a))
            for a in inputs
        )

    def _inside(self, node: fx.Node) -> bool:
        return node in self.members or bool(storages(node) & self.written)

    def _is_weight(self, node: fx.Node) -> bool:
        return is_tensor(node) and str(value(node).numel()) == self.choices


def _adds_rows(node: fx.Node) -> bool:
    return (
        name_of(node).removesuffix("_") in _ADDS_ROWS and is_tensor(node) and value(node).dim() > 1
    )


def chosen_count(root: fx.Node) -> str:
    """The number of elements of the ids that ``root`` chooses, as a string to compare symbolic sizes by."""
    integral = [t for t in tensors(root) if not t.dtype.is_floating_point]
    return str(integral[0].numel()) if integral else ""


def _is_source(node: fx.Node) -> bool:
    """A graph input, a constant, a fresh tensor, or a view of one."""
    return _is_fresh(node) or viewed(node).op in ("placeholder", "get_attr")


def _is_fresh(node: fx.Node) -> bool:
    """A tensor that is made in the graph, or a view of one."""
    return name_of(viewed(node)) in _CONSTRUCTORS


def _runs_a_graph(node: fx.Node) -> bool:
    """A higher-order operator or one of its results, like those of a router's own autograd function: an input."""
    while node.target is operator.getitem and not is_tensor(source := node.all_input_nodes[0]):
        node = source
    return any(
        a.op == "get_attr" and isinstance(_attribute(a), fx.GraphModule)
        for a in node.all_input_nodes
    )


def _attribute(node: fx.Node) -> Any:
    """What a get_attr node reads; None where it is not there."""
    found: Any = node.graph.owning_module
    for name in str(node.target).split("."):
        found = getattr(found, name, None)
    return found


def viewed(node: fx.Node) -> fx.Node:
    """What ``node`` is a view of."""
    while node.op.startswith("call") and name_of(node) in _VIEWS and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _is_splittable(node: fx.Node) -> bool:
    """A tensor, or the pieces of one; the results of a top-k are inputs of their own."""
    return is_tensor(node) or name_of(node) in ("chunk", "split", "unbind", "size")


def _is_made_here(node: fx.Node) -> bool:
    """A number, or an index tensor that depends on nothing but sizes: ``torch.arange(T)`` and views of it."""
    return not is_tensor(node) or (_is_source(node) and not _reaches_input(node))


def _reaches_input(node: fx.Node) -> bool:
    return node.op in ("placeholder", "get_attr") or any(
        is_tensor(a) and name_of(node) not in _CONSTRUCTORS and _reaches_input(a)
        for a in node.all_input_nodes
    )


def _add_router(root: fx.Node, members: set[fx.Node]) -> None:
    """From the choice back to the logits: up to, not including, the GEMM that made them."""
    todo, found = list(root.all_input_nodes), set()
    while todo:
        node = todo.pop()
        if node in found or node.op in ("placeholder", "get_attr") or name_of(node) in _GEMMS:
            continue
        if _runs_a_graph(node):
            continue
        found.add(node)
        if len(found) > _ROUTER_LIMIT:
            return
        todo += node.all_input_nodes
        todo += [u for u in node.users if u in mutated_by(node)]
    if name_of(root) == "argmax":
        found |= _best_scores(root)
    members |= found


def _best_scores(argmax: fx.Node) -> set[fx.Node]:
    """Where what the chosen expert weighs is asked for in a call of its own: that, and what is made of it alone."""
    scores = argmax.all_input_nodes[0]
    found = {u for u in scores.users if name_of(u) in ("max", "amax")}
    todo, choices = list(found), chosen_count(argmax)
    while todo:
        for user in todo.pop().users:
            weighs = is_floating(user) and str(value(user).numel()) == choices
            if user not in found and weighs and found.issuperset(user.all_input_nodes):
                found.add(user)
                todo.append(user)
    return found


def _add_earlier_choices(graph: fx.Graph, root: fx.Node, members: set[fx.Node]) -> None:
    """What is made of an earlier choice of the same router and read by the region: first choices, where ``root`` is the
    second one, with their masks and weights."""
    chosen = {n for n in members if n is not root and n.op.startswith("call") and _is_root(n)}
    dirty: set[int] = set()
    for node in graph.nodes if chosen else ():
        if not node.op.startswith("call") or name_of(node) in _GEMMS or has_unbacked(node):
            continue
        if any(a in chosen or storages(a) & dirty for a in node.all_input_nodes):
            chosen.add(node)
            dirty |= {s for target in mutated(node) for s in storages(target)}
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node not in chosen or node in members or _runs_a_graph(node):
            continue
        reached = (node, *mutated(node))
        if any(u in members or u in found for n in reached for u in n.users if u is not node):
            found.add(node)
    if len(found) <= _ROUTER_LIMIT:
        members |= found


def mutated_by(node: fx.Node) -> list[fx.Node]:
    """Users that change ``node`` in place."""
    return [u for u in node.users if node in mutated(u)]


def _add_operands(members: set[fx.Node]) -> None:
    """Views, casts and fresh tensors that only prepare an operand come along, so that the canonical form sees
    them: ``weight.transpose(-2, -1)``, ``hidden_states.view(-1, H)``, ``torch.zeros_like(hidden_states)``.  A fresh
    tensor that others write to, as an earlier layer does to its sum, is an input."""
    graph = next(iter(members)).graph
    writers = (n for n in graph.nodes if n not in members)
    written = {s for n in writers for target in mutated(n) for s in storages(target)}
    todo = [a for n in members for a in n.all_input_nodes if a not in members]
    while todo:
        node = todo.pop()
        if node in members or not node.op.startswith("call"):
            continue
        name = name_of(node)
        if name == "getitem" and not all(_is_made_here(a) for a in node.all_input_nodes[1:]):
            continue  # rows picked by something computed: that is a tensor of its own
        if name == "getitem" and not _is_splittable(node.all_input_nodes[0]):
            continue
        if name in _CONSTRUCTORS and storages(node) & written:
            continue
        if name in _VIEWS or name in _CONSTRUCTORS or node.target is operator.getitem:
            members.add(node)
            todo += node.all_input_nodes
