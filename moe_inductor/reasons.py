"""Why a region was not fused.  Every stage answers with a result or raises ``Refusal``; nobody returns silence."""

from __future__ import annotations

import dataclasses
import enum


class Code(enum.Enum):
    """The kinds of refusal, one per semantic.  Tests and the coverage table compare these, not the wording."""

    # region/
    CONTROL_FLOW = "the expert loop was not captured"
    MUTATION = "a tensor that the block reads is changed while the block runs"
    GRAD_STATE = "the block mixes grad modes"
    CANONICALISE = "the block could not be traced again on its own"
    # match/
    SPELLING = "no known spelling"
    ACTIVATION = "activation not supported"
    LAYOUT = "weight layout not supported"
    EXPERT_MISSING = "not every expert is visited"
    EXPERT_TWICE = "an expert is visited twice"
    EXPERT_WEIGHTS = "weights of one expert are used for another"
    EXPERT_SHAPES = "experts differ in shape or dtype"
    ACCUMULATOR = "the sum over experts is not one chain that starts from zeros"
    INPUTS_DIFFER = "experts read different inputs"
    ESCAPES = "an intermediate of the experts is read outside"
    ROUTER = "router not recognised"
    # prove/
    PROOF = "the block is not equal to the reference"
    ASSUMPTION = "what capture assumed about the data does not hold"
    # rewrite/ and ops/
    DTYPE = "dtype not supported"
    DEVICE = "device not supported"
    TENSOR_TYPE = "tensor subclass or layout not supported"
    TORCH_VERSION = "torch version not supported"
    INTERNAL = "internal error of moe_inductor"


@dataclasses.dataclass(frozen=True)
class Reason:
    """One refusal: what kind, the words for the user, and where in the model (``file.py:line``, may be empty)."""

    code: Code
    message: str
    location: str = ""

    def __str__(self) -> str:
        text = self.message or self.code.value
        return f"{text} at {self.location}" if self.location else text


class Refusal(Exception):
    """Raised inside the stages; becomes a line of the report, or ``NotFused`` under strict mode."""

    def __init__(self, code: Code, message: str = "", location: str = "") -> None:
        self.reason = Reason(code, message or code.value, location)
        super().__init__(str(self.reason))


class NotFused(RuntimeError):
    """Raised to the user under ``options={"moe_inductor.strict": True}`` when an MoE-like region was not fused."""
