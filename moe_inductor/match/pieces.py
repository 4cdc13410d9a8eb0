"""From a reference to Inductor patterns.

The reference of an experts spelling is traced with a hole in place of the expert MLP's activation.  What lies above
the hole (the second GEMM, the routing weight, the combine) and what lies below it (the rows of each expert, the
first GEMM) become two patterns for ``torch._inductor.pattern_matcher``.  In between, any activation may stand: it
is recognised on its own (``activation.py``), once for all spellings.

Patterns are coarse on purpose: ints, floats, lists and devices are wildcards and any number of readers is accepted.
A match only proposes; constants are compared by ``prove/`` and readers by ``rewrite/``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from moe_inductor._compat import (
    MULTIPLE,
    FakeTensorMode,
    PatternExpr,
    ShapeEnv,
    fx_to_pattern,
    make_optional,
    pattern_children,
)
from moe_inductor.match.api import ExpertsSpelling, Linear, RouterSpelling
from moe_inductor.region.canonical import trace
from moe_inductor.region.normalise import normalise

_LIBRARY = torch.library.Library("moe_inductor_match", "DEF")
_LIBRARY.define("hole(Tensor gate_up) -> Tensor")
_HOLE = torch.ops.moe_inductor_match.hole.default


@torch.library.register_fake("moe_inductor_match::hole", lib=_LIBRARY)
def _hole(gate_up: torch.Tensor) -> torch.Tensor:
    return gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2))


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What the structure of a traced reference can depend on: dtypes, device, which sizes are 1, and whether
    weights are stored ``[.., out, in]`` or, ``is_transposed``, ``[.., in, out]``."""

    x_dtype: torch.dtype
    weights_dtype: torch.dtype
    device: torch.device
    num_tokens: int
    top_k: int
    is_transposed: bool = False
    num_experts: int = 4

    # Any multiples of 16 bytes would do; distinct ones make dumps readable.
    hidden_size: int = 64
    intermediate_size: int = 48


@dataclasses.dataclass(frozen=True, eq=False)
class Pieces:
    """upper: binds topk_ids, topk_weights, hidden, down (and acc in a loop).  lower: binds x, topk_ids, gate_up."""

    upper: PatternExpr
    lower: PatternExpr
    upper_root: Any
    lower_root: Any


class _Hollow:
    """Experts with a hole for the activation; a loop visits one of them."""

    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor, shapes: Shapes) -> None:
        if shapes.is_transposed:  # the spelling's own transpose then cancels in the normal form
            gate_up, down = gate_up.transpose(-2, -1), down.transpose(-2, -1)
        self.gate_up, self.down, self.num_experts = gate_up, down, shapes.num_experts

    def __call__(self, rows: torch.Tensor, linear: Linear) -> torch.Tensor:
        return linear(_HOLE(linear(rows, self.gate_up)), self.down)

    def __iter__(self) -> Iterator[tuple[int, Callable[[torch.Tensor], torch.Tensor]]]:
        yield 0, lambda rows: self(rows, torch.nn.functional.linear)


@contextlib.contextmanager
def _fakes() -> Iterator[FakeTensorMode]:
    env = ShapeEnv(allow_dynamic_output_shape_ops=True, allow_scalar_outputs=True)
    yield FakeTensorMode(shape_env=env, allow_non_fake_inputs=True)


def experts_pieces(spelling: ExpertsSpelling, facts: tuple, shapes: Shapes) -> Pieces:
    """The two patterns of ``spelling`` with ``facts`` (sorted items).  Cached: traced once per process."""
    return _experts_pieces(spelling.name, spelling.reference, spelling.loop, facts, shapes)


@functools.lru_cache(maxsize=1024)
def _experts_pieces(
    name: str, reference: Callable, loop: bool, facts: tuple, shapes: Shapes
) -> Pieces:
    T, k, E = shapes.num_tokens, shapes.top_k, shapes.num_experts
    H, I = shapes.hidden_size, shapes.intermediate_size
    stack = () if loop else (E,)
    matrices = [(2 * I, H), (H, I)]
    if shapes.is_transposed:
        matrices = [(inner, outer) for outer, inner in matrices]

    def run(x, topk_ids, topk_weights, gate_up, down):
        return reference(x, topk_ids, topk_weights, _Hollow(gate_up, down, shapes), **dict(facts))

    with _fakes() as fake_mode:
        with fake_mode:
            device = shapes.device
            args = [
                torch.empty(T, H, dtype=shapes.x_dtype, device=device),
                torch.empty(T, k, dtype=torch.int64, device=device),
                torch.empty(T, k, dtype=shapes.weights_dtype, device=device),
                *(torch.empty(*stack, *m, dtype=shapes.x_dtype, device=device) for m in matrices),
            ]
        graph, _ = normalise(trace(run, args, fake_mode).graph)
    names = ["x", "topk_ids", "topk_weights", "gate_up", "down"]
    holders = dict(zip((n for n in graph.nodes if n.op == "placeholder"), names, strict=True))
    (output,) = (n for n in graph.nodes if n.op == "output")
    (hole,) = (n for n in graph.nodes if n.target is _HOLE)
    root = output.args[0]
    cuts = {**holders, hole: "hidden"}
    if loop:
        cuts[_start_of_sum(root, hole)] = "acc"
    upper = _pattern(root, cuts)
    lower = _pattern(hole.args[0], holders)
    return Pieces(upper, lower, root.target, hole.args[0].target)


def _start_of_sum(root: fx.Node, hole: fx.Node) -> fx.Node:
    """The zeros that a loop's sum starts from: the fill nearest to the root that has the root's shape."""
    todo, seen = [root], set()
    while todo:
        node = todo.pop(0)
        if (
            node.target is torch.ops.aten.full.default
            and node.meta["val"].shape == root.meta["val"].shape
        ):
            return node
        for arg in node.all_input_nodes:
            if arg not in seen and arg is not hole:
                seen.add(arg)
                todo.append(arg)
    raise ValueError("a loop spelling must add its experts up into a tensor of zeros")


@functools.lru_cache(maxsize=1024)
def _router_piece(reference: Callable, facts: tuple, shapes: Shapes) -> tuple[PatternExpr, Any]:
    def run(router_logits):
        return reference(router_logits, shapes.top_k, **dict(facts))[0]

    with _fakes() as fake_mode:
        with fake_mode:
            size = (shapes.num_tokens, shapes.num_experts)
            args = [torch.empty(size, dtype=shapes.x_dtype, device=shapes.device)]
        graph, _ = normalise(trace(run, args, fake_mode).graph)
    (holder,) = (n for n in graph.nodes if n.op == "placeholder")
    (output,) = (n for n in graph.nodes if n.op == "output")
    return _pattern(output.args[0], {holder: "router_logits"}), output.args[0].target


def router_piece(spelling: RouterSpelling, facts: tuple, shapes: Shapes) -> tuple[PatternExpr, Any]:
    """Pattern of ``topk_weights`` down to ``router_logits``, and the op at its root."""
    return _router_piece(spelling.reference, facts, shapes)


def _pattern(root: fx.Node, cuts: dict[fx.Node, str]) -> PatternExpr:
    """Pattern of the expression at ``root``; nodes in ``cuts`` become keyword arguments of that name."""
    graph, env, names = fx.Graph(), {}, []
    for node, name in cuts.items():
        env[node] = graph.placeholder(name)
        names.append(name)

    def copy(node: fx.Node) -> fx.Node:
        if node not in env:
            for arg in node.all_input_nodes:
                copy(arg)
            env[node] = graph.node_copy(node, lambda a: env[a])
        return env[node]

    graph.output(copy(root))
    pattern = fx_to_pattern(
        fx.GraphModule({}, graph),
        ignore_types=(int, float, bool, list, torch.device),
        argnames=names,
    )
    for part in pattern_children(pattern):
        part.users = MULTIPLE
    make_optional(pattern, torch.ops.aten.view.default)
    return pattern
