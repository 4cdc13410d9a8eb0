"""``for i, end in enumerate(ids.bincount().cumsum(0))``: as many passes as the largest id says, traced for all experts.

``bincount`` without a ``minlength`` counts up to the largest id there is.  An expert beyond it has no tokens, so its
pass is one more that has to do nothing then.  What Python and the graph know of the length stays as it is: only the
loop reads its elements from ``padded(counts, length)``, and so does the loop's body where it reads another element by
its number.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from moe_inductor import _compat
from moe_inductor.capture import emptiness
from moe_inductor.capture.trackers import is_kind

_LIBRARY = torch.library.Library("moe_inductor_capture", "FRAGMENT")
_LIBRARY.define("padded(Tensor counts, int length) -> Tensor")
PADDED = torch.ops.moe_inductor_capture.padded.default


@torch.library.register_fake("moe_inductor_capture::padded", lib=_LIBRARY)
def _fake(counts: torch.Tensor, length: int) -> torch.Tensor:
    return counts.new_empty(length)


@torch.library.impl("moe_inductor_capture::padded", "CompositeExplicitAutograd", lib=_LIBRARY)
def _run(counts: torch.Tensor, length: int) -> torch.Tensor:
    raise AssertionError("moe_inductor: a graph captured on unproved assumptions was run")


@dataclasses.dataclass(frozen=True, eq=False)
class Counts:
    """counts: the tracker of a tensor or array whose length depends on the data.  padded: that of its first
    ``length`` elements, as if there were as many.  region: the loop's, while it is traced."""

    counts: Any
    padded: Any
    length: int
    region: Any

    def is_read_by(self, owner: Any, key: Any) -> bool:
        """Is ``owner[key]`` an element that the loop may read from ``padded``?"""
        number = key.value if type(key) is _compat.ConstantVariable else None
        return (
            not self.region.closed
            and _is_array(owner)
            and owner.as_proxy().node is self.counts.as_proxy().node
            and type(number) is int
            and 0 <= number < self.length
        )


def length_of(counts: Any) -> int | None:
    """How many elements there are at most, if that is what the data decide."""
    if not _is_array(counts):
        return None
    node = counts.as_proxy().node
    value = node.meta.get("example_value")
    if not isinstance(value, torch.Tensor) or value.dim() != 1:
        return None
    return emptiness.most_counted(node) if isinstance(value.shape[0], torch.SymInt) else None


def pad(tx: Any, counts: Any, length: int) -> tuple[fx.Node, Any]:
    """The node of ``padded(counts, length)`` and its tracker."""
    args = (counts.as_proxy(), length)
    proxy = tx.output.create_proxy("call_function", PADDED, args, {})
    if is_kind(counts, _compat.NumpyNdarrayVariable):
        return proxy.node, _compat.NumpyNdarrayVariable.create(tx, proxy)
    return proxy.node, _compat.wrap_fx_proxy(tx, proxy)


def _is_array(tracker: Any) -> bool:
    return type(tracker) in (_compat.TensorVariable, _compat.NumpyNdarrayVariable)
