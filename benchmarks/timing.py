"""Times of GPU work: the median of CUDA-graph replays, or of calls on a stream."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch


def graph_us(
    call: Callable[[Any], Any],
    inputs: Sequence[Any],
    budget_ms: float = 150.0,
    least: int = 7,
    warm_ms: float = 0.0,
) -> float:
    """us per call.  All inputs run in one CUDA graph; ``least`` to 40 replays, as the budget allows.

    warm_ms: time of replays before them.  At its power limit the card's clock goes by what ran in the last tens of
    milliseconds: without them, by what was measured before this.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for one in inputs[:2]:
            call(one)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call(one) for one in inputs]  # alive, so that no result shares memory with the next
    first = _elapsed_ms(graph.replay)
    first = _elapsed_ms(graph.replay)
    for _ in range(math.ceil(warm_ms / max(first, 1e-3))):
        graph.replay()
    torch.cuda.synchronize()
    replays = int(min(40, max(least, budget_ms / max(first, 1e-3))))
    times = [_elapsed_ms(graph.replay) for _ in range(replays)]
    del kept
    graph.reset()
    return 1e3 * statistics.median(times) / len(inputs)


def balanced_orders(names: Sequence[str]) -> list[list[str]]:
    """Orders of all names in which each is as often first, and as often right behind each other one.

    As many as names where that is even, else twice as many.  Source: E. J. Williams, "Experimental designs balanced for
    the estimation of residual effects of treatments", Australian Journal of Scientific Research A 2 (1949).
    """
    n = len(names)
    zigzag = [0, *(place for i in range(1, n // 2 + 1) for place in (i, n - i))][:n]
    orders = [[names[(place + shift) % n] for place in zigzag] for shift in range(n)]
    return orders if n % 2 == 0 else orders + [order[::-1] for order in orders]


def stream_us(call: Callable[[Any], Any], inputs: Sequence[Any], rounds: int = 2) -> float:
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
