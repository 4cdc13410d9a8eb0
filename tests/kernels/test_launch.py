"""Programs: repeated launches are the launches that the JIT would make, argument by argument.

Kernels are replaced by stubs on CPU tensors.  A stub asks Triton's own binder (for sm_90) what it specialises the
arguments on, and a compiled stub fails when it is launched with arguments of another specialisation.
"""

import itertools
import threading
import types

import pytest
import torch

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_inductor.kernels import (
    align,
    combine,
    decode,
    down,
    gate_up,
    launch,
    program,
    router_logits,
    router_pieces,
    routing,
)
from moe_inductor.ops import cuda
from moe_inductor.ops.block import Block
from moe_inductor.ops.check import Call, Routing

BACKEND = make_backend(GPUTarget("cuda", 90, 32))
MODULES = (align, combine, decode, down, gate_up, router_logits, router_pieces, routing)


def facts(descriptor):
    return descriptor.shape, descriptor.strides, descriptor.block_shape


class Compiled:
    """As much of a CompiledKernel as a program touches."""

    function, packed_metadata = 1, (2,)

    def __init__(self, specialisation, names, values, log):
        self.specialisation, self.names, self.values, self.log = specialisation, names, values, log

    @property
    def run(self):
        return Launcher(self.launch)

    def launch(self, x, y, z, stream, function, scratch, packed, *rest):
        *hooks, values = rest
        assert (function, scratch, packed, hooks) == (1, None, (2,), [None, None, None])
        assert stream == 77
        now = []
        for name, value, first in zip(self.names, values, self.values, strict=True):
            if isinstance(first, TensorDescriptor):
                assert facts(value) == facts(first)
                assert value.base.data_ptr() % 16 == 0
                now.append(value.base.data_ptr())
            elif isinstance(first, torch.Tensor):
                assert isinstance(value, int)
                assert (value % 16 == 0) == (first.data_ptr() % 16 == 0), name
                now.append(value)
            else:
                assert (type(value), value) == (type(first), first), name
        self.log.append(("repeated", self.names[0], (x, y, z), self.specialisation, now))


class Launcher:
    """Around the function that launches, as Triton has it; a program calls the function."""

    global_scratch_size = profile_scratch_size = 0

    def __init__(self, launch):
        self.launch = self.real = launch

    def __call__(self, x, y, z, stream, function, packed, metadata, enter, leave, *values):
        assert self.launch is not self.real
        self.launch(x, y, z, stream, function, None, packed, metadata, enter, leave, values)


class Kernel:
    def __init__(self, jit, log):
        self.log = log
        self.arg_names = jit.arg_names
        self.bind = create_function_from_signature(jit.signature, jit.params, BACKEND)

    def __getitem__(self, grid):
        def run(*args, **meta):
            bound, specialisation, _ = self.bind(*args, **meta)
            values = list(bound.values())
            assert list(bound) == self.arg_names
            tensors = [v.base if isinstance(v, TensorDescriptor) else v for v in values]
            addresses = [t.data_ptr() for t in tensors if isinstance(t, torch.Tensor)]
            full = (*grid, 1, 1)[:3]
            # With what a descriptor is made of, which Triton does not look at.
            boxes = [facts(value) for value in values if isinstance(value, TensorDescriptor)]
            specialisation = str((specialisation, boxes))
            self.log.append(("jit", self.arg_names[0], full, specialisation, addresses))
            return Compiled(specialisation, self.arg_names, values, self.log)

        return run


@pytest.fixture
def log(monkeypatch):
    """Every launch: how it was made, the kernel's first argument's name, grid, Triton's specialisation, addresses."""
    entries = []
    for module in MODULES:
        jits = {n: v for n, v in vars(module).items() if hasattr(v, "arg_names")}
        for name, jit in jits.items():
            monkeypatch.setattr(module, name, Kernel(jit, entries))
    monkeypatch.setattr(cuda, "repeatable", lambda tensor: True)
    monkeypatch.setattr(cuda, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(cuda, "_PROGRAMS", launch.Programs())
    driver = types.SimpleNamespace(get_current_stream=lambda device: 77)
    monkeypatch.setattr(launch.triton.runtime.driver, "_active", driver)
    return entries


E, K, H, I = 8, 2, 256, 256


def unaligned(tensor):
    flat = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:]
    assert flat.data_ptr() % 16
    return flat.view(tensor.shape).copy_(tensor)


def draw(T=3, dtype=torch.bfloat16, weights_dtype=None, ids=torch.int64, h=H, i=I):
    return {
        "hidden_states": torch.randn(T, h).to(dtype),
        "topk_ids": torch.randint(E, (T, K), dtype=ids),
        "topk_weights": torch.rand(T, K).to(weights_dtype or dtype),
        "gate_up_proj": [torch.randn(E, 2 * i, h).to(dtype)],
        "up_proj": [],
        "down_proj": [torch.randn(E, h, i).to(dtype)],
        "activation": "silu",
        "out_dtype": dtype,
    }


def scattered(stacked, unaligned=(), gap=256, row_gap=0):
    """Its matrices as separate tensors, last first and with gaps, but near each other as on a GPU."""
    rows, columns = stacked[0].shape
    size = rows * (columns + row_gap)
    memory = torch.empty(len(stacked) * (size + gap) + 64, dtype=stacked.dtype)
    memory = memory[-memory.data_ptr() % 64 // memory.element_size() :]
    starts = [place * (size + gap) + (place in unaligned) for place in range(len(stacked))]
    return [
        memory[start : start + size].view(rows, -1)[:, :columns].copy_(w)
        for start, w in zip(starts[::-1], stacked, strict=True)
    ]


def unstack(call, **how):
    lists = ("gate_up_proj", "up_proj", "down_proj")
    return call | {n: [w for t in call[n] for w in scattered(t, **how)] for n in lists}


def separate(call):
    gate, up = call["gate_up_proj"][0].chunk(2, 1)
    return call | {"gate_up_proj": [gate.contiguous()], "up_proj": [up.contiguous()]}


def biased(call):
    rows = {n: call[n][0].shape[:2] for n in ("gate_up_proj", "down_proj")}
    return call | {
        n.replace("proj", "bias"): [torch.randn(s).to(call["out_dtype"])] for n, s in rows.items()
    }


def transposed(call):
    return call | {n: [call[n][0].mT.contiguous().mT] for n in ("gate_up_proj", "down_proj")}


def wide(call):
    """Rows of hidden_states further apart than H."""
    x = call["hidden_states"]
    return call | {"hidden_states": torch.cat([x, x], 1)[:, :H]}


VARIANTS = {
    "plain": lambda: draw(),
    "one token": lambda: draw(T=1),
    "T=2": lambda: draw(T=2),
    "T=16": lambda: draw(T=16),
    "T=100": lambda: draw(T=100),
    "T=2000": lambda: draw(T=2000),
    "H not a multiple of 16": lambda: draw(h=250),
    "H=1": lambda: draw(h=1),
    "I not a multiple of 16": lambda: draw(i=250),
    "fp16": lambda: draw(dtype=torch.float16),
    "fp32": lambda: draw(dtype=torch.float32),
    "weights in fp32": lambda: draw(weights_dtype=torch.float32),
    "ids in int32": lambda: draw(ids=torch.int32),
    "out in fp32": lambda: draw() | {"out_dtype": torch.float32},
    "activation": lambda: draw() | {"activation": "mul(gelu(g),u)"},
    "biases": lambda: biased(draw()),
    "interleaved": lambda: draw() | {"interleaved": True},
    "weight on input": lambda: draw() | {"weight_on_input": True},
    "separate": lambda: separate(draw()),
    "transposed": lambda: transposed(draw()),
    "list": lambda: unstack(draw()),
    "T=2000, list": lambda: unstack(draw(T=2000)),
    "T=2000, list 256 bytes apart": lambda: unstack(draw(T=2000), gap=128),
    "T=2000, list 16 bytes apart": lambda: unstack(draw(T=2000), gap=8),
    "T=2000, list of longer rows": lambda: unstack(draw(T=2000), row_gap=64),
    "T=2000, list, separate": lambda: unstack(separate(draw(T=2000))),
    "T=2000, separate": lambda: separate(draw(T=2000)),
    "T=2000, interleaved": lambda: draw(T=2000) | {"interleaved": True},
    "T=2000, transposed": lambda: transposed(draw(T=2000)),
    "T=2000, gate transposed": lambda: (
        transposed(c := draw(T=2000)) | {"down_proj": c["down_proj"]}
    ),
    "T=2000, up transposed": lambda: (
        (c := separate(draw(T=2000))) | {"up_proj": [c["up_proj"][0].mT.contiguous().mT]}
    ),
    "T=2000, unaligned list": lambda: (
        unstack(c := draw(T=2000)) | {"down_proj": scattered(c["down_proj"][0], range(E))}
    ),
    "list, separate": lambda: unstack(separate(draw())),
    "wide rows": lambda: wide(draw()),
    **{
        f"unaligned {name}": lambda name=name: draw() | {name: unaligned(draw()[name])}
        for name in ("hidden_states", "topk_ids", "topk_weights")
    },
    **{
        f"unaligned {name}": lambda name=name: draw() | {name: [unaligned(draw()[name][0])]}
        for name in ("gate_up_proj", "down_proj")
    },
    "unaligned bias": lambda: (
        biased(draw()) | {"down_bias": [unaligned(torch.randn(E, H).bfloat16())]}
    ),
    "unaligned list": lambda: (
        unstack(c := draw()) | {"down_proj": scattered(c["down_proj"][0], range(E))}
    ),
    "one unaligned": lambda: (
        unstack(c := draw()) | {"down_proj": scattered(c["down_proj"][0], [3])}
    ),
}


def kinds(entries):
    return {kind for kind, *_ in entries}


@pytest.mark.parametrize("variant", VARIANTS)
def test_repeated_launches_are_the_jits(variant, log):
    """The third call of a kind repeats: same kernels, grids, values, and the addresses of its own tensors."""
    make = VARIANTS[variant]
    for _ in range(2):
        cuda.fused_experts(**make())
    assert kinds(log) == {"jit"}
    assert len(cuda._PROGRAMS) == 1
    for _ in range(2):
        call = make()
        log.clear()
        out = cuda.fused_experts(**call)
        repeated = list(log)
        assert kinds(repeated) == {"repeated"}
        log.clear()
        cuda._PROGRAMS.clear()
        cuda.fused_experts(**call)
        assert [entry[1:4] for entry in repeated] == [entry[1:4] for entry in log]
        tensors = [t for v in call.values() for t in (v if isinstance(v, list) else [v])]
        known = {t.data_ptr() for t in tensors if isinstance(t, torch.Tensor)}
        for (*_, now), (*_, fresh) in zip(repeated, log, strict=True):
            assert len(now) == len(fresh)
            assert [a for a in fresh if a in known] == [a for a in now if a in known]
        assert out.data_ptr() in repeated[-1][-1]
        cuda.fused_experts(**call)  # writes the program again, for the second round


def test_every_specialisation_has_its_own_program(log):
    """Programs of all variants exist side by side; the stubs fail where one ran for another's arguments."""
    for _ in range(4):
        for make in VARIANTS.values():
            cuda.fused_experts(**make())
    assert len(cuda._PROGRAMS) == len(VARIANTS)
    assert log[-1][0] == "repeated"


def test_routing_is_repeated(log):
    for T, dtype, k, columns in [(1, torch.bfloat16, 2, 8), (1, torch.float32, 2, 8), (1, torch.bfloat16, 3, 8),
                                 (2, torch.bfloat16, 2, 8), (2, torch.bfloat16, 2, 16)]:  # fmt: skip
        for expected in ("jit", "jit", "repeated"):
            logits = torch.randn(T, columns).to(dtype)[:, :8]
            log.clear()
            weights, ids = cuda.topk_routing(logits, k, True, dtype)
            ((kind, _, grid, _, addresses),) = log
            assert (kind, grid) == (expected, (T, 1, 1))
            assert addresses == [logits.data_ptr(), weights.data_ptr(), ids.data_ptr()]
    assert len(cuda._PROGRAMS) == 5


def block(call, x=None, dtype=torch.bfloat16, bias=None, **routing):
    """The arguments of fused_moe, whose router reads ``x``."""
    x = call["hidden_states"] if x is None else x
    weight = torch.randn(E, H).to(dtype)
    facts = Routing(x, K, True, dtype, **routing)
    return Block.of(x, weight, bias, facts, Call(**call))


@pytest.mark.parametrize("T", [1, 5, 40])
def test_a_block_is_repeated_in_one_program(T, log):
    for _ in range(2):
        cuda.fused_moe(*block(draw(T=T)))
    assert len(cuda._PROGRAMS) == 1
    arguments = block(draw(T=T))
    log.clear()
    out = cuda.fused_moe(*arguments)
    repeated = list(log)
    assert kinds(repeated) == {"repeated"}
    log.clear()
    cuda._PROGRAMS.clear()
    cuda.fused_moe(*arguments)
    assert [entry[1:4] for entry in repeated] == [entry[1:4] for entry in log]
    product, route, *_, last = (addresses for *_, addresses in repeated)
    x, weight = arguments[:2]
    assert product[:2] == [x.data_ptr(), weight.data_ptr()]
    assert product[-1] == route[0]  # the logits, that nobody else sees
    assert out.data_ptr() in last


@pytest.mark.parametrize("biased", [False, True])
def test_a_router_in_pieces_is_repeated_too(biased, log):
    x, weight = torch.randn(8, 2048).bfloat16(), torch.randn(64, 2048).bfloat16()
    bias = torch.randn(64).bfloat16() if biased else None
    call = Call(**draw(T=8))
    for _ in range(3):
        log.clear()
        cuda.fused_moe(*Block.of(x, weight, bias, Routing(x, K, True, torch.bfloat16), call))
    assert kinds(log) == {"repeated"}
    (_, product, grid, _, first), (_, route, _, _, second) = log[:2]
    assert (product, route, grid) == ("x_ptr", "logits_ptr", (1, 4, 16))
    assert first[:2] == [x.data_ptr(), weight.data_ptr()]
    assert second[: 1 + biased] == [first[-1], *([bias.data_ptr()] if biased else [])]


def test_another_number_of_tokens_is_not_another_specialisation_of_the_router(log):
    """T, and what is a multiple of it, may be 1 or a multiple of 16 or not."""
    weight = torch.randn(130, 2048).bfloat16()
    seen = {}
    for T in (48, 49):
        x = torch.randn(T, 2048).bfloat16()
        log.clear()
        call = Call(**draw(T=T))
        cuda.fused_moe(*Block.of(x, weight, None, Routing(x, K, True, torch.bfloat16), call))
        seen[T] = [specialisation for *_, specialisation, _ in log[:2]]
    assert seen[48] == seen[49]


@pytest.mark.parametrize(("T", "H", "E"), [(1, 64, 8), (8, 2048, 64), (2, 10**6, E)])
def test_only_the_first_kernel_of_a_call_waits_for_nobody(T, H, E, monkeypatch):
    """``early.py``: it starts as launches do by themselves."""
    first = []

    def launch_(kernel, grid, *args, first_=first, **meta):
        first_.append(meta.get("first", False))

    for module in MODULES:
        monkeypatch.setattr(module, "launch", launch_)
    x, weight = torch.randn(T, H).bfloat16(), torch.randn(E, H).bfloat16()
    routing = Routing(x, K, True, torch.bfloat16)
    cuda.fused_moe(*Block.of(x, weight, None, routing, Call(**draw(T=T))))
    assert first == [True] + [False] * (len(first) - 1)
    assert len(first) >= 3


@pytest.mark.parametrize("T", [1, 8])
@pytest.mark.parametrize("wrong", ["another H", "another dtype of the bias"])
def test_a_router_that_does_not_fit_is_an_error(T, wrong, log):
    x, weight = torch.randn(T, 2048).bfloat16(), torch.randn(64, 2048).bfloat16()
    bias = None
    if wrong == "another H":
        weight = weight[:, :1024]
    else:
        bias = torch.randn(64)
    routing = Routing(x, K, True, torch.bfloat16)
    with pytest.raises(RuntimeError):
        cuda.fused_moe(*Block.of(x, weight, bias, routing, Call(**draw(T=T))))
    assert not log


def test_a_block_whose_router_is_large_is_made_of_parts(log):
    call = draw(T=2)
    weight = torch.randn(E, 10**6).bfloat16()
    x = torch.randn(2, 10**6).bfloat16()
    facts = Routing(x, K, True, torch.bfloat16)
    for _ in range(3):
        cuda.fused_moe(*Block.of(x, weight, None, facts, Call(**call)))
    assert len(cuda._PROGRAMS) == 2  # the routing, the experts


def test_facts_of_the_routing_make_another_program(log):
    for facts in (
        {},
        {"scale": 2.0},
        {"score": "sigmoid"},
        {"bias": torch.randn(E).bfloat16()},
        {"groups": 2, "fill": float("-inf")},
    ) * 3:
        log.clear()
        cuda.fused_moe(*block(draw(), **facts))
    assert len(cuda._PROGRAMS) == 5
    assert kinds(log) == {"repeated"}


def test_facts_of_lists_make_another_program(log):
    """With few and with many tokens, where the step between experts is a descriptor's."""
    for T in (1, 2000):
        cuda._PROGRAMS.clear()
        for how in ({}, {"gap": 128}, {"gap": 8}, {"unaligned": [3]}) * 3:
            log.clear()
            cuda.fused_moe(*block(unstack(draw(T=T), **how)))
        assert len(cuda._PROGRAMS) >= 2
        assert kinds(log) == {"repeated"}


def test_what_each_projection_is_made_of():
    call = unstack(separate(draw()))
    names = ("gate_up_proj", "up_proj", "down_proj")
    biases = [[torch.randn(E, 4)] for _ in names]
    experts = cuda._Experts.of(*(call[name] for name in names), *biases)
    for name, (bias,), made in zip(names, biases, experts.projections(False), strict=True):
        assert made.base.data_ptr() == min(tensor.data_ptr() for tensor in call[name])
        assert torch.equal(made.bias, bias)
        assert made.from_table
        assert (made.out_features, made.in_features) == call[name][0].shape


def test_strides_that_change_do_not_make_calls_slow(log):
    """Programs of one kind are gone through one after another, so there are few of a kind."""
    for width in range(H, H + 40, 8):
        for _ in range(2):
            x = torch.randn(3, width).bfloat16()[:, :H]
            cuda.fused_experts(**draw() | {"hidden_states": x})
    assert len(cuda._PROGRAMS) == 5
    assert [len(some) for some in cuda._PROGRAMS._programs.values()] == [1] * 5


def test_facts_of_the_experts_make_another_program(log):
    options = ({}, {"batch_invariant": True}, {"weight_on_input": True}, {"interleaved": True})
    for facts in (*options, {"activation": "gelu"}, {"out_dtype": torch.float32}) * 2:
        cuda.fused_moe(*block(draw() | facts))
    assert len(cuda._PROGRAMS) == 6


class Like:
    """As much of a tensor as a program asks for, with some facts of its own."""

    def __init__(self, tensor, device=None, strides=None, offset=0, **facts):
        self.shape, self.dtype = tensor.shape, tensor.dtype
        self.__dict__.update(facts)
        self.data_ptr = lambda: tensor.data_ptr() + offset
        self.stride = lambda: strides or tensor.stride()
        self.get_device = lambda: tensor.get_device() if device is None else device


@pytest.mark.parametrize("index", range(5))
@pytest.mark.parametrize(
    "other",
    [
        {"shape": torch.Size([7])},
        {"strides": (1,)},
        {"dtype": torch.float64},
        {"device": 1},
        {"offset": 8},
    ],
    ids=lambda other: next(iter(other)),
)
def test_every_fact_of_every_input_is_compared(other, index, log):
    call = biased(draw())
    for _ in range(2):
        cuda.fused_experts(**call)
    ((written,),) = cuda._PROGRAMS._programs.values()
    experts = cuda._Experts.of(call["gate_up_proj"], [], call["down_proj"], call["gate_up_bias"])
    inputs = [*list(call.values())[:3], *experts.tensors, None, call["down_bias"][0]]
    log.clear()
    assert written.run(*(None if t is None else Like(t) for t in inputs)) is not None
    assert kinds(log) == {"repeated"}
    log.clear()
    places = [i for i, tensor in enumerate(inputs) if tensor is not None]
    inputs[places[index]] = Like(inputs[places[index]], **other)
    assert written.run(*inputs) is None
    inputs[places[index]] = None
    assert written.run(*inputs) is None
    assert not log


@pytest.mark.parametrize("what", ["results", "scratch"])
def test_memory_that_is_not_aligned_is_not_used(what, log, monkeypatch):
    def empty(sizes, strides, dtype):
        memory = torch.empty(sizes, dtype=dtype)
        return unaligned(memory) if (dtype is torch.uint8) == (what == "scratch") else memory

    monkeypatch.setattr(program, "empty_on", lambda device: empty)
    for _ in range(3):
        log.clear()
        cuda.fused_experts(**draw())
    assert len(cuda._PROGRAMS) == 1
    assert kinds(log) == {"jit"}


def test_one_weight_twice_is_not_two_weights(log):
    """Written down with one tensor as gate and as up; then these are two of the same kind."""
    call = separate(draw())
    for _ in range(3):
        cuda.fused_experts(**call | {"up_proj": call["gate_up_proj"]})
    assert log[-1][0] == "repeated"
    log.clear()
    cuda.fused_experts(**call)
    assert kinds(log) == {"jit"}
    addresses = {a for *_, entry in log for a in entry}
    assert {call[n][0].data_ptr() for n in ("gate_up_proj", "up_proj")} <= addresses


def test_one_input_twice_is_not_two_inputs(log):
    """Written down with one tensor as the router's input and the experts'; then these are two of the same kind."""
    for _ in range(2):
        cuda.fused_moe(*block(draw()))
    call, other = draw(), draw()["hidden_states"]
    log.clear()
    cuda.fused_moe(*block(call, x=other))
    assert kinds(log) == {"jit"}
    addresses = [a for *_, entry in log for a in entry]
    assert {other.data_ptr(), call["hidden_states"].data_ptr()} <= set(addresses)
    for _ in range(2):
        log.clear()
        cuda.fused_moe(*block(call, x=other))
    assert kinds(log) == {"repeated"}  # both kinds of calls have a program
    log.clear()
    cuda.fused_moe(*block(call))
    assert kinds(log) == {"repeated"}


def test_a_moved_parameter_is_found(log):
    call = draw()
    for _ in range(3):
        cuda.fused_experts(**call)
    call["down_proj"][0].data = torch.randn(E, H, I).bfloat16()
    log.clear()
    cuda.fused_experts(**call)
    assert kinds(log) == {"repeated"}
    assert any(call["down_proj"][0].data_ptr() in entry[-1] for entry in log)
    call["down_proj"][0].data = torch.randn(E, I, H).bfloat16().mT  # same shape, other strides
    log.clear()
    cuda.fused_experts(**call)
    assert kinds(log) == {"jit"}


def test_a_copied_input_is_not_repeated(log):
    """hidden_states with strided columns are copied by an operator, which a program does not run."""
    for _ in range(4):
        call = draw()
        call["hidden_states"] = call["hidden_states"].T.contiguous().T
        cuda.fused_experts(**call)
    assert kinds(log) == {"jit"}
    assert len(cuda._PROGRAMS) == 0


def test_a_result_that_no_kernel_writes_is_not_repeated(log):
    for _ in range(4):
        call = draw()
        empty = call["topk_ids"][:, :0], call["topk_weights"][:, :0]
        call |= {"topk_ids": empty[0], "topk_weights": empty[1]}
        assert torch.equal(cuda.fused_experts(**call), torch.zeros(3, H).bfloat16())


def test_scratch_of_a_program_is_one_piece(log):
    for _ in range(3):
        log.clear()
        cuda.fused_experts(**draw(T=100))
    by_kernel = [addresses for *_, addresses in log]
    (_, *alignment), slot_outputs = by_kernel[0], by_kernel[-1][0]
    pieces = sorted({*alignment, slot_outputs, by_kernel[2][0]})
    assert len(pieces) == 6
    assert all((b - a) % 256 == 0 for a, b in itertools.pairwise(pieces))


def test_hooks_are_served(log, monkeypatch):
    for _ in range(3):
        cuda.fused_experts(**draw())
    assert log[-1][0] == "repeated"
    monkeypatch.setattr(launch, "_hooked", lambda: True)
    log.clear()
    cuda.fused_experts(**draw())
    assert kinds(log) == {"jit"}


def test_hooks_are_seen(monkeypatch):
    assert not launch._hooked()
    monkeypatch.setattr(launch.triton.knobs.runtime, "launch_exit_hook", print)
    assert launch._hooked()


def test_bounded(log, monkeypatch):
    monkeypatch.setattr(cuda, "_PROGRAMS", launch.Programs(limit=4))
    for T in (1, 2, 3, 4, 5, 6) * 3:
        for _ in range(3):
            cuda.fused_experts(**draw(T=T))
            assert len(cuda._PROGRAMS) <= 4


def test_threads_do_not_mix(log):
    """Recordings belong to a thread."""
    errors = []

    def work(T):
        try:
            for _ in range(20):
                call = draw(T=T)
                assert cuda.fused_experts(**call).shape == (T, H)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(T,)) for T in (1, 2, 3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
