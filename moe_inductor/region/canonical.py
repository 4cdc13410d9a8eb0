"""A region, traced again on its own into a small functional ATen graph, with the way back to the Dynamo graph.

Dynamo's graph is torch IR: in-place operators, methods, many surface forms.  Nothing is matched there.  The region is
run once with fake tensors under functionalisation, with no decomposition (Inductor's would turn silu into five nodes)
and with gradients off, and then brought to normal form.  What a Dynamo node is worth when the region has
run is recorded for every node, so that a value matched here can be named, read and replaced there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.fx import traceback as fx_traceback
from torch.fx.node import map_aggregate

from moe_inductor._compat import (
    FakeTensor,
    FakeTensorMode,
    FunctionalTensorMode,
    dispatch_functionalize,
    enable_python_dispatcher,
    make_fx,
)
from moe_inductor.reasons import Code, Refusal
from moe_inductor.region.find import Region
from moe_inductor.region.fold import KEPT, Fold
from moe_inductor.region.nodes import (
    ROLE,
    STATES,
    STORED,
    is_floating,
    location,
    mutated,
    name_of,
    storages,
    unbacked,
    value,
)
from moe_inductor.region.normalise import Emitter, normalise
from moe_inductor.region.row_ops import restated

# How rows are added in place to what was there.
_ADDS = frozenset({"index_add_", "scatter_add_", "index_put_", "setitem"})


@dataclasses.dataclass(frozen=True, eq=False)
class Folded:
    """See ``Fold``, in terms of the normal form."""

    runs: tuple[tuple[int, ...], ...]
    weights: dict[fx.Node, dict[int, fx.Node]]

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(e for run in self.runs for e in run)

    @property
    def traced(self) -> tuple[int, ...]:
        return tuple(e for run in self.runs for e in run[:KEPT])

    def of(self, traced: Iterable[int]) -> Folded:
        """The runs that these passes are of."""
        wanted = set(traced)
        runs = tuple(run for run in self.runs if wanted.intersection(run[:KEPT]))
        return Folded(runs, self.weights)


@dataclasses.dataclass(frozen=True)
class Autocast:
    """An active ``torch.autocast``: its casts are in the normal form, where they are written out."""

    device_type: str
    dtype: torch.dtype


@dataclasses.dataclass(eq=False)
class Canonical:
    """module, graph: the normal form, one placeholder per tensor input of the region; only read, never run.
    dynamo_of: for a normal-form node, the Dynamo nodes that hold its value once the region has run, inputs included.
    made_as: the same for what they held when they were made, of those that the region writes to.
    fake_mode: where to trace references that are to be compared with ``graph``.
    grad_enabled: grad mode of the experts.  grad_modes: that of every Dynamo node.  router_refusal: why the router
        must stay, when it runs under another mode, and that is not written out.
    grad_refusal: what to say of a block with both modes after its root, if it is not fused.
    autocast, router_autocast: under what references are to be traced.  The casts of autocast are written out in
        ``graph``, so that what the proof finds equal is equal, whatever runs under which.
    folded: what stands for passes of a loop that were not traced (``region/fold.py``).
    emitter: what built ``graph``, with what it found out about sizes that depend on data.
    """

    region: Region
    module: fx.GraphModule
    dynamo_of: dict[fx.Node, list[fx.Node]]
    made_as: dict[fx.Node, list[fx.Node]]
    fake_mode: FakeTensorMode
    grad_enabled: bool
    grad_modes: dict[fx.Node, bool]
    autocast: Autocast | None
    router_autocast: Autocast | None
    router_refusal: Refusal | None
    grad_refusal: Refusal | None
    folded: Folded | None
    emitter: Emitter

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    def held_in(self, dynamo: fx.Node | None) -> fx.Node | None:
        """The normal-form node whose value the Dynamo node holds."""
        return next((n for n, held in self.dynamo_of.items() if dynamo in held), None)

    def source_of(self, node: fx.Node | None) -> str:
        """The model's source line behind a normal-form node."""
        while node is not None:
            if found := location(node):
                return found
            for dynamo in self.dynamo_of.get(node, ()):
                if found := location(dynamo):
                    return found
            node = next(iter(node.all_input_nodes), None)
        return self.region.location


def canonicalise(gm: fx.GraphModule, region: Region, folds: Fold | None = None) -> Canonical:
    """Trace ``region``, or what ``folds`` keeps of it.

    Raises Refusal (MUTATION, GRAD_STATE, CANONICALISE).
    """
    states = states_of(region.graph)
    grad = _grad_modes(region, states)
    left = _no_foreign_mutation(region)
    if folds is not None and (passes := left.intersection(folds.nodes)):
        raise Refusal(
            Code.ACCUMULATOR,
            "the experts are added to a tensor that others change, or know by another name",
            min(location(node) for node in passes),
        )
    untraced = set(region.nodes).difference(folds.nodes if folds is not None else region.nodes)
    if not _one_autocast(region, states) or untraced & grad.stopped:
        folds = None  # passes are compared without it
    fake_mode = _fake_mode(region)
    runner = _Runner(gm, region, folds, states, grad.stopped)
    try:
        traced = trace(runner, [value(n) for n in region.inputs], fake_mode)
    except Refusal:
        raise
    except Exception as error:
        where = location(runner.current) if runner.current is not None else region.location
        name = name_of(runner.current) if runner.current is not None else "?"
        text = str(error).strip().splitlines()
        raise Refusal(
            Code.CANONICALISE,
            f"`{name}` could not be traced: {type(error).__name__}: {text[0] if text else ''}",
            where,
        ) from error
    roles = _roles(region)
    for held, raw in zip(region.inputs, _placeholders(traced.graph), strict=True):
        raw.meta[ROLE] = roles.get(held)
    out = Emitter(keep_detach=grad.enabled)
    graph, env = normalise(traced.graph, out=out)
    inputs = {
        n: env[raw] for n, raw in zip(region.inputs, _placeholders(traced.graph), strict=True)
    }
    results = [env.get(raw) for raw in _results(traced.graph)]
    ends, starts = results[: len(runner.wanted)], results[len(runner.wanted) :]
    unwritten = [(n, new) for n, new in inputs.items() if n not in runner.written]
    dynamo_of = _by_value([*unwritten, *zip(runner.wanted, ends, strict=True)])
    made_as = _by_value(zip(runner.written, starts, strict=True))
    module = fx.GraphModule(traced, graph)
    folded = None
    if folds is not None:
        of_pass = {
            inputs[w]: {e: inputs[n] for e, n in by_id.items()}
            for w, by_id in folds.weights.items()
        }
        folded = Folded(folds.runs, of_pass)
    return Canonical(
        region,
        module,
        dynamo_of,
        made_as,
        fake_mode,
        grad.enabled,
        {node: state.grad_enabled for node, state in states.items()},
        states[region.anchor].autocast,
        states[region.root].autocast,
        grad.router,
        grad.refusal,
        folded,
        out,
    )


def _roles(region: Region) -> dict[fx.Node, str]:
    """Which inputs are weights, made of parameters alone, and which are tokens, which the router reads."""
    stored: dict[fx.Node, bool] = {}
    for node in region.graph.nodes:
        inputs = node.all_input_nodes
        stored[node] = isinstance(value(node), torch.nn.Parameter) or (
            bool(inputs) and all(stored[a] for a in inputs)
        )
    read, todo = set(), [region.root]
    while todo:
        node = todo.pop()
        if node not in read:
            read.add(node)
            todo += node.all_input_nodes
    roles = {node: STATES for node in region.inputs if node in read}
    return roles | {node: STORED for node in region.inputs if stored[node]}


def trace(
    fn: Callable[..., Any],
    values: Sequence[Any],
    fake_mode: FakeTensorMode,
    autocast: Autocast | None = None,
) -> fx.GraphModule:
    """``fn`` as a functional ATen graph.  values: fake tensors and sizes, of which only the metadata is used."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(under(autocast))
        stack.enter_context(_quiet())
        stack.enter_context(fake_mode)
        if fake_mode.shape_env is not None:
            # Symbols made by running nonzero() again belong to nobody.
            stack.enter_context(fake_mode.shape_env.ignore_fresh_unbacked_symbols())
            # Symbolic sizes need the Python kernels.
            stack.enter_context(enable_python_dispatcher())
        stack.enter_context(fx_traceback.preserve_node_meta())
        args = [_fresh(v) for v in values]
        gm = make_fx(
            dispatch_functionalize(fn, FunctionalTensorMode()),
            decomposition_table={},
            tracing_mode="real",
        )(*args)
    return gm


class _Runner(fx.Interpreter):
    """Runs the region's Dynamo nodes, folded or not.

    Returns the final value of every wanted one, and what those that are written to were when they were made.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        region: Region,
        folds: Fold | None,
        states: dict[fx.Node, State],
        stopped: frozenset[fx.Node],
    ) -> None:
        super().__init__(gm, graph=region.graph)
        self.region = region
        self.stopped = stopped
        self.states = states
        self.nodes = region.nodes if folds is None else folds.nodes
        touched = {s for n in region.nodes for target in mutated(n) for s in storages(target)}
        held = [n for n in (*region.inputs, *self.nodes) if _trackable(n)]
        self.written = [n for n in held if storages(n) & touched]
        self.wanted = [n for n in held if n not in region.inputs or n in self.written]
        self.current: fx.Node | None = None
        # The sum after the passes that are run stands for the sum after all.
        self.last, self.last_run = folds.last if folds is not None and folds.last else (None, None)
        if self.last is not None and self.last_run is not None:
            self.wanted[self.wanted.index(self.last_run)] = self.last

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        self.env = dict(zip(self.region.inputs, args, strict=True))
        starts = {n: self.env[n].clone() for n in self.region.inputs if n in self.written}
        for node in self.nodes:
            self.current = node
            state = self.states[node]
            # ATen nodes inherit the model's source line.
            with fx_traceback.set_current_meta(node), under(state.autocast):
                constant = _constant(value(node))
                made = constant if constant is not None else restated(node, self.run_node(node))
                if node in self.stopped:
                    made = map_aggregate(made, _without_gradient)
                self.env[node] = made
                if node in self.written:
                    starts[node] = self.env[node].clone()
            if node is self.last_run and self.last is not None:
                self.env[self.last] = self.env[node]
        self.current = None
        return (*(self.env[n] for n in self.wanted), *(starts[n] for n in self.written))


def _by_value(held: Iterable[tuple[fx.Node, Any]]) -> dict[fx.Node, list[fx.Node]]:
    """The Dynamo nodes of each normal-form node."""
    found: dict[fx.Node, list[fx.Node]] = {}
    for dynamo, new in held:
        if isinstance(new, fx.Node):
            found.setdefault(new, []).append(dynamo)
    return found


def _constant(item: Any) -> float | None:
    """A float attribute of the model that Dynamo left open (``dynamic=True``): as it is now, which adds a guard.  An
    epsilon or a scale decides what the block is."""
    return float(item) if isinstance(item, torch.SymFloat) and not unbacked(item) else None


def _without_gradient(made: Any) -> Any:
    return made.detach() if isinstance(made, torch.Tensor) and made.is_floating_point() else made


def _trackable(node: fx.Node) -> bool:
    return isinstance(value(node), torch.Tensor)


def _placeholders(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op == "placeholder"]


def _results(graph: fx.Graph) -> list[Any]:
    (output,) = (n for n in graph.nodes if n.op == "output")
    return list(output.args[0])


def _fresh(item: Any) -> Any:
    if not isinstance(item, torch.Tensor):
        constant = _constant(item)
        return item if constant is None else constant
    return torch.empty_strided(item.shape, item.stride(), dtype=item.dtype, device=item.device)


@contextlib.contextmanager
def under(autocast: Autocast | None) -> Iterator[None]:
    """Exactly this autocast, whatever the caller's is.  Its cache of casts holds fake tensors of other traces."""
    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if autocast is not None and autocast.device_type == device:
                stack.enter_context(torch.autocast(device, autocast.dtype, cache_enabled=False))
            elif torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """A reference that does not run with the tensors at hand is an answer, not an error to log."""
    logger = logging.getLogger(FakeTensor.__module__)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _fake_mode(region: Region) -> FakeTensorMode:
    for node in (*region.inputs, *region.nodes):
        found = value(node)
        if isinstance(found, FakeTensor):
            return found.fake_mode
    raise Refusal(Code.CANONICALISE, "the region has no tensor inputs", region.location)


class State(NamedTuple):
    """Under what a node of the Dynamo graph runs."""

    grad_enabled: bool
    autocast: Autocast | None


def states_of(graph: fx.Graph) -> dict[fx.Node, State]:
    """The state of every node, from what is on around the graph and from the nodes that switch it."""
    grad = torch.is_grad_enabled()
    ambient = None
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            ambient = Autocast(device, torch.get_autocast_dtype(device))
    entered: list[Autocast | None] = []
    states: dict[fx.Node, State] = {}
    for node in graph.nodes:
        name = name_of(node)
        if name == "_set_grad_enabled":
            grad = bool(node.args[0])
        elif name == "_enter_autocast":
            entered.append(_entered(node))
        elif name == "_exit_autocast" and entered:
            entered.pop()
        states[node] = State(grad, entered[-1] if entered else ambient)
    return states


def _entered(node: fx.Node) -> Autocast | None:
    device, dtype, enabled, *_ = (*node.args, *(None, None, True)[len(node.args) :])
    if not enabled:
        return None
    return Autocast(str(device), dtype or torch.get_autocast_dtype(str(device)))  # type: ignore[arg-type]


class _Grad(NamedTuple):
    """enabled: do the experts train?  stopped: nodes whose results have no gradient although they do.
    refusal: what to say if that is in the way.  router: why the router must stay."""

    enabled: bool
    stopped: frozenset[fx.Node]
    refusal: Refusal | None
    router: Refusal | None


def _grad_modes(region: Region, states: dict[fx.Node, State]) -> _Grad:
    """A value computed under ``torch.no_grad()`` inside a block that trains has no gradient; a fused one would have it.

    Where modes are mixed that is written out: f(x) under no_grad is detach(f(x)).  Raises Refusal (GRAD_STATE).
    """
    position = {node: i for i, node in enumerate(region.graph.nodes)}
    floating = [node for node in region.nodes if is_floating(node)]
    # The root belongs to the router: ids are often chosen without gradients.
    after = [n for n in floating if position[n] > position[region.root]]
    enabled = any(states[n].grad_enabled for n in after) or not after
    other = [n for n in floating if states[n].grad_enabled != enabled]
    late = next((n for n in after if n in other), None)
    refusal = Refusal(Code.GRAD_STATE, "", location(late)) if late is not None else None
    words = "the router mixes grad modes"
    unclear = [n for n in other if not enabled or not _stays_without(n, set(other))]
    router = Refusal(Code.GRAD_STATE, words, location(unclear[0])) if unclear else None
    stopped = {n for n in other if enabled and not mutated(n)}
    if refusal is not None and any(n in after and n not in stopped for n in other):
        raise refusal  # changed in place: it keeps the gradient of what it was
    return _Grad(enabled, frozenset(stopped), refusal, router)


def _stays_without(node: fx.Node, without: set[fx.Node]) -> bool:
    """Does ``node``, which runs without gradients, give what has none?  One that changes a tensor in place does where
    all that it reads has none either."""
    return not mutated(node) or all(
        a in without or not is_floating(a) for a in node.all_input_nodes
    )


def _one_autocast(region: Region, states: dict[fx.Node, State]) -> bool:
    """Do all nodes after the choice of experts run under the same autocast?  The choice may be an input."""
    position = {node: i for i, node in enumerate(region.graph.nodes)}
    after = [node for node in region.nodes if position[node] > position[region.root]]
    return len({states[node].autocast for node in after}) <= 1


def _no_foreign_mutation(region: Region) -> set[fx.Node]:
    """Nothing outside changes what the region is still to read, and the region changes only what it made, or adds rows
    to what was there.

    What follows the experts is left to the model where it does otherwise: a block that writes its result into a tensor
    that two blocks share, say.  Returns what was left.
    """
    before = set(region.nodes)
    while (found := _foreign_mutation(region)) is not None:
        touching, refusal = found
        if not region.give_up(touching):
            raise refusal
    return before.difference(region.nodes)


def _last_reads(region: Region) -> tuple[set[int], dict[int, int]]:
    """Storages that the region only reads, and where in the graph each is read last.  From there on others may change
    them, as a router's bias is moved by how often experts were chosen; who reads them later than the model did asks
    ``Rewriter.unchanged``."""
    held = {s for node in region.inputs for s in storages(node)}
    held -= {s for node in region.read_by_others for s in storages(node)}
    last: dict[int, int] = {}
    members = set(region.nodes)
    for position, node in enumerate(region.graph.nodes):
        if node in members:
            held -= {s for target in mutated(node) for s in storages(target)}
            for storage in {s for n in (node, *node.all_input_nodes) for s in storages(n)}:
                last[storage] = position
    return held, last


def _foreign_mutation(region: Region) -> tuple[list[fx.Node], Refusal] | None:
    """The first one: the members that share its tensor, and what to say of it."""
    members = set(region.nodes)
    made: set[int] = set()
    read: set[int] = set()
    for node in region.nodes:
        made |= storages(node)
    known: set[int] = set()  # of more than one input
    for node in region.inputs:
        known |= storages(node) & read
        read |= storages(node)
    held, last = _last_reads(region)
    inside = False
    pending = len(region.nodes)
    for position, node in enumerate(region.graph.nodes):
        if node in members:
            inside, pending = True, pending - 1
        if not (inside and pending):
            continue
        for target in mutated(node):
            if node in members and storages(target) & (known if name_of(node) in _ADDS else read):
                words = f"`{name_of(node)}` changes an input of the block"
                return [node], Refusal(Code.MUTATION, words, location(node))
            shared = {
                s for s in storages(target) & (read | made) if s not in held or last[s] > position
            }
            if node not in members and shared:
                words = f"`{name_of(node)}` changes a tensor of the block in the middle of it"
                touching = [
                    n
                    for n in region.nodes
                    if any(storages(a) & shared for a in (n, *n.all_input_nodes))
                ]
                return touching, Refusal(Code.MUTATION, words, location(node))
    return None
