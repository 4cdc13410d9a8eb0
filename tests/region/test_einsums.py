"""The normal form of einsums with all experts' weights, run: it gives what the einsum gives, whatever the letters."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import fx
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from moe_inductor.region.canonical import trace
from moe_inductor.region.normalise import normalise

aten = torch.ops.aten
# All different, but for the last test: a rule that takes one dimension for another then gives another shape.
SIZES = {"t": 5, "e": 3, "h": 8, "i": 6, "b": 2}

ORDERS = ["".join(letters) for letters in itertools.permutations("tei")]


def tensor(letters, sizes=SIZES):
    return torch.randn([sizes[letter] for letter in letters], dtype=torch.float64)


def normal_form(fn, *tensors):
    mode = FakeTensorMode()
    graph, _ = normalise(trace(fn, [mode.from_tensor(t) for t in tensors], mode).graph)
    for node in graph.find_nodes(op="call_function", target=aten.view.default):
        node.target = aten.reshape.default  # strides mean nothing in the normal form
    return fx.GraphModule(torch.nn.Module(), graph)


def check(fn, *tensors, of_experts=True):
    module = normal_form(fn, *tensors)
    torch.testing.assert_close(module(*tensors), fn(*tensors))
    if of_experts:  # else nothing was tested
        weights = [n for n in module.graph.nodes if n.target is aten.bmm.default]
        assert [n.meta["val"].shape[0] for n in weights] == [SIZES["e"]] * len(weights) != []


@pytest.mark.parametrize("out", ORDERS)
@pytest.mark.parametrize("weight", ["".join(letters) for letters in itertools.permutations("ehi")])
def test_projection(weight, out):
    """A stack has E in front; of others, only that nothing is taken for one."""
    tensors = tensor("th"), tensor(weight)
    stacked = weight[0] == "e"
    check(lambda x, w: torch.einsum(f"th,{weight}->{out}", x, w), *tensors, of_experts=stacked)


@pytest.mark.parametrize("equation", ["bth,ehi->beti", "bth,eih->tbei", "htb,ihe->ebti"])
def test_projection_of_sequences(equation):
    x, w = equation.split("->")[0].split(",")
    check(lambda a, b: torch.einsum(equation, a, b), tensor(x), tensor(w), of_experts=False)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("down", "out"), [("eih", "teh"), ("hei", "eth"), ("ihe", "hte")])
@pytest.mark.parametrize("scores", ["te", "et"])
def test_block(order, down, out, scores):
    """Projection, function, projection, weighted sum."""

    def block(x, w, v, s):
        hidden = F.silu(torch.einsum(f"th,ehi->{order}", x, w))
        y = torch.einsum(f"{order},{down}->{out}", hidden, v)
        return torch.einsum(f"{out},{scores}->th", y, s)

    tensors = tensor("th"), tensor("ehi"), tensor(down), tensor(scores)
    check(block, *tensors, of_experts=down[0] == "e")


@pytest.mark.parametrize("order", ORDERS)
def test_both_sums_at_once(order):
    def block(x, w, v, s):
        hidden = torch.einsum(f"th,ehi->{order}", x, w)
        scored = torch.einsum(f"{order},te->{order}", hidden, s)
        return torch.einsum(f"{order},eih->th", scored, v)

    check(block, tensor("th"), tensor("ehi"), tensor("eih"), tensor("te"))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "equation",
    ["{o},eih->th", "{o},eih->teh", "{o},teh->ih", "{o},eh->tih", "{o},th->eih", "{o},te->ti"],
)
def test_any_dimension_may_be_summed(order, equation):
    """Equal sizes: only the letters say which dimension is meant."""
    sizes = dict.fromkeys("tehib", 4)
    equation = equation.format(o=order)
    other = equation.split("->")[0].split(",")[1]

    def block(x, w, v):
        return torch.einsum(equation, torch.einsum(f"th,ehi->{order}", x, w), v)

    check(block, tensor("th", sizes), tensor("ehi", sizes), tensor(other, sizes), of_experts=False)


@pytest.mark.parametrize("paired", [True, False])
def test_experts_meet_their_own_weights(paired):
    """One sum over E and I together: with the two exchanged on one side, each expert reads what others computed."""
    sizes = dict.fromkeys("tehi", 4)

    def block(x, w, v):
        hidden = torch.einsum("th,ehi->tei", x, w)
        hidden = hidden if paired else hidden.mT
        return hidden.reshape(4, 16) @ v.reshape(16, 4)

    tensors = (tensor(letters, sizes) for letters in ("th", "ehi", "eih"))
    check(block, *tensors, of_experts=False)
