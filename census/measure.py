"""One case: compile the block for each experts implementation, dtype and mode, and say what came of it.

What runs behind our stages is not Inductor but the graph as it is (``tests.without_inductor``), so that a difference
from eager is ours, and a block takes seconds instead of minutes; ``inner="inductor"`` is the real thing.
"""

from __future__ import annotations

import dataclasses
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from census.compiled import Compiled
from census.exact import in_fp64
from census.families import Case
from moe_inductor.debug.report import BlockReport
from tests.hf.compare import cotangent
from tests.oracle import FLOOR, TOTAL_FACTOR, assert_within_fp64_rule

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MODES = ("inference", "training")
SHAPE = (3, 16)
# Most experts of the first have no token; the second makes sizes dynamic.
MORE_SHAPES = ((1, 1), (3, 5))
TOKENS = 120  # at least, per comparison: the rounding errors of a few may be small by luck
SEEDS = 80

Row = dict[str, Any]
Tensors = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Subject:
    """One block to compile: in its dtype, and in fp64 with the loop as its authors wrote it."""

    case: Case
    implementation: str
    dtype: torch.dtype
    block: nn.Module
    exact: nn.Module

    @staticmethod
    def make(case: Case, implementation: str, dtype: torch.dtype) -> Subject:
        loop = case.implementations[0]
        return Subject(
            case,
            implementation,
            dtype,
            case.build(implementation, dtype),
            case.build(loop, dtype).double(),
        )

    def draw(self, shape: tuple[int, int]) -> list[list[Any]]:
        """Inputs of together at least ``TOKENS`` tokens for which the block and its exact copy choose the same experts.

        Where two experts score alike rounding decides, and comparing outputs means nothing.
        """
        found = []
        count = min(-(-TOKENS // (shape[0] * shape[1])), 24)
        for seed in range(SEEDS):
            inputs = self.case.special.draw(torch.Generator().manual_seed(seed), shape)
            mine = choices(self.block, _cast(inputs, self.dtype))
            with in_fp64():
                truth = choices(self.exact, _cast(_cast(inputs, self.dtype), torch.float64))
            if len(mine) == len(truth) and all(map(torch.equal, mine, truth)):
                found.append(_cast(inputs, self.dtype))
            if len(found) == count:
                return found
        raise LookupError(f"not {count} inputs of shape {shape} without ties in {SEEDS} tries")


def measure(
    case: Case,
    implementations: Sequence[str] | None = None,
    dtypes: Sequence[str] = tuple(DTYPES),
    modes: Sequence[str] = MODES,
    inner: str = "eager",
) -> Iterator[Row]:
    """One row for each combination."""
    for implementation in implementations or case.implementations:
        for dtype in dtypes:
            for mode in modes:
                start = time.perf_counter()
                row: Row = {
                    "case": case.name,
                    "family": case.family,
                    "implementation": implementation,
                    "dtype": dtype,
                    "mode": mode,
                }
                row |= _measure(case, implementation, DTYPES[dtype], mode, inner)
                yield row | {"seconds": round(time.perf_counter() - start, 1)}


def _measure(case: Case, implementation: str, dtype: torch.dtype, mode: str, inner: str) -> Row:
    try:
        subject = Subject.make(case, implementation, dtype)
        inputs = subject.draw(SHAPE)
        run = train if mode == "training" else infer
        if mode == "training":
            noisy = _is_noisy(subject.block, inputs[0])
            for module in (subject.block, subject.exact):
                module.train(not noisy)
        else:
            noisy = False
            subject.block.eval()
            subject.exact.eval()
        eager = [run(subject.block, subject.block, x) for x in inputs]
        with in_fp64():
            exact = [run(subject.exact, subject.exact, _cast(x, torch.float64)) for x in inputs]
    except Exception as error:
        return {"status": "not runnable", "message": first_line(error)}
    row: Row = {"noisy": True} if noisy else {}
    try:
        # What an unfused block has to equal: what would have run without us.
        stock = eager
        if inner != "eager":
            torch._dynamo.reset()
            plain = torch.compile(subject.block, backend=inner)
            stock = [run(plain, subject.block, x) for x in inputs]
        compiled = Compiled(subject.block, inner)
        ours = [run(compiled, subject.block, inputs[0])]
        row |= captured(compiled)
        ours += [run(compiled, subject.block, x) for x in inputs[1:]]
        row |= compared(ours, eager if row["fused"] else stock, exact, bool(row["fused"]))
        if mode == "inference" and dtype is torch.float32 and inner == "eager":
            row |= _other_shapes(subject, compiled, bool(row["fused"]))
    except Exception as error:
        return row | {
            "status": "error",
            "message": first_line(error),
            "traceback": traceback.format_exc()[-4000:],
        }
    return row | {"status": _status(row, case)}


def captured(compiled: Compiled) -> Row:
    """What was made of the block so far.  captured: was it in one graph, kept or not?"""
    blocks = compiled.blocks
    fused = [b for b in blocks if b.fused]
    told: BlockReport | None = next((b for b in blocks if not b.fused), None) or next(
        iter(blocks), None
    )
    row: Row = {
        "captured": compiled.backend.whole[:1] == [True],
        "graphs": len(compiled.reports),
        "breaks": sorted({(_short(reason), place) for reason, place in compiled.breaks}),
        "fused": len(fused),
        "blocks": len(blocks),
        "spelling": ", ".join(sorted({b.spelling for b in blocks if b.spelling})),
        "router_fused": bool(fused) and all(b.router_fused for b in fused),
    }
    if told is not None and told.reason is not None:
        row |= {
            "code": told.reason.code.name,
            "message": " ".join(told.reason.message.split()),
            "location": told.reason.location or told.location,
        }
    router = next((b.router_reason for b in fused if b.router_reason is not None), None)
    if router is not None:
        row["router_reason"] = " ".join(str(router).split())
    notes = [note for report in compiled.reports for note in report.notes]
    return row | ({"notes": notes} if notes else {})


def compared(ours: list[Tensors], eager: list[Tensors], exact: list[Tensors], fused: bool) -> Row:
    """By the project's rule where something was fused, bit by bit with ``eager`` where nothing was."""
    notes: Row = {}
    for mine, theirs in zip(ours, eager, strict=True):
        missing = theirs.keys() - mine.keys()
        extra = mine.keys() - theirs.keys()
        if missing or any(mine[name].count_nonzero() for name in extra):
            return {"wrong": f"gradient in eager or ours alone: {sorted(missing | extra)}"}
        if extra:
            if not fused:
                return {"wrong": f"nothing was fused, and only ours has {sorted(extra)}"}
            # A loop over the experts that were hit leaves the others without any gradient.
            notes["zeros_for_none"] = max(notes.get("zeros_for_none", 0), len(extra))
    if not fused:
        for mine, theirs in zip(ours, eager, strict=True):
            for name, value in theirs.items():
                if not _same_bits(mine[name], value):
                    return {"wrong": f"nothing was fused, and {name} differs from eager's"}
        return {}
    worst = 0.0
    for name in ours[0]:
        mine, theirs, truth = (
            torch.stack(
                [r.get(name, torch.zeros_like(o[name])) for r, o in zip(rs, ours, strict=True)]
            )
            for rs in (ours, eager, exact)
        )
        if not mine.is_floating_point():
            if not torch.equal(mine, theirs):
                return {"wrong": f"{name} differs from eager's"}
            continue
        if mine.dtype != theirs.dtype:
            return {"wrong": f"{name} is {mine.dtype}, eager's is {theirs.dtype}"}
        # At unit scale: the floor of the rule must not hide the gradient of a mean.
        scale = truth.double().square().mean().sqrt().item() or 1.0
        mine, theirs, truth = (t.double() / scale for t in (mine, theirs, truth))
        try:
            assert_within_fp64_rule(mine, theirs, truth, what=name)
        except AssertionError as error:
            return {"wrong": str(error)}
        allowed = TOTAL_FACTOR * _rmse(theirs - truth) + FLOOR
        worst = max(worst, _rmse(mine - truth) / allowed)
    return notes | {"of_allowed_error": round(worst, 3)}


def _other_shapes(subject: Subject, compiled: Compiled, fused: bool) -> Row:
    for shape in MORE_SHAPES:
        inputs = subject.draw(shape)
        ours = [infer(compiled, subject.block, x) for x in inputs]
        eager = [infer(subject.block, subject.block, x) for x in inputs]
        with in_fp64():
            exact = [infer(subject.exact, subject.exact, _cast(x, torch.float64)) for x in inputs]
        row = compared(ours, eager, exact, fused)
        if "wrong" in row:
            return {"wrong": f"input {list(shape)}: {row['wrong']}"}
    lost = [str(b.reason) for b in compiled.blocks if not b.fused]
    if fused and lost:
        return {"wrong_shape": f"fused for {list(SHAPE)}, not for another shape: {lost[0]}"}
    return {"compilations": len(compiled.reports)}


def _status(row: Row, case: Case) -> str:
    if "wrong" in row:
        return "wrong"
    if row["fused"]:
        whole = row["fused"] == row["blocks"] == case.special.blocks and "wrong_shape" not in row
        return "fused" if whole else "partly fused"
    if case.special.dense:
        return "not MoE-fusable"
    return "refused" if row["blocks"] else "silent"


# --- running ------------------------------------------------------------------------------------------------------


def infer(run: Callable[..., Any], block: nn.Module, inputs: list[Any]) -> Tensors:
    with torch.no_grad():
        return _named(run(*inputs))


def train(run: Callable[..., Any], block: nn.Module, inputs: list[Any]) -> Tensors:
    """Outputs, and the gradients of every parameter and of every input that has one."""
    block.zero_grad()
    inputs = [
        x.clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
        for x in inputs
    ]
    torch.manual_seed(0)
    outputs = _named(run(*inputs))
    loss = sum((o * cotangent(o)).sum() for o in outputs.values() if o.requires_grad)
    assert isinstance(loss, Tensor), "no output has a gradient"
    loss.backward()
    gradients = {f"gradient of {n}": p.grad for n, p in block.named_parameters()}
    gradients |= {
        f"gradient of input {i}": x.grad for i, x in enumerate(inputs) if isinstance(x, Tensor)
    }
    block.zero_grad()
    found = {n: o.detach() for n, o in outputs.items()}
    return found | {n: g for n, g in gradients.items() if g is not None}


def _is_noisy(block: nn.Module, inputs: list[Any]) -> bool:
    """Does training mode draw random numbers?  Then gradients are compared in eval mode."""
    block.train()
    before = torch.get_rng_state()
    infer(block, block, inputs)
    return not torch.equal(before, torch.get_rng_state())


def _named(output: Any) -> Tensors:
    leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    return {f"output {i}": leaf for i, leaf in enumerate(leaves)}


def _cast(inputs: list[Any], dtype: torch.dtype) -> list[Any]:
    return [x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]


class _Choices(TorchDispatchMode):
    """What every router chose, whatever way it chooses; rows in ascending order, for some do not sort."""

    def __init__(self) -> None:
        super().__init__()
        self.chosen: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.topk.default, torch.ops.aten.max.dim):
            self.chosen.append(result[1].sort(-1).values if result[1].dim() else result[1])
        elif func is torch.ops.aten.argmax.default:
            self.chosen.append(result)
        return result


def choices(block: nn.Module, inputs: list[Any]) -> list[Tensor]:
    block.eval()
    with _Choices() as mode, torch.no_grad():
        block(*inputs)
    return mode.chosen


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())


def _rmse(error: Tensor) -> float:
    return error.square().mean().sqrt().item() if error.numel() else 0.0


def _short(reason: str) -> str:
    """Dynamo's reasons go on for a page; the head says which."""
    text = " ".join(reason.split())
    text = text.removeprefix("Consider annotating your code using torch._check*(). ")
    return text.split(" (unhinted")[0].split(" (Size-like")[0][:120]


def first_line(error: object) -> str:
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else ""
    return f"{type(error).__name__}: {text}" if isinstance(error, Exception) else text
