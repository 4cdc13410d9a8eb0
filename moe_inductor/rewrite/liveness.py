"""What of a region is still needed when some of its values come from elsewhere.

Dynamo graphs hold in-place operators, which ordinary dead-code elimination keeps for ever: here a write is needed
exactly when somebody still needs the tensor that it writes to.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from moe_inductor.region.find import Region
from moe_inductor.region.nodes import mutated, name_of, storages, tensors, value

_SIDE_EFFECTS = frozenset(
    {
        "_assert_scalar", "_assert_async", "_assert", "sym_constrain_range", "sym_constrain_range_for_size",
        "_check", "_check_is_size", "_assert_tensor_metadata",
    }
)  # fmt: skip


def needed(region: Region, replaced: Callable[[fx.Node, fx.Node], bool]) -> set[fx.Node]:
    """Members that must stay.

    replaced(reader, node): the reader will read something else in place of ``node``.
    """
    members = set(region.nodes)
    writers: dict[int, list[fx.Node]] = {}
    for node in region.nodes:
        for target in mutated(node):
            for storage in storages(target):
                writers.setdefault(storage, []).append(node)

    keep: set[fx.Node] = set()
    todo = [
        node
        for node in region.nodes
        if any(u not in members and not replaced(u, node) for u in node.users)
    ]
    for reader in region.graph.nodes:
        if reader not in members:
            for arg in reader.all_input_nodes:  # an outside view of something written in the region
                if arg not in members:
                    todo += [w for s in storages(arg) for w in writers.get(s, ())]
    while todo:
        node = todo.pop()
        if node in keep:
            continue
        keep.add(node)
        todo += [a for a in node.all_input_nodes if a in members and not replaced(node, a)]
        # Whoever needs a tensor needs what was written into it.
        read = {s for a in (node, *node.all_input_nodes) for s in storages(a)}
        todo += [w for s in read for w in writers.get(s, ()) if _needs_write(node, w, replaced)]
    for node in region.nodes:
        inside = [a for a in node.all_input_nodes if a in members]
        if name_of(node) in _SIDE_EFFECTS and inside and all(a in keep for a in inside):
            keep.add(node)
    return keep


def _needs_write(
    reader: fx.Node, write: fx.Node, replaced: Callable[[fx.Node, fx.Node], bool]
) -> bool:
    """False when everything the reader takes from the written storage is replaced by something else."""
    if reader is write:
        return False
    hit = {s for target in mutated(write) for s in storages(target)}
    if storages(reader) & hit:
        return True
    return any(storages(a) & hit and not replaced(reader, a) for a in reader.all_input_nodes)


def erase_unneeded(region: Region, keep: set[fx.Node]) -> int:
    """Remove members that are not in ``keep``; returns how many went."""
    erased = 0
    for node in reversed(region.nodes):
        if node not in keep and not node.users:
            region.graph.erase_node(node)
            erased += 1
    region.nodes = [n for n in region.nodes if n in keep]
    return erased


def has_plain_value(node: fx.Node) -> bool:
    return value(node) is not None and any(True for _ in tensors(node))
