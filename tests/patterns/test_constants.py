"""Every constant between a block's inputs and its output counts: changed, the block is refused, or is another one.

Patterns take constants for wildcards, so this is about the proof, and about the text of the unit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import fx

from moe_inductor.match.api import (
    ChosenSpelling,
    ExpertsSpelling,
    HitListSpelling,
    RouterSpelling,
    discover,
)
from moe_inductor.match.bind import BoundRouter
from moe_inductor.match.experts import propose
from moe_inductor.match.pieces import unviewed
from moe_inductor.match.router import propose_routers
from moe_inductor.prove import assumptions
from moe_inductor.prove.prove import prove_experts, prove_router
from moe_inductor.reasons import Refusal
from moe_inductor.rewrite import pipeline

# One sample of each spelling, and one with everything that an expert can have.
CASES = [
    pytest.param(s, sample, id=f"{s.name}-{sample.name}")
    for s in discover()
    if isinstance(s, ExpertsSpelling) and s.samples
    for sample in s.samples
    if sample is s.samples[0] or (sample.name == "gpt_oss" and not s.loop)
]


def _block_of(spelling, sample, rewritten, monkeypatch) -> tuple[Any, Any]:
    """The sample's normal form and what was proved about it."""
    seen: list[Any] = []
    prove = pipeline.prove_experts

    def spy(canonical, bound):
        prove(canonical, bound)
        seen.append((canonical, bound))

    monkeypatch.setattr(pipeline, "prove_experts", spy)
    torch.manual_seed(0)
    dtype = sample.dtypes[-1]
    with torch.no_grad():
        rewritten(sample.build().to(dtype))(torch.randn(11, 32, dtype=dtype))
    ((canonical, bound),) = seen
    assert bound.spelling is spelling
    return canonical, bound


def _inside(bound) -> list[fx.Node]:
    """The nodes from the block's inputs, not included, to its output."""
    stop, found, todo = set(bound.inputs()), [], [bound.output]
    while todo:
        node = todo.pop()
        if node not in stop and node not in found and node.op == "call_function":
            found.append(node)
            todo += node.all_input_nodes
    return found


def _changes(item: Any) -> Iterator[Any]:
    """``item`` with one number in it changed, one after the other."""
    if isinstance(item, (list, tuple)):
        for i, part in enumerate(item):
            for changed in _changes(part):
                yield type(item)([*item[:i], changed, *item[i + 1 :]])
    elif type(item) in (int, float):
        yield item + 1 if abs(item) != float("inf") else 0.0


def _proved(canonical, spelling) -> list[Any]:
    for found in propose(canonical, [spelling], []):
        for bound in found:
            try:
                prove_experts(canonical, bound)
            except Refusal:
                continue
            return [bound]
    return []


@pytest.mark.parametrize(("spelling", "sample"), CASES)
def test_every_constant_counts(spelling, sample, rewritten, monkeypatch):
    canonical, bound = _block_of(spelling, sample, rewritten, monkeypatch)
    assert _proved(canonical, spelling)
    tried = 0
    for node in _inside(bound):
        original = node.args
        for args in _changes(tuple(original)):
            node.args = args
            tried += 1
            for other in _proved(canonical, spelling):
                assert other.moe != bound.moe, f"{node.format_node()} was {original}"
                assert other.moe.experts.activation != bound.moe.experts.activation
            node.args = original
    assert tried > 10, "nothing was looked at"
    assert _proved(canonical, spelling), "the graph is as it was"


# -- what capture assumed ----------------------------------------------------------------------------------------------

ASSUMED = [s for s in discover() if isinstance(s, (HitListSpelling, ChosenSpelling))]


@pytest.mark.parametrize("spelling", ASSUMED, ids=lambda s: s.name)
def test_every_constant_of_an_assumption_counts(spelling, rewritten, monkeypatch):
    """What is asked about the ids, and what is listed of them, is compared with all that is in it."""
    name = "is_hit_list" if isinstance(spelling, HitListSpelling) else "is_chosen_test"
    prove, proved = getattr(assumptions, name), []

    def spy(*args):
        holds = prove(*args)
        if holds:
            proved.append(args)
            monkeypatch.setattr(assumptions, name, prove)
            _change_all(args, prove)
            monkeypatch.setattr(assumptions, name, spy)
        return holds

    monkeypatch.setattr(assumptions, name, spy)
    torch.manual_seed(0)
    for sample in spelling.samples:
        with torch.no_grad():
            dtype = sample.dtypes[0]
            rewritten(sample.build().to(dtype))(torch.randn(11, 32, dtype=dtype))
    assert len(proved) >= len(spelling.samples) // 2, "some are proved by another spelling"


def _change_all(args: tuple[Any, ...], prove: Any) -> None:
    _, shown, bound, *_ = args
    stop, todo, nodes = {unviewed(bound.topk_ids), *bound.index}, [unviewed(shown)], []
    while todo:
        node = todo.pop()
        if node not in stop and node not in nodes and node.op == "call_function":
            nodes.append(node)
            todo += node.all_input_nodes
    assert nodes
    for node in nodes:
        original = node.args
        for changed in _changes(tuple(original)):
            node.args = changed
            assert not prove(*args), f"{node.format_node()} was {original}"
            node.args = original
    assert prove(*args), "the graph is as it was"


# -- routers -----------------------------------------------------------------------------------------------------------

ROUTERS = [
    pytest.param(s, sample, id=f"{s.name}-{sample.name}")
    for s in discover()
    if isinstance(s, RouterSpelling)
    for sample in s.samples
]


def _routers_of(canonical, bound, spelling) -> list[BoundRouter]:
    """What is proved to be the router of ``bound``."""
    proved = []
    try:
        candidates = propose_routers(canonical, bound, [spelling])
    except Refusal:
        return []
    for router in candidates:
        try:
            prove_router(canonical, bound, router)
        except Refusal:
            continue
        proved.append(router)
    return proved


@pytest.mark.parametrize(("spelling", "sample"), ROUTERS)
def test_every_constant_of_a_router_counts(spelling, sample, rewritten, monkeypatch):
    """Constants are read from the graph, so a router with another one is another router, or none."""
    seen: list[Any] = []
    prove = pipeline.prove_router

    def spy(canonical, bound, router):
        prove(canonical, bound, router)
        seen.append((canonical, bound, router))

    monkeypatch.setattr(pipeline, "prove_router", spy)
    torch.manual_seed(0)
    with torch.no_grad():
        rewritten(sample.build())(torch.randn(11, 32))
    ((canonical, bound, router),) = seen
    nodes, todo = [], [bound.topk_weights, bound.topk_ids]
    while todo:
        node = todo.pop()
        if node not in nodes and node not in router.inputs() and node.op == "call_function":
            nodes.append(node)
            todo += node.all_input_nodes
    tried = 0
    for node in nodes:
        original = node.args
        for args in _changes(tuple(original)):
            node.args = args
            tried += 1
            for other in _routers_of(canonical, bound, spelling):
                assert other.router != router.router, f"{node.format_node()} was {original}"
            node.args = original
    assert tried > 3, "nothing was looked at"
    (same,) = _routers_of(canonical, bound, spelling)
    assert same.router == router.router, "the graph is as it was"
