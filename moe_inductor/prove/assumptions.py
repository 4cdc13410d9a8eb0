"""What capture took for granted while it traced a block, proved for that block.

The graph of a speculated loop says what happens when every expert is visited and has tokens.  The model visits only
those in its hit list, and skips an expert whose rows are empty.  The two are the same if

* what is traced speculatively reaches the rest of the program only as the experts' additions to the block's sum.  These
  are the links of the chain that ``prove_experts`` has shown; all else has to be gone after the rewrite, which
  ``survivors`` tells;
* pass e of a loop makes the addition of expert e and no other, and the hit list holds every expert that was chosen.
  Who is not in it then adds no rows;
* an emptiness test guards only additions of that many rows.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import fx

from moe_inductor.capture.assumptions import Assumption, NonEmpty, Pass, Visited
from moe_inductor.capture.marker import take
from moe_inductor.match.api import HitListSpelling, combinations
from moe_inductor.match.bind import Bound
from moe_inductor.prove.expressions import Numbering
from moe_inductor.reasons import Code, Refusal
from moe_inductor.region.canonical import Canonical, trace
from moe_inductor.region.nodes import is_integral, mutated, storages, unbacked, value
from moe_inductor.region.normalise import normalise

aten = torch.ops.aten


def concerning(canonical: Canonical, assumptions: Iterable[Assumption]) -> list[Assumption]:
    """Those under which some node of the region was traced."""
    members = set(canonical.region.nodes)
    return [a for a in assumptions if any(n in members for p in a.passes for n in p.nodes)]


def survivors(graphs: Sequence[fx.Graph], assumptions: Iterable[Assumption]) -> list[Assumption]:
    """Those under which something was traced that is still computed."""
    alive = {n for graph in graphs for n in graph.nodes}
    return [a for a in assumptions if any(n in alive for p in a.passes for n in p.nodes)]


def take_markers(assumptions: Iterable[Assumption]) -> dict[Assumption, fx.Node]:
    """The hit list of each speculated loop; from now on nothing in the graph keeps it."""
    return {a: take(a.marker) for a in assumptions if isinstance(a, Visited)}


def prove_assumptions(
    canonical: Canonical,
    bound: Bound,
    assumptions: Sequence[Assumption],
    rows: Mapping[Assumption, fx.Node],
    hit_lists: Sequence[HitListSpelling],
) -> None:
    """All of ``concerning(canonical, ..)`` hold for a block that ``prove_experts`` accepted.

    Raises Refusal(ASSUMPTION) with the loop or test that does not.
    """
    for assumption in assumptions:
        if isinstance(assumption, Visited):
            _each_pass_adds_its_expert(assumption, bound)
            _lists_every_chosen_expert(canonical, assumption, rows[assumption], bound, hit_lists)
        elif isinstance(assumption, NonEmpty):
            _guards_its_own_rows(assumption)
        else:
            raise Refusal(Code.ASSUMPTION, "", _where(assumption))


def _each_pass_adds_its_expert(loop: Visited, bound: Bound) -> None:
    adds = [e for e, one in enumerate(loop.passes) for _ in _effects(one, loop)]
    # Additions to one tensor cannot change places, so the n-th here is the n-th link of the proved chain.
    if tuple(adds) != bound.visited:
        raise Refusal(
            Code.ASSUMPTION,
            "for-loop over data-dependent rows: a pass does more or other than adding its expert's rows",
            _where(loop),
        )


def _lists_every_chosen_expert(
    canonical: Canonical,
    loop: Visited,
    listed: fx.Node,
    bound: Bound,
    hit_lists: Sequence[HitListSpelling],
) -> None:
    """``rows`` is a known function of ``topk_ids`` whose value is the sorted list of the ids that occur."""
    held_in = (n for n, held in canonical.dynamo_of.items() if listed in held)
    rows = next(held_in, None)
    if rows is not None:
        rows = _unviewed(rows)
        for spelling in hit_lists:
            for facts in combinations(spelling.facts):
                if is_hit_list(canonical, rows, bound, loop.bound, spelling, facts):
                    return
    raise Refusal(
        Code.ASSUMPTION,
        "for-loop over data-dependent rows: not known to be the list of the chosen experts",
        _where(loop),
    )


def is_hit_list(
    canonical: Canonical,
    rows: fx.Node,
    bound: Bound,
    num_classes: int,
    spelling: HitListSpelling,
    facts: dict[str, object],
) -> bool:
    """Is ``rows`` what the spelling with these facts makes of the block's ids?"""

    def reference(topk_ids: torch.Tensor) -> torch.Tensor:
        return spelling.reference(topk_ids.reshape(-1, bound.moe.top_k), num_classes, **facts)

    try:
        traced = trace(reference, [value(bound.topk_ids)], canonical.fake_mode)
    except Exception:  # it does not run with these ids, so it is not what the model ran
        return False
    graph, _ = normalise(traced.graph)
    (ids,) = (n for n in graph.nodes if n.op == "placeholder")
    (output,) = (n for n in graph.nodes if n.op == "output")
    numbering = Numbering()
    numbering.leaf(bound.topk_ids, "topk_ids")
    numbering.leaf(ids, "topk_ids")
    return numbering.number(rows) == numbering.number(_unviewed(output.args[0]))


def _guards_its_own_rows(test: NonEmpty) -> None:
    for one in test.passes:
        for effect in _effects(one, test):
            rows = {
                s
                for a in effect.all_input_nodes
                if is_integral(a) and value(a).dim() == 1
                for s in unbacked(value(a))
            }
            if rows != {test.symbol}:
                raise Refusal(
                    Code.ASSUMPTION,
                    "test of a data-dependent size: it decides about more than rows of that number",
                    _where(test),
                )


def _effects(one: Pass, assumption: Assumption) -> list[fx.Node]:
    """Nodes of a pass that can be seen from outside: writes into older tensors, and new values of older locals."""
    nodes = set(one.nodes)
    older = {s for n in one.nodes for a in n.all_input_nodes if a not in nodes for s in storages(a)}
    found = {
        n: None
        for n in one.nodes
        for target in mutated(n)
        if target not in nodes or storages(target) & older
    }
    if getattr(one, "appended", ()):
        raise Refusal(Code.ASSUMPTION, "a list is filled by the passes", _where(assumption))
    for name, after in one.after.items():
        before = one.before.get(name)
        if after is before:
            continue
        if before is None or after not in nodes or not after.args or after.args[0] is not before:
            raise Refusal(
                Code.ASSUMPTION, f"`{name}` is not a sum over the passes", _where(assumption)
            )
        found[after] = None
    return [n for n in one.nodes if n in found]


def _unviewed(node: fx.Node) -> fx.Node:
    """A list [n, 1] as [n] is the same list."""
    while node.target is aten.view.default:
        (node,) = (a for a in node.all_input_nodes[:1])
    return node


def _where(assumption: Assumption) -> str:
    return os.path.basename(assumption.location)
