"""What capture took for granted while it traced a block, proved for that block.

The graph of a speculated loop says what happens when every expert is visited and has tokens.  The model visits only
those in its hit list, and skips an expert that has no tokens.  The two are the same if

* what is traced speculatively reaches the rest of the program only as the experts' additions to the block's sum.  These
  are the links of the chain that ``prove_experts`` has shown; all else has to be gone after the rewrite, which
  ``unaccounted`` tells;
* pass e of a loop makes the addition of expert e and no other, and the hit list holds every expert that was chosen.
  Who is not in it then adds no rows;
* a test of a size guards only additions of that many rows, and a test of a tensor only the additions of one expert, for
  which it asks whether it was chosen.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx

from moe_inductor.capture.assumptions import (
    Assumption,
    Forked,
    Kept,
    Length,
    NonEmpty,
    Padded,
    Pass,
    Rolled,
    RolledModules,
    Tested,
    Visited,
)
from moe_inductor.capture.marker import take
from moe_inductor.capture.rolled import EXPERT_INDEX
from moe_inductor.match.api import ChosenSpelling, HitListSpelling, combinations
from moe_inductor.match.bind import Bound
from moe_inductor.match.experts import ids_in_range
from moe_inductor.prove.expressions import Numbering
from moe_inductor.prove.skipped import counted_by, prove_padded, prove_skipped
from moe_inductor.reasons import Code, Reason, Refusal
from moe_inductor.region.canonical import Canonical, trace
from moe_inductor.region.counts import counted, root_of
from moe_inductor.region.find import Region
from moe_inductor.region.fold import Fold, fold, fold_rolled, sum_steps
from moe_inductor.region.nodes import (
    has_unbacked,
    is_integral,
    is_tensor,
    mutated,
    name_of,
    storages,
    unbacked,
    unviewed,
    value,
)
from moe_inductor.region.normalise import normalise

aten = torch.ops.aten


class Assumed:
    """The assumptions of one capture.

    proved: those that hold for a block.  refused: why one does not, that is about more than a block.
    kept: the tensor that an assumption is about, where nothing else reads it.
    """

    def __init__(self, assumptions: Iterable[Assumption] = ()) -> None:
        self.all = list(assumptions)
        self.proved: set[Assumption] = set()
        self.refused: dict[Assumption, Reason] = {}
        self.kept: dict[Assumption, fx.Node] = {
            a: take(a.marker) for a in self.all if isinstance(a, (Visited, Tested, Length))
        }
        self.kept.update((a, a.padded) for a in self.all if isinstance(a, Padded))
        for loop in self.all:
            if isinstance(loop, Rolled):
                self.kept[loop] = loop.index.all_input_nodes[0]
            elif isinstance(loop, RolledModules):
                self.kept[loop] = loop.indices[0].all_input_nodes[0]
                for node in loop.kept:
                    node.graph.erase_node(node)

    def concerning(self, region: Region) -> list[Assumption]:
        """Those that the region was traced under."""
        members = set(region.nodes)
        return [
            a
            for a in self.all
            if self.kept.get(a) in members or any(n in members for p in a.passes for n in p.nodes)
        ]

    def forks(self, graph: fx.Graph) -> list[Forked]:
        """Tests in ``graph`` that were traced both ways, inner ones first."""
        found = [
            a for a in self.all if isinstance(a, Forked) and a.merged and a.test.graph is graph
        ]
        return found[::-1]

    def fold(self, region: Region) -> Fold | None:
        """What stands for passes of the region's loop that need not be traced again."""
        for loop in self.concerning(region):
            if isinstance(loop, Rolled):
                return None
            if isinstance(loop, RolledModules):
                return fold_rolled(region, loop.passes, loop.experts)
        return fold(region, self.guards(region))

    def guards(self, region: Region) -> dict[fx.Node, list[fx.Node]]:
        """For each addition to the sum, the tensors whose test decides whether it is made."""
        steps = set(sum_steps(region))
        found: dict[fx.Node, list[fx.Node]] = {}
        for test in self.all:
            if isinstance(test, Tested):
                for node in (n for p in test.passes for n in p.nodes if n in steps):
                    found.setdefault(node, []).append(self.kept[test])
        return found

    def unaccounted(self, graphs: Sequence[fx.Graph]) -> list[Assumption]:
        """Those that were not proved, or under which something was traced that is still computed."""
        alive = {n for graph in graphs for n in graph.nodes}
        return [
            a
            for a in self.all
            if a not in self.proved
            or any(n in alive and not _says_nothing(n) for p in a.passes for n in p.nodes)
            or any(n in alive for n in _never_run(a))
        ]


def prove_assumptions(
    canonical: Canonical,
    bound: Bound,
    assumed: Assumed,
    hit_lists: Sequence[HitListSpelling],
    chosen: Sequence[ChosenSpelling],
) -> None:
    """All that the region was traced under holds for a block that ``prove_experts`` accepted.

    Raises Refusal(ASSUMPTION) with the loop or test that does not.
    """
    concerning = assumed.concerning(canonical.region)
    if not bound.spelling.loop:
        tests = [(a, assumed.kept.get(a)) for a in concerning if isinstance(a, (Tested, NonEmpty))]
        prove_skipped(canonical, bound, tests, [a for a in concerning if isinstance(a, Kept)])
        for loop in concerning:
            if isinstance(loop, Padded):
                prove_padded(canonical, bound, loop)
        skipped = (Tested, NonEmpty, Kept, Padded)
        assumed.proved.update(a for a in concerning if isinstance(a, skipped))
    for assumption in concerning:
        if assumption in assumed.proved:
            continue
        if isinstance(assumption, Visited):
            _each_pass_adds_its_expert(assumption, bound)
            rows = assumed.kept[assumption]
            classes = assumption.bound
            _lists_every_chosen_expert(canonical, assumption, rows, bound, classes, hit_lists)
        elif isinstance(assumption, (Rolled, RolledModules)):
            _one_pass_stands_for_all(canonical, assumption, bound)
            rows = assumed.kept[assumption]
            classes = assumption.count + assumption.last
            _lists_every_chosen_expert(canonical, assumption, rows, bound, classes, hit_lists)
        elif isinstance(assumption, (NonEmpty, Tested)) and _asks_for_its_count(
            canonical, assumption, assumed.kept.get(assumption), bound
        ):
            pass
        elif isinstance(assumption, NonEmpty):
            _guards_its_own_rows(assumption)
        elif isinstance(assumption, Tested):
            _asks_whether_chosen(canonical, assumption, assumed.kept[assumption], bound, chosen)
        elif isinstance(assumption, Length):
            _counts_no_other_ids(canonical, assumption, assumed.kept[assumption], bound)
        else:
            words = "loop over counts: not known to leave out nothing but experts without tokens"
            raise Refusal(Code.ASSUMPTION, words, _where(assumption))
    assumed.proved.update(concerning)


def _each_pass_adds_its_expert(loop: Visited, bound: Bound) -> None:
    adds = [e for e, one in enumerate(loop.passes) for _ in _effects(one, loop)]
    # Additions to one tensor cannot change places, so the n-th here is the n-th link of the proved chain.
    if tuple(adds) != bound.visited:
        raise Refusal(
            Code.ASSUMPTION,
            "for-loop over data-dependent rows: a pass does more or other than adding its expert's rows",
            _where(loop),
        )


def _one_pass_stands_for_all(
    canonical: Canonical, loop: Rolled | RolledModules, bound: Bound
) -> None:
    """A pass makes the one addition of expert ``index``, which is each of the experts, and no other."""
    indices = _indices(loop)
    index = _index_in(canonical, indices[0])
    adds = [len(_effects(one, loop)) for one in loop.passes]
    expected = [1] * len(indices) + [0] * loop.last
    experts = len(bound.visited)
    # A mask may have rows beyond the experts, whose weights do not exist: no id may be that large.
    fits = loop.count == experts or (loop.count > experts and ids_in_range(bound.topk_ids, experts))
    if bound.index != [index] or adds != expected or not fits:
        raise Refusal(
            Code.ASSUMPTION,
            "for-loop over data-dependent rows: a pass does more or other than adding its expert's rows",
            _where(loop),
        )


def _lists_every_chosen_expert(
    canonical: Canonical,
    loop: Visited | Rolled | RolledModules,
    listed: fx.Node,
    bound: Bound,
    num_classes: int,
    hit_lists: Sequence[HitListSpelling],
) -> None:
    """``rows`` is a known function of ``topk_ids`` whose value is the sorted list of the ids that occur."""
    rows = canonical.held_in(listed)
    for spelling in hit_lists:
        for facts in combinations(spelling.facts):
            if rows is not None and is_hit_list(
                canonical, rows, bound, num_classes, spelling, facts
            ):
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
    if spelling.ids_in_range and not ids_in_range(bound.topk_ids, num_classes):
        return False
    return _equals(
        canonical, rows, bound, lambda ids: spelling.reference(ids, num_classes, **facts)
    )


def _asks_for_its_count(
    canonical: Canonical, test: Tested | NonEmpty, tested: fx.Node | None, bound: Bound
) -> bool:
    """``if counts[e] == 0``, where only rows of expert e depend on it: no id is e where none was counted."""
    count = counted_by(canonical, test, tested)
    ids = counted(count[0]) if count is not None else None
    if count is None or ids is None or ids[0] is not root_of(bound.topk_ids):
        return False
    experts = _experts_of(canonical, test, bound)
    return experts is not None and experts <= {count[1]}


def _experts_of(canonical: Canonical, test: Tested | NonEmpty, bound: Bound) -> set[Any] | None:
    """The experts of the additions that depend on a test, None among them where it is not known of one."""
    steps = sum_steps(canonical.region)
    ids = bound.index * len(steps) or bound.visited
    if len(steps) != len(ids):
        return None
    number = dict(zip(steps, ids, strict=True))
    return {number.get(node) for one in test.passes for node in _effects(one, test)}


def _asks_whether_chosen(
    canonical: Canonical,
    test: Tested,
    tested: fx.Node,
    bound: Bound,
    spellings: Sequence[ChosenSpelling],
) -> None:
    """The value is a known function of ``topk_ids`` that says whether expert e occurs; only its rows depend on it."""
    experts = _experts_of(canonical, test, bound)
    asked = canonical.held_in(tested)
    if experts is not None and len(experts) <= 1:
        (e,) = experts or {None}
        if not experts:
            return  # it decides about nothing
        if e is not None and (
            # The test of a pass that is folded was compared with those that are not.
            (asked is None and canonical.folded is not None and e not in bound.traced)
            or _is_known_test(canonical, asked, e, test.truth, bound, spellings)
        ):
            return
    raise Refusal(
        Code.ASSUMPTION,
        "test of a tensor: not known to ask whether the expert was chosen whose rows depend on it",
        _where(test),
    )


def _is_known_test(
    canonical: Canonical,
    asked: fx.Node | None,
    e: int | fx.Node,
    truth: bool,
    bound: Bound,
    spellings: Sequence[ChosenSpelling],
) -> bool:
    return asked is not None and any(
        spelling.truth(facts) is truth
        and is_chosen_test(canonical, asked, bound, e, spelling, facts)
        for spelling in spellings
        for facts in combinations(spelling.facts)
    )


def is_chosen_test(
    canonical: Canonical,
    asked: fx.Node,
    bound: Bound,
    e: int | fx.Node,
    spelling: ChosenSpelling,
    facts: dict[str, object],
) -> bool:
    """Is ``asked`` what the spelling with these facts asks about expert ``e``?"""
    given = [e] if isinstance(e, fx.Node) else []
    return _equals(
        canonical,
        asked,
        bound,
        lambda ids, *index: spelling.reference(ids, *(index or (e,)), **facts),
        given,
    )


def _equals(
    canonical: Canonical,
    node: fx.Node,
    bound: Bound,
    reference: Callable[..., torch.Tensor],
    further: Sequence[fx.Node] = (),
) -> bool:
    """Is ``node`` the value of ``reference(topk_ids, *further)``, up to a view?"""

    def of_ids(topk_ids: torch.Tensor, *others: Any) -> torch.Tensor:
        return reference(topk_ids.reshape(-1, bound.moe.top_k), *others)

    # Below a view: the model's may have been merged into the next one.
    inputs = [unviewed(bound.topk_ids), *further]
    try:
        traced = trace(of_ids, [value(n) for n in inputs], canonical.fake_mode)
    except Exception:  # it does not run with these ids, so it is not what the model ran
        return False
    graph, _ = normalise(traced.graph)
    (output,) = (n for n in graph.nodes if n.op == "output")
    numbering = Numbering()
    placeholders = (n for n in graph.nodes if n.op == "placeholder")
    for name, (mine, theirs) in enumerate(zip(inputs, placeholders, strict=True)):
        numbering.leaf(mine, name)
        numbering.leaf(theirs, name)
    return numbering.number(unviewed(node)) == numbering.number(unviewed(output.args[0]))


def _guards_its_own_rows(test: NonEmpty) -> None:
    for one in test.passes:
        for effect in _effects(one, test):
            rows = {
                s
                for a in effect.all_input_nodes
                if is_integral(a) and value(a).dim() == 1
                for s in unbacked(value(a))
            }
            if rows != {test.number}:
                raise Refusal(
                    Code.ASSUMPTION,
                    "test of a data-dependent size: it decides about more than rows of that number",
                    _where(test),
                )


def _counts_no_other_ids(
    canonical: Canonical, length: Length, counts: fx.Node, bound: Bound
) -> None:
    """The counts are those of the block's ids, all of which are below the length."""
    held = canonical.held_in(counts)
    ids = None
    if held is not None and unviewed(held).target is aten.bincount.default:
        ids = root_of(unviewed(held).all_input_nodes[0])
    if ids is not root_of(bound.topk_ids) or not ids_in_range(bound.topk_ids, length.length):
        raise Refusal(
            Code.ASSUMPTION,
            "bincount: not known to count ids below its minlength",
            _where(length),
        )


def _effects(one: Pass, assumption: Assumption) -> list[fx.Node]:
    """Nodes of a pass that can be seen from outside: writes into older tensors, and new values of older locals."""
    nodes = set(one.nodes)
    older = {s for n in one.nodes for a in n.all_input_nodes if a not in nodes for s in storages(a)}
    found = {
        n
        for n in one.nodes
        for target in mutated(n)
        if target not in nodes or storages(target) & older
    }
    if one.appended:
        raise Refusal(Code.ASSUMPTION, "a list is filled by the passes", _where(assumption))
    for name, after in one.after.items():
        before = one.before.get(name)
        if after is before:
            continue
        if before is None or after not in nodes or not after.args or after.args[0] is not before:
            raise Refusal(
                Code.ASSUMPTION, f"`{name}` is not a sum over the passes", _where(assumption)
            )
        found.add(after)
    return [n for n in one.nodes if n in found]


def _says_nothing(node: fx.Node) -> bool:
    return _switches_mode(node) or _views_an_input(node)


def _views_an_input(node: fx.Node) -> bool:
    """A view of a graph input is what it is, whichever passes are made: dbrx views its stacked weights in each."""
    base = node
    while base.op.startswith("call") and len(base.all_input_nodes) == 1 and not mutated(base):
        base = base.all_input_nodes[0]
    return (
        base.op in ("placeholder", "get_attr")
        and is_tensor(node)
        and storages(node) <= storages(base)
        and not has_unbacked(node)
    )


def _switches_mode(node: fx.Node) -> bool:
    """A pass leaves the modes as it found them; with all between them gone, the switches do nothing."""
    return name_of(node) in ("_set_grad_enabled", "_enter_autocast", "_exit_autocast")


def _never_run(assumption: Assumption) -> list[fx.Node]:
    """Nodes that raise if they are run."""
    return [assumption.padded] if isinstance(assumption, Padded) else _indices(assumption)


def _indices(assumption: Assumption) -> list[fx.Node]:
    """The symbolic indices of a loop that was rolled; none of another assumption."""
    if isinstance(assumption, Rolled):
        return [assumption.index]
    return assumption.indices if isinstance(assumption, RolledModules) else []


def _index_in(canonical: Canonical, dynamo: fx.Node) -> fx.Node | None:
    """The normal form of a symbolic index: made of the same rows."""
    rows = canonical.held_in(dynamo.all_input_nodes[0])
    made = [n for n in canonical.graph.nodes if n.target is EXPERT_INDEX and n.args[0] is rows]
    return made[0] if len(made) == 1 else None


def _where(assumption: Assumption) -> str:
    return os.path.basename(assumption.location)
