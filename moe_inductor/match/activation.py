"""What an expert does between its two GEMMs, recognised once for all spellings."""

from __future__ import annotations

import dataclasses

import torch
from torch import fx

from moe_inductor.description import Activation
from moe_inductor.reasons import Code, Refusal
from moe_inductor.region.nodes import location, name_of, node_arg, value

aten = torch.ops.aten

# The one table of activations: ATen op -> name in the description.  ops/ and kernels/ know the same names.
ACTIVATIONS: dict[object, Activation] = {aten.silu.default: "silu"}


@dataclasses.dataclass(frozen=True)
class GatedUnit:
    """``hidden = activation(gate) * up``.

    gate, up: the GEMM results they come from, one and the same node when ``is_concatenated``.
    """

    activation: Activation
    gate: fx.Node
    up: fx.Node
    is_concatenated: bool


def read_activation(hidden: fx.Node) -> GatedUnit:
    """``hidden [rows, I]`` -> GatedUnit.  Raises Refusal (ACTIVATION, GATE_ORDER, LAYOUT)."""
    operands = hidden.all_input_nodes
    if hidden.target is not aten.mul.Tensor or len(operands) != 2:
        raise Refusal(
            Code.ACTIVATION,
            f"`{name_of(hidden)}` stands where `act(gate) * up` is expected",
            location(hidden),
        )
    found = [n for n in operands if n.target in ACTIVATIONS]
    if len(found) != 1:
        names = " * ".join(name_of(n) for n in operands)
        known = ", ".join(ACTIVATIONS.values())
        raise Refusal(
            Code.ACTIVATION,
            f"activation `{names}` is not one of: {known}",
            location(hidden),
        )
    (activated,) = found
    (up,) = (n for n in operands if n is not activated)
    gate = node_arg(activated, 0)
    activation = ACTIVATIONS[activated.target]
    if not (_is_slice(gate) or _is_slice(up)):
        return GatedUnit(activation, gate, up, is_concatenated=False)
    return _halves(activation, gate, up)


def _is_slice(node: fx.Node) -> bool:
    return node.target is aten.slice.Tensor


def _halves(activation: Activation, gate: fx.Node, up: fx.Node) -> GatedUnit:
    """Both are cut from one GEMM's ``[rows, 2I]``: gate the first half, up the second."""
    for half in (gate, up):
        if not _is_slice(half):
            raise Refusal(
                Code.ACTIVATION,
                f"`{name_of(half)}` stands between the projection and the activation",
                location(half),
            )
    if gate.args[0] is not up.args[0]:
        raise Refusal(Code.LAYOUT, "gate and up are not halves of one projection", location(gate))
    source = node_arg(gate, 0)
    width = value(source).shape[-1]
    last = value(source).dim() - 1
    first_half, second_half = (last, 0, width // 2), (last, width // 2, width)
    if (gate.args[1:], up.args[1:]) == (first_half, second_half):
        return GatedUnit(activation, source, source, is_concatenated=True)
    if (gate.args[1:], up.args[1:]) == (second_half, first_half):
        raise Refusal(Code.GATE_ORDER, "", location(gate))
    raise Refusal(
        Code.LAYOUT,
        "gate and up are not the first and the second half of one projection",
        location(gate),
    )
