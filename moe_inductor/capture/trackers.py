"""How Dynamo's trackers of values are asked about themselves."""

from __future__ import annotations

from typing import Any


def is_kind(tracker: Any, kind: type | tuple[type, ...]) -> bool:
    """``isinstance`` without looking: Dynamo's realizes what it is asked about, which changes the graph's inputs."""
    return issubclass(type(tracker), kind)


def realized(tracker: Any) -> Any:
    """The tracker behind a lazy one, of what is looked at anyway."""
    return tracker.realize() if hasattr(tracker, "realize") else tracker


def function_of(tracker: Any) -> Any:
    """What a tracker stands for that holds it as it is.  (Some compute it, and some cannot.)"""
    held = vars(tracker)
    return held.get("fn", held.get("value"))
