"""From a reference to Inductor patterns.

The reference of an experts spelling is traced with holes in place of what belongs to no spelling, and cut there into
three patterns for ``torch._inductor.pattern_matcher``:

    upper   from the block's output (the combine, the routing weight) to ``y``, what the second projection gives
    second  from ``y`` (the second projection) to ``hidden``
    first   from a first projection's result to the rows of each expert and to ``x``

Between ``second`` and ``first`` any activation may stand: it is recognised on its own (``activation.py``), once for all
spellings.  A projection is the same in every spelling up to its storage and its bias, so these vary by projection.

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
from moe_inductor.region.canonical import Autocast, trace
from moe_inductor.region.nodes import unviewed
from moe_inductor.region.normalise import normalise

_LIBRARY = torch.library.Library("moe_inductor_match", "DEF")
_LIBRARY.define("hole(Tensor gate_up) -> Tensor")
_LIBRARY.define("mark(Tensor y) -> Tensor")
_HOLE = torch.ops.moe_inductor_match.hole.default
_MARK = torch.ops.moe_inductor_match.mark.default


@torch.library.register_fake("moe_inductor_match::hole", lib=_LIBRARY)
def _hole(gate_up: torch.Tensor) -> torch.Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


@torch.library.register_fake("moe_inductor_match::mark", lib=_LIBRARY)
def _mark(y: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(y)


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What the structure of a traced reference can depend on: dtypes, device, autocast, and which sizes are 1."""

    x_dtype: torch.dtype
    weight_dtype: torch.dtype
    routing_dtype: torch.dtype
    device: torch.device
    num_tokens: int
    top_k: int
    autocast: Autocast | None = None
    num_experts: int = 4

    # Any multiples of 16 bytes would do; distinct ones make dumps readable.
    hidden_size: int = 64
    intermediate_size: int = 48


@dataclasses.dataclass(frozen=True)
class Projection:
    """How the weight of a projection is stored, ``[.., out, in]`` or ``[.., in, out]``, and whether it has a bias."""

    is_transposed: bool
    has_bias: bool


# Tried in this order: a transposed weight also matches where a transpose of a stored one is meant.
PROJECTIONS = tuple(Projection(t, b) for t in (False, True) for b in (False, True))


@dataclasses.dataclass(frozen=True, eq=False)
class Pieces:
    """upper: binds topk_ids, y (acc in a loop, topk_weights).  second: binds hidden, weight (bias, topk_ids).
    first: binds x, weight (bias, topk_ids, topk_weights).
    rows: in a loop without biases, what an expert reads: binds x, topk_ids (topk_weights).
    text: all that was traced, with its constants: facts that write the same here are one way of writing.
    """

    upper: PatternExpr
    second: PatternExpr
    first: PatternExpr
    rows: PatternExpr | None
    text: str


class _Hollow:
    """Experts with holes; a loop visits one of them."""

    def __init__(
        self,
        weights: list[torch.Tensor],
        biases: list[torch.Tensor],
        projection: Projection,
        num_experts: int,
    ) -> None:
        if projection.is_transposed:  # the spelling's own transpose then cancels in the normal form
            weights = [w.transpose(-2, -1) for w in weights]
        self.gate_up, self.down = weights
        self.biases = biases if projection.has_bias else [None, None]
        self.num_experts = num_experts

    def __call__(self, rows: torch.Tensor, linear: Linear) -> torch.Tensor:
        hidden = _HOLE(linear(rows, self.gate_up, self.biases[0]))
        return _MARK(linear(hidden, self.down, self.biases[1]))

    def __iter__(self) -> Iterator[tuple[int, Callable[[torch.Tensor], torch.Tensor]]]:
        yield 0, lambda rows: self(rows, torch.nn.functional.linear)


@contextlib.contextmanager
def _fakes() -> Iterator[FakeTensorMode]:
    env = ShapeEnv(allow_dynamic_output_shape_ops=True, allow_scalar_outputs=True)
    yield FakeTensorMode(shape_env=env, allow_non_fake_inputs=True)


def experts_pieces(
    spelling: ExpertsSpelling, facts: tuple, shapes: Shapes, projection: Projection
) -> Pieces | None:
    """The patterns of ``spelling`` with ``facts`` (sorted items), or None where the reference does not take tensors of
    these dtypes.  Cached: traced once per process."""
    return _experts_pieces(
        spelling.name,
        spelling.reference,
        spelling.loop,
        spelling.keeps_tokens,
        facts,
        shapes,
        projection,
    )


@functools.lru_cache(maxsize=4096)
def _experts_pieces(
    name: str,
    reference: Callable,
    loop: bool,
    keeps_tokens: bool,
    facts: tuple,
    shapes: Shapes,
    projection: Projection,
) -> Pieces | None:
    T, k, E = shapes.num_tokens, shapes.top_k, shapes.num_experts
    H, I = shapes.hidden_size, shapes.intermediate_size
    stack = () if loop else (E,)
    matrices = [(2 * I, H), (H, I)]
    if projection.is_transposed:
        matrices = [(inner, outer) for outer, inner in matrices]
    vectors = [(2 * I,), (H,)]

    def run(x, topk_ids, topk_weights, gate_up, down, gate_up_bias, down_bias):
        biases = [gate_up_bias, down_bias]
        experts = _Hollow([gate_up, down], biases, projection, shapes.num_experts)
        return reference(x, topk_ids, topk_weights, experts, **dict(facts))

    with _fakes() as fake_mode:
        with fake_mode:
            device = shapes.device
            args = [
                torch.empty(T, H, dtype=shapes.x_dtype, device=device),
                torch.empty(T, k, dtype=torch.int64, device=device),
                torch.empty(T, k, dtype=shapes.routing_dtype, device=device),
                *(
                    torch.empty(*stack, *m, dtype=shapes.weight_dtype, device=device)
                    for m in (*matrices, *vectors)
                ),
            ]
        try:
            traced = trace(run, args, fake_mode, shapes.autocast)
        except RuntimeError:  # GEMMs of two dtypes
            return None
        graph, _ = normalise(traced.graph)
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    x, topk_ids, topk_weights, gate_up, down, gate_up_bias, down_bias = placeholders
    routing = {x: "x", topk_ids: "topk_ids", topk_weights: "topk_weights"}
    (output,) = (n for n in graph.nodes if n.op == "output")
    (hole,) = (n for n in graph.nodes if n.target is _HOLE)
    (mark,) = (n for n in graph.nodes if n.target is _MARK)
    root = output.args[0]
    cuts = {**routing, mark: "y"}
    if loop:
        cuts[x if keeps_tokens else _start_of_sum(root, mark)] = "acc"
    first = unviewed(hole.args[0])
    has_rows = loop and not projection.has_bias
    return Pieces(
        upper=_pattern(root, cuts),
        second=_pattern(
            unviewed(mark.args[0]), {**routing, hole: "hidden", down: "weight", down_bias: "bias"}
        ),
        first=_pattern(first, {**routing, gate_up: "weight", gate_up_bias: "bias"}),
        rows=_pattern(_before_autocast(first.args[0], shapes), routing) if has_rows else None,
        text=str(graph),
    )


def _before_autocast(operand: Any, shapes: Shapes) -> fx.Node:
    """An operand of a GEMM without the cast that autocast made of it."""
    is_cast = operand.target is torch.ops.aten._to_copy.default
    if shapes.autocast is not None and is_cast and shapes.x_dtype != shapes.autocast.dtype:
        return operand.args[0]
    return operand


def _start_of_sum(root: fx.Node, mark: fx.Node) -> fx.Node:
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
            if arg not in seen and arg is not mark:
                seen.add(arg)
                todo.append(arg)
    raise ValueError("a loop spelling must add its experts up into a tensor of zeros")


@functools.lru_cache(maxsize=1024)
def _router_piece(reference: Callable, facts: tuple, shapes: Shapes) -> tuple[PatternExpr, Any]:
    def run(scores, choice):
        return reference(scores, choice, shapes.top_k, **dict(facts))[0]

    with _fakes() as fake_mode:
        with fake_mode:
            size = (shapes.num_tokens, shapes.num_experts)
            args = [torch.empty(size, dtype=shapes.x_dtype, device=shapes.device) for _ in range(2)]
        graph, _ = normalise(trace(run, args, fake_mode, shapes.autocast).graph)
    scores, choice = (n for n in graph.nodes if n.op == "placeholder")
    (output,) = (n for n in graph.nodes if n.op == "output")
    root = unviewed(output.args[0])
    return _pattern(root, {scores: "scores", choice: "choice"}), root.target


def router_piece(spelling: RouterSpelling, facts: tuple, shapes: Shapes) -> tuple[PatternExpr, Any]:
    """Pattern of the weights that the spelling looks up, down to ``choice`` and ``scores``, and the op at its root."""
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
