"""``python -m moe_inductor demo``: unmodified transformers models through ``backend="moe_inductor"``, measured.

The models are the classes that transformers ships, with random weights and configurations that are small but keep
the proportions that matter (several layers, most of the time in the experts).  Nothing is downloaded.  For each one:
is every MoE block fused, does the output obey the fp64 rule, and how fast is it beside eager and Inductor in the same
process.  The exit code is 0 only if the first two hold and no prompt is slower.  One token on a CPU is shown and not
judged: nearly all of it is reading weights, in every backend, and the rest is the scheduling of a few threads.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from moe_inductor import _compat
from moe_inductor.backend import moe_inductor

PROMPT_TOKENS = 256
# The rule for outputs: as close to fp64 as eager is, up to a factor and a floor for exactness by luck.
FACTOR, FLOOR = 2.0, 1e-5
WARM_UP, ROUNDS = 3, 11
# A busy machine can decide a measurement: a prompt is slower if it is by this much, and so many times in a row.
NOISE, ATTEMPTS = 0.1, 3

# Sizes: 16 experts of 512 x 512 make the experts the larger part of the work at 256 tokens.
_COMMON: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "max_position_embeddings": 1024,
    "use_cache": False,
}


@dataclasses.dataclass(frozen=True)
class _Model:
    """A model of transformers: class names and what its configuration adds to ``_COMMON``."""

    config: str
    causal_lm: str
    extra: dict[str, Any]
    moe_blocks: int


MODELS = {
    "mixtral": _Model(
        "MixtralConfig",
        "MixtralForCausalLM",
        {
            "num_key_value_heads": 2,
            "intermediate_size": 1024,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        moe_blocks=3,
    ),
    "qwen3": _Model(
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {
            "num_key_value_heads": 2,
            "head_dim": 64,
            "intermediate_size": 1024,
            "moe_intermediate_size": 384,
            "num_experts": 32,
            "num_experts_per_tok": 4,
            "norm_topk_prob": True,
        },
        moe_blocks=3,
    ),
    "dsv3": _Model(
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {
            "num_key_value_heads": 8,
            "intermediate_size": 1024,
            "moe_intermediate_size": 384,
            "n_routed_experts": 32,
            "n_shared_experts": 1,
            "num_experts_per_tok": 4,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
            "q_lora_rank": 128,
            "kv_lora_rank": 64,
            "qk_rope_head_dim": 32,
            "qk_nope_head_dim": 32,
            "v_head_dim": 64,
        },
        moe_blocks=2,
    ),
}


def run(model: str, device: str, dtype: str) -> int:
    """The command.  Returns the exit code."""
    try:
        import transformers
    except ImportError:
        print('the demo needs transformers: pip install -e ".[demo]"', file=sys.stderr)
        return 2
    if device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device", file=sys.stderr)
        return 2

    where = (
        torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    )
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, {device} ({where}), {dtype}; "
        f"random weights, median of {ROUNDS} interleaved rounds"
    )
    failures = []
    for name in list(MODELS) if model == "all" else [model]:
        failures += [f"{name}: {why}" for why in _one(name, device, getattr(torch, dtype))]
    print()
    for failure in failures:
        print(f"FAILED  {failure}")
    if not failures:
        print(
            "OK  every block fused, outputs within the fp64 rule, "
            f"{PROMPT_TOKENS} tokens not slower than eager or inductor by more than {NOISE:.0%}"
        )
    return 1 if failures else 0


@torch.no_grad()
def _one(name: str, device: str, dtype: torch.dtype) -> list[str]:
    """Measure one model and print it; returns what went wrong."""
    spec = MODELS[name]
    model, vocabulary = _build(spec, device, dtype)
    prompt = torch.randint(vocabulary, (1, PROMPT_TOKENS), device=device)
    token = prompt[:, :1].contiguous()
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(
        f"\n{spec.causal_lm}, {spec.moe_blocks} MoE blocks, {millions:.0f} M parameters", flush=True
    )

    torch._dynamo.reset()
    runs: dict[str, Callable[..., Any]] = {"eager": model}
    graphs, breaks, seconds = {}, {}, {}
    for backend in ("inductor", "moe_inductor"):
        runs[backend] = torch.compile(model, backend=backend)
        graphs[backend], breaks[backend] = -_compat.graph_count(), -len(_compat.graph_breaks())
        start = time.perf_counter()
        runs[backend](prompt)
        seconds[backend] = time.perf_counter() - start
        graphs[backend] += _compat.graph_count()
        breaks[backend] += len(_compat.graph_breaks())
    blocks = [block for report in moe_inductor.reports for block in report.blocks]
    fused = sum(block.fused for block in blocks)
    _print("fused", f"{fused}/{spec.moe_blocks} MoE blocks")
    _print("graphs", *(f"{b} {graphs[b]} ({breaks[b]} breaks)" for b in graphs))
    _print("compile", *(f"{b} {seconds[b]:.1f} s" for b in seconds))

    exact = _exact(model, prompt)
    rmse = {run: _rmse(compiled(prompt).logits, exact) for run, compiled in runs.items()}
    ratio = rmse["moe_inductor"] / rmse["eager"] if rmse["eager"] else float("nan")
    within = rmse["moe_inductor"] <= FACTOR * rmse["eager"] + FLOOR
    _print("rmse vs fp64", *(f"{run} {value:.2e}" for run, value in rmse.items()))
    _print("", f"moe_inductor/eager {ratio:.2f}, {'within' if within else 'BREAKS'} the rule")

    failures = []
    if fused != spec.moe_blocks or len(blocks) != fused:
        failures.append(f"fused {fused} of {spec.moe_blocks} MoE blocks")
    if graphs["moe_inductor"] > graphs["inductor"] or breaks["moe_inductor"] > breaks["inductor"]:
        failures.append("more graphs or graph breaks than inductor")
    if not within:
        failures.append(f"rmse {rmse['moe_inductor']:.2e} against {rmse['eager']:.2e} of eager")
    for attempt in range(ATTEMPTS):
        speedups = _compare(f"{PROMPT_TOKENS} tokens", runs, prompt, ROUNDS)
        slower = {run: value for run, value in speedups.items() if value < 1 - NOISE}
        if not slower:
            break
        _print("", f"slower, attempt {attempt + 1} of {ATTEMPTS}")
    else:
        failures += [
            f"{PROMPT_TOKENS} tokens: {value:.2f} x as fast as {run}"
            for run, value in slower.items()
        ]
    _compare("1 token", runs, token, 4 * ROUNDS)
    return failures


def _compare(
    label: str, runs: dict[str, Callable[..., Any]], tokens: torch.Tensor, rounds: int
) -> dict[str, float]:
    """Time all runs, print times and ratios as measured; returns how many times as fast as each other run ours is."""
    milliseconds = _time(runs, tokens, rounds)
    ours = milliseconds.pop("moe_inductor")
    speedups = {run: value / ours for run, value in milliseconds.items()}
    others = [f"{run} {value:.2f} ms" for run, value in milliseconds.items()]
    _print(label, *others, f"moe_inductor {ours:.2f} ms")
    _print("", *(f"{value:.2f} x as fast as {run}" for run, value in speedups.items()))
    return speedups


def _exact(model: torch.nn.Module, prompt: torch.Tensor) -> torch.Tensor:
    """The logits in fp64, by the plain expert loop: transformers' grouped_mm has no fp64."""
    reference: Any = copy.deepcopy(model).double()
    reference.set_experts_implementation("eager")
    return reference(prompt).logits


def _time(
    runs: dict[str, Callable[..., Any]], tokens: torch.Tensor, rounds: int
) -> dict[str, float]:
    """Median milliseconds of each, taken in turns so that a busy machine disturbs all alike."""
    samples: dict[str, list[float]] = {run: [] for run in runs}
    for _ in range(WARM_UP + rounds):
        for run, compiled in runs.items():
            _wait(tokens)
            start = time.perf_counter()
            compiled(tokens)
            _wait(tokens)
            samples[run].append((time.perf_counter() - start) * 1e3)
    return {run: statistics.median(values[WARM_UP:]) for run, values in samples.items()}


def _wait(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


def _rmse(output: torch.Tensor, exact: torch.Tensor) -> float:
    return (output.double() - exact).square().mean().sqrt().item()


def _print(label: str, *cells: str) -> None:
    print(f"  {label:<14}{', '.join(cells)}", flush=True)


def _build(spec: _Model, device: str, dtype: torch.dtype) -> tuple[torch.nn.Module, int]:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, spec.config)(**_COMMON | spec.extra)
    with torch.device(device):
        model = getattr(transformers, spec.causal_lm)(config)
    return model.to(dtype).eval(), config.vocab_size
