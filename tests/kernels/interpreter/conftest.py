"""Only for pytest runs started by ../test_interpreter.py."""

import inspect
import os

import pytest
import torch

assert os.environ.get("TRITON_INTERPRET") == "1", "run by test_interpreter.py"

import triton.language as tl  # noqa: E402
import triton.runtime.interpreter as interpreter  # noqa: E402

# Triton 3.6's interpreter turns loop bounds into ints by int(array), which NumPy 2.4 refuses for arrays of one
# element; fixed in later Triton, whose function has the same shape.
_patch = interpreter._patch_lang_tensor
if len(inspect.signature(_patch).parameters) == 2:

    def _patch_lang_tensor(tensor, scope):
        _patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(-1)[0]))

    interpreter._patch_lang_tensor = _patch_lang_tensor

# When one jit function calls another, Triton looks through all of triton.language for what to replace, which the
# launch has done already: a third of the time.
_patch_lang, _patched = interpreter._patch_lang, []


def _patch_lang_once(fn):
    modules = {id(m) for m in fn.__globals__.values() if inspect.ismodule(m)}
    modules &= {id(tl), id(tl.core)}
    if any(modules <= done for done in _patched):
        return None  # only a launch uses what is returned
    scope = _patch_lang(fn)
    if not hasattr(scope, "restore"):
        return scope  # another Triton's
    restore = scope.restore

    def restored():
        _patched.clear()
        restore()

    _patched.append(modules)
    scope.restore = restored
    return scope


interpreter._patch_lang = _patch_lang_once


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
