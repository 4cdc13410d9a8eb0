"""What can be said of the measurements without a GPU."""

import collections
import itertools

import pytest

from benchmarks.timing import balanced_orders


@pytest.mark.parametrize("names", ["", "a", "ab", "abc", "abcd", "abcde", "abcdef", "abcdefg"])
def test_orders_are_balanced(names):
    orders = balanced_orders(names)
    rounds = len(names) * (1 + len(names) % 2)
    assert [sorted(order) for order in orders] == [sorted(names)] * rounds
    assert len({collections.Counter(o[0] for o in orders)[name] for name in names}) <= 1
    pairs = collections.Counter(pair for o in orders for pair in itertools.pairwise(o))
    assert len({pairs[pair] for pair in itertools.permutations(names, 2)}) <= 1
