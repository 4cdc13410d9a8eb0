"""A program by itself: what it allocates, on which stream it launches, what it keeps, and what it cannot repeat."""

import gc
import types
import weakref

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_inductor.kernels.program import Program, Step


class Compiled:
    """A compiled kernel that writes down what it is launched with."""

    function, packed_metadata = 1, (2,)

    def __init__(self):
        self.launches = launches = []

        def run(x, y, z, stream, function, packed, metadata, enter, leave, *values):
            launches.append((stream, values))

        self.run = run  # knows nothing of the kernel, as Triton's launcher


@pytest.fixture(autouse=True)
def streams(monkeypatch):
    driver = types.SimpleNamespace(get_current_stream=lambda device: ("stream of", device))
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)


def step(*values):
    names = [f"argument_{i}" for i in range(len(values))]
    return Step(Compiled(), types.SimpleNamespace(arg_names=names), (1,), values, {})


def test_pieces_of_scratch_do_not_overlap():
    x, out = torch.empty(8), torch.empty(8)
    sizes = {torch.float32: 300, torch.int64: 33, torch.bfloat16: 129, torch.uint8: 1}
    pieces = [torch.empty(n, dtype=dtype) for dtype, n in sizes.items()]
    one = step(x, *pieces, out)
    program = Program.of([x], [out], pieces, [one])
    program.run(x)
    ((_, (_, *starts, _)),) = one.compiled.launches
    for start, following, piece in zip(starts, starts[1:], pieces, strict=False):
        assert following - start >= piece.numel() * piece.itemsize
        assert start % 16 == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64])
def test_results_are_like_those_of_the_call(dtype):
    x, out = torch.empty(8), torch.empty((3, 5), dtype=dtype)
    (result,) = Program.of([x], [out], [], [step(x, out)]).run(x)
    assert (result.shape, result.stride(), result.dtype) == (out.shape, out.stride(), dtype)
    assert result.data_ptr() != out.data_ptr()


def test_the_stream_is_that_of_the_results_device():
    x, out = torch.empty(8), torch.empty(8)
    one = step(x, out)
    Program.of([x], [out], [], [one]).run(x)
    assert [stream for stream, _ in one.compiled.launches] == [("stream of", out.device.index)]


def test_no_tensor_is_kept_but_the_kernel_is():
    x, out, weight = torch.empty(8), torch.empty(8), torch.empty(64, 64)
    one = step(x, TensorDescriptor.from_tensor(weight, [16, 64]), out)
    program = Program.of([x, weight], [out], [], [one])
    program.run(x, other := torch.empty(64, 64))
    ((_, (_, descriptor, _)),) = one.compiled.launches
    assert descriptor.base.data_ptr() == other.data_ptr()
    assert (tuple(descriptor.shape), descriptor.block_shape) == ((64, 64), [16, 64])
    tensors = [weakref.ref(tensor) for tensor in (x, out, weight)]
    kernel = weakref.ref(one.compiled)
    del x, out, weight, one, descriptor
    gc.collect()
    assert [tensor() for tensor in tensors] == [None] * 3
    assert kernel() is not None
    assert program.run is not None


def touched(tensor):
    return tensor.zero_()


def strided(tensor):
    return torch.empty(16)[::2]


def unaligned(tensor):
    return torch.empty(9)[1:]


@pytest.mark.parametrize("how", [touched, strided, unaligned])
@pytest.mark.parametrize("which", ["result", "scratch"])
def test_memory_that_an_operator_had_in_hand_is_not_repeated(how, which):
    x = torch.empty(8)
    memory = {"result": torch.empty(8), "scratch": torch.empty(8)}
    assert Program.of([x], [memory["result"]], [memory["scratch"]], [step(x, *memory.values())])
    memory[which] = how(memory[which])
    launch = step(x, *memory.values())
    assert Program.of([x], [memory["result"]], [memory["scratch"]], [launch]) is None


def test_a_kernel_that_is_not_compiled_is_not_repeated():
    """What the interpreter's launches return."""
    x, out = torch.empty(8), torch.empty(8)
    one = step(x, out)
    one.compiled = None
    assert Program.of([x], [out], [], [one]) is None
