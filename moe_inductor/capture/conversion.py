"""``self.classifier = self.classifier.to(dtype)`` in the forward of a router: nothing, where it has that dtype already.

Dynamo traces ``Module.to`` parameter by parameter, up to an assignment to ``param.data``; torch 2.11 gives up on
it and splits the block before its experts (switch_transformers, nllb_moe, gptsan_japanese).
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn

from moe_inductor import _compat
from moe_inductor.capture.trackers import realized


def to_dtype(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """``module.to(dtype)``, traced in its place: Dynamo guards on what it reads."""
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        if (tensor.is_floating_point() or tensor.is_complex()) and tensor.dtype != dtype:
            return nn.Module.to(module, dtype)
    return module


def before_call(tx: Any, call: Any) -> None:
    """Have ``to_dtype`` called for ``module.to(dtype)``."""
    if call.arg != 1:
        return
    for place in range(-min(3, len(tx.stack)), -1):
        method = tx.stack[place]
        if type(method) is not _compat.UserMethodVariable or method.fn is not nn.Module.to:
            continue
        # On torch 2.15 the object is elsewhere, and Module.to is traced.
        bound: Any = getattr(method, "obj", None)
        module, argument = getattr(bound, "value", None), realized(tx.stack[-1])
        if (
            isinstance(module, nn.Module)
            and all(map(_is_plain, module.modules()))
            and argument.is_python_constant()
            and isinstance(argument.as_python_constant(), torch.dtype)
        ):
            tx.stack[place] = _compat.UserMethodVariable(to_dtype, bound)


def _is_plain(module: nn.Module) -> bool:
    return type(module).to is nn.Module.to and type(module)._apply is nn.Module._apply
