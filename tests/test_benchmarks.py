"""What can be said of the measurements without a GPU."""

import collections
import itertools
import random

import pytest

from benchmarks import timing


class Clock:
    """Of a GPU that slows down for a moment once a second; ``replay`` of a graph passes the time of its calls."""

    now = 0.0

    def take(self, ms):
        self.now += ms * (2.0 if self.now % 1000.0 < 150.0 else 1.0)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()

    class Captured:
        def __init__(self, call, inputs):
            self.ms = sum(call(one) for one in inputs)
            self.graph = self

        def replay(self, times):
            clock.take(self.ms * times)

        def reset(self):
            pass

    def elapsed_ms(run):
        start = clock.now
        run()
        return clock.now - start

    monkeypatch.setattr(timing, "_Captured", Captured)
    monkeypatch.setattr(timing, "_elapsed_ms", elapsed_ms)
    return clock


@pytest.mark.parametrize("ms", [0.01, 1.0, 40.0])
def test_the_median_of_rounds_is_none_of_the_slow_moments(ms, clock):
    times = timing.rounds_us(
        {
            name: lambda one, factor=factor: ms * factor
            for name, factor in zip("abcd", range(1, 5), strict=True)
        },
        range(2),
        random.Random(0),
    )
    medians = [sorted(of)[len(of) // 2] for of in times.values()]
    assert medians == pytest.approx([1e3 * ms * factor for factor in range(1, 5)])
    assert {len(of) for of in times.values()} == {12}
    assert max(of[-1] / of[0] for of in map(sorted, times.values())) > 1.5  # there were some


def test_nobody_has_a_place_of_its_own(clock, monkeypatch):
    """Each contestant is first, and behind each other one, about as often."""
    turns = []
    monkeypatch.setattr(timing._Captured, "replay", lambda self, times: turns.append(self.ms))
    orders = random.Random(0)
    calls = {name: lambda one, name=name: float(name) for name in "1234"}
    firsts, pairs = collections.Counter(), collections.Counter()
    for _ in range(60):  # cells
        turns.clear()
        timing.rounds_us(calls, [0], orders)
        order = turns[::2]  # warm, timed
        firsts.update(order[::4])
        pairs.update(itertools.pairwise(order))
    assert max(firsts.values()) < 1.3 * min(firsts.values())
    different = [pairs[pair] for pair in itertools.permutations(firsts, 2)]
    assert max(different) < 1.3 * min(different)
