"""moe_inductor: a torch.compile backend that runs plain-PyTorch mixture-of-experts models on fused kernels.

    model = torch.compile(model, backend="moe_inductor")

This module must stay free of torch: ``TORCH_LOGS="+moe_inductor"`` makes torch import it in the middle of
torch's own import.  Everything that needs torch is therefore resolved on first attribute access.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_inductor.debug.explain import explain

__version__ = "0.1.0"
__all__ = ["__version__", "explain"]


def __getattr__(name: str) -> Any:
    if name == "explain":
        return importlib.import_module("moe_inductor.debug.explain").explain
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
