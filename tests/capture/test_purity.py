"""Loops whose tensors are all right, and whose Python is not.

The backend here believes every assumption, as if each had been proved: only the purity checks stand
between a wrong speculation and a wrong result.  Every loop has to give what it gives eagerly.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from moe_inductor.capture import scope
from moe_inductor.capture.assumptions import NonEmpty, Visited
from moe_inductor.capture.marker import take
from tests.capture.fake_backend import FakeBackend, Recorder, installed
from tests.capture.models import Block, E, H

Body = Callable[..., Any]


class Believer(FakeBackend):
    def __init__(self) -> None:
        super().__init__()
        self.assumptions: list[Any] = []
        self.about: dict[Any, torch.fx.Node] = {}  # what the marker of an assumption kept

    def __call__(self, gm: torch.fx.GraphModule, inputs: list[Any], **options: Any) -> Any:
        self.assumptions += scope.assumptions()
        for assumption in scope.assumptions():
            marker = getattr(assumption, "marker", None)
            if marker is not None:
                assert marker in list(gm.graph.nodes)
                self.about[assumption] = take(marker)
        gm.recompile()
        return super().__call__(gm, inputs, **options)


class Loop(Block):
    """``body`` gets the block, x, the routing weights, the mask, the output and the hit list."""

    def __init__(self, body: Body, stacked: bool = False) -> None:
        super().__init__()
        self.stacked = stacked
        self.body = body
        self.calls = 0
        self.table = dict.fromkeys(range(E), 1.0)

    def add(self, x: Any, weights: Any, mask: Any, out: Any, e: Any) -> None:
        k, t = torch.where(mask[e])
        if self.stacked:
            out.index_add_(0, t, self.stacked_expert(e, x[t]) * weights[t, k, None])
            return
        out.index_add_(0, t, self.experts[e](x[t]) * weights[t, k, None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, mask = self.route(x)
        hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
        return self.body(self, x, weights, mask, torch.zeros_like(x), hit)


def compile_and_compare(
    body: Body, backend: Believer | None = None, stacked: bool = False, **settings: Any
) -> Believer:
    """One token: some experts have none.  The results have to be eager's."""
    block, x, backend = Loop(body, stacked), torch.randn(1, H), backend or Believer()
    with torch.no_grad(), installed(backend, speculate=True, **settings):
        random.seed(0)
        expected, calls = block(x), block.calls
        block.calls = 0
        random.seed(0)
        torch.testing.assert_close(torch.compile(block, backend=backend)(x), expected)
        assert block.calls == calls
    return backend


# --- captured whole -------------------------------------------------------------------------------
def rows_squeezed(s, x, w, m, out, hit):
    for e in hit.squeeze(-1):
        s.add(x, w, m, out, e)
    return out


def rows_indexed(s, x, w, m, out, hit):
    for e in hit:
        s.add(x, w, m, out, e[0])
    return out


def rows_with_sentinel(s, x, w, m, out, hit):
    """transformers 5: an extra class for tokens of other devices."""
    for e in hit:
        e = e[0]
        if e == E:
            continue
        s.add(x, w, m, out, e)
    return out


def stacked_weights(s, x, w, m, out, hit):
    for e in hit:
        k, t = torch.where(m[e].squeeze(0))
        out.index_add_(0, t, s.stacked_expert(e[0], x[t]) * w[t, k, None])
    return out


def functional_sum(s, x, w, m, out, hit):
    for e in hit:
        k, t = torch.where(m[e[0]])
        out = out.index_add(0, t, s.experts[e[0]](x[t]) * w[t, k, None])
    return out


def numel_skip(s, x, w, m, out, hit):
    for e in range(E):
        k, t = torch.where(m[e])
        if t.numel() == 0:
            continue
        out.index_add_(0, t, s.experts[e](x[t]) * w[t, k, None])
    return out


def numel_if(s, x, w, m, out, hit):
    for e in range(E):
        k, t = torch.where(m[e])
        if t.numel() > 0:
            y = s.experts[e](x[t]) * w[t, k, None]
            out.index_add_(0, t, y)
    return out


def shape_skip(s, x, w, m, out, hit):
    for e in range(E):
        k, t = torch.where(m[e])
        if t.shape[0] == 0:
            continue
        out.index_add_(0, t, s.experts[e](x[t]) * w[t, k, None])
    return out


def len_skip(s, x, w, m, out, hit):
    for e in range(E):
        k, t = torch.where(m[e])
        if len(t) > 0:
            out.index_add_(0, t, s.experts[e](x[t]) * w[t, k, None])
    return out


def local_list_in_body(s, x, w, m, out, hit):
    for e in hit:
        parts = []
        parts.append(e[0])
        s.add(x, w, m, out, parts[0])
    return out


def both(s, x, w, m, out, hit):
    for e in hit:
        k, t = torch.where(m[e[0]])
        if t.numel() == 0:
            continue
        out.index_add_(0, t, s.experts[e[0]](x[t]) * w[t, k, None])
    return out


def scores(w, m):
    """[T, E]: the weights of all experts, 0 where one was not chosen."""
    return (m.permute(2, 1, 0) * w[..., None]).sum(1)


def column_by_a_row(s, x, w, m, out, hit):
    """transformers 4: qwen3_vl_moe."""
    for e in hit:
        with torch.no_grad():
            _, t = torch.where(m[e[0]])
        out.index_add_(0, t, s.experts[e[0]](x[t]) * scores(w, m)[t, e][:, None])
    return out


def no_grad_in_the_body(s, x, w, m, out, hit):
    """transformers 4: gpt_oss."""
    for e in hit[:]:
        e = e[0]
        with torch.no_grad():
            k, t = torch.where(m[e])
        out.index_add_(0, t, s.experts[e](x[t]) * w[t, k, None])
    return out


WHOLE = [
    column_by_a_row,
    no_grad_in_the_body,
    rows_squeezed,
    rows_indexed,
    rows_with_sentinel,
    stacked_weights,
    functional_sum,
    numel_skip,
    numel_if,
    shape_skip,
    len_skip,
    local_list_in_body,
    both,
]


# --- not speculated -------------------------------------------------------------------------------
def counter(s, x, w, m, out, hit):
    n = 0
    for e in hit:
        s.add(x, w, m, out, e[0])
        n += 1
    return out / n


def last_index(s, x, w, m, out, hit):
    for e in hit:
        s.add(x, w, m, out, e[0])
    return out * (int(e) + 1)


def tensor_becomes_number(s, x, w, m, out, hit):
    scale = x.sum()
    for e in hit:
        s.add(x, w, m, out, e[0])
        scale = int(e)
    return out * scale


def tensor_becomes_number_at_the_end(s, x, w, m, out, hit):
    scale = x.sum()
    for e in hit:
        s.add(x, w, m, out, e[0])
        if e[0] == E - 1:
            scale = 5.0
    return out * scale


def attribute_counter(s, x, w, m, out, hit):
    for e in hit:
        s.add(x, w, m, out, e[0])
        s.calls += 1
    return out / s.calls


def attribute_in_callee(s, x, w, m, out, hit):
    def visit(e):
        s.add(x, w, m, out, e)
        s.calls += 1

    for e in hit:
        visit(e[0])
    return out


def list_append(s, x, w, m, out, hit):
    seen = []
    for e in hit:
        s.add(x, w, m, out, e[0])
        seen.append(1)
    return out / len(seen)


def append_in_callee(s, x, w, m, out, hit):
    seen = []

    def visit(e):
        s.add(x, w, m, out, e)
        seen.append(1)

    for e in hit:
        visit(e[0])
    return out / len(seen)


def append_in_method_of_list(s, x, w, m, out, hit):
    seen = []
    note = seen.append
    for e in hit:
        s.add(x, w, m, out, e[0])
        note(1)
    return out / len(seen)


def nested_list(s, x, w, m, out, hit):
    seen = {"inner": [[]]}
    for e in hit:
        s.add(x, w, m, out, e[0])
        seen["inner"][0].append(1)
    return out / len(seen["inner"][0])


def dict_store(s, x, w, m, out, hit):
    seen = {}
    for e in hit:
        s.add(x, w, m, out, e[0])
        seen[len(seen)] = 1
    return out / len(seen)


def set_add(s, x, w, m, out, hit):
    seen = set()
    for e in hit:
        s.add(x, w, m, out, e[0])
        seen.add(int(e))
    return out / len(seen)


def list_element(s, x, w, m, out, hit):
    count = [0]
    for e in hit:
        s.add(x, w, m, out, e[0])
        count[0] += 1
    return out / count[0]


def nonlocal_counter(s, x, w, m, out, hit):
    n = 0

    def visit(e):
        nonlocal n
        s.add(x, w, m, out, e)
        n += 1

    for e in hit:
        visit(e[0])
    return out / n


def closure_variable(s, x, w, m, out, hit):
    last = 0

    def read():
        return last + 1

    for e in hit:
        s.add(x, w, m, out, e[0])
        last = int(e)
    return out * read()


def iterator_advanced(s, x, w, m, out, hit):
    numbers = iter(range(1, 100))
    for e in hit:
        s.add(x, w, m, out, e[0])
        next(numbers)
    return out / next(numbers)


def generator_advanced(s, x, w, m, out, hit):
    numbers = (i * 2 for i in range(1, 100))
    for e in hit:
        s.add(x, w, m, out, e[0])
        next(numbers)
    return out / next(numbers)


def random_number(s, x, w, m, out, hit):
    for e in hit:
        s.add(x, w, m, out, e[0])
        random.random()
    return out * random.random()


def breaks(s, x, w, m, out, hit):
    for e in hit:
        s.add(x, w, m, out, e[0])
        if int(e) >= 0:
            break
    return out


def returns(s, x, w, m, out, hit):
    for e in hit:
        s.add(x, w, m, out, e[0])
        if int(e) >= 0:
            return out * 2
    return out


def raises_and_catches(s, x, w, m, out, hit):
    n = 1
    for e in hit:
        s.add(x, w, m, out, e[0])
        try:
            if int(e) >= 0:
                raise KeyError
        except KeyError:
            n = 2
    return out * n


def read_by_a_handler(s, x, w, m, out, hit):
    n = 0
    try:
        for e in hit:
            s.add(x, w, m, out, e[0])
            n = int(e) + 1
        raise KeyError
    except KeyError:
        return out * n


def swallowed(s, x, w, m, out, hit):
    """The second pass reads what the first has left, because an exception kept it from being written."""
    n = 1
    for e in hit:
        try:
            if int(e) > 1:
                raise KeyError
            n = int(e) + 5
        except KeyError:
            pass
        s.add(x * n, w, m, out, e[0])
    return out


def caught_outside(s, x, w, m, out, hit):
    """Only an expert without tokens is missing from the table."""
    table = {int(e): 1.0 for e in hit}
    try:
        for e in hit:
            out = out * table[int(e)]
            s.add(x, w, m, out, e[0])
    except KeyError:
        return out * 0
    return out


def printed(s, x, w, m, out, hit):
    for e in hit:
        s.add(x, w, m, out, e[0])
        print("", end="")
    return out


def grad_mode_changed(s, x, w, m, out, hit):
    for e in hit:
        s.add(x, w, m, out, e[0])
        torch.set_grad_enabled(True)
    torch.set_grad_enabled(False)
    return out


def key_of_a_dict(s, x, w, m, out, hit):
    for e in hit:
        s.add(x, w, m, out * s.table.get(e[0], 1.0), e[0])
    return out * (2.0 if hit[0, 0] in s.table else 1.0)


def kind_of_the_index(s, x, w, m, out, hit):
    for e in hit:
        s.add(x, w, m, out, e[0])
        if isinstance(e[0], int):
            out = out + 1
    return out


def arithmetic_on_the_index(s, x, w, m, out, hit):
    for e in hit:
        flag = (e[0] == 1) + (e[0] < E)  # a logical or for tensors, 2 for bools
        s.add(x, w * flag, m, out, e[0])
    return out


def text_of_the_index(s, x, w, m, out, hit):
    for e in hit:
        s.add(x, w * len(f"{e}"), m, out, e[0])
    return out


def numel_counter(s, x, w, m, out, hit):
    n = 0
    for e in range(E):
        k, t = torch.where(m[e])
        if t.numel() == 0:
            continue
        out.index_add_(0, t, s.experts[e](x[t]) * w[t, k, None])
        n += 1
    return out / n


def numel_else(s, x, w, m, out, hit):
    for e in range(E):
        k, t = torch.where(m[e])
        if t.numel() > 0:
            out.index_add_(0, t, s.experts[e](x[t]) * w[t, k, None])
        else:
            out += 1.0
    return out


def numel_return(s, x, w, m, out, hit):
    for e in range(E):
        k, t = torch.where(m[e])
        if t.numel() == 0:
            return out
        out.index_add_(0, t, s.experts[e](x[t]) * w[t, k, None])
    return out


def numel_append(s, x, w, m, out, hit):
    seen = []
    for e in range(E):
        k, t = torch.where(m[e])
        if t.shape[0] == 0:
            continue
        seen.append(e)
        out.index_add_(0, t, s.experts[e](x[t]) * w[t, k, None])
    return out / len(seen)


def numel_flag(s, x, w, m, out, hit):
    scale = 1.0
    for e in range(E):
        _, t = torch.where(m[e])
        if t.numel() > 0:
            scale = scale + 1.0
    return x * scale


def numel_value_kept(s, x, w, m, out, hit):
    _, t = torch.where(m[0])
    empty = t.numel() == 0
    return x * (2.0 if empty else 3.0)


def numel_conditional_expression(s, x, w, m, out, hit):
    n = 0
    for e in range(E):
        _, t = torch.where(m[e])
        n += 1 if t.numel() > 0 else 0
    return x * n


def more_than_one(s, x, w, m, out, hit):
    """Not a test of emptiness."""
    for e in range(E):
        k, t = torch.where(m[e])
        if t.numel() > 1:
            out.index_add_(0, t, s.experts[e](x[t]) * w[t, k, None])
    return out


IMPURE = [
    counter,
    last_index,
    tensor_becomes_number,
    tensor_becomes_number_at_the_end,
    attribute_counter,
    attribute_in_callee,
    list_append,
    append_in_callee,
    append_in_method_of_list,
    nested_list,
    dict_store,
    set_add,
    list_element,
    nonlocal_counter,
    closure_variable,
    iterator_advanced,
    generator_advanced,
    random_number,
    breaks,
    returns,
    raises_and_catches,
    read_by_a_handler,
    swallowed,
    caught_outside,
    printed,
    grad_mode_changed,
    key_of_a_dict,
    kind_of_the_index,
    arithmetic_on_the_index,
    text_of_the_index,
    numel_counter,
    numel_else,
    numel_return,
    numel_append,
    numel_flag,
    numel_value_kept,
    numel_conditional_expression,
    more_than_one,
]


@pytest.mark.parametrize("body", WHOLE, ids=lambda body: body.__name__)
def test_captured_whole(body: Body) -> None:
    backend = compile_and_compare(body)
    assert [str(r) for r in backend.reasons] == []
    assert len(backend.graphs) == 1
    rows = [a for a in backend.assumptions if isinstance(a, Visited)]
    sizes = [a for a in backend.assumptions if isinstance(a, NonEmpty)]
    assert [a.bound for a in rows] == ([] if "range" in body.__code__.co_names else [E])
    assert len(sizes) == (
        E if any(n in body.__code__.co_names for n in ("numel", "shape", "len")) else 0
    )
    nodes = list(backend.graphs[0].graph.nodes)
    assert all(backend.about[a] in nodes for a in rows)
    assert all(a.location.startswith(__file__) for a in backend.assumptions)


@pytest.mark.parametrize("body", IMPURE, ids=lambda body: body.__name__)
def test_not_speculated(body: Body) -> None:
    backend = compile_and_compare(body)
    if body is not kind_of_the_index:
        assert backend.assumptions == []


def test_reason_names_the_line_and_the_construct() -> None:
    backend = compile_and_compare(counter)
    (reason,) = [r for r in backend.reasons if "loop-carried" in r.message]
    assert "`n`" in reason.message
    line = counter.__code__.co_firstlineno + 2
    assert reason.location == f"test_purity.py:{line}"


@pytest.mark.parametrize("body", [rows_indexed, numel_skip], ids=lambda body: body.__name__)
def test_nothing_is_speculated_unless_asked_for(body: Body) -> None:
    block, x, backend = Loop(body), torch.randn(1, H), Believer()
    with torch.no_grad(), installed(backend):
        torch.testing.assert_close(torch.compile(block, backend=backend)(x), block(x))
    assert backend.assumptions == []


@pytest.mark.parametrize("body", [rows_indexed, numel_skip], ids=lambda body: body.__name__)
def test_declined_assumptions_end_in_stock(body: Body) -> None:
    """First without speculation, then, where that is no use either, without the flags."""

    def texts(backend: Any) -> list[str]:
        torch._dynamo.reset()
        with torch.no_grad():
            torch.testing.assert_close(torch.compile(block, backend=backend)(x), block(x))
        return backend.texts

    block, x = Loop(body), torch.randn(1, H)
    ours = FakeBackend(decline_when=scope.changed_capture)
    expected = texts(Recorder())
    with installed(ours, speculate=True):
        assert texts(ours) == expected


@pytest.mark.parametrize("body", [rows_indexed, numel_skip], ids=lambda body: body.__name__)
def test_fullgraph(body: Body) -> None:
    block, x, backend = Loop(body), torch.randn(1, H), Believer()
    with torch.no_grad(), installed(backend, speculate=True):
        compiled = torch.compile(block, backend=backend, fullgraph=True)
        torch.testing.assert_close(compiled(x), block(x))
        assert len(backend.graphs) == 1
        torch._dynamo.reset()
        decliner = FakeBackend(decline_when=scope.changed_capture)
        with installed(decliner, speculate=True):
            compiled = torch.compile(block, backend=decliner, fullgraph=True)
            with pytest.raises(Exception, match=r"data-dependent|Data-dependent"):
                compiled(x)


def test_other_backends_do_not_speculate() -> None:
    block, x, stock, other = Loop(rows_indexed), torch.randn(1, H), Recorder(), Recorder()
    with torch.no_grad():
        torch.compile(block, backend=stock)(x)
        with installed(Believer(), speculate=True):
            torch._dynamo.reset()
            torch.compile(block, backend=other)(x)
    assert other.texts == stock.texts
