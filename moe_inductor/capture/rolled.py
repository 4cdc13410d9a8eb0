"""An expert index that stands for every expert: the loop's body is traced once, and capture does not grow with E.

``for e in rows`` gets one element, a symbolic integer in the range of the experts.  ``weights[e]`` then is a select at
a symbolic position, and whatever Python decides in the body it decides for all experts alike: Dynamo knows nothing of
the symbol but its range.  A decision that does need the number has the loop unrolled instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import fx

from moe_inductor import _compat

# Fewer passes than this are unrolled: there is little to win, and each pass is then proved by itself.
MIN_EXPERTS = 4

_LIBRARY = torch.library.Library("moe_inductor_capture", "FRAGMENT")
_LIBRARY.define("expert_index(Tensor rows, SymInt count) -> SymInt")
EXPERT_INDEX = torch.ops.moe_inductor_capture.expert_index.default


@torch.library.register_fake("moe_inductor_capture::expert_index", lib=_LIBRARY)
def _fake(rows: torch.Tensor, count: int) -> torch.SymInt:
    # Not new_dynamic_size: a size may be taken to be at least 2, and there are experts 0 and 1.
    symbol = torch.library.get_ctx()._shape_env.create_unbacked_symint()  # type: ignore[attr-defined]
    _compat.constrain_range(symbol, min=0, max=int(count) - 1)
    return symbol


@torch.library.impl("moe_inductor_capture::expert_index", "CompositeExplicitAutograd", lib=_LIBRARY)
def _run(rows: torch.Tensor, count: int) -> int:
    raise AssertionError("moe_inductor: a graph captured on unproved assumptions was run")


def make_index(tx: Any, rows: Any, count: int) -> tuple[fx.Node, Any]:
    """An integer out of ``range(count)`` for the loop over the tensor variable ``rows``: its node and its tracker."""
    proxy = tx.output.create_proxy("call_function", EXPERT_INDEX, (rows.as_proxy(), count), {})
    return proxy.node, _compat.wrap_fx_proxy(tx, proxy)


class RolledIndex(_compat.VariableTracker):
    """One row of the hit list, whichever: a tensor in the model, [] or [1], and a symbolic integer in the trace.

    refuse: called with the use, wherever the two could be told apart.
    """

    def __init__(
        self, number: Any, dims: int, refuse: Callable[[str], NoReturn], **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.number, self.dims, self.refuse = number, dims, refuse

    def python_type(self) -> type:
        return torch.Tensor

    def is_tensor(self) -> bool:
        return False

    def as_proxy(self) -> Any:
        if self.dims:
            self.refuse("an expression")
        return self.number.as_proxy()

    def var_getattr(self, tx: Any, name: str) -> Any:
        if name not in ("item", "squeeze", "tolist"):
            self.refuse(f".{name}")
        return _compat.GetAttrVariable(self, name)

    def call_method(self, tx: Any, name: str, args: Any, kwargs: Any) -> Any:
        if name == "__getitem__":
            return self._element(args[0])
        if name in ("item", "__int__", "__index__"):
            return self.number
        if name == "squeeze":
            return RolledIndex(self.number, 0, self.refuse)
        if name == "tolist":
            return self.listed(tx)
        self.refuse(f".{name}()")

    def listed(self, tx: Any) -> Any:
        return self.number if not self.dims else _compat.VariableTracker.build(tx, [self.number])

    def nb_index_impl(self, tx: Any) -> Any:
        return self.number

    def nb_int_impl(self, tx: Any) -> Any:
        return self.number

    def mp_subscript_impl(self, tx: Any, key: Any) -> Any:
        return self._element(key)

    def getitem_const(self, tx: Any, key: Any) -> Any:
        return self._element(key)

    def is_python_hashable(self) -> bool:
        self.refuse("a key")

    def reconstruct(self, codegen: Any) -> None:
        self.refuse("what follows a graph break")

    def _element(self, key: Any) -> RolledIndex:
        known = type(key) is _compat.ConstantVariable and key.value in (0, -1)
        if self.dims == 0 or not known:
            self.refuse("an index of its own")
        return RolledIndex(self.number, self.dims - 1, self.refuse)


def decided(condition: Any) -> bool | None:
    """What ``condition`` is for every expert alike; None if it is not the same for all."""
    if isinstance(condition, torch.SymInt):
        condition = condition != 0
    if isinstance(condition, bool):
        return condition
    if _compat.statically_known_true(condition):
        return True
    if _compat.statically_known_true(torch.sym_not(condition)):
        return False
    return None


def asks_for(condition: Any, number: int) -> bool:
    """Is ``condition`` ``e == number`` or ``e != number``?"""
    if not isinstance(condition, torch.SymBool):
        return False
    expression = condition.node.expr
    return (
        expression.is_Relational
        and expression.rel_op in ("==", "!=")
        and any(side == number for side in expression.args)
        and any(side.is_symbol for side in expression.args)
    )
