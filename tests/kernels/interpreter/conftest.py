"""Only for pytest runs started by ../test_interpreter.py."""

import inspect
import os

import pytest
import torch

assert os.environ.get("TRITON_INTERPRET") == "1", "run by test_interpreter.py"

import triton.runtime.interpreter as interpreter  # noqa: E402

# Triton 3.6's interpreter turns loop bounds into ints by int(array), which NumPy 2.4 refuses for arrays of one
# element; fixed in later Triton, whose function has the same shape.
_patch = interpreter._patch_lang_tensor
if len(inspect.signature(_patch).parameters) == 2:

    def _patch_lang_tensor(tensor, scope):
        _patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(-1)[0]))

    interpreter._patch_lang_tensor = _patch_lang_tensor


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def poisoned_workspaces():
    """``torch.empty`` returns NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
