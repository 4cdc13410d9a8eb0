"""Propose blocks: run the patterns of every spelling over a region's normal form and read what they bound.

Upper piece, activation and lower piece are matched from the output towards the input; the first spelling that
goes all the way wins.  When none does, the refusal that got furthest is the one worth telling.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Iterator
from typing import Any

import sympy
import torch
from torch import fx

from moe_inductor._compat import Match, OpOverload, PatternMatcherPass, register_graph_pattern
from moe_inductor.description import Combine, Experts, MoE
from moe_inductor.match.activation import GatedUnit, read_activation
from moe_inductor.match.api import ExpertsSpelling, combinations
from moe_inductor.match.bind import Bound, Weight, check_experts
from moe_inductor.match.loop import Group, Iteration, group_iterations
from moe_inductor.match.pieces import Pieces, Shapes, experts_pieces
from moe_inductor.reasons import Code, Refusal
from moe_inductor.region.canonical import Canonical, Folded
from moe_inductor.region.nodes import location, value


def propose(
    canonical: Canonical, spellings: list[ExpertsSpelling], refused: list[Refusal]
) -> Iterator[list[Bound]]:
    """For each way of writing that matches, all its blocks; why near ones failed is appended to ``refused``."""
    present = {_op_name(n) for n in canonical.graph.nodes}
    for spelling in spellings:
        if spelling.anchor not in present:
            continue
        for facts, shapes in itertools.product(
            combinations(spelling.facts), _shapes(canonical, spelling.anchor)
        ):
            pieces = experts_pieces(spelling, tuple(sorted(facts.items())), shapes)
            attempt = _Attempt(spelling, facts, shapes, pieces, canonical.folded)
            found, failed = attempt.run(find_all(canonical.module, pieces.upper))
            refused += failed
            if found:
                yield found


@dataclasses.dataclass(frozen=True, eq=False)
class _Attempt:
    """One spelling with one choice of facts and one trace."""

    spelling: ExpertsSpelling
    facts: dict[str, Any]
    shapes: Shapes
    pieces: Pieces
    folded: Folded | None

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
        upper = match.kwargs
        unit = read_activation(upper["hidden"])
        gate = self._lower(unit.gate)
        up = None if unit.is_concatenated else self._lower(unit.up)
        for lower in (gate, up or gate):
            if lower.get("topk_ids", upper["topk_ids"]) is not upper["topk_ids"] or (
                lower["x"] is not gate["x"]
            ):
                raise Refusal(Code.INPUTS_DIFFER, "", location(match.output_node()))
        group = Group(
            output=match.output_node(),
            x=gate["x"],
            gate_up=self._stacked(gate["gate_up"]),
            up=self._stacked(up["gate_up"]) if up else None,
            down=self._stacked(upper["down"]),
            visited=None,
        )
        return self._bound(unit, upper, group)

    def _loop(self, matches: list[Match]) -> Bound:
        """A spelling that visits experts one by one: all matches together are one block."""
        iterations = []
        for match in matches:
            unit = read_activation(match.kwargs["hidden"])
            lower = [self._lower(gemm) for gemm in dict.fromkeys((unit.gate, unit.up))]
            iterations.append(Iteration(match, match.kwargs, unit, lower))
        group = group_iterations(
            iterations, is_transposed=self.shapes.is_transposed, folded=self.folded
        )
        return self._bound(iterations[0].unit, iterations[0].upper, group)

    def _lower(self, gemm: fx.Node) -> dict[str, Any]:
        match = self.pieces.lower.match(gemm)
        if not match:
            raise Refusal(
                Code.SPELLING,
                "the experts' first projection does not read its own tokens",
                location(gemm),
            )
        return match.kwargs  # type: ignore[union-attr]

    def _stacked(self, node: fx.Node) -> Weight:
        return Weight((node,), is_stacked=True, is_transposed=self.shapes.is_transposed)

    def _bound(self, unit: GatedUnit, upper: dict[str, Any], group: Group) -> Bound:
        moe = _describe(self.spelling, unit, upper["topk_ids"], group)
        self._check_trace(moe, upper, group)
        check_experts(moe, group.gate_up, group.up, group.down)
        if self.facts.get(self.spelling.ids_in_range or "") and not ids_in_range(
            upper["topk_ids"], moe.experts.num_experts
        ):
            raise Refusal(Code.SPELLING, "ids may be out of range", location(group.output))
        visited = group.visited or tuple(range(moe.experts.num_experts))
        return Bound(
            spelling=self.spelling,
            facts=self.facts,
            moe=moe,
            output=group.output,
            x=group.x,
            topk_ids=upper["topk_ids"],
            topk_weights=upper["topk_weights"],
            gate_up=group.gate_up,
            up=group.up,
            down=group.down,
            visited=visited,
            traced=group.traced or len(visited),
        )

    def _check_trace(self, moe: MoE, upper: dict[str, Any], group: Group) -> None:
        """A pattern can match where a trace with other dtypes or with k > 1 is meant: leave it to that one."""
        T, H = value(group.output).shape
        x, ids = value(group.x), value(upper["topk_ids"])
        fits = (
            x.dtype == self.shapes.x_dtype
            and value(upper["topk_weights"]).dtype == self.shapes.weights_dtype
            and (moe.top_k == 1) == (self.shapes.top_k == 1)
            and str(x.numel()) == str(T * H)
            and str(ids.numel()) == str(T * moe.top_k)
            and not (self.shapes.is_transposed and _is_permuted(group.down))
        )
        if not fits:
            raise Refusal(Code.SPELLING, "", location(group.output))


def find_all(module: fx.GraphModule, pattern: Any) -> list[Match]:
    """Every place where ``pattern`` matches, in graph order."""
    hits: dict[fx.Node, Match] = {}
    patterns = PatternMatcherPass(pass_name="moe_inductor")

    def collect(match: Match, *args: Any, **kwargs: Any) -> None:
        hits[match.output_node()] = match

    register_graph_pattern(pattern, pass_dict=patterns)(collect)  # type: ignore[arg-type]
    patterns.apply(module)
    return [hits[n] for n in module.graph.nodes if n in hits]


def _is_permuted(weight: Weight) -> bool:
    """The operand is a transpose of what is stored: the pattern without ``is_transposed`` names the storage."""
    return any(node.target is torch.ops.aten.permute.default for node in weight.nodes)


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
            if _op_name(node) == anchor:  # a GEMM: its dtype is that of the rows
                anchored.setdefault(found.dtype)
        elif found.dtype in (torch.int32, torch.int64) and found.dim() == 2:
            # Only the ids have two dimensions of integers; a symbolic T is never 1.
            tokens.setdefault(1 if isinstance(found.shape[0], int) and found.shape[0] == 1 else 7)
            if isinstance(found.shape[1], int):
                chosen.setdefault(1 if found.shape[1] == 1 else 2)
    device = next(iter(devices), torch.device("cpu"))
    sizes = (tokens or {7: None}, chosen or {2: None})
    for transposed, x, w, t, k in itertools.product(
        (False, True), anchored or floats, floats, *sizes
    ):
        yield Shapes(
            x_dtype=x,
            weights_dtype=w,
            device=device,
            num_tokens=t,
            top_k=k,
            is_transposed=transposed,
        )


def _describe(spelling: ExpertsSpelling, unit: GatedUnit, topk_ids: fx.Node, group: Group) -> MoE:
    where = location(group.output)
    T, H = value(group.output).shape
    down = group.down
    matrix = value(down.nodes[0])
    E = matrix.shape[0] if down.is_stacked else len(down.nodes)
    I = matrix.shape[-2] if down.is_transposed else matrix.shape[-1]
    if not all(isinstance(size, int) for size in (E, H, I)):
        raise Refusal(Code.EXPERT_SHAPES, "E, H and I must be known sizes", where)
    if len({w.is_stacked for w in (group.gate_up, group.up, down) if w}) > 1:
        raise Refusal(Code.LAYOUT, "stacked and separate weights are mixed", where)
    return MoE(
        spelling=spelling.name,
        top_k=_top_k(topk_ids, T),
        experts=Experts(
            num_experts=E,
            hidden_size=H,
            intermediate_size=I,
            activation=unit.activation,
            is_concatenated=unit.is_concatenated,
            is_transposed=down.is_transposed,
            storage="stacked" if down.is_stacked else "per_expert",
            weight_dtype=matrix.dtype,
        ),
        combine=Combine(out_dtype=value(group.output).dtype),
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
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def ids_in_range(topk_ids: fx.Node, num_experts: int) -> bool:
    """Are the ids positions among E scores, hence in ``[0, E)``?"""
    pack = topk_ids.args[0] if topk_ids.target is operator.getitem else None
    if not isinstance(pack, fx.Node) or pack.target is not torch.ops.aten.topk.default:
        return False
    scores, _, dim = (*pack.args, -1)[:3]
    return isinstance(scores, fx.Node) and value(scores).shape[dim] == num_experts
