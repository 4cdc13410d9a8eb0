"""A node that keeps a tensor in a captured graph although nothing reads it any more.

When a loop over ``rows`` has been traced for numbers, ``rows`` itself is dead, and Dynamo may drop or rebuild what
nobody reads.  What was assumed about ``rows`` can only be proved if it stays, so the graph says that it is used.
``take`` removes the marker and tells the node; a graph that still holds one must not run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

_LIBRARY = torch.library.Library("moe_inductor_capture", "DEF")
_LIBRARY.define("keep(Tensor rows) -> ()")
_KEEP = torch.ops.moe_inductor_capture.keep.default


@torch.library.impl("moe_inductor_capture::keep", "CompositeExplicitAutograd", lib=_LIBRARY)
def _keep(rows: torch.Tensor) -> None:
    raise AssertionError("moe_inductor: a graph captured on unproved assumptions was run")


def keep(tx: Any, rows: Any) -> fx.Node:
    """Have the graph that ``tx`` traces read the tensor variable ``rows``."""
    return tx.output.create_proxy("call_function", _KEEP, (rows.as_proxy(),), {}).node


def take(marker: fx.Node) -> fx.Node:
    """The node that is kept by ``marker``, which is removed."""
    (rows,) = marker.all_input_nodes
    marker.graph.erase_node(marker)
    return rows
