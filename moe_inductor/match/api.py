"""The public pattern API: what a file in ``patterns/`` is made of.

A pattern file holds one spelling, written as plain eager PyTorch the way its authors write it, and the facts about
it.  Everything that does not belong to the spelling (activation, gate and up layout, biases, weight storage, view and
cast noise) is left to the ``experts`` argument and to the normal form, so that it never has to be written twice.

    def reference(x, topk_ids, topk_weights, experts, **facts) -> Tensor        # ExpertsSpelling
    def reference(scores, choice, k, **facts) -> (weights, topk_ids)            # RouterSpelling
    def reference(topk_ids, num_classes, **facts) -> rows                       # HitListSpelling
    def reference(topk_ids, e, **facts) -> Tensor []                            # ChosenSpelling

The reference is traced twice: once with a hole for the expert MLP, which gives the pattern, and once with the
matched inputs and the described MLP, which gives the proof.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, Protocol

import torch

from moe_inductor.region.row_ops import PAIR_LINEAR

Linear = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


def linear_of_pairs(
    rows: torch.Tensor, expert_ids: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """``rows [S, in]``, each through the ``weight [E, out, in]`` and ``bias [E, out]`` of its own expert: ``[S, out]``.

    What all that is done to rows sorted by expert comes down to in the normal form (``region/pairs.py``).
    """
    out = PAIR_LINEAR(rows, expert_ids, weight.transpose(-2, -1))
    return out if bias is None else out + bias[expert_ids]


class Experts(Protocol):
    """The expert MLPs, as a reference sees them.

    ``experts(rows, linear)`` applies all experts to ``rows [S, H]`` sorted or paired by the spelling, or to ``[E, T,
    H]``; ``linear(rows, weight [E, out, in], bias [E, out] or None) -> [.., out]`` is the spelling's way to apply a
    stack of weights.
    ``for e, expert in experts`` visits them one by one; ``expert(rows [n, H]) -> [n, H]``.
    """

    num_experts: int

    def __call__(self, rows: torch.Tensor, linear: Linear) -> torch.Tensor: ...

    def __iter__(self) -> Iterator[tuple[int, Callable[[torch.Tensor], torch.Tensor]]]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class NearMiss:
    """A program that looks like the spelling and means something else.

    build: makes the module, in plain eager PyTorch; it is called with ``x [T, 32]`` and must equal eager exactly.
    code: name of the ``reasons.Code`` it must be refused with.
    In the near misses of a router the experts are fused, and only the router is refused.
    """

    name: str
    build: Callable[[], torch.nn.Module]
    code: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """A program in this spelling that must be fused.  build makes the module; it is called with ``x [T, 32]``.

    brief: differs from another sample in nothing that has to do with shapes; a training step is test enough.
    """

    name: str
    build: Callable[[], torch.nn.Module]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    brief: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsSpelling:
    """One way to write the experts.

    source: where it comes from (package, file, versions).
    anchor: name of an ATen or custom op without which this spelling cannot occur ("aten::_grouped_mm").
    defined_in: the module that has to be imported before there is such an op, for the samples.
    facts: keyword arguments of the reference, each with the values it may take.  ``weight_on`` is known beyond it:
    "input" where the routing weight scales what the expert reads, "output" where it scales what it gives.
    loop: the reference visits experts one by one; its iteration is the pattern.
    ids_in_range: a fact under which the reference means something else than the fused op for ids outside ``[0, E)``,
        which the op ignores, or for an id twice in a row; with it, only ids of a top-k over E scores are matched.
    keeps_tokens: the reference starts from x, of which the one expert of a token replaces the token; k is 1.
    dense: the reference computes every expert for every token.  The ids are of a top-k over E scores in any case, and
        with the weight on the input the experts must give zero for zero: no biases, and a unit with unit(0, 0) = 0.
    """

    name: str
    source: str
    reference: Callable[..., torch.Tensor]
    anchor: str
    defined_in: str = "torch"
    facts: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    loop: bool = False
    ids_in_range: str | None = None
    keeps_tokens: bool = False
    dense: bool = False
    samples: tuple[Sample, ...] = ()
    near_misses: tuple[NearMiss, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterSpelling:
    """One way to choose k experts and to look up what they weigh.

    reference(scores [T, E], choice [T, E], k, **facts) -> (weights [T, k], topk_ids [T, k]): ``choice`` is compared,
    the weights are those of ``scores``, or of ``choice`` where the spelling looks at nothing else.  Functions of the
    logits, biases, groups, renormalisation, scale and casts belong to no spelling (``match/router_steps.py``).
    unordered(facts): the order of the k experts is left open.
    """

    name: str
    source: str
    reference: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    facts: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    unordered: Callable[[Mapping[str, Any]], bool] = lambda facts: False
    samples: tuple[Sample, ...] = ()
    near_misses: tuple[NearMiss, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class HitListSpelling:
    """One way to list the experts that were chosen at all, for a loop over them.

    reference(topk_ids [T, k], num_classes, **facts) -> [n] or [n, 1], the sorted distinct ids; all are < num_classes.
    ids_in_range: it is that only for ids that come from a top-k over num_classes scores; so is a list that does not say
        how many experts there are, such as that of the distinct ids.
    """

    name: str
    source: str
    reference: Callable[..., torch.Tensor]
    facts: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    ids_in_range: bool = False
    samples: tuple[Sample, ...] = ()
    near_misses: tuple[NearMiss, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChosenSpelling:
    """One way to ask whether an expert was chosen by any token, before its tokens are run.

    reference(topk_ids [T, k], e, **facts) -> a tensor without dimensions that Python is to find true or false.
    truth(facts): which of the two, for an expert that was chosen; the other for one that was not.
    """

    name: str
    source: str
    reference: Callable[..., torch.Tensor]
    truth: Callable[[Mapping[str, Any]], bool]
    facts: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    samples: tuple[Sample, ...] = ()
    near_misses: tuple[NearMiss, ...] = ()


Spelling = ExpertsSpelling | RouterSpelling | HitListSpelling | ChosenSpelling


def combinations(facts: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Every choice of one value per fact."""
    for values in itertools.product(*facts.values()):
        yield dict(zip(facts, values, strict=True))


def discover() -> list[Spelling]:
    """Every spelling defined at the top level of a module in ``moe_inductor.patterns``, in name order."""
    package = importlib.import_module("moe_inductor.patterns")
    found: dict[str, Spelling] = {}
    names = sorted(i.name for i in pkgutil.iter_modules(package.__path__))
    for name in names:
        if name.startswith("_"):  # shared by patterns, not one itself
            continue
        for spelling in _spellings(importlib.import_module(f"{package.__name__}.{name}")):
            if found.setdefault(spelling.name, spelling) is not spelling:
                raise ValueError(f"two patterns are named {spelling.name!r}")
    return list(found.values())


def _spellings(module: ModuleType) -> Iterator[Spelling]:
    for item in vars(module).values():
        if isinstance(item, Spelling):
            yield item
