"""What changes nothing must not matter: noise at every edge of a block, names, order of statements, extra dimensions.

The first sample of every way to write experts is wrapped in each of these ways; the block is still fused, described by
the same words, and gives what eager gives.  Every other sample is wrapped in all of them at once.  Nothing here names a
pattern: a new file in patterns/ is tested because it is there.

Half of it is in training, where the gradients are the same as well: which half differs from sample to sample, so that
over all samples each change is made in both.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from moe_inductor.patterns._blocks import VARIANTS
from torch import fx, nn

from moe_inductor.match.api import ExpertsSpelling, HitListSpelling, RouterSpelling, discover
from moe_inductor.region.nodes import mutated, storages
from moe_inductor.rewrite import pipeline
from tests.patterns.conftest import require
from tests.patterns.samples import step

SPELLINGS = discover()
_FIRST = [s for s in SPELLINGS if isinstance(s, (ExpertsSpelling, HitListSpelling))]
FIRST = [pytest.param(s, i, id=f"{s.name}-{s.samples[0].name}") for i, s in enumerate(_FIRST)]
# What experts compute between their projections is read by the same code for all: the first samples are enough.
OTHERS = [
    pytest.param(s, sample, i, id=f"{s.name}-{sample.name}")
    for s in SPELLINGS
    for i, sample in enumerate(s.samples)
    if sample.name not in VARIANTS and not (s in _FIRST and i == 0)
]
T = 12


def _copied(t: torch.Tensor) -> torch.Tensor:
    """Without gradients to anything before it, where there are none."""
    return (t if torch.is_grad_enabled() else t.detach()).contiguous().clone()


def _of_matrices(change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    return lambda t: change(t) if t.dim() > 1 else t


# tensor -> the same tensor
NOISE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "reshape": lambda t: t.reshape(-1).view(t.shape).unsqueeze(0).squeeze(0),
    "new_axis": lambda t: t[None, ..., None][0, ..., 0],
    "transpose": _of_matrices(lambda t: t.transpose(-2, -1).mT),
    "clone": _copied,
    "cast": lambda t: t.to(t.dtype).type_as(t),
    "slice": lambda t: t[..., : t.shape[-1]][0:],
    "chunk": lambda t: torch.cat(t.chunk(1, dim=-1)),
    "expand": lambda t: t.expand_as(t).expand(t.shape),
    "dropout": lambda t: nn.functional.dropout(t, 0.0, training=False),
    "permute": lambda t: t.unflatten(-1, (1, -1)).movedim(-2, 0).squeeze(0),
}
KINDS = list(NOISE.values())
EDGES = (
    *("input", "logits", "weights", "ids", "scores", "rows", "sorted", "read", "gate_up", "hidden"),
    *("given", "unsorted", "sum", "output"),
)


def shifted(shift: int) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Each edge has another kind of noise, and over all shifts each kind stands at each edge.

    But for what one expert reads, which is cloned: where every expert of a dense loop reads x, regions end at some of
    the others (dropout, cat, movedim), and each expert then has an input of its own.
    """
    noise = {edge: KINDS[(i + shift) % len(KINDS)] for i, edge in enumerate(EDGES)}
    return noise | {"read": NOISE["clone"]}


def noisy(module: nn.Module, noise: dict[str, Callable[[torch.Tensor], torch.Tensor]]) -> nn.Module:
    """``module`` with ``noise[edge]`` at each edge that it has a method for."""
    plain: Any = type(module)

    class Noisy(plain):
        def forward(self, x):
            made = super().forward(noise["input"](x))
            if isinstance(made, tuple):
                return (noise["output"](made[0]), *made[1:])
            return noise["output"](made)

        def route(self, logits):
            weights, ids = super().route(noise["logits"](logits))
            return noise["weights"](weights), noise["ids"](ids)

        def experts(self, x, topk_ids, topk_weights):
            return noise["sum"](super().experts(noise["rows"](x), topk_ids, topk_weights))

        def act(self, gate_up):
            return noise["hidden"](super().act(noise["gate_up"](gate_up)))

        def scores(self, *given):
            return noise["scores"](super().scores(*given))

        def expert(self, e, rows):
            return noise["given"](super().expert(e, noise["read"](rows)))

        def mlp(self, rows, *others):
            return noise["unsorted"](super().mlp(noise["sorted"](rows), *others))

    module.__class__ = Noisy
    return module


class Deep(nn.Module):
    """Hidden states [batch, length, H] around a block that takes [T, H].

    They come with three dimensions, so that they look like a stack of matrices; [T, H] may be given as well.
    """

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        states = x if x.dim() == 3 else x.view(3, -1, x.shape[-1])
        made = self.block(states.reshape(-1, states.shape[-1]))
        first = made[0] if isinstance(made, tuple) else made
        made_deep = first.reshape(-1, 2, first.shape[-1]).flatten(0, 1).view(first.shape)
        return (made_deep, *made[1:]) if isinstance(made, tuple) else made_deep


def renamed(graph: fx.Graph) -> None:
    """Every node with a name that says nothing."""
    for i, node in enumerate(graph.nodes):
        if node.op.startswith("call"):
            node._rename(f"n{i:04}")


def reordered(graph: fx.Graph) -> None:
    """Another order in which every value is made before it is read and written in the same turn as before."""
    rng = random.Random(0)
    nodes = list(graph.nodes)
    before: dict[fx.Node, set[fx.Node]] = {}
    touched: dict[int, list[tuple[fx.Node, bool]]] = {}
    for node in nodes:
        writes = {s for target in mutated(node) for s in storages(target)}
        reads = {s for a in node.all_input_nodes for s in storages(a)} | storages(node)
        before[node] = set(node.all_input_nodes)
        for storage in reads | writes:
            for other, wrote in touched.get(storage, ()):
                if wrote or storage in writes:
                    before[node].add(other)
            touched.setdefault(storage, []).append((node, storage in writes))
    fixed = [n for n in nodes if n.op in ("placeholder", "get_attr")]
    for node, later in itertools.pairwise(fixed):
        before[later].add(node)
    rest = [n for n in nodes if n not in fixed and n.op != "output"]
    # What has no value is there for what it does: switches of modes, assertions.
    barriers = [n for n in rest if not n.users and not mutated(n)]
    for barrier in barriers:
        at = nodes.index(barrier)
        before[barrier] |= set(nodes[:at])
        for node in nodes[at + 1 :]:
            before[node].add(barrier)
    done, left, order = set(fixed), list(rest), []
    while left:
        ready = [n for n in left if before[n] <= done]
        node = rng.choice(ready)
        left.remove(node)
        done.add(node)
        order.append(node)
    (output,) = (n for n in nodes if n.op == "output")
    for node in order:
        output.prepend(node)
    assert order != rest or len(rest) < 10, "nothing was moved"
    graph.lint()


def _build(sample):
    torch.manual_seed(1)
    dtype = sample.dtypes[0]
    module = sample.build().to(dtype)
    return module, torch.randn(T, 32, dtype=dtype)


def _results(run, module, x, training) -> list[torch.Tensor]:
    """The outputs, and in training the gradients of x and of every parameter."""
    if training:
        return step(run, module, x)
    with torch.no_grad():
        made = run(x)
    return list(made) if isinstance(made, tuple) else [made]


def _run(module, x, rewritten, training):
    compiled = rewritten(module)
    made = _results(compiled, module, x, training)
    (block,) = compiled.blocks
    assert block.fused, block.why_not()
    return made, block


# What the samples are without any noise: spelling -> (spelling, description).
PLAIN: dict[str, tuple[str, Any]] = {}


def _check(spelling, change, rewritten, training, shape=(T, 32)):
    require(spelling)
    module, x = _build(spelling.samples[0])
    eager = _results(module, module, x, training)
    if spelling.name not in PLAIN:
        _, plain = _run(module, x, rewritten, training=False)
        PLAIN[spelling.name] = (plain.spelling, plain.moe)
    ours, block = _run(change(module), x.view(shape), rewritten, training)
    assert (block.spelling, block.moe) == PLAIN[spelling.name]
    _assert_same(ours, eager, block.moe.experts.compute_dtype)


def _assert_same(ours, eager, dtype) -> None:
    """dtype: in which the experts compute, which may not be the model's."""
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for mine, theirs in zip(ours, eager, strict=True):
        # Outputs are about one; gradients of what is summed up are as large as they come.
        atol = tolerance * max(1.0, theirs.abs().max().item())
        torch.testing.assert_close(mine.view_as(theirs), theirs, rtol=tolerance, atol=atol)


@pytest.mark.parametrize("shift", range(len(NOISE)), ids=list(NOISE))
@pytest.mark.parametrize(("spelling", "number"), FIRST)
def test_noise_at_every_edge(spelling, number, shift, rewritten):
    training = (number + shift) % 2 == 1
    _check(spelling, lambda module: noisy(module, shifted(shift)), rewritten, training)


@pytest.mark.parametrize("shape", [(T, 32), (3, -1, 32)], ids=["two", "three"])
@pytest.mark.parametrize(("spelling", "number"), FIRST)
def test_hidden_states_of_three_dimensions(spelling, number, shape, rewritten):
    training = (number + len(shape)) % 2 == 1
    _check(spelling, Deep, rewritten, training, shape)


def _change_graphs(monkeypatch, *changes) -> None:
    fuse = pipeline.fuse_moe_blocks

    def changed(gm, *args, **kwargs):
        for change in changes:
            change(gm.graph)
        gm.recompile()
        return fuse(gm, *args, **kwargs)

    monkeypatch.setattr(pipeline, "fuse_moe_blocks", changed)


@pytest.mark.parametrize("change", [renamed, reordered])
@pytest.mark.parametrize(("spelling", "number"), FIRST)
def test_names_and_order(spelling, number, change, rewritten, monkeypatch):
    def install(module):
        _change_graphs(monkeypatch, change)
        return module

    _check(spelling, install, rewritten, training=(number % 2 == 1) is (change is renamed))


@pytest.mark.parametrize(("spelling", "sample", "number"), OTHERS)
def test_all_at_once(spelling, sample, number, rewritten, monkeypatch):
    require(spelling)
    training = (number // len(KINDS) + number) % 2 == 1
    module, x = _build(sample)
    eager = _results(module, module, x, training)
    _change_graphs(monkeypatch, renamed, reordered)
    changed = Deep(noisy(module, shifted(number)))
    ours, block = _run(changed, x.view(3, -1, 32), rewritten, training)
    if isinstance(spelling, ExpertsSpelling):
        assert block.spelling == spelling.name
    elif isinstance(spelling, RouterSpelling):
        assert block.router_fused, block.router_reason
    _assert_same(ours, eager, block.moe.experts.compute_dtype)


def test_every_spelling_is_varied():
    varied = {s.name for s in _FIRST} | {p.values[0].name for p in OTHERS}
    assert {s.name for s in SPELLINGS} == varied


@pytest.mark.parametrize(
    "edge", ["input", "logits", "weights", "rows", "gate_up", "hidden", "sum", "output"]
)
def test_what_is_no_noise_counts(edge, rewritten):
    """The wrapper works: a factor at any edge is in the result, fused or not."""
    sample = next(s.samples[0] for s in SPELLINGS if s.name == "hf_batched_mm")
    module, x = _build(sample)
    noise = dict.fromkeys(EDGES, NOISE["clone"]) | {edge: lambda t: t * 1.5}
    with torch.no_grad():
        plain = module(x)
        module = noisy(module, noise)
        eager = module(x)
        ours = rewritten(module)(x)
    torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(eager, plain)
