"""Experts on sorted rows: what was counted, divided, cut and put back is not in the normal form, so it counts before.

``tests/patterns/test_constants.py`` changes constants of the normal form; here it is those of the graph that is
brought to normal form.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from moe_inductor.match.api import ExpertsSpelling, discover
from moe_inductor.prove.expressions import Numbering
from moe_inductor.region import canonical
from moe_inductor.region.nodes import value
from moe_inductor.region.normalise import Emitter, normalise
from moe_inductor.region.row_ops import ALL_ROWS, PAIR_LINEAR
from tests.without_inductor import WithoutInductor

aten = torch.ops.aten

(SORTED,) = (s for s in discover() if isinstance(s, ExpertsSpelling) and s.name == "sorted_experts")
SAMPLES = {sample.name: sample.build for sample in SORTED.samples}
NUM_EXPERTS = 4

# Nothing but the shape of the result, which is read where it is recorded.
SHAPES = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.unsqueeze.default,
    aten.expand.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.t.default,
    aten.zeros.default,
    aten.new_zeros.default,
    ALL_ROWS,
}


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch):
    """The trace of a block's region, before it is brought to normal form."""

    def trace(block: torch.nn.Module) -> fx.Graph:
        seen: list[fx.Graph] = []

        def spy(graph: fx.Graph, **kwargs: Any) -> Any:
            seen.append(graph)
            return normalise(graph, **kwargs)

        monkeypatch.setattr(canonical, "normalise", spy)
        torch._dynamo.reset()
        backend = WithoutInductor()
        backend.install()
        with torch.no_grad():
            torch.compile(block, backend=backend)(torch.randn(11, 32))
        (report,) = (b for r in backend.reports for b in r.blocks)
        assert report.fused, report.why_not()
        return seen[0]

    return trace


def _sums(graph: fx.Graph, numbering: Numbering) -> set[int]:
    """The block's output, as numbers of expressions: sums over choices of what experts give."""
    made, _ = normalise(graph, out=Emitter(keep_detach=False))
    for node in made.nodes:
        if node.op == "placeholder":
            numbering.leaf(node, node.name)
    of_experts: set[fx.Node] = set()
    for node in made.nodes:
        if node.target is PAIR_LINEAR or any(a in of_experts for a in node.all_input_nodes):
            of_experts.add(node)
    return {numbering.number(n) for n in of_experts if n.target is aten.sum.dim_IntList}


def _shows_in_shape(node: fx.Node, i: int) -> bool:
    """Another dimension would give another shape, or there is only one.  A bin more up to E is the same histogram, a
    slice to beyond the end (2.15 writes the end as it is) the same slice, and two as true as one.
    """
    if node.target is aten.arange.default:
        return True
    if node.target is aten.scatter.value and i == 3:
        read = [value(user) for user in node.users if user.op != "output"]
        return all(found.dtype == torch.bool for found in read)
    if node.target is aten.histc.default:
        return i == 3 and bool(node.args[i] == NUM_EXPERTS - 1)
    if node.target is aten.slice.Tensor and i == 3:
        return node.args[3] == value(node.args[0]).shape[node.args[1]]
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.arguments[i].name == "dim"


def _is_noticed(graph: fx.Graph, numbering: Numbering, block: set[int]) -> bool:
    try:
        return not _sums(graph, numbering) & block
    except IndexError:  # there is no such part or dimension
        return True


def _changed(item: Any) -> list[Any]:
    if isinstance(item, (list, tuple)):
        return [
            [*item[:i], other, *item[i + 1 :]]
            for i, part in enumerate(item)
            for other in _changed(part)
        ]
    return [item + 1] if type(item) in (int, float) else []


@pytest.mark.parametrize(
    "name",
    sorted(
        SAMPLES.keys()
        & {"split", "slices", "written", "scattered", "titan_shared", "titan_put_back", "permuted"}
    ),
)
def test_every_constant_of_the_sort_counts(name, traced):
    torch.manual_seed(0)
    graph = traced(SAMPLES[name]())
    numbering = Numbering()
    block = _sums(graph, numbering)
    assert len(block) == 1
    tried, unnoticed = 0, []
    for node in list(graph.nodes):
        # Numbers that are computed from sizes are read where they are recorded, too; and what a test asks is
        # proved apart from the block.
        found = value(node)
        is_tensor = isinstance(found, (torch.Tensor, tuple, list))
        if node.op != "call_function" or not is_tensor or not node.users or node.target in SHAPES:
            continue
        if isinstance(found, torch.Tensor) and found.dtype == torch.bool:
            continue
        args = node.args
        for i, arg in enumerate(args):
            for other in () if _shows_in_shape(node, i) else _changed(arg):
                node.args = (*args[:i], other, *args[i + 1 :])
                tried += 1
                if not _is_noticed(graph, numbering, block):
                    unnoticed.append(f"{node.format_node()} was {args}")
        node.args = args
    assert tried > 10
    assert not unnoticed, "\n".join(unnoticed)
