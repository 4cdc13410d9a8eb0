"""What is proved of every sample: by one spelling alone, with every value of every fact, and with every constant in it.

A constant counts if the block with another one is refused, or is described as another block.  Patterns take constants
for wildcards, so this is about the proof, and about the text of the unit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import fx

from moe_inductor.match.api import (
    ChosenSpelling,
    ExpertsSpelling,
    HitListSpelling,
    RouterSpelling,
    Spelling,
    combinations,
    discover,
)
from moe_inductor.match.bind import Bound, BoundRouter
from moe_inductor.match.experts import propose
from moe_inductor.match.pieces import PROJECTIONS, Shapes, experts_pieces, router_piece
from moe_inductor.match.router import propose_routers
from moe_inductor.prove import assumptions
from moe_inductor.prove import prove as proofs
from moe_inductor.reasons import Refusal
from moe_inductor.region.canonical import Canonical
from moe_inductor.region.nodes import unviewed
from moe_inductor.rewrite import pipeline
from tests.patterns.conftest import require
from tests.patterns.samples import check, ways

SPELLINGS = discover()


@dataclasses.dataclass
class Proved:
    """All that was proved while the samples of one spelling were compiled.

    assumed: the proof that is about the spelling, with its arguments.
    """

    spelling: Spelling
    experts: list[tuple[Canonical, Bound]]
    routers: list[tuple[Canonical, Bound, BoundRouter]]
    assumed: list[tuple[Callable[..., bool], tuple[Any, ...]]]

    def facts(self) -> list[dict[str, Any]]:
        """The facts with which the spelling itself was proved."""
        if isinstance(self.spelling, ExpertsSpelling):
            return [bound.facts for _, bound in self.experts]
        if isinstance(self.spelling, RouterSpelling):
            return [router.facts for *_, router in self.routers]
        return [args[-1] for _, args in self.assumed]


# The tests of one spelling run in one process (tests/conftest.py), so that its samples are compiled there alone.
@pytest.fixture(scope="module", params=SPELLINGS, ids=lambda spelling: spelling.name)
def proved(request) -> Proved:
    """Every sample compiled in the first of its ways, and checked."""
    spelling = request.param
    require(spelling)
    of = Proved(spelling, [], [], [])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOE_INDUCTOR_RAISE", "1")

        def record(module: Any, name: str, note: Callable[..., None]) -> None:
            prove = getattr(module, name)

            def spy(*args: Any) -> Any:
                answer = prove(*args)
                if answer is not False:
                    note(prove, *args)
                return answer

            patch.setattr(module, name, spy)

        def assumed(prove: Callable[..., bool], *args: Any) -> None:
            if args[-2] is spelling:
                of.assumed.append((prove, args))

        def router(_: Any, *args: Any) -> None:
            if args[-1].spelling is spelling:
                of.routers.append(args)  # type: ignore[arg-type]

        record(pipeline, "prove_experts", lambda _, *args: of.experts.append(args))  # type: ignore[arg-type]
        record(pipeline, "prove_router", router)
        record(assumptions, "is_hit_list", assumed)
        record(assumptions, "is_chosen_test", assumed)
        for sample in spelling.samples:
            try:
                check(spelling, sample, *next(ways(sample)))
            except Exception as error:
                error.add_note(f"sample {sample.name}")
                raise
    assert len(of.experts) == len(spelling.samples)
    _trace_references_once(request)
    return of


def _trace_references_once(request: Any) -> None:
    """For the many proofs of one block: to trace a reference and to bring it to normal form is what takes the time."""
    patch = pytest.MonkeyPatch()
    request.addfinalizer(patch.undo)
    trace, reference_of, normalise = proofs.trace, proofs.reference_of, proofs.normalise
    references: dict[Any, Any] = {}
    traced: dict[Any, Any] = {}
    normal: dict[Any, Any] = {}

    def same_reference(bound: Bound) -> Any:
        weights = tuple(
            w and (len(w.nodes), len(w.bias), w.is_stacked, w.is_transposed)
            for w in bound.projections
        )
        facts = tuple(sorted(bound.facts.items()))
        key = (bound.spelling.name, facts, bound.moe, bound.traced, weights)
        return references.setdefault(key, reference_of(bound))

    def trace_once(reference: Any, values: Any, fake_mode: Any, autocast: Any) -> Any:
        key = (reference, tuple(map(id, values)), autocast)
        if key not in traced:  # with the values, so that no other has their id
            traced[key] = trace(reference, values, fake_mode, autocast), values
        return traced[key][0]

    def normalise_once(graph: fx.Graph, *, keep_detach: bool) -> Any:
        key = (id(graph), keep_detach)
        if key not in normal:  # with the graph, for the same reason
            normal[key] = normalise(graph, keep_detach=keep_detach), graph
        return normal[key][0]

    patch.setattr(proofs, "normalise", normalise_once)
    patch.setattr(proofs, "reference_of", same_reference)
    patch.setattr(proofs, "trace", trace_once)


# -- facts and claims --------------------------------------------------------------------------------------------------


def test_every_spelling_is_used(proved):
    """It is the one that did the work in a sample of its own, and not another that was asked first."""
    used = proved.facts()
    if isinstance(proved.spelling, ExpertsSpelling):
        used = [b.facts for _, b in proved.experts if b.spelling is proved.spelling]
    assert used


def test_every_fact_value_is_used(proved):
    """A fact value that no sample needs is untested, and dead weight in every compile."""
    spelling = proved.spelling
    # Two values may trace alike on a CPU and differ on a GPU (softmax of half precision into fp32).
    used = {_trace_of(spelling, facts) for facts in proved.facts()}
    for fact, values in spelling.facts.items():
        for value in values:
            having = [f for f in combinations(spelling.facts) if f[fact] == value]
            assert used & {_trace_of(spelling, f) for f in having}, f"{fact}={value} is unused"


def _trace_of(spelling, facts: dict[str, object]) -> str:
    shapes = Shapes(
        x_dtype=torch.bfloat16,
        weight_dtype=torch.bfloat16,
        routing_dtype=torch.float32,
        device=torch.device("cpu"),
        num_tokens=7,
        top_k=2,
    )
    items = tuple(sorted(facts.items()))
    if isinstance(spelling, (HitListSpelling, ChosenSpelling)):
        return repr(items)
    if isinstance(spelling, RouterSpelling):
        return repr(router_piece(spelling, items, shapes)[0])
    pieces = experts_pieces(spelling, items, shapes, PROJECTIONS[0])
    return repr((pieces.upper, pieces.second, pieces.first))


def test_every_sample_is_claimed_by_one_spelling(proved):
    for canonical, bound in proved.experts:
        if isinstance(proved.spelling, ExpertsSpelling):
            assert bound.spelling is proved.spelling
        claims = {s.name for s in SPELLINGS if _experts_of(canonical, s)}
        assert claims == {bound.spelling.name}
    for canonical, bound, router in proved.routers:
        claims = {s.name for s in SPELLINGS if _routers_of(canonical, bound, s)}
        assert claims == {router.spelling.name}
    for prove, (*shown, spelling, _) in _one_for_all_facts(proved.assumed):
        claims = {
            s.name
            for s in SPELLINGS
            if type(s) is type(spelling) and any(prove(*shown, s, f) for f in combinations(s.facts))
        }
        assert claims == {spelling.name}


def _one_for_all_facts(assumed: list[tuple[Any, tuple[Any, ...]]]) -> list[Any]:
    """Of lists and tests that are alike, the first."""
    return list({repr(args[-1]): (prove, args) for prove, args in reversed(assumed)}.values())


def _experts_of(canonical: Canonical, spelling: Spelling) -> list[Bound]:
    """What is proved to be experts in this spelling, up to the first way that is."""
    if not isinstance(spelling, ExpertsSpelling):
        return []
    for proposed in propose(canonical, [spelling], []):
        if found := [b for b in proposed if _holds(proofs.prove_experts, canonical, b)]:
            return found
    return []


def _routers_of(canonical: Canonical, bound: Bound, spelling: Spelling) -> list[BoundRouter]:
    """What is proved to be the router of ``bound``, in this spelling."""
    if not isinstance(spelling, RouterSpelling):
        return []
    try:
        candidates = propose_routers(canonical, bound, [spelling])
    except Refusal:
        return []
    return [r for r in candidates if _holds(proofs.prove_router, canonical, bound, r)]


def _holds(prove: Callable[..., None], *args: Any) -> bool:
    try:
        prove(*args)
    except Refusal:
        return False
    return True


# -- constants ---------------------------------------------------------------------------------------------------------


def _between(outputs: list[fx.Node], inputs: list[fx.Node]) -> list[fx.Node]:
    """The nodes from ``inputs``, not included, to ``outputs``."""
    found: dict[fx.Node, None] = {}
    todo = list(outputs)
    while todo:
        node = todo.pop()
        if node not in inputs and node not in found and node.op == "call_function":
            found[node] = None
            todo += node.all_input_nodes
    return list(found)


def _changes(item: Any) -> Iterator[Any]:
    """``item`` with one number in it changed, one after the other."""
    if isinstance(item, dict):
        for name, part in item.items():
            for changed in _changes(part):
                yield {**item, name: changed}
    elif isinstance(item, (list, tuple)):
        for i, part in enumerate(item):
            for changed in _changes(part):
                yield type(item)([*item[:i], changed, *item[i + 1 :]])
    elif type(item) in (int, float):
        yield item + 1 if abs(item) != float("inf") else 0.0


def _each_change(nodes: list[fx.Node], seen: set[Any]) -> Iterator[tuple[fx.Node, str]]:
    """Changes one number of ``nodes``, says where and what, and changes it back; each number of a statement once.

    seen: what was changed before.  Samples of a spelling share most of their statements.
    """
    for node in nodes:
        original = (node.args, dict(node.kwargs))
        constants = repr(fx.map_arg(original, lambda _: None))
        for number, changed in enumerate(_changes(original)):
            statement = (node.meta.get("stack_trace"), node.target, constants, number)
            if statement not in seen:
                seen.add(statement)
                node.args, node.kwargs = changed
                yield node, f"{node.format_node()} was {original}"
                node.args, node.kwargs = original


def test_every_constant_counts(proved):
    seen: set[Any] = set()
    if isinstance(proved.spelling, ExpertsSpelling):
        for canonical, bound in proved.experts:
            _constants_of_experts(canonical, bound, seen)
    for canonical, bound, router in proved.routers:
        _constants_of_router(canonical, bound, router, seen)
    for prove, args in proved.assumed:
        _constants_of_assumption(prove, args, seen)
    assert len(seen) > 5, "nothing was looked at"


def _constants_of_experts(canonical: Canonical, bound: Bound, seen: set[Any]) -> None:
    """A changed constant of the activation is another activation, one of the ids may be other ids; else: refused."""
    stop, before = [*bound.inputs(), *bound.index], len(seen)
    for node, changed in _each_change(_between([bound.output], stop), seen):
        for other in _experts_of(canonical, bound.spelling):
            is_inside = node in _between([other.output], other.inputs())
            same = other.moe.experts.activation == bound.moe.experts.activation
            assert not (is_inside and same), changed
    assert len(seen) == before or _experts_of(canonical, bound.spelling), "the graph is as it was"


def _constants_of_router(
    canonical: Canonical, bound: Bound, router: BoundRouter, seen: set[Any]
) -> None:
    """Constants are read from the graph, so a router with another one is another router, or none.  Weights and ids are
    taken in any shape: a last view of them is the same router."""
    assert bound.topk_weights is not None
    ends = [unviewed(bound.topk_weights), unviewed(bound.topk_ids)]
    nodes = _between(ends, router.inputs())
    for _, changed in _each_change(nodes, seen):
        for other in _routers_of(canonical, bound, router.spelling):
            assert other.router != router.router, changed
    (same,) = _routers_of(canonical, bound, router.spelling)
    assert same.router == router.router, "the graph is as it was"


def _constants_of_assumption(
    prove: Callable[..., bool], args: tuple[Any, ...], seen: set[Any]
) -> None:
    """What is asked about the ids, and what is listed of them, is compared with all that is in it."""
    _, shown, bound, *_ = args
    nodes = _between([unviewed(shown)], [unviewed(bound.topk_ids), *bound.index])
    assert nodes
    for _, changed in _each_change(nodes, seen):
        assert not prove(*args), changed
    assert prove(*args), "the graph is as it was"
