"""What of a region is still needed when some of its values come from elsewhere.

Dynamo graphs hold in-place operators, which ordinary dead-code elimination keeps for ever: here a write is needed
exactly when somebody still needs the tensor that it writes to.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from moe_inductor.region.find import Region
from moe_inductor.region.nodes import mutated, name_of, storages

SIDE_EFFECTS = frozenset(
    {
        "_assert_scalar", "_assert_async", "_assert", "sym_constrain_range", "sym_constrain_range_for_size",
        "_check", "_check_is_size", "_assert_tensor_metadata",
    }
)  # fmt: skip


Replaced = Callable[[fx.Node, fx.Node], bool]


def needed(region: Region, replaced: Replaced) -> set[fx.Node]:
    """Members that must stay.

    replaced(reader, node): the reader will read something else in place of ``node``.
    """
    members = set(region.nodes)
    moved = _moved(region.graph, replaced)
    writers: dict[int, list[fx.Node]] = {}
    for node in region.nodes:
        for target in mutated(node):
            for storage in storages(target):
                writers.setdefault(storage, []).append(node)

    def writes_into(node: fx.Node) -> list[fx.Node]:
        """Whoever needs a tensor needs what was written into it."""
        if node in moved:
            return []
        return [w for s in storages(node) for w in writers.get(s, ()) if w is not node]

    keep: set[fx.Node] = set()
    todo: list[fx.Node] = []
    later: set[fx.Node] = set(members)
    for reader in region.graph.nodes:
        later.discard(reader)
        if reader not in members:
            for arg in reader.all_input_nodes:
                if not replaced(reader, arg):
                    todo += (
                        [arg] if arg in members else [w for w in writes_into(arg) if w not in later]
                    )
    while todo:
        node = todo.pop()
        if node in keep:
            continue
        keep.add(node)
        todo += writes_into(node)
        for arg in node.all_input_nodes:
            if not replaced(node, arg):
                todo += [arg] if arg in members else writes_into(arg)
    for node in region.nodes:
        inside = [a for a in node.all_input_nodes if a in members]
        if name_of(node) in SIDE_EFFECTS and inside and all(a in keep for a in inside):
            keep.add(node)
    return keep


def _moved(graph: fx.Graph, replaced: Replaced) -> set[fx.Node]:
    """Views of what is replaced: their recorded storage is the old one, but they will live in the new one."""
    moved: set[fx.Node] = set()
    for node in graph.nodes:
        for arg in node.all_input_nodes:
            if (arg in moved or replaced(node, arg)) and storages(node) & storages(arg):
                moved.add(node)
    return moved


def erase_unneeded(region: Region, keep: set[fx.Node]) -> int:
    """Remove members that are not in ``keep``; returns how many went."""
    erased = 0
    for node in reversed(region.nodes):
        if node not in keep and not node.users:
            region.graph.erase_node(node)
            erased += 1
    region.nodes = [n for n in region.nodes if n in keep]
    return erased
