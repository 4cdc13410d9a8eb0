"""The truth: a model's own code with every number in fp64, also where its authors ask for fp32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree


@contextmanager
def in_fp64() -> Iterator[None]:
    """What runs inside must be fp64 already; fp32 that it asks for is fp64 as well."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _NoSingles():
            yield
    finally:
        torch.set_default_dtype(before)


class _NoSingles(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.float:
            return args[0].double()
        args = pytree.tree_map(_double, args)
        return func(*args, **{name: _double(value) for name, value in (kwargs or {}).items()})


def _double(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value
