"""Our backend with something quicker than Inductor behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.backends.registry import lookup_backend

from moe_inductor.backend import MoEInductor


class WithoutInductor(MoEInductor):
    """The backend as users get it, but ``inner`` instead of Inductor runs what comes out of the stages.

    Quick, and any difference from eager is ours.  ``dry_run`` would not do: it runs the captured graph.
    """

    def __init__(self, inner: str = "eager") -> None:
        super().__init__()
        self.inner = lookup_backend(inner)
        self.ops: list[str] = []

    def _inductor(self, mode: Any, options: Any, name: Any) -> Callable[..., Any]:
        return self._compile

    def _compile(self, gm: torch.fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
        graphs = [m.graph for m in gm.modules() if isinstance(m, torch.fx.GraphModule)]
        self.ops += [str(n.target) for g in graphs for n in g.nodes if n.op == "call_function"]
        return self.inner(gm, inputs)
