"""``if mask.any(): A else: B``, captured as both (``capture/fork.py``): A alone, where it gives what B gives.

B is executed for a mask of zeros only.  So both are traced with zeros for the mask, and have to be equal, expression by
expression.  A selects by the mask: ``x[mask]`` is then no row and ``x[~mask]`` every row, which is known here by what
each mask is filled with.  The blocks in A and B have been rewritten, and are one operator each.
"""

from __future__ import annotations

import operator
import os
from typing import Any

import torch
from torch import fx

from moe_inductor._compat import FakeTensor, OpOverload
from moe_inductor.capture.assumptions import Forked
from moe_inductor.prove.expressions import Numbering
from moe_inductor.reasons import Code, Refusal
from moe_inductor.region.canonical import State, states_of, trace, under
from moe_inductor.region.find import Region
from moe_inductor.region.nodes import (
    is_floating,
    is_random,
    is_tensor,
    location,
    mutated,
    name_of,
    node_arg,
    same_sizes,
    storages,
    tensors,
    value,
    written,
)
from moe_inductor.region.normalise import Emitter, normalise
from moe_inductor.rewrite.liveness import SIDE_EFFECTS, erase_unneeded, needed

aten = torch.ops.aten

_SWITCHES = frozenset({"_set_grad_enabled", "_enter_autocast", "_exit_autocast"})
# What is known not to fail for want of rows, besides functions of each element.
_OF_NO_ROWS = frozenset(
    {
        "view", "reshape", "_unsafe_view", "expand", "permute", "transpose", "t", "unsqueeze", "squeeze", "select",
        "slice", "split", "split_with_sizes", "chunk", "cat", "clone", "copy", "detach", "alias", "_to_copy",
        "lift_fresh_copy", "mm", "addmm", "bmm", "linear", "matmul", "_softmax", "sum", "cumsum", "any", "nonzero",
        "topk", "gather", "index", "index_put", "index_add", "scatter", "full", "zeros", "ones", "empty", "arange",
        "full_like", "zeros_like", "ones_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty",
        "getitem", "fused_experts", "topk_routing",
    }
)  # fmt: skip
# The result holds nothing but elements of the first argument.
_MOVES = frozenset(
    {
        "reshape", "view", "flatten", "unsqueeze", "squeeze", "expand", "contiguous", "transpose", "permute", "clone",
        "getitem", "repeat",
    }
)  # fmt: skip
_CASTS = frozenset({"to", "bool", "long", "int", "float"})
_NOT = frozenset({"invert", "logical_not", "bitwise_not"})
_COMPARE = {name: getattr(operator, name) for name in ("eq", "ne", "gt", "ge", "lt", "le")}
_WORDS = "test of a tensor: not known that the other branch gives what this one gives for zeros"


def prove_fork(gm: fx.GraphModule, fork: Forked) -> None:
    """Raises Refusal (ASSUMPTION, GRAD_STATE) where B may give something else than A."""
    where = os.path.basename(fork.location)
    nodes = _between(fork)
    made = set(nodes)
    inputs = list(dict.fromkeys(a for n in nodes for a in n.all_input_nodes if a not in made))
    if fork.zeros not in inputs:
        inputs.append(fork.zeros)
    _keep_to_themselves(fork, nodes, inputs, where)
    states = states_of(gm.graph)
    ambient = states[fork.test].grad_enabled
    if any(is_floating(n) and states[n].grad_enabled is not ambient for n in nodes):
        raise Refusal(Code.GRAD_STATE, "", where)
    fake = next(v for n in inputs if isinstance(v := value(n), FakeTensor))
    runner = _Both(gm, fork, nodes, inputs, states)
    try:
        traced = trace(runner, [value(n) for n in inputs], fake.fake_mode)
    except Refusal:
        raise
    except Exception as error:
        words = f"{_WORDS} ({type(error).__name__}: {str(error).strip().splitlines()[:1]})"
        raise Refusal(Code.ASSUMPTION, words, where) from error
    for node in traced.graph.nodes:
        if is_random(node.target):
            raise Refusal(Code.ASSUMPTION, f"{_WORDS}: random numbers are drawn", where)
        if not _takes_no_rows(node):
            words = f"{_WORDS}: `{name_of(node)}` of no rows"
            raise Refusal(Code.ASSUMPTION, words, location(node) or where)
    graph, _ = normalise(traced.graph, out=Emitter(keep_detach=True))
    (output,) = (n for n in graph.nodes if n.op == "output")
    numbering = Numbering()
    for some, none in output.args[0]:
        if numbering.number(_copied(some)) != numbering.number(_copied(none)):
            raise Refusal(Code.ASSUMPTION, _WORDS, where)


def take_first_way(fork: Forked) -> None:
    """What A makes takes the place of what was merged, and B goes."""
    graph = fork.test.graph
    nodes = [fork.test, *_between(fork), *fork.merged]
    for merged, (some, _) in zip(fork.merged, fork.made(), strict=True):
        merged.replace_all_uses_with(some)
    region = Region(graph, nodes, fork.test, fork.test)
    erase_unneeded(region, needed(region, lambda reader, node: False))


def _between(fork: Forked) -> list[fx.Node]:
    """What is computed after the test and before the ways meet."""
    order = list(fork.test.graph.nodes)
    start = order.index(fork.test) + 1
    end = next(i for i, n in enumerate(order) if n in fork.merged)
    return [n for n in order[start:end] if n.op.startswith("call")]


def _keep_to_themselves(
    fork: Forked, nodes: list[fx.Node], inputs: list[fx.Node], where: str
) -> None:
    """Neither way changes a tensor that is older, and what each makes are tensors of their own."""
    older = {s for n in inputs for s in storages(n)}
    if any(storages(target) & older for n in nodes for target in mutated(n)):
        raise Refusal(Code.ASSUMPTION, f"{_WORDS}: a tensor from outside is changed", where)
    for results in zip(*fork.made(), strict=True):
        taken = set(older)
        for result in results:
            if storages(result) & taken:
                words = f"{_WORDS}: a result is another tensor under a second name"
                raise Refusal(Code.ASSUMPTION, words, where)
            taken |= storages(result)


class _Both(fx.Interpreter):
    """Runs both ways with zeros for the mask.  Returns (a, b) for each local that is merged."""

    def __init__(
        self,
        gm: fx.GraphModule,
        fork: Forked,
        nodes: list[fx.Node],
        inputs: list[fx.Node],
        states: dict[fx.Node, State],
    ) -> None:
        super().__init__(gm, graph=fork.test.graph)
        self.fork, self.nodes, self.inputs, self.states = fork, nodes, inputs, states
        # What tensors that the mask is made into are filled with.
        self.filled: dict[fx.Node, bool | float] = {}
        self._where = os.path.basename(fork.location)

    def __call__(self, *args: Any) -> list[tuple[Any, Any]]:
        self.env = dict(zip(self.inputs, args, strict=True))
        self.filled = {self.fork.zeros: 0}
        for node in self.nodes:
            if name_of(node) in _SWITCHES or (name_of(node) in SIDE_EFFECTS and not node.users):
                continue
            with under(self.states[node].autocast):
                made, filled = self._step(node)
            if filled is not None:
                self.filled[node] = filled
            self.env[node] = made
        return [(self.env[some], self.env[none]) for some, none in self.fork.made()]

    def _step(self, node: fx.Node) -> tuple[Any, bool | float | None]:
        """What ``node`` makes, and what that is filled with if it is known."""
        known = {s for n in self.filled for s in storages(n)}
        if any(storages(target) & known for target in mutated(node)):
            raise Refusal(Code.ASSUMPTION, f"{_WORDS}: the mask is changed", self._where)
        name, args = name_of(node), node.args
        if name in ("getitem", "setitem") and self._is_known_mask(args[1]):
            tensor, mask = self.env[node_arg(node, 0)], node_arg(node, 1)
            if name == "getitem":
                return self._rows(tensor, mask), None
            if isinstance(args[2], fx.Node):
                return self._write(tensor, mask, self.env[args[2]]), None
        source = args[0] if args else None
        made = self.run_node(node)
        if not isinstance(source, fx.Node) or source not in self.filled:
            return made, None
        return made, self._filled(name, source, node)

    def _filled(self, name: str, source: fx.Node, node: fx.Node) -> bool | float | None:
        """A function of a tensor that is filled with one number is filled with one."""
        made, rest, name = value(node), node.args[1:], name.strip("_")  # __eq__ on torch 2.11
        if not isinstance(made, torch.Tensor) or any(map(is_tensor, node.all_input_nodes[1:])):
            return None
        number: Any = self.filled[source]
        if name in _NOT and (name == "logical_not" or value(source).dtype == torch.bool):
            number = not number
        elif name in _COMPARE and len(rest) == 1 and isinstance(rest[0], (bool, int, float)):
            number = _COMPARE[name](number, rest[0])
        elif name not in _CASTS and (name not in _MOVES or made.dtype != value(source).dtype):
            return None
        if made.dtype == torch.bool:
            return bool(number)
        return float(number) if made.dtype.is_floating_point else int(number)

    def _is_known_mask(self, index: Any) -> bool:
        if not isinstance(index, fx.Node) or index not in self.filled:
            return False
        return value(index).dtype == torch.bool and value(index).dim() > 0

    def _rows(self, tensor: torch.Tensor, mask: fx.Node) -> torch.Tensor:
        """``tensor[mask]``: all of them in their order, or none."""
        rows = tensor.reshape(-1, *tensor.shape[value(mask).dim() :])
        return rows if self.filled[mask] else rows[:0]

    def _write(self, tensor: torch.Tensor, mask: fx.Node, rows: Any) -> None:
        """``tensor[mask] = rows``"""
        old = self._rows(tensor, mask)
        if (
            not isinstance(rows, torch.Tensor)
            or not same_sizes(rows.shape, old.shape)
            or rows.dtype != tensor.dtype
        ):
            raise Refusal(Code.ASSUMPTION, f"{_WORDS}: other rows are written", self._where)
        if self.filled[mask]:
            tensor.copy_(rows.reshape(tensor.shape))


def _copied(node: fx.Node) -> fx.Node:
    """What all of the tensor was overwritten with."""
    while node.target is aten.copy.default:
        source = node_arg(node, 1)
        if value(source).dtype != value(node).dtype:
            return node
        if not same_sizes(value(source).shape, value(node).shape):
            return node
        node = source
    return node


def _takes_no_rows(node: fx.Node) -> bool:
    """A does run where the model runs B, with tensors of no rows.  Fake tensors do not say what fails for them."""
    read = [t for a in node.all_input_nodes for t in tensors(a)]
    if node.op != "call_function" or not any("0" in map(written, t.shape) for t in read):
        return True
    pointwise = isinstance(node.target, OpOverload) and torch.Tag.pointwise in node.target.tags
    return pointwise or name_of(node) in _OF_NO_ROWS
