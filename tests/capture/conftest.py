from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from moe_inductor.capture import scope


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Each test compiles anew, with the same random numbers, and sees no refusal of another."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    scope.take_decline_reasons()
    yield
    torch._dynamo.reset()
