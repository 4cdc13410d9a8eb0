"""Loops that look like those of test_constructs.py, and of which Python sees more.

The backend believes everything, so only the purity checks stand between a wrong speculation and a wrong result.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.capture.models import E
from tests.capture.test_purity import compile_and_compare


# --- seen by Python -----------------------------------------------------------------------------------------------
def how_many_hits(s, x, w, m, out, hit):
    hits = hit.flatten().tolist()
    for e in hits:
        s.add(x, w, m, out, e)
    return out / len(hits)


def first_of_the_hits(s, x, w, m, out, hit):
    hits = hit.flatten().tolist()
    for e in hits:
        s.add(x, w, m, out, e)
    return out * hits[0]


def is_hit(s, x, w, m, out, hit):
    hits = hit.flatten().tolist()
    for e in range(E):
        if e in hits:
            s.add(x, w, m, out, e)
        else:
            out += 1.0
    return out


def sorted_hits(s, x, w, m, out, hit):
    order = sorted(hit.flatten().tolist(), reverse=True)
    for e in order:
        out = out * (e + 1) + m[e].sum()
    return out


def hits_in_a_set(s, x, w, m, out, hit):
    return out + len(set(hit.flatten().tolist()))


def hits_are_returned(s, x, w, m, out, hit):
    hits = hit.flatten().tolist()
    for e in hits:
        s.add(x, w, m, out, e)
    s.calls = len(str(hits))
    return out


def last_of_the_list(s, x, w, m, out, hit):
    e = 0
    for e in hit.flatten().tolist():
        s.add(x, w, m, out, e)
    return out * (e + 1)


def counter_over_the_list(s, x, w, m, out, hit):
    n = 0
    for e in hit.flatten().tolist():
        s.add(x, w, m, out, e)
        n += 1
    return out / n


def break_out_of_the_list(s, x, w, m, out, hit):
    for e in hit.flatten().tolist():
        s.add(x, w, m, out, e)
        if e > 0:
            break
    return out


def position_of_the_hit(s, x, w, m, out, hit):
    for i, e in enumerate(hit):
        s.add(x, w * (i + 1), m, out, e[0])
    return out


def position_in_the_list(s, x, w, m, out, hit):
    for i, e in enumerate(hit.flatten().tolist()):
        s.add(x, w * (i + 1), m, out, e)
    return out


def zipped_hits(s, x, w, m, out, hit):
    for e, scale in zip(hit.flatten().tolist(), (1.0, 2.0, 3.0, 4.0), strict=False):
        s.add(x, w * scale, m, out, e)
    return out


def comprehension_over_hits(s, x, w, m, out, hit):
    return out + sum([m[e].sum() * (e + 1) for e in hit.flatten().tolist()])


def any_counter(s, x, w, m, out, hit):
    n = 0
    for e in range(E):
        if m[e].any():
            s.add(x, w, m, out, e)
            n += 1
    return out / n


def any_else(s, x, w, m, out, hit):
    for e in range(E):
        if m[e].any():
            s.add(x, w, m, out, e)
        else:
            out += 1.0
    return out


def sum_break(s, x, w, m, out, hit):
    for e in range(E):
        if m[e].sum() == 0:
            break
        s.add(x, w, m, out, e)
    return out


def sum_raises(s, x, w, m, out, hit):
    try:
        for e in range(E):
            if m[e].sum() == 0:
                raise KeyError
            s.add(x, w, m, out, e)
    except KeyError:
        return out - 1.0
    return out


def sum_returns(s, x, w, m, out, hit):
    for e in range(E):
        if m[e].sum() == 0:
            return out * 3
        s.add(x, w, m, out, e)
    return out


def sum_is_two(s, x, w, m, out, hit):
    for e in range(E):
        if m[e].sum() == 2:
            out += 1.0
        s.add(x, w, m, out, e)
    return out


def sum_is_more_than_one(s, x, w, m, out, hit):
    for e in range(E):
        if m[e].sum() > 1:
            s.add(x, w, m, out, e)
    return out


def all_of_them(s, x, w, m, out, hit):
    for e in range(E):
        if m[e].all():
            s.add(x, w, m, out, e)
    return out


def float_test(s, x, w, m, out, hit):
    if x.sum() > 0:
        out = out + 1.0
    return out


def while_some_are_left(s, x, w, m, out, hit):
    left = m.sum()
    while left > 0:
        out = out + 1.0
        left = left - 1
    return out


def any_prints(s, x, w, m, out, hit):
    for e in range(E):
        if m[e].any():
            print("", end="")
            s.add(x, w, m, out, e)
    return out


def any_sets_attribute(s, x, w, m, out, hit):
    for e in range(E):
        if m[e].any():
            s.calls += 1
            s.add(x, w, m, out, e)
    return out


def helper_tells_what_it_did(s, x, w, m, out, hit):
    def visit(e):
        if not m[e].any():
            return 0
        s.add(x, w, m, out, e)
        return 1

    return out / sum([visit(e) for e in range(E)])


def number_runs_ahead(s, x, w, m, out, hit):
    start = 0
    for n in m.sum(dim=(-1, -2)).tolist():
        if n == 0:
            continue
        start += n + 1
    return out + start


def number_becomes_tensor(s, x, w, m, out, hit):
    start = 0
    for n in m.sum(dim=(-1, -2)):
        if n == 0:
            continue
        start = start + n * 0
    return out + isinstance(start, int)


def length_of_pieces(s, x, w, m, out, hit):
    parts = []
    for e in range(E):
        k, t = torch.where(m[e])
        if t.numel() == 0:
            continue
        parts.append(s.experts[e](x[t]) * w[t, k, None])
    return out + len(parts)


def first_piece(s, x, w, m, out, hit):
    parts = []
    for e in range(E):
        k, t = torch.where(m[e])
        if t.numel() == 0:
            continue
        parts.append(s.experts[e](x[t]) * w[t, k, None])
    return out + parts[0].sum()


def other_name_of_pieces(s, x, w, m, out, hit):
    parts = []
    other = parts
    for e in range(E):
        k, t = torch.where(m[e])
        if t.numel() == 0:
            continue
        parts.append(s.experts[e](x[t]) * w[t, k, None])
    return out + len(other)


def pieces_side_by_side(s, x, w, m, out, hit):
    parts = []
    for e in range(E):
        k, t = torch.where(m[e])
        if t.numel() == 0:
            continue
        parts.append((s.experts[e](x[t]) * w[t, k, None]).sum(0, keepdim=True))
    return out + torch.cat(parts, dim=1).shape[1]


def pieces_summed(s, x, w, m, out, hit):
    parts = []
    for e in range(E):
        _, t = torch.where(m[e])
        if t.numel() == 0:
            continue
        parts.append(s.experts[e](x[t]).sum() + 1)
    return out + sum(parts)


def pieces_stacked(s, x, w, m, out, hit):
    parts = []
    for e in range(E):
        _, t = torch.where(m[e])
        if t.numel() == 0:
            continue
        parts.append(s.experts[e](x[t]).sum(0) + 1)
    return out + torch.stack(parts).sum(0)


def numbers_among_pieces(s, x, w, m, out, hit):
    parts = []
    for e in range(E):
        _, t = torch.where(m[e])
        if t.numel() == 0:
            continue
        parts.append(1.0)
    return out + len(parts)


def pieces_in_a_closure(s, x, w, m, out, hit):
    parts = []

    def count():
        return len(parts)

    for e in range(E):
        _, t = torch.where(m[e])
        if t.numel() == 0:
            continue
        parts.append(s.experts[e](x[t]))
    return out + count()


def pieces_of_the_block(s, x, w, m, out, hit):
    parts = s.parts = []
    for e in range(E):
        _, t = torch.where(m[e])
        if t.numel() == 0:
            continue
        parts.append(s.experts[e](x[t]))
    return out + len(s.parts)


def pieces_or_those_of_the_block(s, x, w, m, out, hit):
    s.parts = others = []
    parts = others if x.dim() == 2 else []
    for e in range(E):
        _, t = torch.where(m[e])
        if t.numel() == 0:
            continue
        parts.append(s.experts[e](x[t]))
    return out + len(s.parts)


def pieces_extended(s, x, w, m, out, hit):
    parts = []
    for e in range(E):
        _, t = torch.where(m[e])
        if t.numel() == 0:
            continue
        parts.extend([s.experts[e](x[t]), x + 1])
    return out + torch.cat(parts).sum(0)


PYTHON = [
    how_many_hits,
    first_of_the_hits,
    is_hit,
    sorted_hits,
    hits_in_a_set,
    hits_are_returned,
    last_of_the_list,
    counter_over_the_list,
    break_out_of_the_list,
    position_of_the_hit,
    position_in_the_list,
    zipped_hits,
    comprehension_over_hits,
    any_counter,
    any_else,
    sum_break,
    sum_raises,
    sum_returns,
    sum_is_two,
    sum_is_more_than_one,
    all_of_them,
    float_test,
    while_some_are_left,
    any_prints,
    any_sets_attribute,
    helper_tells_what_it_did,
    number_runs_ahead,
    number_becomes_tensor,
    length_of_pieces,
    first_piece,
    other_name_of_pieces,
    pieces_side_by_side,
    pieces_summed,
    pieces_stacked,
    numbers_among_pieces,
    pieces_in_a_closure,
    pieces_of_the_block,
    pieces_or_those_of_the_block,
    pieces_extended,
]


@pytest.mark.parametrize("body", PYTHON, ids=lambda body: body.__name__)
def test_python_sees_it(body: Any) -> None:
    compile_and_compare(body)


def test_a_while_statement_is_no_if() -> None:
    """Each answer would only lead to the next test, until Python's stack is full."""
    backend = compile_and_compare(while_some_are_left)
    why = "the test is that of a while statement: `while left > 0:`"
    assert any(why in reason.message for reason in backend.reasons)
