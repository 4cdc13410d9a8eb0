"""Real transformers code, compiled by our backend and compared with itself, eager and in fp64."""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.testing import assert_close

from moe_inductor.debug.report import BlockReport, CompileReport
from tests.oracle import assert_within_fp64_rule
from tests.without_inductor import WithoutInductor

SEEDS = 60


def require_transformers(major: int) -> None:
    """Skip the calling test file when another transformers is installed."""
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        version = "none"
    if version.split(".")[0] != str(major):
        reason = f"written for transformers {major}.x, installed is {version}"
        pytest.skip(reason, allow_module_level=True)


class Compiled:
    """``module`` under torch.compile with ``WithoutInductor``, and what was seen on the way."""

    def __init__(self, module: Any, inner: str = "eager", **kwargs: Any) -> None:
        torch._dynamo.reset()
        counters.clear()
        self.backend = WithoutInductor(inner)
        self.backend.install()
        self.run = torch.compile(module, backend=self.backend, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)

    @property
    def reports(self) -> list[CompileReport]:
        return list(self.backend.reports)

    @property
    def blocks(self) -> list[BlockReport]:
        return [block for report in self.reports for block in report.blocks]

    def assert_fused(self, blocks: int, graphs: int = 1) -> None:
        """Every graph holds ``blocks`` MoE blocks, all fused, and no graph was broken."""
        assert not counters["graph_break"], dict(counters["graph_break"])
        assert len(self.reports) == graphs, [r.summary() for r in self.reports]
        for report in self.reports:
            assert len(report.fused) == blocks, str(report)
            assert not report.refused, str(report)
        calls = [op for op in self.backend.ops if "fused_experts" in op]
        assert len(calls) == blocks * graphs, "the reports and the graphs tell different stories"


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Unit scale: matrices N(0, 1/fan_in), embeddings N(0, 1), vectors around their value.  In place.

    With the small weights that models are created with, an MoE adds next to nothing to its residual.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.dtype)

    embeddings = {m.weight for m in module.modules() if isinstance(m, nn.Embedding)}
    biases = [b for n, b in module.named_buffers() if n.endswith("e_score_correction_bias")]
    with torch.no_grad():
        for p in module.parameters():
            if p.dim() < 2:
                p.add_(0.1 * draw(p))
            else:
                p.copy_(draw(p) if p in embeddings else draw(p) * p.shape[-1] ** -0.5)
        for b in biases:
            b.copy_(0.1 * draw(b))
    return module


def in_fp64(module: nn.Module) -> nn.Module:
    """A copy in fp64 whose experts run the plain loop: the truth, by another road than the one compiled."""
    exact = copy.deepcopy(module).double()
    for each in exact.modules():
        config = getattr(each, "config", None)
        if config is not None and hasattr(each, "has_gate"):
            each.config = copy.copy(config)
            each.config._experts_implementation = "eager"
    return exact


@dataclasses.dataclass
class Case:
    """A module, its fp64 copy, and inputs for which both choose the same experts in every layer."""

    module: nn.Module
    exact: nn.Module
    inputs: list[Tensor]


def find_case(
    module: nn.Module,
    draw: Callable[[torch.Generator], Tensor],
    chosen: Callable[[nn.Module, Tensor], list[Tensor]] | None = None,
    count: int = 1,
) -> Case:
    """Routing is discrete: where two experts score alike rounding decides, and comparing outputs means nothing."""
    chosen = chosen or chosen_experts
    case = Case(module, in_fp64(module), [])
    for seed in range(SEEDS):
        x = draw(torch.Generator().manual_seed(seed))
        mine, truth = chosen(module, x), chosen(case.exact, _exact(x))
        if all(torch.equal(a, b) for a, b in zip(mine, truth, strict=True)):
            case.inputs.append(x)
        if len(case.inputs) == count:
            return case
    raise AssertionError(f"not {count} inputs without ties in {SEEDS} tries")


def _exact(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def chosen_experts(module: nn.Module, x: Tensor) -> list[Tensor]:
    """``top_k_index`` of every experts module, each row in ascending order (some routers do not sort)."""
    seen: list[Tensor] = []

    def record(_: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[1].sort(-1).values)

    hooks = [e.register_forward_pre_hook(record) for e in experts_modules(module)]
    try:
        with torch.no_grad():
            module(x)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(seen) == len(hooks) > 0
    return seen


def experts_modules(module: nn.Module) -> Iterator[nn.Module]:
    """The modules on the experts interface of transformers 5."""
    return (m for m in module.modules() if hasattr(m, "has_gate") and hasattr(m, "num_experts"))


def infer(run: Any, x: Tensor, **kwargs: Any) -> dict[str, Tensor]:
    with torch.no_grad():
        return _named(run(x, **kwargs))


def train(run: Any, module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """One step: the outputs and the gradient of every parameter (and of the input of a block)."""
    module.zero_grad()
    is_block = x.is_floating_point()
    if is_block:
        x = x.clone().requires_grad_()
    outputs = _named(run(x) if is_block else run(x, labels=x))
    loss = outputs.get("loss")
    if loss is None:
        loss = sum((o * cotangent(o)).sum() for o in outputs.values() if o.requires_grad)
    loss.backward()
    gradients = {n: p.grad for n, p in module.named_parameters()} | (
        {"x": x.grad} if is_block else {}
    )
    missing = [n for n, g in gradients.items() if g is None]
    assert not missing, f"no gradient: {missing}"
    result = {n: o.detach() for n, o in outputs.items()}
    if "loss" in result:
        result = _loss_by_token(result, module, x)
    result |= {f"gradient of {n}": g for n, g in gradients.items()}
    module.zero_grad()
    return result


def _loss_by_token(outputs: dict[str, Tensor], module: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """``outputs`` with the loss of each token in the place of their mean.

    One number per input says little about how large an error is: over four inputs, eager's happens to be half of
    ours in one of ten machines.  So the errors are judged over the tokens, and the mean only has to be their mean.
    """
    logits = outputs["logits"][:, :-1].float().flatten(0, 1)
    each = F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
    total = each.mean()
    if "aux_loss" in outputs:
        total = total + module.config.router_aux_loss_coef * outputs["aux_loss"]
    assert_close(outputs["loss"].float(), total.float(), rtol=1e-5, atol=1e-5)
    rest = {name: output for name, output in outputs.items() if name != "loss"}
    return rest | {"loss of each token": each}


def cotangent(output: Tensor) -> Tensor:
    """The same exact numbers in every dtype.  With a loss made of the output, the rounding of one output would
    be in a whole row of a weight's gradient."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(output.shape, generator=generator).bfloat16().to(output.dtype)


def check_inference(compiled: Any, case: Case) -> None:
    steps = [(compiled, _same), (case.module, _same), (case.exact, _exact)]
    assert_all_within_fp64_rule(
        *(_stacked([infer(run, to(x)) for x in case.inputs]) for run, to in steps)
    )


def check_training(compiled: Any, case: Case) -> None:
    """All inputs of the case are one sample.  A bf16 gradient from one token has so few roundings that eager's
    error may be small by luck; over many inputs it is not, and twice of it is a fair bound."""
    steps = [
        (compiled, case.module, _same),
        (case.module, case.module, _same),
        (case.exact, case.exact, _exact),
    ]
    assert_all_within_fp64_rule(
        *(_stacked([train(run, m, to(x)) for x in case.inputs]) for run, m, to in steps)
    )


def _same(x: Tensor) -> Tensor:
    return x


def _stacked(results: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([r[name] for r in results]) for name in results[0]}


def _named(output: Any) -> dict[str, Tensor]:
    if isinstance(output, Tensor):
        return {"output": output}
    if isinstance(output, tuple):
        return {f"output {i}": o for i, o in enumerate(output)}
    wanted = ("loss", "logits", "aux_loss")
    named = {n: output[n] for n in wanted if output.get(n) is not None}
    return named | {
        f"router logits {i}": t for i, t in enumerate(output.get("router_logits") or ())
    }


def assert_all_within_fp64_rule(
    ours: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor]
) -> None:
    """The rule for each tensor at unit scale: the floor of the rule must not hide a gradient of a mean."""
    assert ours.keys() == eager.keys() == exact.keys()
    for name, truth in exact.items():
        scale = truth.double().square().mean().sqrt().item() or 1.0
        scaled = [t.double() / scale for t in (ours[name], eager[name], truth)]
        assert ours[name].dtype == eager[name].dtype, name
        assert_within_fp64_rule(*scaled, what=name)
