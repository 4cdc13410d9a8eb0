"""The router's product, the routing and the experts as one op, in Inductor's graphs: the CPU stands for the GPU."""

import operator
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch.utils.checkpoint import checkpoint

from moe_inductor import _compat
from moe_inductor.ops import cpu
from moe_inductor.rewrite import whole_block
from tests.oracle import assert_within_fp64_rule


class Loop(nn.Module):
    """A block with everything that the joined op has to pass on, as ``options`` say."""

    def __init__(self, E=5, k=2, H=24, I=16, bias=False, sigmoid=False, shared=False):
        super().__init__()
        self.k, self.sigmoid = k, sigmoid
        self.gate = nn.Linear(H, E, bias=bias)
        self.correction = nn.Parameter(torch.randn(E)) if sigmoid else None
        self.gate_up = nn.Parameter(torch.randn(E, 2 * I, H) / H**0.5)
        self.down = nn.Parameter(torch.randn(E, H, I) / I**0.5)
        self.shared = nn.Linear(H, H) if shared else None
        self.returned = ""

    def forward(self, x):
        rows = x.flatten(0, -2)
        logits = self.gate(rows)
        if self.sigmoid:
            scores = logits.sigmoid()
            ids = (scores + self.correction).topk(self.k, dim=-1).indices
            weights = scores.gather(1, ids)
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * 2.5
        else:
            weights, ids = logits.softmax(-1).topk(self.k, dim=-1)
        out = torch.zeros_like(rows)
        for e in range(self.gate_up.shape[0]):
            token, slot = torch.where(ids == e)
            gate, up = F.linear(rows[token], self.gate_up[e]).chunk(2, -1)
            y = F.linear(F.silu(gate) * up, self.down[e]) * weights[token, slot, None]
            out.index_add_(0, token, y)
        if self.shared is not None:
            out = out + self.shared(rows)
        out = out.view(x.shape)
        return (
            (out, {"logits": logits, "weights": weights, "ids": ids}[self.returned])
            if self.returned
            else out
        )


class Product(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(24, 5))

    def forward(self, rows):
        return rows @ self.weight


@pytest.fixture(autouse=True)
def cpu_as_gpu(monkeypatch):
    monkeypatch.setattr(whole_block, "DEVICES", {"cpu"})
    _compat.decompose(whole_block.ROUTING, cpu.topk_routing, "cuda")
    yield
    _compat.decompose(whole_block.ROUTING, cpu.topk_routing, "cpu")
    torch._dynamo.reset()


def run(model, *inputs, **options):
    """The compiled model's result, and the ops that Inductor's code calls."""
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="moe_inductor", options=options)
    with torch._inductor.config.patch(force_disable_caches=True):
        result, codes = run_and_get_code(compiled, *inputs)
    names = ("fused_moe", "fused_experts", "topk_routing")
    calls = re.findall(
        r"= (?:torch\.ops\.moe_inductor|moe_inductor\.ops\.cpu)\.(\w+)", "\n".join(codes)
    )
    found = [name for name in names if name in calls]
    return result, found


def check(model, x):
    model = model.to(x.dtype)
    with torch.no_grad():
        result, found = run(model, x)
        exact = model.double()(x.double())
        eager = model.to(x.dtype)(x)
    assert_within_fp64_rule(result, eager, exact)
    return found


VARIANTS = {
    "plain": {},
    "bias": {"bias": True},
    "sigmoid": {"sigmoid": True},
    "shared expert": {"shared": True},
    "top 1": {"k": 1},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(1, 24), (2, 3, 24)])
def test_joined(variant, shape):
    torch.manual_seed(0)
    assert check(Loop(**VARIANTS[variant]), torch.randn(shape)) == ["fused_moe"]


def test_joined_under_a_dynamic_number_of_tokens():
    torch._dynamo.reset()
    model = Loop()
    compiled = torch.compile(model, backend="moe_inductor", dynamic=True)
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        _, codes = run_and_get_code(compiled, torch.randn(3, 24))
        assert "= torch.ops.moe_inductor.fused_moe" in "".join(codes)
        for T in (3, 7, 12):
            x = torch.randn(T, 24)
            torch.testing.assert_close(compiled(x), model(x))


class Transposed(Loop):
    """Weights stored [E, in, out]."""

    def __init__(self):
        super().__init__()
        self.gate_up = nn.Parameter(self.gate_up.mT.contiguous())
        self.down = nn.Parameter(self.down.mT.contiguous())

    def forward(self, x):
        weights, ids = self.gate(x).softmax(-1).topk(self.k, dim=-1)
        out = torch.zeros_like(x)
        for e in range(self.gate_up.shape[0]):
            token, slot = torch.where(ids == e)
            gate, up = (x[token] @ self.gate_up[e]).chunk(2, -1)
            y = (F.silu(gate) * up) @ self.down[e] * weights[token, slot, None]
            out.index_add_(0, token, y)
        return out


def test_no_weight_is_copied():
    torch.manual_seed(0)
    model, x = Transposed(), torch.randn(4, 24)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="moe_inductor")
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        out, (code, *_) = run_and_get_code(compiled, x)
        torch.testing.assert_close(out, model(x))
    assert "fused_moe" in code
    assert "async_compile.cpp_pybinding(" not in code  # not one kernel beside the op


@pytest.mark.parametrize("returned", ["logits", "weights", "ids"])
def test_what_is_also_returned_is_not_joined(returned):
    torch.manual_seed(0)
    model = Loop()
    model.returned = returned
    x = torch.randn(4, 24)
    with torch.no_grad():
        (out, more), found = run(model, x)
        wanted, wanted_more = model(x)
    assert found == ["fused_experts", "topk_routing"]
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(more, wanted_more)


def test_training_is_not_joined():
    torch.manual_seed(0)
    model, x = Loop(), torch.randn(4, 24, requires_grad=True)
    out, found = run(model, x)
    assert found == ["fused_experts", "topk_routing"]
    out.sum().backward()
    grad, x.grad = x.grad, None
    model(x).sum().backward()
    torch.testing.assert_close(grad, x.grad)


class Checkpointed(Loop):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


def test_a_router_that_is_computed_twice_is_not_joined():
    """The forward pass keeps nothing of it, but both passes must choose the same experts."""
    torch.manual_seed(0)
    model, x = Checkpointed(), torch.randn(4, 24, requires_grad=True)
    out, found = run(model, x)
    assert "fused_moe" not in found
    out.sum().backward()
    grad, x.grad = x.grad, None
    model(x).sum().backward()
    torch.testing.assert_close(grad, x.grad)


def test_batch_invariant_is_not_joined():
    with torch.no_grad():
        _, found = run(Loop(), torch.randn(4, 24), **{"moe_inductor.batch_invariant": True})
    assert found == ["fused_experts", "topk_routing"]


def test_a_weight_stored_the_other_way_is_not_joined():
    model = Loop()
    model.gate = Product()
    with torch.no_grad():
        _, found = run(model, torch.randn(4, 24))
    assert found == ["fused_experts", "topk_routing"]


def test_nothing_is_joined_on_a_cpu(monkeypatch):
    monkeypatch.setattr(whole_block, "DEVICES", {"cuda"})
    assert check(Loop(), torch.randn(4, 24)) == ["fused_experts", "topk_routing"]


CHANGES = {
    "nothing": True,
    "a view of the weight that is no transpose": False,
    "ids and weights swapped": False,
    "ids of another routing": False,
    "a write in between": False,
    "a write before": True,
    "a factor on the product": False,
    "a bias for each expert": True,
    "a bias for all experts": False,
}


@pytest.mark.parametrize("change", CHANGES)
def test_joined_is_what_means_the_same(change):
    """On a graph as Inductor's, written by hand: torch makes none of these of a model that would be fused."""
    graph = torch.fx.Graph()

    def placeholder(name, *shape):
        node = graph.placeholder(name)
        node.meta["val"] = torch.empty(shape)
        return node

    def call(target, *args, **kwargs):
        return graph.call_function(target, args, kwargs)

    x, weight = placeholder("x", 3, 4), placeholder("weight", 4, 4)
    gate_up, down = placeholder("gate_up", 4, 6, 4), placeholder("down", 4, 4, 3)
    aten = torch.ops.aten
    if change == "a write before":
        call(aten.copy_.default, x, x)
    dims = [0, 1] if change == "a view of the weight that is no transpose" else [1, 0]
    transposed = call(aten.permute.default, weight, dims)
    if change in ("a factor on the product", "a bias for each expert", "a bias for all experts"):
        bias = placeholder("bias", 1 if change == "a bias for all experts" else 4)
        factor = {"beta": 2} if change == "a factor on the product" else {}
        logits = call(aten.addmm.default, bias, x, transposed, **factor)
    else:
        logits = call(aten.mm.default, x, transposed)
    if change == "a write in between":
        call(aten.copy_.default, weight, weight)
    routed = call(whole_block.ROUTING, logits, 2, True, torch.float32)
    parts = [call(operator.getitem, routed, i) for i in range(2)]
    if change == "ids of another routing":
        other = call(whole_block.ROUTING, x, 2, True, torch.float32)
        parts[0] = call(operator.getitem, other, 0)
    if change == "ids and weights swapped":
        parts.reverse()
    weights, ids = parts
    out = call(whole_block.EXPERTS, x, ids, weights, [gate_up], [], [down], "silu", torch.float32)
    out.meta["val"] = torch.empty(3, 4)
    graph.output(out)
    whole_block.join(out)
    joined = any(node.target is whole_block.BLOCK for node in graph.nodes)
    assert joined is CHANGES[change]


def test_an_error_in_joining_is_told_and_nothing_is_fused(monkeypatch, caplog):
    def broken(*args):
        raise ValueError("no such thing")

    monkeypatch.setattr(whole_block.Block, "of", broken)
    caplog.set_level("INFO", "moe_inductor")
    assert check(Loop(), torch.randn(3, 24)) == []
    assert "internal error of moe_inductor (ValueError: no such thing)" in caplog.text
