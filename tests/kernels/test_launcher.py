"""What a program calls for a launch is what Triton's own launcher would call."""

import types

import pytest

pytest.importorskip("triton")

import triton
from triton.backends.nvidia.driver import CudaLauncher

from moe_inductor.kernels.launcher import READ, call_of


@pytest.fixture(autouse=True)
def driver(monkeypatch):
    """Newer launchers ask for the active driver, which a machine without a GPU does not have."""
    monkeypatch.setattr(triton.runtime.driver, "_active", types.SimpleNamespace())


def launcher(calls, **attributes):
    """Triton's class with all that its ``__call__`` reads, around a function that writes down its calls."""
    made = object.__new__(CudaLauncher)
    made.launch = lambda *given: calls.append(given)
    made.num_ctas = 1
    made.global_scratch_size = made.profile_scratch_size = 0
    made.global_scratch_align = made.profile_scratch_align = 1
    made.launch_cooperative_grid, made.launch_pdl, made.gsan_enabled = False, True, False
    made.arg_annotations, made.kernel_signature = ("annotations",), b"signature"
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def arguments(stream, address):
    grid, kernel = (3, 2, 1), (11, (4, 1, 512))
    return (*grid, stream, *kernel, None, None, None, address, 7, None, "silu", True, 0.5)


def test_the_call_is_the_launchers():
    calls = []
    one = launcher(calls)
    stream, address = object(), object()
    function, call = call_of(one, arguments(stream, address))
    assert not calls  # watched, not launched
    assert function is one.launch
    one(*arguments(stream, address))
    assert calls == [call]
    assert call != arguments(stream, address)  # it is not the launcher itself that is called


class Keeps:
    """Does not hand on what it is given, or not once."""

    def __init__(self, how):
        self.how = how

    def launch(self, *given):
        raise AssertionError("launched")

    def __call__(self, *given):
        if self.how == "takes one":
            self.launch(*given[:-1])
        elif self.how == "twice":
            self.launch(*given)
            self.launch(*given)
        elif self.how == "other order":
            self.launch(*given[::-1])
        elif self.how == "hands on":
            self.launch("more", *given)


@pytest.mark.parametrize("more", ["global_scratch_size", "profile_scratch_size", "gsan_enabled"])
def test_one_that_does_more_is_called_itself(more):
    given = arguments(object(), object())
    one = Keeps("hands on")
    assert call_of(one, given) != (one, given)
    setattr(one, more, 16)
    assert call_of(one, given) == (one, given)


def test_one_that_nobody_has_read_is_called_itself(monkeypatch):
    given = arguments(object(), object())
    one = Keeps("hands on")
    assert call_of(one, given) != (one, given)
    monkeypatch.setattr(triton, "__version__", "4.0.0")
    assert call_of(one, given) == (one, given)


def test_the_installed_one_was_read():
    """Read ``CudaLauncher.__call__`` before a version is added to READ."""
    assert ".".join(triton.__version__.split(".")[:2]) in READ


@pytest.mark.parametrize("how", ["takes one", "twice", "other order", "nothing"])
def test_one_that_is_unlike_those_we_know_is_called_itself(how):
    one = Keeps(how)
    given = arguments(object(), object())
    assert call_of(one, given) == (one, given)


def test_a_function_is_called_itself():
    given = arguments(object(), object())
    assert call_of(print, given) == (print, given)
