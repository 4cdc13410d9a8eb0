"""What torch.compile asks of the ops: opcheck, exact fake implementations, no recompiles, no weight copies."""

import functools

import pytest
import torch
from oracle import storages, unit_scale_inputs
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code

from moe_inductor import ops

OPS = torch.ops.moe_inductor
NO_MORE = (
    [],
    [],
    [],
    False,
    False,
)  # no biases, gate and up not interleaved, routing weight on the output


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("storage", list(storages(unit_scale_inputs(1, 1, 1, 2, 1))))
@pytest.mark.parametrize("tokens", [1, 5])
def test_opcheck_experts(tokens, storage):
    data = unit_scale_inputs(tokens, 3, 2, 8, 4, dtype=torch.bfloat16)
    lists = [[w.detach().requires_grad_() for w in group] for group in storages(data)[storage]]
    args = (
        data.hidden_states.requires_grad_(),
        data.topk_ids,
        data.topk_weights.requires_grad_(),
        *lists,
        "silu",
        torch.float32,
    )
    torch.library.opcheck(OPS.fused_experts.default, (*args, *NO_MORE, False))


@pytest.mark.parametrize("per_expert", [False, True])
@pytest.mark.parametrize(("interleaved", "on_input"), [(True, False), (False, True)])
def test_opcheck_experts_with_biases(interleaved, on_input, per_expert):
    data = unit_scale_inputs(5, 3, 2, 8, 4, dtype=torch.float32)
    x, _, ids, weights, gate_up, down = data
    tensors = [gate_up, down, torch.randn(3, 8), torch.randn(3, 8)]
    lists = [list(t.unbind(0)) if per_expert else [t] for t in tensors]
    gate_up, down, gate_up_bias, down_bias = (
        [t.detach().clone().requires_grad_() for t in group] for group in lists
    )
    more = (gate_up_bias, [], down_bias, interleaved, on_input)
    args = (x.requires_grad_(), ids, weights.requires_grad_(), gate_up, [], down, "silu", x.dtype)
    torch.library.opcheck(OPS.fused_experts.default, (*args, *more, True))
    flags = [True] * (2 + 4 * len(gate_up))
    gate_up, down, gate_up_bias, down_bias = lists
    more = (gate_up_bias, [], down_bias, interleaved, on_input)
    backward = (torch.randn(5, 8), x.detach(), ids, weights.detach(), gate_up, [], down, "silu")
    torch.library.opcheck(
        OPS.fused_experts_backward.default,
        (*backward, flags, *more),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@pytest.mark.parametrize("storage", ["stacked", "stacked, transposed", "per expert, two"])
def test_opcheck_backward(storage):
    data = unit_scale_inputs(5, 3, 2, 8, 4, dtype=torch.bfloat16)
    lists = storages(data)[storage]
    flags = [True] * (2 + sum(map(len, lists)))
    args = (torch.randn(5, 8), *data[:1], *data[2:4], *lists, "silu")
    for needs in (flags, [False, *flags[1:]], [True, *[False] * (len(flags) - 1)]):
        torch.library.opcheck(
            OPS.fused_experts_backward.default,
            (*args, needs, *NO_MORE),
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16])
def test_opcheck_routing(renormalise, weights_dtype):
    logits = torch.randn(5, 6, requires_grad=True)
    torch.library.opcheck(OPS.topk_routing.default, (logits, 2, renormalise, weights_dtype))


@pytest.fixture(autouse=True)
def decompose_nothing(monkeypatch):
    """Inductor's table without what other tests of the same process had registered by importing the backend."""
    from torch._inductor import decomposition

    table = dict(decomposition.decompositions)
    table.pop(OPS.topk_routing.default, None)
    monkeypatch.setattr(decomposition, "decompositions", table)
    decomposition.fast_random_decomps.cache_clear()
    monkeypatch.setattr(
        decomposition,
        "fast_random_decomps",
        functools.cache(decomposition.fast_random_decomps.__wrapped__),
    )


class Block(torch.nn.Module):
    def __init__(self, lists, k=2):
        super().__init__()
        self.lists = [torch.nn.ParameterList(group) for group in lists]
        self.k = k

    def forward(self, x, logits):
        weights, ids = ops.topk_routing(logits, self.k, True, x.dtype)
        gate_up, up, down = (list(group) for group in self.lists)
        return ops.fused_experts(x * 2, ids, weights, gate_up, up, down, "silu", x.dtype) + x


# Inductor for one inference and one training case: compiling C++ is what costs in this file.
@pytest.mark.parametrize(
    ("backend", "per_expert", "training"),
    [
        ("inductor", False, False),
        ("inductor", True, True),
        ("aot_eager", True, False),
        ("aot_eager", False, True),
    ],
)
def test_dynamic_tokens_compile_once(backend, per_expert, training):
    data = unit_scale_inputs(40, 4, 2, 16, 8)
    block = Block(storages(data)["per expert" if per_expert else "stacked"])
    block.requires_grad_(training)
    for group in block.lists:
        group.requires_grad_(training)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(block, backend=counter, dynamic=True, fullgraph=True)
    for tokens in (7, 40, 3, 16, 2):
        x = data.hidden_states[:tokens].clone().requires_grad_(training)
        logits = data.router_logits[:tokens].clone().requires_grad_(training)
        results = []
        for run in (compiled, block):
            y = run(x, logits)
            results.append([y])
            if training:
                results[-1] += torch.autograd.grad(y.square().sum(), [x, logits])
        for ours, expected in zip(*results, strict=True):
            torch.testing.assert_close(ours, expected)
    assert counter.frame_count == 1


def test_static_sizes_zero_and_one():
    data = unit_scale_inputs(4, 4, 2, 16, 8)
    block = Block(storages(data)["stacked"])
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for tokens in (0, 1, 4):
        x, logits = data.hidden_states[:tokens], data.router_logits[:tokens]
        torch.testing.assert_close(compiled(x, logits), block(x, logits))


def test_unbacked_number_of_tokens():
    data = unit_scale_inputs(9, 4, 2, 16, 8)
    block = Block(storages(data)["stacked"])

    def run(x, logits, mask):
        rows = mask.nonzero().squeeze(-1)
        return block(x[rows], logits[rows])

    args = (data.hidden_states, data.router_logits, torch.arange(9) % 2 == 0)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*args), run(*args))


@pytest.mark.parametrize("storage", ["stacked, transposed", "per expert, two"])
def test_inductor_copies_no_weight(storage):
    data = unit_scale_inputs(6, 4, 2, 16, 8)
    block = Block(storages(data)[storage])
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        compiled = torch.compile(block, dynamic=False)
        out, (code, *_) = run_and_get_code(compiled, data.hidden_states, data.router_logits)
    torch.testing.assert_close(out, block(data.hidden_states, data.router_logits))
    assert code.count("moe_inductor.fused_experts") >= 1
    # One kernel before the op (x * 2), one after it (+ x); a weight copy would be a third.
    kernels = code.count("async_compile.cpp_pybinding(")
    assert kernels <= 2, code


def test_importing_the_ops_imports_neither_triton_nor_dynamo():
    import subprocess
    import sys

    code = (
        "import sys, torch; before = set(sys.modules); import moe_inductor.ops;"
        "new = set(sys.modules) - before;"
        "bad = [m for m in new if m.split('.')[0] == 'triton' or m.startswith(('torch._dynamo',"
        " 'torch._inductor', 'torch.fx', 'moe_inductor.ops.cuda', 'moe_inductor.kernels'))];"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_inductor_calls_ours_without_the_dispatcher(monkeypatch):
    """On CUDA; here the CPU stands in for it."""
    from moe_inductor import _compat

    registry = pytest.importorskip(
        "torch._inductor.codegen.custom_extern_kernel_codegen"
    ).CUSTOM_EXTERN_KERNEL_CODEGEN
    data = unit_scale_inputs(6, 4, 2, 16, 8)
    block = Block(storages(data)["stacked"])
    for op, function in (
        (OPS.fused_experts.default, "moe_inductor.ops.cpu.fused_experts"),
        (OPS.topk_routing.default, "moe_inductor.ops.cpu.topk_routing"),
    ):
        monkeypatch.setitem(registry, f"torch.ops.{op}", None)  # undone after the test
        _compat.call_directly(op, {"cpu": function})
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        compiled = torch.compile(block, dynamic=False)
        out, (code, *_) = run_and_get_code(compiled, data.hidden_states, data.router_logits)
    assert "= moe_inductor.ops.cpu.fused_experts(" in code
    assert "= moe_inductor.ops.cpu.topk_routing(" in code
    assert "= torch.ops.moe_inductor" not in code
    torch.testing.assert_close(out, block(data.hidden_states, data.router_logits))


def test_routing_on_cpu_is_compiled_with_what_surrounds_it(monkeypatch):
    from moe_inductor import _compat
    from moe_inductor.ops import cpu

    data = unit_scale_inputs(6, 4, 2, 16, 8)
    block = Block(storages(data)["stacked"])
    _compat.decompose(OPS.topk_routing.default, cpu.topk_routing, "cpu")
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        compiled = torch.compile(block, dynamic=False)
        out, (code, *_) = run_and_get_code(compiled, data.hidden_states, data.router_logits)
    assert "= torch.ops.moe_inductor.topk_routing" not in code
    torch.testing.assert_close(out, block(data.hidden_states, data.router_logits))


def test_routing_is_called_where_it_is_not_decomposed(monkeypatch):
    """As on CUDA; here the CPU is the device that it is not decomposed on."""
    from torch._inductor import lowering

    from moe_inductor import _compat
    from moe_inductor.ops import cpu

    op = OPS.topk_routing.default
    allowed = type(lowering.FALLBACK_ALLOW_LIST)(lowering.FALLBACK_ALLOW_LIST)
    allowed.discard(op.name())
    monkeypatch.setattr(lowering, "FALLBACK_ALLOW_LIST", allowed)
    monkeypatch.setattr("torch._inductor.graph.FALLBACK_ALLOW_LIST", allowed)
    monkeypatch.delitem(lowering.lowerings, op, raising=False)  # of an earlier compile
    data = unit_scale_inputs(6, 4, 2, 16, 8)
    block = Block(storages(data)["stacked"])
    _compat.decompose(op, cpu.topk_routing, "cuda")
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        compiled = torch.compile(block, dynamic=False)
        out, (code, *_) = run_and_get_code(compiled, data.hidden_states, data.router_logits)
    assert "moe_inductor.topk_routing" in code
    torch.testing.assert_close(out, block(data.hidden_states, data.router_logits))


def test_the_option_makes_the_block_batch_invariant():
    torch.manual_seed(0)
    gate_up, down = torch.randn(8, 320, 96) / 96**0.5, torch.randn(8, 96, 160) / 160**0.5

    def block(x, router_logits):
        topk_weights, topk_ids = torch.topk(router_logits.softmax(-1), 2)
        gate, up = torch.einsum("ti,taoi->tao", x, gate_up[topk_ids]).chunk(2, dim=-1)
        h = torch.nn.functional.silu(gate) * up
        y = torch.einsum("tai,taoi->tao", h, down[topk_ids])
        return torch.einsum("tao,ta->to", y, topk_weights)

    x, router_logits = torch.randn(70, 96), torch.randn(70, 8)
    options = {"moe_inductor.strict": True, "moe_inductor.batch_invariant": True}
    compiled = torch.compile(block, backend="moe_inductor", options=options)
    whole = compiled(x, router_logits)
    torch.testing.assert_close(whole, block(x, router_logits))
    for rows in (slice(3, 4), slice(10, 19)):
        assert torch.equal(compiled(x[rows], router_logits[rows]), whole[rows])
