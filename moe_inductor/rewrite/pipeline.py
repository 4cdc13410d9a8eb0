"""The stages in a row: find regions, bring each to normal form, match, prove, rewrite, and report every step."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from torch import fx

from moe_inductor.debug.report import BlockReport, CompileReport
from moe_inductor.description import MoE
from moe_inductor.match.api import (
    ChosenSpelling,
    ExpertsSpelling,
    HitListSpelling,
    RouterSpelling,
    Spelling,
    discover,
)
from moe_inductor.match.bind import Bound
from moe_inductor.match.diagnose import diagnose
from moe_inductor.match.experts import propose
from moe_inductor.match.router import before_drops, propose_routers
from moe_inductor.match.weighted import weighted
from moe_inductor.prove.assumptions import Assumed, prove_assumptions
from moe_inductor.prove.fork import prove_fork, take_first_way
from moe_inductor.prove.prove import prove_experts, prove_router
from moe_inductor.reasons import Code, Reason, Refusal
from moe_inductor.region.canonical import Canonical, canonicalise
from moe_inductor.region.find import (
    Region,
    dense_only,
    find_regions,
    looks_like_moe,
    router_only,
)
from moe_inductor.region.nodes import location, name_of, value
from moe_inductor.region.soft import soft_moe
from moe_inductor.region.thresholds import (
    beyond_threshold,
    choosers,
    chosen_by_experts,
    kept_by_threshold,
)
from moe_inductor.rewrite import whole_block  # noqa: F401 (registers itself with Inductor)
from moe_inductor.rewrite.experts import ExpertsRewriter
from moe_inductor.rewrite.router import RouterRewriter
from moe_inductor.rewrite.support import check_support

if TYPE_CHECKING:
    from moe_inductor.capture.assumptions import Assumption
    from moe_inductor.options import Options

SpellingT = TypeVar("SpellingT", bound=Spelling)

# Of several reasons, the one that got furthest through the stages says most.
_DEPTH = {code: depth for depth, code in enumerate(Code)}


def fuse_moe_blocks(
    gm: fx.GraphModule,
    report: CompileReport,
    options: Options,
    assumptions: Sequence[Assumption] = (),
    uncaptured: Reason | None = None,
    lost_experts: bool = False,
) -> dict[Assumption, Reason | None]:
    """Rewrite every provable MoE block of ``gm`` and of the bodies of its higher-order ops, in place.

    Appends one BlockReport per region to ``report``.  A region that is refused is left exactly as it was.  Returns
    those of the ``assumptions`` that the rewritten graph may still depend on, with the reason if there is one: with
    any left it must not run.

    uncaptured: why an earlier capture of the same code, with more in the graph, was of no use.
    lost_experts: whether that one told experts apart.
    """
    modules = [m for m in gm.modules() if isinstance(m, fx.GraphModule)]
    assumed = Assumed(assumptions)
    for module in modules:
        with _timed(report, "region"):
            regions = [r for r in find_regions(module.graph) if not _is_chosen(r)]
        if (chosen := chosen_by_experts(module.graph, [r.root for r in regions])) is not None:
            report.blocks.append(_refused(chosen.reason))
        elif (named := _without_choice(module.graph, regions)) is not None:
            report.blocks.append(_refused(named.reason))
        elif not regions and not looks_like_moe(module.graph):
            router = router_only(module.graph)
            dense = dense_only(module.graph) if router is None else None
            named = kept_by_threshold(module.graph.nodes) if dense is not None else None
            if named is not None:
                report.blocks.append(_refused(named.reason))
            elif router is not None:
                report.blocks.append(_router_only(router, uncaptured))
            elif dense is not None:
                report.blocks.append(_dense(dense))
            elif module is gm and lost_experts and uncaptured is not None:
                report.blocks.append(not_captured(uncaptured))
            continue
        blocks: list[tuple[Region, list[BlockReport]]] = []
        for region in regions:
            start = len(report.blocks)
            _fuse_region(module, region, report, options, assumed)
            blocks.append((region, report.blocks[start:]))
        _join_ways(module, blocks, report, assumed)
        if module is not gm:
            module.recompile()
    left = assumed.unaccounted([m.graph for m in modules])
    return {assumption: assumed.refused.get(assumption) for assumption in left}


def _without_choice(graph: fx.Graph, regions: Sequence[Region]) -> Refusal | None:
    """Experts outside of the ``regions``, of which no number is chosen for each token."""
    known = {n for region in regions for n in region.nodes}
    nodes = [n for n in graph.nodes if n not in known]
    return beyond_threshold(nodes) or soft_moe(nodes)


def _join_ways(
    gm: fx.GraphModule,
    blocks: Sequence[tuple[Region, list[BlockReport]]],
    report: CompileReport,
    assumed: Assumed,
) -> None:
    """Of each test that was traced both ways, keep the way that is enough, and tell nothing of the other's blocks."""
    for fork in assumed.forks(gm.graph):
        with _timed(report, "prove"):
            try:
                prove_fork(gm, fork)
            except Refusal as refusal:
                assumed.refused[fork] = refusal.reason
                continue
        assumed.proved.add(fork)
        take_first_way(fork)
        gone = {
            id(b) for region, told in blocks if region.anchor in fork.ways[1].nodes for b in told
        }
        report.blocks = [block for block in report.blocks if id(block) not in gone]


def _is_chosen(region: Region) -> bool:
    """Slots that experts fill with tokens of their own choice."""
    return region.has_slots and name_of(region.root) == "topk" and choosers(region.root) is not None


def _fuse_region(
    gm: fx.GraphModule,
    region: Region,
    report: CompileReport,
    options: Options,
    assumed: Assumed,
) -> None:
    region.refresh()
    before = len(region.nodes)
    try:
        with _timed(report, "canonical"):
            canonical = canonicalise(gm, region, assumed.fold(region))
        blocks, refused = _prove_blocks(canonical, report, assumed)
    except Refusal as refusal:
        report.blocks.append(_not_fused(region, [refusal]))
        return
    report.artifacts[f"canonical_{len(report.artifacts)}"] = str(canonical.graph)
    if not blocks:
        if canonical.grad_refusal is not None:
            refused = [canonical.grad_refusal]  # no spelling has both modes
        if not refused or _furthest(refused).reason.code is Code.SPELLING:
            named = diagnose(canonical)
            refused = refused if named is None else [named]
        report.blocks.append(_not_fused(region, refused))
        return
    for proved in blocks:
        try:
            with _timed(report, "rewrite"):
                bound = _fuse_experts(canonical, proved, options)
        except Refusal as refusal:
            report.blocks.append(_not_fused(region, [refusal], proved))
            continue
        moe, router_reason = _fuse_router(canonical, bound, report, options)
        report.blocks.append(
            BlockReport(
                spelling=bound.spelling.name,
                fused=True,
                location=canonical.source_of(bound.output),
                moe=moe,
                router_fused=router_reason is None,
                router_reason=router_reason,
                nodes_before=before,
                nodes_after=len(region.nodes) + 1,
                shapes=_shapes(bound),
            )
        )


def _fuse_experts(canonical: Canonical, proved: Bound, options: Options) -> Bound:
    """Returns what was fused: ``proved``, or more than that.  Raises Refusal."""
    check_support(proved, canonical.source_of(proved.output))
    rewriter = ExpertsRewriter(canonical, options.batch_invariant)
    if (more := weighted(proved)) is not None:
        with contextlib.suppress(Refusal):
            check_support(more, canonical.source_of(more.output))
            rewriter.fuse(more)
            return more
    rewriter.fuse(proved)
    return proved


def _prove_blocks(
    canonical: Canonical, report: CompileReport, assumed: Assumed
) -> tuple[list[Bound], list[Refusal]]:
    refused: list[Refusal] = []
    if canonical.region.has_slots and canonical.emitter.refused:
        return [], canonical.emitter.refused  # there are no pairs without the slots
    proposals = propose(canonical, spellings(ExpertsSpelling), refused)
    while True:
        with _timed(report, "match"):
            proposed = next(proposals, None)
        if proposed is None:
            return [], refused + canonical.emitter.refused
        proved: list[Bound] = []
        for bound in proposed:
            try:
                with _timed(report, "prove"):
                    prove_experts(canonical, bound)
                    lists, tests = spellings(HitListSpelling), spellings(ChosenSpelling)
                    prove_assumptions(canonical, bound, assumed, lists, tests)
            except Refusal as refusal:
                refused.append(refusal)
            else:
                proved.append(bound)
        if proved:
            return proved, refused


def _fuse_router(
    canonical: Canonical, bound: Bound, report: CompileReport, options: Options
) -> tuple[MoE, Reason | None]:
    """Fuse the router as well; the block's description, and the reason why the router stayed or None."""
    if not options.fuse_router:
        return bound.moe, Reason(Code.ROUTER, "switched off by moe_inductor.fuse_router")
    if canonical.router_refusal is not None:
        return bound.moe, canonical.router_refusal.reason
    refused: list[Refusal] = []
    bound = before_drops(bound)
    try:
        with _timed(report, "match"):
            candidates = propose_routers(canonical, bound, spellings(RouterSpelling))
    except Refusal as refusal:
        return bound.moe, refusal.reason
    for router in candidates:
        try:
            with _timed(report, "prove"):
                prove_router(canonical, bound, router)
            with _timed(report, "rewrite"):
                RouterRewriter(canonical).fuse(bound, router)
        except Refusal as refusal:
            refused.append(refusal)
        else:
            return dataclasses.replace(bound.moe, router=router.router), None
    return bound.moe, _furthest(refused).reason


@functools.cache
def _discovered() -> list[Spelling]:
    return discover()


def spellings(kind: type[SpellingT]) -> list[SpellingT]:
    """All patterns of one kind."""
    return [s for s in _discovered() if isinstance(s, kind)]


def _furthest(refused: list[Refusal]) -> Refusal:
    return max(refused, key=lambda r: _DEPTH[r.reason.code])


def _not_fused(region: Region, refused: list[Refusal], bound: Bound | None = None) -> BlockReport:
    refusal = (
        _furthest(refused)
        if refused
        else Refusal(Code.SPELLING, "no known spelling of the experts", region.location)
    )
    reason = refusal.reason
    if not reason.location:
        reason = Reason(reason.code, reason.message, region.location)
    return BlockReport(
        spelling=bound.spelling.name if bound else "",
        fused=False,
        reason=reason,
        location=region.location,
        moe=bound.moe if bound else None,
        nodes_before=len(region.nodes),
    )


def _router_only(node: fx.Node, uncaptured: Reason | None) -> BlockReport:
    why = "the loop over the experts is not in the graph"
    return not_captured(uncaptured or Reason(Code.CONTROL_FLOW, why, location(node)))


def not_captured(reason: Reason) -> BlockReport:
    """The line for experts that did not reach the backend, at most their router."""
    words = "only the router was captured: "
    if (
        reason.code is Code.CONTROL_FLOW
    ):  # else the loop had been captured, and that is what was wrong with it
        reason = dataclasses.replace(reason, message=words + reason.message.removeprefix(words))
    return _refused(reason)


def _refused(reason: Reason) -> BlockReport:
    return BlockReport(spelling="", fused=False, reason=reason, location=reason.location)


def _dense(node: fx.Node) -> BlockReport:
    words = (
        "no known spelling: every expert is computed for every token, with scores that are not zero"
    )
    reason = Reason(Code.SPELLING, words, location(node))
    return _refused(reason)


def _shapes(bound: Bound) -> dict[str, str]:
    named = {
        "hidden_states": bound.x,
        "topk_ids": bound.topk_ids,
        "topk_weights": bound.topk_weights,
    }
    return {n: str(list(value(node).shape)) for n, node in named.items() if node is not None}


@contextlib.contextmanager
def _timed(report: CompileReport, stage: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        report.stage_seconds[stage] = (
            report.stage_seconds.get(stage, 0.0) + time.perf_counter() - start
        )
