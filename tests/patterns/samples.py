"""A sample of a spelling, compiled and compared: it is fused, and gives what eager gives within the rule."""

from __future__ import annotations

import copy
import itertools
import zlib
from collections.abc import Iterator

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe_inductor.match.api import ExpertsSpelling, RouterSpelling, Sample, Spelling
from tests.oracle import assert_within_fp64_rule
from tests.patterns.conftest import Rewritten

aten = torch.ops.aten

T = 29


def ways(sample: Sample) -> Iterator[tuple[torch.dtype, bool, bool]]:
    """(dtype, training, dynamic shapes), half of all eight, in which any value of one meets any value of another.

    Of a brief sample the one that does most.  test_constants.py checks the first, and looks into it; test_patterns.py
    the others.
    """
    first, last = sample.dtypes[0], sample.dtypes[-1]
    if sample.brief:
        yield last, True, False
    else:
        yield last, False, False
        yield last, True, True
        yield first, True, False
        yield first, False, True


def floats(output: object) -> list[torch.Tensor]:
    return [
        t for t in tree_leaves(output) if isinstance(t, torch.Tensor) and t.dtype.is_floating_point
    ]


def step(run: object, module: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """One training step: the outputs and the gradients of the input and of every parameter."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    outputs = floats(run(x))  # type: ignore[operator]
    loss = sum(o.square().sum() for o in outputs if o.requires_grad)
    if isinstance(
        loss, torch.Tensor
    ):  # a block that skipped every expert has nothing to differentiate
        loss.backward()
    return [o.detach() for o in outputs] + [
        torch.zeros_like(p) if p.grad is None else p.grad for p in (x, *module.parameters())
    ]


class _NearBounds(TorchDispatchMode):
    """Is anything that is clamped so near to a bound that rounding decides on which side of it?"""

    found = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default):
            for bound in (b for b in args[1:] if b is not None):
                self.found |= bool(((args[0] - bound).abs() < 2**-7 * abs(bound)).any())
        return func(*args, **(kwargs or {}))


def _inputs(
    sample: Sample, dtype: torch.dtype
) -> tuple[torch.nn.Module, torch.nn.Module, torch.Tensor]:
    """The block in ``dtype``, the same block in fp64, and tokens for which rounding decides nothing.

    Which experts are chosen, and which gradients a clamp lets through, is discrete.  Where two experts score alike, or
    a number is the bound up to rounding, eager is as likely to be wrong as we are, and comparing means nothing.
    """
    torch.manual_seed(zlib.crc32(sample.name.encode()))
    module = sample.build().to(dtype)
    exact = copy.deepcopy(module).double()
    tokens = torch.randn(16 * T, 32, dtype=dtype)

    def near_bounds(tokens: torch.Tensor) -> bool:
        with _NearBounds() as bounds:
            exact(tokens.double())
        return bounds.found

    with torch.no_grad():
        mine = module.route(module.gate(tokens))[1]
        truth = exact.route(exact.gate(tokens.double()))[1]
        tokens = tokens[(mine == truth).flatten(1).all(1)]
        if near_bounds(tokens):
            clear = (token for token in tokens.split(1) if not near_bounds(token))
            tokens = torch.cat(list(itertools.islice(clear, T)))
    assert len(tokens) >= T, "not enough tokens without ties"
    return module, exact, tokens[:T]


def check(
    spelling: Spelling, sample: Sample, dtype: torch.dtype, training: bool, dynamic: bool
) -> None:
    module, exact_module, x = _inputs(sample, dtype)
    compiled = Rewritten(module, dynamic=dynamic)

    def forward(run, module, x):
        with torch.no_grad():
            return floats(run(x))

    run = step if training else forward
    eager = run(module, module, x)
    exact = run(exact_module, exact_module, x.double())
    ours = run(compiled, module, x)

    (block,) = compiled.blocks
    assert block.fused, block.why_not()
    assert len(compiled.backend.reports) == 1, "one graph"
    calls = [op for op in compiled.backend.ops if "moe_inductor.fused_experts" in op]
    assert len(calls) == 1, "the fused op is in the graph that ran"
    if isinstance(spelling, ExpertsSpelling):
        assert block.spelling == spelling.name
    elif isinstance(spelling, RouterSpelling):
        assert block.router_fused, block.router_reason
    for i, (mine, theirs, truth) in enumerate(zip(ours, eager, exact, strict=True)):
        assert_within_fp64_rule(mine, theirs, truth, what=f"tensor {i}")
