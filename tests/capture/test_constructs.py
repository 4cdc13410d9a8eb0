"""The ways in which models ask tensors how many tokens an expert has, captured whole.

As in test_purity.py the backend believes every assumption; one token, so that most experts have none.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moe_inductor.capture import purity
from moe_inductor.capture.assumptions import Kept, Length, NonEmpty, Tested, Visited
from tests.capture.fake_backend import installed
from tests.capture.models import Block, E, H, K
from tests.capture.test_purity import Believer, compile_and_compare


# --- tests of tensors without dimensions (D) ----------------------------------------------------------------------
def any_skip(s, x, w, m, out, hit):
    for e in range(E):
        if not m[e].any():
            continue
        s.add(x, w, m, out, e)
    return out


def torch_any_if(s, x, w, m, out, hit):
    for e in range(E):
        if torch.any(m[e]):
            s.add(x, w, m, out, e)
    return out


def sum_is_zero(s, x, w, m, out, hit):
    for e in range(E):
        if m[e].sum() == 0:
            continue
        s.add(x, w, m, out, e)
    return out


def sum_is_positive(s, x, w, m, out, hit):
    for e in range(E):
        if m[e].sum() > 0:
            s.add(x, w, m, out, e)
    return out


def sum_is_true(s, x, w, m, out, hit):
    for e in range(E):
        if m[e].sum():
            s.add(x, w, m, out, e)
    return out


def none_at_all(s, x, w, m, out, hit):
    for e in range(E):
        if torch.logical_not(m[e].any()):
            continue
        s.add(x, w, m, out, e)
    return out


def any_item(s, x, w, m, out, hit):
    for e in range(E):
        if not m[e].any().item():
            continue
        s.add(x, w, m, out, e)
    return out


def sum_item(s, x, w, m, out, hit):
    for e in range(E):
        if m[e].sum().item() == 0:
            continue
        s.add(x, w, m, out, e)
    return out


def counts_enumerated(s, x, w, m, out, hit):
    for e, n in enumerate(m.sum(dim=(-1, -2))):
        if n == 0:
            continue
        s.add(x, w, m, out, e)
    return out


def functional_any(s, x, w, m, out, hit):
    for e in range(E):
        if m[e].any():
            k, t = torch.where(m[e])
            out = out.index_add(0, t, s.experts[e](x[t]) * w[t, k, None])
    return out


def helper_ends_with_test(s, x, w, m, out, hit):
    def visit(e):
        k, t = torch.where(m[e])
        if t.numel() > 0:
            out.index_add_(0, t, s.experts[e](x[t]) * w[t, k, None])

    for e in range(E):
        visit(e)
    return out


def helper_returns_early(s, x, w, m, out, hit):
    def visit(e):
        if not m[e].any():
            return
        s.add(x, w, m, out, e)

    for e in range(E):
        visit(e)
    return out


def helper_returns_the_same(s, x, w, m, out, hit):
    def visit(e, y):
        k, t = torch.where(m[e])
        if t.shape[0] == 0:
            return y
        y = y.index_add(0, t, s.experts[e](x[t]) * w[t, k, None])
        return y

    for e in range(E):
        out = visit(e, out)
    return out


TENSOR_TESTS = [
    any_skip,
    torch_any_if,
    sum_is_zero,
    sum_is_positive,
    sum_is_true,
    none_at_all,
    counts_enumerated,
    functional_any,
    helper_returns_early,
]
NUMBER_TESTS = [any_item, sum_item, helper_ends_with_test, helper_returns_the_same]


def whole(body: Any) -> Believer:
    backend = compile_and_compare(body)
    assert [str(r) for r in backend.reasons] == []
    assert len(backend.graphs) == 1
    return backend


@pytest.mark.parametrize("body", TENSOR_TESTS, ids=lambda body: body.__name__)
def test_of_a_tensor(body: Any) -> None:
    backend = whole(body)
    tests = [a for a in backend.assumptions if isinstance(a, Tested)]
    assert len(tests) == E
    assert backend.assumptions == tests
    nodes = list(backend.graphs[0].graph.nodes)
    negative = body in (sum_is_zero, none_at_all, counts_enumerated)
    for test in tests:
        assert backend.about[test] in nodes
        assert test.truth is not negative
        assert test.location.startswith(__file__)
        (once,) = test.passes
        assert any("index_add" in str(node.target) for node in once.nodes)


@pytest.mark.parametrize("body", NUMBER_TESTS, ids=lambda body: body.__name__)
def test_of_a_number(body: Any) -> None:
    backend = whole(body)
    assert [type(a) for a in backend.assumptions] == [NonEmpty] * E
    assert all(len(a.passes) == 1 for a in backend.assumptions)


def test_what_watches_a_region_goes_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop over hundreds of experts has a region for each, and Python's stack is only so deep."""
    open_at_once: list[int] = []
    watch = purity.watch

    def counted(region: Any, give_up: Any) -> None:
        watch(region, give_up)
        step = region.tx.step
        open_at_once.append(0)
        while isinstance(step, purity._CheckedStep):
            open_at_once[-1] += 1
            step = step.step

    monkeypatch.setattr(purity, "watch", counted)
    compile_and_compare(functional_any)
    assert open_at_once == [1] * E


def test_what_a_branch_hands_on_is_in_its_pass() -> None:
    first, second = [a.passes[0] for a in whole(functional_any).assumptions][:2]
    assert list(first.before) == list(first.after) == ["out"]
    assert first.after["out"] is second.before["out"]
    assert first.after["out"] in first.nodes


# --- lists of hit experts (E) -------------------------------------------------------------------------------------
def rows_tolist(s, x, w, m, out, hit):
    for e in hit.tolist():
        s.add(x, w, m, out, e[0])
    return out


def rows_flat_tolist(s, x, w, m, out, hit):
    for e in hit.flatten().tolist():
        s.add(x, w, m, out, e)
    return out


def nonzero_tuple_tolist(s, x, w, m, out, hit):
    hits = torch.nonzero(m.sum(dim=(-1, -2)), as_tuple=True)[0].tolist()
    for e in hits:
        s.add(x, w, m, out, e)
    return out


def rows_item(s, x, w, m, out, hit):
    for e in hit.squeeze(-1):
        e = e.item()
        if e == E:
            continue
        s.add(x, w, m, out, e)
    return out


def rows_int_item(s, x, w, m, out, hit):
    for row in hit:
        e = int(row.item())
        k, t = torch.where(m[e].squeeze(0))
        if t.numel() == 0:
            continue
        out.index_add_(0, t, s.experts[e](x[t]) * w[t, k, None])
    return out


def rows_row_tolist(s, x, w, m, out, hit):
    for row in hit:
        (e,) = row.tolist()
        s.add(x, w, m, out, e)
    return out


def rows_whole_slice(s, x, w, m, out, hit):
    for e in hit[:]:
        s.add(x, w, m, out, e[0])
    return out


def rows_column(s, x, w, m, out, hit):
    for e in hit[:, 0]:
        s.add(x, w, m, out, e)
    return out


def rows_view(s, x, w, m, out, hit):
    for e in hit.view(-1):
        s.add(x, w, m, out, e)
    return out


def rows_where(s, x, w, m, out, hit):
    for e in torch.where(m.sum(dim=(-1, -2)) > 0)[0]:
        s.add(x, w, m, out, e)
    return out


def name_of_the_index(s, x, w, m, out, hit):
    """transformers 5: switch_transformers."""
    for e in hit:
        k, t = torch.where(m[e].squeeze(0))
        expert = s.experts._modules[f"{e[0]}"]
        out.index_add_(0, t, expert(x[t]) * w[t, k, None])
    return out


def name_of_the_number(s, x, w, m, out, hit):
    """transformers 4: switch_transformers."""
    for e in hit.flatten().tolist():
        k, t = torch.where(m[e])
        out.index_add_(0, t, getattr(s.experts, f"{e}")(x[t]) * w[t, k, None])
    return out


LISTS = [
    rows_tolist,
    rows_flat_tolist,
    nonzero_tuple_tolist,
    rows_item,
    rows_int_item,
    rows_row_tolist,
    rows_whole_slice,
    rows_column,
    rows_view,
    rows_where,
    name_of_the_index,
    name_of_the_number,
]


@pytest.mark.parametrize("body", LISTS, ids=lambda body: body.__name__)
def test_hit_list(body: Any) -> None:
    backend = whole(body)
    (rows,) = [a for a in backend.assumptions if isinstance(a, Visited)]
    assert rows.bound == E
    assert len(rows.passes) == E
    assert backend.about[rows] in list(backend.graphs[0].graph.nodes)


class Chosen(Block):
    """Blocks that loop over the experts that were chosen, or over how many tokens each has."""

    def __init__(self, loop: Any) -> None:
        super().__init__()
        self.loop = loop

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = torch.topk(F.softmax(self.router(x), dim=-1), K, dim=-1)
        return self.loop(self, x, weights, ids)


def unique_ids(s, x, w, ids):
    out = torch.zeros_like(x)
    for e in torch.unique(ids):
        t, k = torch.where(ids == e)
        out.index_add_(0, t, s.experts[e](x[t]) * w[t, k, None])
    return out


def unique_list(s, x, w, ids):
    out = torch.zeros_like(x)
    for e in ids.flatten().unique().tolist():
        t, k = torch.where(ids == e)
        out.index_add_(0, t, s.experts[e](x[t]) * w[t, k, None])
    return out


def deepseek_v2(s, x, w, ids):
    """transformers 4.57: DeepseekV2MoE.moe."""
    counts = ids.new_zeros((ids.shape[0], E))
    counts.scatter_(1, ids, 1)
    per_expert = counts.sum(dim=0)
    order = ids.view(-1).argsort()
    ordered = x[order // ids.shape[1]]
    outputs = []
    start = 0
    for i, count in enumerate(per_expert):
        if count == 0:
            continue
        end = start + count
        outputs.append(s.experts[i](ordered[start:end]))
        start = end
    outs = torch.cat(outputs, dim=0) if outputs else ordered.new_empty(0)
    new_x = torch.empty_like(outs)
    new_x[order] = outs
    return (new_x.view(*ids.shape, -1) * w.unsqueeze(-1)).sum(dim=1)


def deepseek_numpy(s, x, w, ids):
    """The model code on the hub: counts as a numpy array."""
    per_expert = F.one_hot(ids, E).sum(dim=(0, 1)).cpu().numpy()
    order = ids.view(-1).argsort()
    ordered = x[order // ids.shape[1]]
    outputs, start = [], 0
    for i, count in enumerate(per_expert):
        end = start + count
        if count == 0:
            continue
        outputs.append(s.experts[i](ordered[start:end]))
        start = end
    outs = torch.cat(outputs, dim=0) if len(outputs) else ordered.new_empty(0)
    new_x = torch.empty_like(outs)
    new_x[order] = outs
    return (new_x.view(*ids.shape, -1) * w.unsqueeze(-1)).sum(dim=1)


def counted(s, x, w, ids, counts):
    order = ids.view(-1).argsort()
    ordered = x[order // ids.shape[1]]
    outputs = []
    start = 0
    for i, count in enumerate(counts):
        end = start + count
        if count == 0:
            continue
        outputs.append(s.experts[i](ordered[start:end]))
        start = end
    new_x = torch.empty(ids.numel(), H)
    new_x[order] = torch.cat(outputs, dim=0)
    return (new_x.view(*ids.shape, -1) * w.unsqueeze(-1)).sum(dim=1)


def bincount_list(s, x, w, ids):
    return counted(s, x, w, ids, torch.bincount(ids.flatten(), minlength=E).tolist())


def bincount_cpu(s, x, w, ids):
    return counted(s, x, w, ids, ids.flatten().bincount(minlength=E).cpu())


def one_hot_list(s, x, w, ids):
    return counted(s, x, w, ids, F.one_hot(ids, E).sum(dim=(0, 1)).tolist())


def histc_cpu(s, x, w, ids):
    counts = torch.histc(ids.float(), bins=E, min=0, max=E - 1).to(torch.int64).cpu()
    return counted(s, x, w, ids, counts)


def split_by_bincount(s, x, w, ids):
    order = ids.view(-1).argsort()
    parts = x[order // ids.shape[1]].split(torch.bincount(ids.flatten(), minlength=E).tolist())
    outs = torch.cat([s.experts[i](part) for i, part in enumerate(parts)])
    new_x = torch.empty_like(outs)
    new_x[order] = outs
    return (new_x.view(*ids.shape, -1) * w.unsqueeze(-1)).sum(dim=1)


def values_of_experts(s, x, w, ids):
    out = torch.zeros_like(x)
    for e, expert in enumerate(s.by_name.values()):
        t, k = torch.where(ids == e)
        if t.numel():
            out.index_add_(0, t, expert(x[t]) * w[t, k, None])
    return out


def items_of_experts(s, x, w, ids):
    out = torch.zeros_like(x)
    for name, expert in s.by_name.items():
        t, k = torch.where(ids == int(name.split("_")[1]))
        if t.numel() == 0:
            continue
        out.index_add_(0, t, expert(x[t]) * w[t, k, None])
    return out


def zip_of_experts(s, x, w, ids):
    out = torch.zeros_like(x)
    for expert, chosen in zip(s.experts, F.one_hot(ids, E).permute(2, 0, 1), strict=True):
        t, k = torch.where(chosen)
        if len(t) > 0:
            out.index_add_(0, t, expert(x[t]) * w[t, k, None])
    return out


CHOSEN = {
    unique_ids: (Visited,),
    unique_list: (Visited,),
    deepseek_v2: (*(Tested,) * E, Kept),
    deepseek_numpy: (*(Tested,) * E, Kept),
    bincount_list: (Length, *(NonEmpty,) * E),
    bincount_cpu: (Length, *(Tested,) * E),
    one_hot_list: (NonEmpty,) * E,
    histc_cpu: (Tested,) * E,
    split_by_bincount: (Length,),
    values_of_experts: (NonEmpty,) * E,
    items_of_experts: (NonEmpty,) * E,
    zip_of_experts: (NonEmpty,) * E,
}


def run(block: nn.Module, x: torch.Tensor) -> Believer:
    backend = Believer()
    with torch.no_grad(), installed(backend, speculate=True):
        torch.testing.assert_close(torch.compile(block, backend=backend)(x), block(x))
    return backend


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("loop", CHOSEN, ids=lambda loop: loop.__name__)
def test_chosen_experts(loop: Any, tokens: int) -> None:
    backend = run(Chosen(loop), torch.randn(tokens, H))
    assert [str(r) for r in backend.reasons] == []
    assert len(backend.graphs) == 1
    assert tuple(type(a) for a in backend.assumptions) == CHOSEN[loop]


def test_pieces_and_where_the_slices_start() -> None:
    *tests, kept = run(Chosen(deepseek_v2), torch.randn(3, H)).assumptions
    passes = [test.passes[0] for test in tests]
    assert kept.passes == passes
    assert [len(p.appended) for p in passes] == [1] * E
    assert passes[0].before == {"start": 0}
    for one, other in itertools.pairwise(passes):
        assert one.after["start"] is other.before["start"]
