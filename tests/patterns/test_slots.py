"""Tokens sent to slots: the normal form, run, gives what the model gives, whoever is dropped."""

from __future__ import annotations

import copy

import pytest
import torch
from moe_inductor.patterns import capacity_slots
from torch import fx, nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call

from moe_inductor.region.canonical import trace
from moe_inductor.region.normalise import normalise
from moe_inductor.region.row_ops import PAIR_LINEAR

aten = torch.ops.aten

BLOCKS = [sample.build for sample in capacity_slots.CAPACITY_SLOTS.samples]


def normal_form(fn, tensors):
    mode = FakeTensorMode()
    graph, _ = normalise(trace(fn, [mode.from_tensor(t) for t in tensors], mode).graph)
    for node in graph.find_nodes(op="call_function", target=aten.view.default):
        node.target = aten.reshape.default  # strides mean nothing in the normal form
    return fx.GraphModule(nn.Module(), graph)


def of_module(module, x):
    """The normal form of a module, as a function of x and its parameters, and these."""
    names = [name for name, _ in module.named_parameters()]
    tensors = [x, *(p.detach() for p in module.parameters())]

    def run(x, *parameters):
        return functional_call(module, dict(zip(names, parameters, strict=True)), (x,))

    return normal_form(run, tensors), tensors


@pytest.mark.parametrize("build", BLOCKS, ids=lambda b: b.__name__)
def test_normal_form_gives_what_the_model_gives(build):
    torch.manual_seed(0)
    module, x = build().double(), torch.randn(30, 32, dtype=torch.float64)
    if build is not capacity_slots.Slots and isinstance(module.capacity, int):
        module.capacity = 5
    form, tensors = of_module(module, x)
    targets = [node.target for node in form.graph.nodes]
    assert PAIR_LINEAR in targets
    ids = [n for n in form.graph.nodes if n.target is aten.where.ScalarOther and n.args[2] == -1]
    dropped = 0
    for node in ids:  # what it is, is told by an interpreter that stops there
        found = copy.deepcopy(form.graph)
        output = next(n for n in found.nodes if n.op == "output")
        output.args = (next(n for n in found.nodes if n.name == node.name),)
        dropped += (fx.GraphModule(nn.Module(), found)(*tensors) < 0).sum().item()
    assert dropped > 0 or build is capacity_slots.Everybody, "nobody is dropped: nothing was tested"
    torch.testing.assert_close(form(*tensors), module(x))


@pytest.mark.parametrize("capacity", [1, 2, 3, 64])
def test_any_capacity(capacity, rewritten):
    """One slot is no axis, and is refused; more than enough drop nobody."""
    torch.manual_seed(1)
    module, x = capacity_slots.Gates(), torch.randn(29, 32)
    module.capacity = capacity
    compiled = rewritten(module)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), module(x))
    (block,) = compiled.blocks
    assert block.fused is (capacity > 1)


class Layers(nn.Module):
    """Two layers with a residual stream, and a loss that reads the masks and the scores of each."""

    def __init__(self):
        super().__init__()
        self.first, self.second = capacity_slots.Gates(), capacity_slots.Groups()

    def forward(self, x):
        loss = 0.0
        for layer in (self.first, self.second):
            scores = layer.scores(layer.gate(x))
            best = nn.functional.one_hot(scores.argmax(-1), scores.shape[-1]).float()
            loss = loss + (best.mean(0) * scores.mean(0)).sum()
            x = x + layer(x)
        return x, loss


def test_layers_and_their_losses(rewritten):
    torch.manual_seed(2)
    module, x = Layers(), torch.randn(30, 32, requires_grad=True)
    compiled = rewritten(module)

    def step(run):
        out, loss = run(x)
        return [
            out,
            loss,
            *torch.autograd.grad(out.square().sum() + loss, [x, *module.parameters()]),
        ]

    for mine, theirs in zip(step(compiled), step(module), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert [block.fused for block in compiled.blocks] == [True, True]


def test_two_random_tensors_are_two():
    """What is drawn twice is not one expression."""

    def noise(x):
        return torch.rand_like(x) - torch.rand_like(x)

    drawn = normal_form(noise, [torch.randn(3)]).graph.find_nodes(
        op="call_function", target=aten.rand_like.default
    )
    assert len(drawn) == 2
