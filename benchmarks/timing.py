"""Times of GPU work: the median of CUDA-graph replays, or of calls on a stream."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Call = Callable[[Any], Any]


class _Captured:
    """Calls over all inputs as one CUDA graph, run twice.  ms: what the second replay took."""

    def __init__(self, call: Call, inputs: Sequence[Any]) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for one in inputs[:2]:
                call(one)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            # Alive, so that no result shares memory with the next.
            self.kept = [call(one) for one in inputs]
        _elapsed_ms(self.graph.replay)
        self.ms = max(_elapsed_ms(self.graph.replay), 1e-3)

    def replay(self, times: int) -> None:
        for _ in range(times):
            self.graph.replay()


def graph_us(call: Call, inputs: Sequence[Any], budget_ms: float = 150.0) -> float:
    """us per call.  All inputs run in one CUDA graph; 7 to 40 replays, as the budget allows."""
    captured = _Captured(call, inputs)
    replays = int(min(40, max(7, budget_ms / captured.ms)))
    times = [_elapsed_ms(captured.graph.replay) for _ in range(replays)]
    captured.graph.reset()
    return 1e3 * statistics.median(times) / len(inputs)


def rounds_us(
    calls: Mapping[str, Call],
    inputs: Sequence[Any],
    orders: random.Random,
    rounds: int = 12,
    warm_ms: float = 20.0,
    timed_ms: float = 12.0,
) -> dict[str, list[float]]:
    """us per call of several contestants in each of many short rounds, of which the median is to be taken.

    At its power limit a card's clock goes by what ran in the last tens of milliseconds, and falls for a moment again
    and again (on an H200 about once a second, by 5 to 50 %).  So each is timed behind ``warm_ms`` of itself, and all
    take turns in an order that is drawn anew in every round: in any fixed order somebody meets the slow moments more
    often than the others.
    """
    captured = {name: _Captured(call, inputs) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name in orders.sample(list(calls), len(calls)):
            one = captured[name]
            one.replay(math.ceil(warm_ms / one.ms))
            replays = max(2, math.ceil(timed_ms / one.ms))
            ms = _elapsed_ms(lambda one=one, replays=replays: one.replay(replays))
            times[name].append(1e3 * ms / replays / len(inputs))
    for one in captured.values():
        one.graph.reset()
    return times


def stream_us(call: Call, inputs: Sequence[Any], rounds: int = 2) -> float:
    """us per call without a graph, Python and launch time included.  For work that cannot be captured."""
    call(inputs[0])
    torch.cuda.synchronize()
    times = []
    for _ in range(rounds):
        times += [_elapsed_ms(lambda one=one: call(one)) for one in inputs]
    return 1e3 * statistics.median(times)


def _elapsed_ms(run: Callable[[], Any]) -> float:
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
