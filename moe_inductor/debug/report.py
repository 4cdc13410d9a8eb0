"""The one object that every stage writes to and everything a user sees is printed from."""

from __future__ import annotations

import dataclasses
import enum
from collections import Counter
from collections.abc import Iterable
from typing import Any

from moe_inductor.description import MoE, Router
from moe_inductor.reasons import Reason

# Reasons named in the one-line summary; the full list is in the report.
_REASONS_SHOWN = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockReport:
    """One MoE-like region: what it is, and fused or the reason why not.

    spelling: name of the matched pattern, or the nearest one tried; "" when nothing came near.
    location: the block in the model's source, ``modeling_x.py:123``; "" when unknown.
    router_reason: why the router stayed as the model wrote it although the experts were fused.
    shapes: symbolic shapes by name, for people: ``{"hidden_states": "[s0, 2048]"}``.
    """

    spelling: str
    fused: bool
    reason: Reason | None = None
    location: str = ""
    moe: MoE | None = None
    router_fused: bool = False
    router_reason: Reason | None = None
    nodes_before: int = 0
    nodes_after: int = 0
    shapes: dict[str, str] = dataclasses.field(default_factory=dict)

    def why_not(self) -> str:
        """The refusal in words, ending in a source location when one is known."""
        if self.reason is None:
            return f"no reason given at {self.location}" if self.location else "no reason given"
        if self.reason.location or not self.location:
            return _one_line(str(self.reason))
        return _one_line(f"{self.reason} at {self.location}")


@dataclasses.dataclass(kw_only=True)
class CompileReport:
    """One graph that reached the backend.  Mutable: the stages append to it.

    frame: Dynamo's compile id of the graph, ``0/0``, as in the logs of torch.
    stage_seconds: wall time by stage, in the order in which the stages ran.
    notes: anything else that is worth telling (internal errors, hints).
    artifacts: further texts by name (a canonical region, say); written next to the graphs when dumps are on.
    """

    blocks: list[BlockReport] = dataclasses.field(default_factory=list)
    stage_seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    graph_before: str | None = None
    graph_after: str | None = None
    frame: str = ""
    notes: list[str] = dataclasses.field(default_factory=list)
    artifacts: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def fused(self) -> list[BlockReport]:
        return [block for block in self.blocks if block.fused]

    @property
    def refused(self) -> list[BlockReport]:
        return [block for block in self.blocks if not block.fused]

    def summary(self) -> str:
        """One line without the ``moe_inductor:`` in front; "" when there was nothing MoE-like."""
        if not self.blocks:
            return ""
        noun = "block" if len(self.blocks) == 1 else "blocks"
        line = f"fused {len(self.fused)}/{len(self.blocks)} MoE {noun}"
        if self.fused:
            spellings = Counter(block.spelling for block in self.fused)
            line += f" ({', '.join(spellings)})"
        if self.refused:
            separator = f"; {len(self.refused)} not: " if self.fused else ": "
            line += separator + _grouped(block.why_not() for block in self.refused)
        return line

    def to_json(self) -> dict[str, Any]:
        """Everything but the graphs, as plain JSON values."""
        skip = {"graph_before", "graph_after", "artifacts"}
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain = {name: _plain(value) for name, value in fields.items() if name not in skip}
        return {"summary": self.summary(), **plain}

    def __str__(self) -> str:
        lines = [f"graph {self.frame or '?'}: {self.summary() or 'nothing MoE-like'}"]
        for index, block in enumerate(self.blocks):
            lines += [f"  {line}" for line in _block_lines(index, block)]
        if self.stage_seconds:
            stages = ", ".join(f"{k} {v:.3f} s" for k, v in self.stage_seconds.items())
            lines.append(f"  time: {stages}")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def _block_lines(index: int, block: BlockReport) -> list[str]:
    """One block for a person: a head line and indented facts."""
    state = "fused" if block.fused else "not fused"
    head = f"block {index}: {state}, {block.spelling or 'unknown spelling'}"
    lines = [f"{head} at {block.location}" if block.location else head]
    if not block.fused:
        lines.append(f"  reason: {block.why_not()}")
        if block.reason is not None:
            lines.append(f"  kind: {block.reason.code.name}")
    if block.moe is not None:
        lines.append(f"  router: {_router(block)}")
        lines.append(f"  experts: {_experts(block.moe)}")
    if block.shapes:
        lines.append("  shapes: " + ", ".join(f"{k} {v}" for k, v in block.shapes.items()))
    if block.fused and block.nodes_before:
        lines.append(f"  nodes: {block.nodes_before} -> {block.nodes_after}")
    return lines


def _router(block: BlockReport) -> str:
    moe = block.moe
    assert moe is not None
    if moe.router is None or not block.router_fused:
        reason = f": {_one_line(str(block.router_reason))}" if block.router_reason else ""
        return f"top-{moe.top_k}, left as the model wrote it{reason}"
    return ", ".join(
        [*_router_facts(moe.router), f"{_name(moe.router.weights_dtype)} weights", "fused"]
    )


def _router_facts(router: Router) -> list[str]:
    weighed = (
        "" if router.weight == router.score else f" for the choice, {router.weight} for the weights"
    )
    facts = [router.score + weighed, "bias for the choice" if router.bias else ""]
    if groups := router.groups:
        facts.append(
            f"{groups.kept} of {groups.count} groups by {groups.score}, others {groups.fill}"
        )
    facts.append(f"top-{router.k}")
    divided = f" + {router.epsilon:g}" if router.epsilon else ""
    divided += f" >= {router.minimum:g}" if router.minimum is not None else ""
    facts.append("renormalised" + divided if router.renormalise else "not renormalised")
    facts.append(f"times {router.scale:g}" if router.scale != 1 else "")
    return list(filter(None, facts))


def _experts(moe: MoE) -> str:
    e = moe.experts
    gate = f"{e.activation}-gated" if e.has_gate and "(" not in e.activation else e.activation
    layouts = {
        "plain": "no gate",
        "concatenated": "gate and up in one weight",
        "interleaved": "gate and up interleaved in one weight",
        "separate": "gate and up apart",
    }
    transposed = {e.gate_up_transposed, e.down_transposed}
    which = "" if transposed == {True} else "first " if e.gate_up_transposed else "second "
    facts = [
        gate,
        f"{e.storage.replace('_', ' ')} weights",
        f"{which}transposed" if True in transposed else "",
        layouts[e.layout],
        "biases" if e.gate_up_bias or e.down_bias else "",
        f"{e.identities} identities" if e.identities else "",
        "tokens without an expert are kept" if moe.combine.keeps_tokens else "",
        "routing weight on the input" if moe.combine.weight_on == "input" else "",
        _name(e.weight_dtype),
        f"computed in {_name(e.compute_dtype)}" if e.compute_dtype != e.weight_dtype else "",
    ]
    sizes = f"{e.num_experts} x ({e.hidden_size} -> {e.intermediate_size} -> {e.hidden_size})"
    return ", ".join([sizes, *filter(None, facts)])


def _grouped(reasons: Iterable[str]) -> str:
    """Equal reasons once, the most frequent first, with a count where there is more than one kind."""
    counts = Counter(reasons).most_common()
    if len(counts) == 1:
        return counts[0][0]
    shown = [f"{count} x {reason}" for reason, count in counts[:_REASONS_SHOWN]]
    more = len(counts) - len(shown)
    return "; ".join(shown) + (f"; {more} more reasons" if more else "")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _plain(value: Any) -> Any:
    """A report's value as JSON can hold it: dataclasses to dicts, enums to names, the rest to strings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return _name(value)
