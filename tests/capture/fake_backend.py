"""A stand-in for the moe_inductor backend: an object that records what it is given and may decline
it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from moe_inductor.capture import scope
from moe_inductor.reasons import Code, Reason


class FakeBackend:
    """Runs every graph as it is.

    decline_when: asked for every graph; True declines it.
    """

    def __init__(self, decline_when: Callable[[torch.fx.GraphModule], bool] | None = None) -> None:
        self.decline_when = decline_when
        self.graphs: list[torch.fx.GraphModule] = []
        self.active: list[bool] = []
        self.options: list[dict[str, Any]] = []
        self.reasons: list[Reason] = []

    def __call__(
        self, gm: torch.fx.GraphModule, example_inputs: list[Any], **options: Any
    ) -> Callable[..., Any]:
        if self.decline_when is not None and self.decline_when(gm):
            scope.decline(Reason(Code.SPELLING, "the test declines"))
        self.graphs.append(gm)
        self.active.append(scope.active())
        self.options.append(options)
        self.reasons += scope.take_decline_reasons()
        return gm.forward

    @property
    def texts(self) -> list[str]:
        return [graph_text(gm) for gm in self.graphs]


class Recorder:
    """A backend that capture was not installed for."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []
        self.active: list[bool] = []

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        self.graphs.append(gm)
        self.active.append(scope.active())
        return gm.forward

    @property
    def texts(self) -> list[str]:
        return [graph_text(gm) for gm in self.graphs]


def graph_text(gm: torch.fx.GraphModule) -> str:
    """The graph with the types of its inputs, symbols included."""
    return gm.print_readable(print_output=False, include_stride=True)


@contextlib.contextmanager
def installed(backend: object, **settings: Any) -> Iterator[None]:
    assert scope.install(backend, **settings)
    try:
        yield
    finally:
        scope.uninstall(backend)
