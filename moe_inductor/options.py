"""Our own options and how they are told apart from Inductor's.

    torch.compile(model, backend="moe_inductor", options={"moe_inductor.strict": True, "max_autotune": True})

Keys under ``moe_inductor.`` are ours and are checked here; every other key is Inductor's and is checked by Inductor.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

PREFIX = "moe_inductor."


def _option(default: bool, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What a user can set under ``moe_inductor.``; immutable, one object per compiled graph."""

    strict: bool = _option(False, "raise NotFused when an MoE-like region was not fused")
    summary: bool = _option(True, "print one summary line per compiled graph that holds an MoE")
    fuse_router: bool = _option(True, "also fuse a recognised router, not only the experts")
    batch_invariant: bool = _option(
        False, "a token's bits do not depend on the other tokens (forward, fused blocks only)"
    )
    dump: bool = _option(False, "write graphs and report to the debug folder for this compile")


def split(options: Mapping[str, Any] | None) -> tuple[Options, dict[str, Any]]:
    """``torch.compile``'s ``options`` as (ours, Inductor's)."""
    known = {field.name: field for field in dataclasses.fields(Options)}
    ours: dict[str, bool] = {}
    theirs: dict[str, Any] = {}
    for key, value in (options or {}).items():
        # Inductor takes dashes for underscores in its option names, so ours do as well.
        name = key.replace("-", "_")
        if not name.startswith(PREFIX):
            theirs[key] = value
            continue
        name = name.removeprefix(PREFIX)
        if name not in known:
            raise RuntimeError(_unknown(key, name, list(known)))
        if not isinstance(value, bool):
            raise RuntimeError(
                f"Unexpected type of option {key}: got {type(value).__name__}, should be bool"
            )
        ours[name] = value
    return Options(**ours), theirs


def _unknown(key: str, name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {PREFIX}{close[0]}?" if close else ""
    valid = ", ".join(PREFIX + each for each in known)
    return f"Unexpected option {key}.{hint} The options of moe_inductor are: {valid}"
