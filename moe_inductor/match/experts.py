"""Propose blocks: run the patterns of every spelling over a region's normal form and read what they bound.

Upper piece, second projection, activation and first projection are matched from the output towards the input; the first
spelling that goes all the way wins.  When none does, the refusal that got furthest is the one worth telling.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import sympy
import torch
from torch import fx

from moe_inductor._compat import (
    Match,
    OpOverload,
    PatternExpr,
    size_expr,
)
from moe_inductor.description import Combine, Experts, MoE
from moe_inductor.match.activation import Gated, read_activation
from moe_inductor.match.api import ExpertsSpelling, combinations
from moe_inductor.match.bind import Bound, Weight, check_experts
from moe_inductor.match.diagnose import OVER_ROWS, UNTOLD
from moe_inductor.match.loop import MLP, Group, Iteration, group_iterations
from moe_inductor.match.pieces import PROJECTIONS, Pieces, Shapes, experts_pieces
from moe_inductor.match.widened import widened
from moe_inductor.reasons import Code, Refusal
from moe_inductor.region.buffers import is_part
from moe_inductor.region.canonical import Canonical, Folded
from moe_inductor.region.distinct import are_distinct, kept_of
from moe_inductor.region.nodes import location, name_of, same_sizes, unviewed, value
from moe_inductor.region.rows import hits
from moe_inductor.unit import parse

# How many operators to look at between the experts and the sum over them.
_AFTER_PROJECTION = 24
# Casting GEMMs: their operands may differ in dtype in the model.
_STACK = torch.ops.aten.stack.default
_CASTING = (
    "aten::_grouped_mm",
    "transformers::grouped_mm_fallback",
    "moe_inductor_region::pair_linear",  # a grouped GEMM of sorted rows
)


def propose(
    canonical: Canonical, spellings: list[ExpertsSpelling], refused: list[Refusal]
) -> Iterator[list[Bound]]:
    """For each way of writing that matches, all its blocks; why near ones failed is appended to ``refused``."""
    present = {_op_name(n) for n in canonical.graph.nodes}
    for spelling in spellings:
        if spelling.anchor not in present:
            continue
        tried: set[tuple[Shapes, str]] = set()
        for facts, shapes in itertools.product(
            combinations(spelling.facts), _shapes(canonical, spelling.anchor)
        ):
            attempt = _Attempt(spelling, facts, shapes, canonical.folded)
            pieces = attempt.pieces(0)
            if pieces is None or (shapes, pieces.text) in tried:
                continue
            tried.add((shapes, pieces.text))
            found, failed = attempt.run(find_all(canonical.graph, pieces.upper))
            refused += failed
            if found:
                yield found
    refused += _replaced_rows(canonical)
    refused += widened(canonical.graph)


def _replaced_rows(canonical: Canonical) -> Iterator[Refusal]:
    """Rows of an expert that are put into a sum where something may have been."""
    for node in canonical.graph.nodes:
        if node.target is not torch.ops.aten.index_put.default or len(node.args[1]) != 1:
            continue
        of_expert = hits(node.args[1][0])
        if of_expert is None or _reads(node.args[2], node.args[0]):
            continue
        if value(of_expert[0]).shape[-1] == 1:
            continue  # a spelling of its own
        if is_part(node):
            continue  # nothing has been there
        words = "rows of a token that has several experts are replaced, not added"
        yield Refusal(Code.ACCUMULATOR, words, location(node))


@dataclasses.dataclass(frozen=True, eq=False)
class _Attempt:
    """One spelling with one choice of facts and one trace."""

    spelling: ExpertsSpelling
    facts: dict[str, Any]
    shapes: Shapes
    folded: Folded | None
    _pieces: dict[int, Pieces | None] = dataclasses.field(default_factory=dict)

    def pieces(self, projection: int) -> Pieces | None:
        """Looked up often enough for the hash of all that is asked for to count."""
        if projection not in self._pieces:
            facts = tuple(sorted(self.facts.items()))
            found = experts_pieces(self.spelling, facts, self.shapes, PROJECTIONS[projection])
            self._pieces[projection] = found
        return self._pieces[projection]

    def run(self, matches: list[Match]) -> tuple[list[Bound], list[Refusal]]:
        found, failed = [], []
        for group in [matches] if self.spelling.loop else [[m] for m in matches]:
            try:
                if group:
                    found.append(self._loop(group) if self.spelling.loop else self._whole(group[0]))
            except Refusal as refusal:
                failed.append(refusal)
        return found, failed

    def _whole(self, match: Match) -> Bound:
        """A spelling that treats all experts at once."""
        iteration = self._iteration(match)
        mlp = iteration.mlp
        assert mlp is not None  # only in a loop
        gate, *up = [self._stacked(p) for p in mlp.unit.projections]
        group = Group(
            output=match.output_node(),
            x=iteration.bound["x"],
            gate_up=gate,
            up=up[0] if up else None,
            down=self._stacked(mlp.second),
            visited=None,
        )
        return self._bound(iteration, mlp.unit, group)

    def _loop(self, matches: list[Match]) -> Bound:
        """A spelling that visits experts one by one: all matches together are one block."""
        iterations = [self._iteration(match) for match in matches]
        units = [it.mlp.unit for it in iterations if it.mlp is not None]
        if not units:
            raise Refusal(Code.SPELLING, "no expert computes anything", "")
        group = group_iterations(iterations, self.folded, self.spelling.keeps_tokens)
        return self._bound(iterations[0], units[0], group)

    def _iteration(self, match: Match) -> Iteration:
        """All that one match of the upper piece leads to.

        Raises Refusal (SPELLING, ACTIVATION, LAYOUT, INPUTS_DIFFER, DTYPE).
        """
        output = match.output_node()
        second = self._projection(match.kwargs["y"], "second")
        mlp, parts = None, [match.kwargs]
        if second is not None:
            unit = read_activation(second["hidden"], lambda node: self._projection(node, "first"))
            if value(match.kwargs["y"]).dtype != unit.dtype:
                words = "the two projections compute in two dtypes"
                raise Refusal(Code.DTYPE, words, location(output))
            mlp = MLP(unit, second)
            parts += [second, *unit.projections]
        else:
            parts.append(self._rows(match))
        bound: dict[str, fx.Node] = {}
        for part in parts:
            for name in ("x", "topk_ids", "topk_weights"):
                if name in part and bound.setdefault(name, part[name]) is not part[name]:
                    raise Refusal(Code.INPUTS_DIFFER, "", location(output))
        if not {"x", "topk_ids"} <= bound.keys() or (
            "topk_weights" not in bound and self.facts.get("weight_on") != "nothing"
        ):
            raise Refusal(Code.SPELLING, "", location(output))
        return Iteration(match, match.kwargs, mlp, bound)

    def _rows(self, match: Match) -> dict[str, Any]:
        """What an expert that gives its rows as they are has bound.  Raises Refusal(SPELLING)."""
        pieces, y = self.pieces(0), match.kwargs["y"]
        assert pieces is not None
        rows = pieces.rows.match(y) if pieces.rows is not None else None
        if not rows:
            raise self._no_projection(y, location(y) or location(match.output_node()))
        return rows.kwargs

    def _no_projection(self, y: fx.Node, where: str) -> Refusal:
        """Why ``y`` is not what the second projection gives: most likely because something is done with that."""
        between, todo, is_of_experts = [], [y], False
        while todo and len(between) < _AFTER_PROJECTION:
            node = todo.pop(0)
            if node.op != "call_function" or node in between:
                continue
            if between and self._projection(node, "second") is not None:
                is_of_experts = True
                continue
            between.append(node)
            todo += node.all_input_nodes
        steps = [n for n in between if name_of(n) not in UNTOLD]
        if is_of_experts and steps:
            norms = [n for n in steps if name_of(n) in OVER_ROWS]
            names = dict.fromkeys(f"`{name_of(n)}`" for n in reversed(steps))
            what = "a norm" if norms else "more than a routing weight"
            words = f"{what} stands between the experts and the sum over them ({', '.join(names)})"
            found = next(filter(None, map(location, (*norms, *steps))), where)
            return Refusal(Code.SPELLING, words, found)
        words = "the experts' second projection is not one of this spelling"
        return Refusal(Code.SPELLING, words, where)

    def _projection(self, node: fx.Node, which: str) -> dict[str, Any] | None:
        """What ``node``, a projection's result, is made of; None where it is something else."""
        node = unviewed(node)
        for number, projection in enumerate(PROJECTIONS):
            pieces = self.pieces(number)
            assert pieces is not None
            pattern = pieces.first if which == "first" else pieces.second
            match = pattern.match(node)
            if not match:
                continue
            bound = dict(match.kwargs)  # type: ignore[union-attr]
            rank = 1 if self.spelling.loop else 2
            if projection.has_bias and value(bound["bias"]).dim() != rank:
                continue  # the sum of two projections, say
            return bound | {"is_transposed": projection.is_transposed}
        return None

    def _stacked(self, projection: dict[str, Any]) -> Weight:
        """Weights of all experts at once; a stack of E tensors is these tensors."""
        found = [projection[name] for name in ("weight", "bias") if name in projection]
        parts = [tuple(n.args[0]) if n.target is _STACK else (n,) for n in found]
        is_stacked = {n.target is not _STACK for n in found}
        if len(is_stacked) > 1:
            raise Refusal(Code.LAYOUT, "stacked and separate weights are mixed", location(found[0]))
        weight, *bias = parts
        return Weight(
            weight,
            is_stacked=is_stacked.pop(),
            is_transposed=projection["is_transposed"],
            bias=bias[0] if bias else (),
        )

    def _bound(self, iteration: Iteration, unit: Gated, group: Group) -> Bound:
        ids = iteration.bound["topk_ids"]
        weight_on = self.facts.get("weight_on", "output")
        moe = _describe(self.spelling, unit, weight_on, ids, group)
        self._check_trace(moe, iteration, group)
        check_experts(moe, group.gate_up, group.up, group.down)
        needed = self.spelling.dense or self.facts.get(self.spelling.ids_in_range or "")
        if needed and not ids_in_range(ids, moe.experts.num_choices):
            raise Refusal(Code.SPELLING, "ids may be out of range", location(group.output))
        if self.spelling.dense and weight_on == "input":
            _zero_gives_zero(moe, group)
        if self.spelling.keeps_tokens and is_part(group.output):
            raise Refusal(Code.SPELLING, "", location(group.output))
        if self.spelling.keeps_tokens and moe.top_k != 1:
            words = "rows of a token that has several experts are replaced, not added"
            raise Refusal(Code.ACCUMULATOR, words, location(group.output))
        visited = group.visited or tuple(range(moe.experts.num_choices))
        return Bound(
            spelling=self.spelling,
            facts=self.facts,
            moe=moe,
            output=group.output,
            x=group.x,
            topk_ids=ids,
            topk_weights=iteration.bound.get("topk_weights"),
            gate_up=group.gate_up,
            up=group.up,
            down=group.down,
            visited=visited,
            traced=group.traced or visited,
        )

    def _check_trace(self, moe: MoE, iteration: Iteration, group: Group) -> None:
        """A pattern can match where a trace with other dtypes or with k > 1 is meant: leave it to that one."""
        T, H = value(group.output).shape
        x, ids = value(group.x), value(iteration.bound["topk_ids"])
        weights = iteration.bound.get("topk_weights")
        meant = (
            x.dtype == self.shapes.x_dtype
            and moe.experts.weight_dtype == self.shapes.weight_dtype
            and (weights is None or value(weights).dtype == self.shapes.routing_dtype)
            and (moe.top_k == 1) == (self.shapes.top_k == 1)
        )
        if not meant:
            raise Refusal(Code.SPELLING, "", location(group.output))
        fits = (
            same_sizes([x.numel()], [T * H]) or same_sizes([x.numel() // H], [T])
        ) and same_sizes([ids.numel()], [T * moe.top_k])
        if not fits:
            raise Refusal(
                Code.SPELLING,
                "hidden states, ids and result are not known to have the same number of tokens",
                location(group.output),
            )


def _reads(given: Any, base: Any) -> bool:
    """Does the sum itself come into what is put into it, other than through a projection?"""
    todo, seen = [given], set()
    while todo:
        node = todo.pop()
        if node is base:
            return True
        if node not in seen and node.target is not torch.ops.aten.mm.default:
            seen.add(node)
            todo += node.all_input_nodes
    return False


def find_all(graph: fx.Graph, pattern: PatternExpr) -> list[Match]:
    """Every place where ``pattern`` matches, in graph order.

    Not by a PatternMatcherPass, which spends most of its time on what a normal form has none of: changes in place,
    and nodes that Inductor cannot lower.
    """
    targets = pattern.fns_set  # type: ignore[attr-defined]
    found = (pattern.match(n) for n in graph.nodes if n.target in targets)
    return [match for match in found if isinstance(match, Match)]


def _op_name(node: fx.Node) -> str:
    return node.target._schema.name if isinstance(node.target, OpOverload) else ""


def _shapes(canonical: Canonical, anchor: str) -> Iterator[Shapes]:
    """The traces worth trying: float dtypes that occur in the region, and whether T or k is 1."""
    floats, anchored, devices, tokens, chosen = {}, {}, {}, {}, {}
    for node in canonical.graph.nodes:
        found = value(node)
        if not isinstance(found, torch.Tensor):
            continue
        devices.setdefault(found.device)
        if found.dtype.is_floating_point:
            floats.setdefault(found.dtype)
            # A GEMM: its dtype is that of the rows.  A scatter has that of the routing weights.
            if _op_name(node) == anchor and node.target is not torch.ops.aten.scatter.src:
                anchored.setdefault(found.dtype)
        elif found.dtype in (torch.int32, torch.int64) and found.dim() == 2:
            # Only the ids have two dimensions of integers; a symbolic T is never 1.
            tokens.setdefault(1 if isinstance(found.shape[0], int) and found.shape[0] == 1 else 7)
            if isinstance(found.shape[1], int):
                chosen.setdefault(1 if found.shape[1] == 1 else 2)
    device = next(iter(devices), torch.device("cpu"))
    sizes = (tokens or {7: None}, chosen or {2: None})
    # Outside autocast, only a GEMM that casts its rows takes two dtypes.
    mixed = anchor in _CASTING or canonical.autocast is not None
    weights = floats if canonical.autocast is not None else anchored or floats
    pairs = [(x, w) for w in weights for x in floats if mixed or x == w]
    pairs.sort(key=lambda pair: pair[0] != pair[1])
    for (x, weight), routing, t, k in itertools.product(pairs, floats, *sizes):
        yield Shapes(
            x_dtype=x,
            weight_dtype=weight,
            routing_dtype=routing,
            device=device,
            num_tokens=t,
            top_k=k,
            autocast=canonical.autocast,
        )


def _describe(
    spelling: ExpertsSpelling, unit: Gated, weight_on: Any, topk_ids: fx.Node, group: Group
) -> MoE:
    where = location(group.output)
    if value(group.output).dim() != 2:  # a view of what is [T, H], which is a match of its own
        raise Refusal(Code.SPELLING, "the sum over the experts is not [T, H]", where)
    T, H = value(group.output).shape
    gate_up, down = group.gate_up, group.down
    matrix = value(down.nodes[0])
    E = matrix.shape[0] if down.is_stacked else len(down.nodes)
    if group.identities and group.visited:
        E = len(group.visited) - group.identities
    I = matrix.shape[-2] if down.is_transposed else matrix.shape[-1]
    if not all(isinstance(size, int) for size in (E, H, I)):
        raise Refusal(Code.EXPERT_SHAPES, "E, H and I must be known sizes", where)
    first = [w for w in (gate_up, group.up) if w is not None]
    if len({w.is_stacked for w in (*first, down)}) > 1:
        raise Refusal(Code.LAYOUT, "stacked and separate weights are mixed", where)
    if len({(w.is_transposed, bool(w.bias)) for w in first}) > 1:
        raise Refusal(Code.LAYOUT, "gate and up are stored in two ways", where)
    return MoE(
        spelling=spelling.name,
        top_k=_top_k(topk_ids, T),
        experts=Experts(
            num_experts=E,
            hidden_size=H,
            intermediate_size=I,
            activation=unit.activation,
            layout=unit.layout,
            storage="stacked" if down.is_stacked else "per_expert",
            gate_up_transposed=gate_up.is_transposed,
            down_transposed=down.is_transposed,
            gate_up_bias=bool(gate_up.bias),
            down_bias=bool(down.bias),
            weight_dtype=matrix.dtype,
            compute_dtype=unit.dtype,
            identities=group.identities,
        ),
        combine=Combine(
            weight_on="input" if weight_on == "input" else "output",
            keeps_tokens=spelling.keeps_tokens,
            out_dtype=value(group.output).dtype,
        ),
    )


def _top_k(topk_ids: fx.Node, tokens: Any) -> int:
    """k of ``topk_ids [T, k]``, or of its flat form."""
    shape = value(topk_ids).shape
    if len(shape) >= 2 and isinstance(shape[-1], int):
        return shape[-1]
    ratio = sympy.simplify(_expr(value(topk_ids).numel()) / _expr(tokens)) if tokens != 0 else None
    if ratio is not None and ratio.is_Integer:
        return int(ratio)
    raise Refusal(
        Code.SPELLING, "the number of experts per token is not a known size", location(topk_ids)
    )


def _expr(size: Any) -> sympy.Expr:
    return size_expr(size) if isinstance(size, torch.SymInt) else sympy.Integer(size)


def ids_in_range(topk_ids: fx.Node, num_experts: int) -> bool:
    """Are the ids of a token distinct positions among E scores, hence in ``[0, E)``?"""
    return kept_of(topk_ids) is topk_ids and are_distinct(topk_ids, num_experts)


def _zero_gives_zero(moe: MoE, group: Group) -> None:
    """An expert that was not chosen reads zeros: it must give zeros.  Raises Refusal(PROOF)."""
    where = location(group.output)
    if group.gate_up.bias or group.down.bias:
        raise Refusal(Code.PROOF, "experts that were not chosen give their biases", where)
    unit, zero = parse(moe.experts.activation), torch.zeros(())
    if unit(zero, zero if unit.gated else None).item() != 0:
        raise Refusal(Code.PROOF, "experts that were not chosen do not give zeros", where)
