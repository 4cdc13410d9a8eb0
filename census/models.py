"""Whole tiny models around the blocks: a forward, a training step and ``generate`` with and without a cache."""

from __future__ import annotations

import copy
import inspect
import re
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from census import shrink
from census.compiled import Compiled
from census.exact import in_fp64
from census.families import Case
from census.measure import Row, Tensors, captured, choices, compared, first_line
from census.weights import randomise, without_garbage

# What is asked of a model, in the order in which it is asked.
MODES = ("inference", "training", "generate", "generate without cache")
BATCH, LENGTH, PROMPT, NEW_TOKENS = 2, 9, 5, 8
SAMPLES, SEEDS = 3, 60


class NoModel(Exception):
    """There is no causal language model around this block."""


def build(case: Case, implementation: str) -> nn.Module:
    """A causal language model of a few layers in fp32, the same weights on every call."""
    config = case.config()
    mapping = transformers.AutoModelForCausalLM._model_mapping
    if type(config) not in mapping.keys():  # noqa: SIM118, the mapping is lazy
        raise NoModel(f"no causal language model is made from a {type(config).__name__}")
    config._experts_implementation = "eager" if implementation == "own" else implementation
    # Random tokens must not end a text.
    config.eos_token_id = None
    with without_garbage():
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    model = randomise(model).eval()
    if not moe_blocks(case, model):
        raise NoModel("the tiny model has no MoE layer")
    return model


def moe_blocks(case: Case, model: nn.Module) -> int:
    """How many MoE blocks the model holds."""
    if case.special.wrap is None:
        return sum(isinstance(m, case.block_class) for m in model.modules())
    return sum(hasattr(m, "experts") and not isinstance(m, nn.ModuleList) for m in model.modules())


def measure(case: Case, implementation: str, modes: tuple[str, ...]) -> Iterator[Row]:
    """One row for each mode, in fp32."""
    for mode in modes:
        start = time.perf_counter()
        row = {
            "case": case.name,
            "family": case.family,
            "implementation": implementation,
            "dtype": "float32",
            "mode": mode,
        }
        row |= _measure(case, implementation, mode)
        yield row | {"seconds": round(time.perf_counter() - start, 1)}


def _measure(case: Case, implementation: str, mode: str) -> Row:
    try:
        model = build(case, implementation)
        truth = build(case, case.implementations[0]).double()
        if mode.startswith("generate"):
            inputs = [_tokens(0, 1, PROMPT)]
            eager: Any = _generate(model, inputs[0], "without" not in mode)
        else:
            inputs = _without_ties(model, truth)
            run = _train if mode == "training" else _infer
            eager = [run(model, model, x) for x in inputs]
            with in_fp64():
                exact = [run(truth, truth, x) for x in inputs]
    except NoModel as error:
        return {"status": "no model", "message": str(error)}
    except Exception as error:
        return {"status": "not runnable", "message": first_line(error)}
    row: Row = {}
    try:
        if mode.startswith("generate"):
            compiled = Compiled(model.forward)
            # generate() prepares what the signature asks for.
            compiled.__signature__ = inspect.signature(model.forward)
            model.forward = compiled
            ours: Any = _generate(model, inputs[0], "without" not in mode)
        else:
            compiled = Compiled(model)
            ours = [run(compiled, model, x) for x in inputs]
        row |= captured(compiled)
        row["breaks_in_moe"] = sum(_in_moe(case, place) for _, place in row["breaks"])
        row["moe_layers"] = moe_blocks(case, model)
        # Every graph that holds MoE has to hold all layers, and all of them fused.
        row["all_layers"] = all(
            len(r.fused) == row["moe_layers"] for r in compiled.reports if r.blocks
        )
        if mode.startswith("generate"):
            if not torch.equal(ours, eager):
                row["wrong"] = f"tokens {ours.tolist()}, eager's are {eager.tolist()}"
        else:
            row |= compared(ours, eager, exact, bool(row["fused"]))
    except Exception as error:
        return row | {
            "status": "error",
            "message": first_line(error),
            "traceback": traceback.format_exc()[-4000:],
        }
    return row | {"status": _status(row, case)}


def _status(row: Row, case: Case) -> str:
    if "wrong" in row:
        return "wrong"
    if row["fused"]:
        return "fused" if row["all_layers"] else "partly fused"
    if case.special.dense:
        return "not MoE-fusable"
    return "refused" if row["blocks"] else "silent"


def _in_moe(case: Case, place: str) -> bool:
    """Is ``file.py:line`` inside of a class of the block?"""
    file, _, line = place.rpartition(":")
    block = case.build(case.implementations[0])
    for owner in {type(m) for m in block.modules()}:
        if owner.__module__.startswith("torch.") or not (path := inspect.getsourcefile(owner)):
            continue
        lines, first = inspect.getsourcelines(owner)
        if Path(path).name == file and first <= int(line) < first + len(lines):
            return True
    return bool(re.fullmatch(r"moe\.py", file))


def _tokens(seed: int, batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, shrink.VOCAB, (batch, length), generator=generator)


def _without_ties(model: nn.Module, truth: nn.Module) -> list[Tensor]:
    found = []
    for seed in range(SEEDS):
        ids = _tokens(seed, BATCH, LENGTH)
        mine = choices(model, [ids])
        with in_fp64():
            exact = choices(truth, [ids])
        if len(mine) == len(exact) and all(map(torch.equal, mine, exact)):
            found.append(ids)
        if len(found) == SAMPLES:
            return found
    raise LookupError(f"not {SAMPLES} inputs without ties in {SEEDS} tries")


def _infer(run: Any, model: nn.Module, ids: Tensor) -> Tensors:
    with torch.no_grad():
        return {"logits": run(ids, use_cache=False).logits}


def _train(run: Any, model: nn.Module, ids: Tensor) -> Tensors:
    """One step; in eval mode, so that nothing is random."""
    model.zero_grad()
    output = run(ids, labels=ids, use_cache=False)
    output.loss.backward()
    found = {"logits": output.logits.detach(), "loss": output.loss.detach()}
    found |= {f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def _generate(model: Any, ids: Tensor, use_cache: bool) -> Tensor:
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        use_cache=use_cache,
        generation_config=copy.copy(model.generation_config),
    )
