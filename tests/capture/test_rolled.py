"""Loops that are traced once.  The backend here executes what an assumption of the kind Rolled says, row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from moe_inductor.capture import scope
from moe_inductor.capture.assumptions import NonEmpty, Rolled, RolledModules, Tested, Visited
from tests.capture import test_adversarial, test_constructs, test_purity
from tests.capture.fake_backend import installed
from tests.capture.models import Block, E, H
from tests.capture.test_purity import Believer, compile_and_compare


class Executor(fx.Interpreter):
    """Runs the pass of a rolled loop for each row of its hit list."""

    def __init__(self, gm: fx.GraphModule, loops: list[Any]) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.loops = {_indices(loop)[0]: loop for loop in loops}
        kept = {n for loop in loops for n in getattr(loop, "kept", ())}
        self.skipped = {n for loop in loops for n in _indices(loop)} | kept
        self.skipped |= {n for loop in loops for one in loop.passes for n in one.nodes}

    def run_node(self, n: fx.Node) -> Any:
        if n in self.loops:
            return self.run_loop(self.loops[n])
        skipped = n in self.skipped or "assert" in str(n.target)
        # What nobody inside of a loop has made belongs to runtime assertions, which are for others.
        skipped |= n.op != "output" and any(self.env.get(a) is self for a in n.all_input_nodes)
        return self if skipped else super().run_node(n)

    def run_loop(self, loop: Any) -> Any:
        index = _indices(loop)[0]
        inputs = {n: value for n, value in self.env.items() if n.op == "placeholder"}
        for value in self.env[index.args[0]].flatten().tolist():
            is_last = loop.last and value == loop.count
            self.env[index] = value
            if isinstance(loop, RolledModules) and not is_last:
                for mine, of_first in zip(loop.experts[value], loop.experts[0], strict=True):
                    self.env[of_first] = inputs[mine]
            for node in loop.passes[-1 if is_last else 0].nodes:
                if not node._erased and node.op != "output":
                    self.env[node] = super().run_node(node)
        self.env.update(inputs)
        return self


def _indices(loop: Any) -> list[fx.Node]:
    return loop.indices if isinstance(loop, RolledModules) else [loop.index]


class Roller(Believer):
    def __call__(self, gm: fx.GraphModule, inputs: list[Any], **options: Any) -> Any:
        super().__call__(gm, inputs, **options)
        loops = [a for a in scope.assumptions() if isinstance(a, Rolled | RolledModules)]
        return Executor(gm, loops).run if loops else gm.forward


def rolled(body: Any) -> Roller:
    backend = Roller()
    compile_and_compare(body, backend, stacked=True, roll=True)
    return backend


# --- bodies over stacked weights ----------------------------------------------------------------------------------
def rows_of_shape_one(s, x, w, m, out, hit):
    for e in hit:
        k, t = torch.where(m[e].squeeze(0))
        y = F.linear(x[t], s.gate_up[e].squeeze(0))[:, :16]
        out.index_add_(0, t, F.linear(y, s.down[e[0]]) * w[t, k, None])
    return out


def skip_if_empty(s, x, w, m, out, hit):
    for e in hit.flatten().tolist():
        k, t = torch.where(m[e])
        if t.numel() == 0:
            continue
        out.index_add_(0, t, s.stacked_expert(e, x[t]) * w[t, k, None])
    return out


def two_loops(s, x, w, m, out, hit):
    for e in hit[:, 0]:
        s.add(x, w, m, out, e)
    y = torch.zeros_like(out)
    for e in hit.squeeze(-1):
        s.add(x + 1, w, m, y, e)
    return out + y


def bound_is_checked(s, x, w, m, out, hit):
    """Python may ask what is the same for all experts."""
    for e in hit.flatten().tolist():
        if e < E and e >= 0:
            s.add(x, w, m, out, e)
        else:
            out.add_(1.0)
    return out


def scaled_by_the_number(s, x, w, m, out, hit):
    for e in hit.flatten().tolist():
        s.add(x * (e + 1), w, m, out, e)
    return out


def mask_by_comparison(s, x, w, m, out, hit):
    ids = m.argmax(0).T
    for e in hit[:, 0]:
        t, k = torch.where(ids == e)
        out.index_add_(0, t, s.stacked_expert(e, x[t]) * w[t, k, None])
    return out


def index_assignment(s, x, w, m, out, hit):
    for e in hit[:, 0]:
        k, t = torch.where(m[e])
        out[t] += s.stacked_expert(e, x[t]) * w[t, k, None]
    return out


def column_of_scores(s, x, w, m, out, hit):
    """transformers 4.57, gpt_oss: the row of the hit list inside of an index."""
    scores = test_purity.scores(w, m)
    for e in hit:
        t = torch.where(m[e[0]])[1]
        out.index_add_(0, t, s.stacked_expert(e[0], x[t]) * scores[t, e[0], None])
    return out


def column_by_a_row(s, x, w, m, out, hit):
    """transformers 4.57, qwen3_vl_moe: a row of shape [1] broadcasts against the other index."""
    scores = test_purity.scores(w, m)
    for e in hit:
        t = torch.where(m[e[0]])[1]
        out.index_add_(0, t, s.stacked_expert(e[0], x[t]) * scores[t, e, None])
    return out


def row_with_slices(s, x, w, m, out, hit):
    """Alone, it keeps its dimension, in its place."""
    for e in hit:
        k, t = torch.where(m[e[0]])
        first, second = s.gate_up[e, :H][0], s.gate_up.transpose(0, 1)[:H, e][:, 0]
        out.index_add_(0, t, (x[t] @ first.T + x[t] @ second.T) * w[t, k, None])
    return out


ROLLED = [
    column_of_scores,
    column_by_a_row,
    row_with_slices,
    test_purity.rows_squeezed,
    test_purity.rows_indexed,
    test_purity.rows_with_sentinel,
    test_purity.stacked_weights,
    test_purity.local_list_in_body,
    test_constructs.rows_tolist,
    test_constructs.rows_flat_tolist,
    test_constructs.nonzero_tuple_tolist,
    test_constructs.rows_item,
    test_constructs.rows_row_tolist,
    test_constructs.rows_whole_slice,
    test_constructs.rows_column,
    test_constructs.rows_view,
    test_constructs.rows_where,
    rows_of_shape_one,
    skip_if_empty,
    two_loops,
    bound_is_checked,
    scaled_by_the_number,
    mask_by_comparison,
    index_assignment,
]


@pytest.mark.parametrize("body", ROLLED, ids=lambda body: body.__name__)
def test_one_pass(body: Any) -> None:
    backend = rolled(body)
    assert [str(r) for r in backend.reasons] == []
    assert len(backend.graphs) == 1
    loops = [a for a in backend.assumptions if isinstance(a, Rolled)]
    assert len(loops) == (2 if body is two_loops else 1)
    for loop in loops:
        assert (loop.count, loop.last, len(loop.passes)) == (E, False, 1)
        assert loop.passes[0].before == loop.passes[0].after == {}
        assert loop.location.startswith(test_purity.__file__.rsplit("/", 1)[0])
    assert not any(isinstance(a, Visited) for a in backend.assumptions)


# --- where each expert is traced, or none -------------------------------------------------------------------------
def one_expert_is_special(s, x, w, m, out, hit):
    for e in hit[:, 0]:
        s.add(x * 3 if e == 2 else x, w, m, out, e)
    return out


def even_experts(s, x, w, m, out, hit):
    for e in hit.flatten().tolist():
        if e % 2 == 0:
            s.add(x, w, m, out, e)
    return out


def among_some(s, x, w, m, out, hit):
    for e in hit.flatten().tolist():
        s.add(x * 3 if e in (0, 2) else x, w, m, out, e)
    return out


def looked_up(s, x, w, m, out, hit):
    scales = [1.0, 2.0, 3.0, 4.0]
    for e in hit.flatten().tolist():
        s.add(x * scales[e], w, m, out, e)
    return out


def looked_up_by_key(s, x, w, m, out, hit):
    scales = {0: 1.0, 2: 3.0}
    for e in hit.flatten().tolist():
        s.add(x * scales.get(e, 5.0), w, m, out, e)
    return out


def number_of_repeats(s, x, w, m, out, hit):
    for e in hit.flatten().tolist():
        y = x
        for _ in range(e):
            y = y + 1.0
        s.add(y, w, m, out, e)
    return out


def text(s, x, w, m, out, hit):
    for e in hit.flatten().tolist():
        s.add(x * len(f"{e * 7}"), w, m, out, e)
    return out


def name_of_a_row(s, x, w, m, out, hit):
    """transformers 5: switch_transformers.  Torch 2.11 makes the text without asking for the number."""
    for e in hit:
        k, t = torch.where(m[e].squeeze(0))
        expert = s.by_name[f"expert_{e[0]}"]
        out.index_add_(0, t, expert(x[t]) * w[t, k, None])
    return out


def identity(s, x, w, m, out, hit):
    for e in hit.flatten().tolist():
        s.add(x * 3 if e is True else x, w, m, out, e)
    return out


UNROLLED = [
    test_purity.functional_sum,
    one_expert_is_special,
    even_experts,
    among_some,
    looked_up,
    looked_up_by_key,
    number_of_repeats,
    text,
    name_of_a_row,
]


@pytest.mark.parametrize("body", UNROLLED, ids=lambda body: body.__name__)
def test_unrolled(body: Any) -> None:
    backend = rolled(body)
    assert not any(isinstance(a, Rolled) for a in backend.assumptions)
    assert any(isinstance(a, Visited) for a in backend.assumptions)
    assert len(backend.graphs) == 1


IMPURE = [
    test_purity.counter,
    test_purity.last_index,
    test_purity.attribute_in_callee,
    test_purity.append_in_callee,
    test_purity.dict_store,
    test_purity.iterator_advanced,
    test_purity.breaks,
    test_purity.random_number,
    test_purity.key_of_a_dict,
    test_purity.kind_of_the_index,
    test_purity.arithmetic_on_the_index,
    test_purity.text_of_the_index,
    test_purity.printed,
    test_purity.grad_mode_changed,
    test_purity.caught_outside,
    test_adversarial.how_many_hits,
    test_adversarial.is_hit,
    test_adversarial.last_of_the_list,
    test_adversarial.position_of_the_hit,
    test_adversarial.zipped_hits,
    test_adversarial.counter_over_the_list,
    identity,
]


@pytest.mark.parametrize("body", IMPURE, ids=lambda body: body.__name__)
def test_as_eager(body: Any) -> None:
    rolled(body)


class Stacked(Block):
    """transformers 5: one_hot with a class too many, for tokens of other devices."""

    def __init__(self, use_one_dim: bool) -> None:
        super().__init__()
        self.use_one_dim = use_one_dim

    def forward(self, x: torch.Tensor, dropped: torch.Tensor) -> torch.Tensor:
        weights, ids = torch.topk(F.softmax(self.router(x), dim=-1), 2, dim=-1)
        ids = torch.where(dropped, E, ids)
        mask = F.one_hot(ids, num_classes=E + 1).permute(2, 1, 0)
        out = torch.zeros_like(x)
        hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
        for e in hit.squeeze(-1) if self.use_one_dim else hit:
            if not self.use_one_dim:
                e = e[0]
            if e == E:
                continue
            k, t = torch.where(mask[e])
            out.index_add_(0, t, self.stacked_expert(e, x[t]) * weights[t, k, None])
        return out


@pytest.mark.parametrize("use_one_dim", [False, True])
def test_row_after_the_experts(use_one_dim: bool) -> None:
    block, backend, x = Stacked(use_one_dim), Roller(), torch.randn(5, H)
    with torch.no_grad(), installed(backend, speculate=True, roll=True):
        compiled = torch.compile(block, backend=backend)
        for dropped in (torch.zeros(5, 2, dtype=torch.bool), torch.rand(5, 2) > 0.5):
            torch.testing.assert_close(compiled(x, dropped), block(x, dropped))
    (loop,) = backend.assumptions
    assert isinstance(loop, Rolled)
    assert (loop.count, loop.last, len(loop.passes)) == (E, True, 2)
    assert loop.passes[1].nodes == []


def test_nested_tests_are_in_the_pass() -> None:
    loop, test = rolled(skip_if_empty).assumptions
    assert isinstance(loop, Rolled)
    assert isinstance(test, NonEmpty | Tested)
    assert set(test.passes[0].nodes) < set(loop.passes[0].nodes)


def test_the_graph_does_not_grow_with_the_experts() -> None:
    backend = rolled(test_purity.rows_indexed)
    once = sum("linear" in str(n.target) for n in backend.graphs[0].graph.nodes)
    assert once == 3  # router, gate and up, down


def test_declined_loops_are_unrolled_next() -> None:
    kinds: list[list[type]] = []

    class Declines(Believer):
        def __call__(self, gm: fx.GraphModule, inputs: list[Any], **options: Any) -> Any:
            kinds.append([type(a) for a in scope.assumptions()])
            if kinds[-1]:
                scope.decline(None)
            return gm.forward

    compile_and_compare(test_purity.rows_indexed, Declines(), stacked=True, roll=True)
    assert kinds[:2] == [[Rolled], [Visited]]
    assert not any(kinds[2:])


def test_an_unproved_graph_does_not_run() -> None:
    with pytest.raises(AssertionError, match="unproved"):
        compile_and_compare(test_purity.rows_indexed, Believer(), stacked=True, roll=True)


# --- experts that are modules -------------------------------------------------------------------------------------
class Layered(Block):
    """transformers 4: Qwen3MoeSparseMoeBlock.  ``body(block, e)`` gives the expert."""

    def __init__(self, pick: Any) -> None:
        super().__init__()
        self.pick = pick
        self.first = [self.experts[0]]
        self.drop = 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, mask = self.route(x)
        out = torch.zeros_like(x)
        for e in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
            k, t = torch.where(mask[e].squeeze(0))
            y = self.pick(self, e)(x[None, t].reshape(-1, H)) * weights[t, k, None]
            out.index_add_(0, t, y.to(x.dtype))
        return out


def by_row(block, e):
    return block.experts[e]


def by_element(block, e):
    return block.experts[e[0]]


def by_number(block, e):
    return block.experts[e.item()]


def layered(block: Layered, x: torch.Tensor, *more: Any) -> Roller:
    """Compile, compare, and again after each of ``more`` has changed the block."""
    backend = Roller()
    with torch.no_grad(), installed(backend, speculate=True, roll=True, roll_modules=True):
        compiled = torch.compile(block, backend=backend)
        torch.testing.assert_close(compiled(x), block(x))
        for change in more:
            change(block)
            torch.testing.assert_close(compiled(x), block(x))
    return backend


class Listed(Layered):
    """The same over ``tolist()``, with a row after the experts."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = torch.topk(F.softmax(self.router(x), dim=-1), 2, dim=-1)
        ids = torch.where(weights < 0.3, E, ids)
        mask = F.one_hot(ids, num_classes=E + 1).permute(2, 1, 0)
        out = torch.zeros_like(x)
        for e in torch.where(mask.sum(dim=(-1, -2)) > 0)[0].tolist():
            if e == E:
                continue
            k, t = torch.where(mask[e])
            out.index_add_(0, t, self.experts[e](x[t]) * weights[t, k, None])
        return out


def test_modules_by_a_list_of_numbers_with_a_row_after_them() -> None:
    (loop,) = layered(Listed(by_row), torch.randn(9, H)).assumptions
    assert isinstance(loop, RolledModules)
    assert (loop.count, loop.last, len(loop.passes), len(loop.experts)) == (E, True, 3, E)


def kinds(backend: Roller) -> list[str]:
    return [type(a).__name__ for a in backend.assumptions]


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("pick", [by_row, by_element, by_number], ids=lambda pick: pick.__name__)
def test_modules_two_passes(pick: Any, tokens: int) -> None:
    backend = layered(Layered(pick), torch.randn(tokens, H))
    (loop,) = backend.assumptions
    assert isinstance(loop, RolledModules)
    assert (len(loop.indices), len(loop.passes), len(loop.experts)) == (2, 2, E)
    assert [len(inputs) for inputs in loop.experts] == [3] * E
    assert len({node for inputs in loop.experts for node in inputs}) == 3 * E
    assert len(backend.graphs) == 1
    assert backend.reasons == []


def test_modules_are_unrolled_unless_asked_for() -> None:
    block, x, backend = Layered(by_row), torch.randn(3, H), Roller()
    with torch.no_grad(), installed(backend, speculate=True, roll=True):
        torch.testing.assert_close(torch.compile(block, backend=backend)(x), block(x))
    assert kinds(backend) == ["Visited"]


def replace_weight(block):
    block.experts[3].down.weight = torch.nn.Parameter(torch.randn(H, 16))


def change_weight(block):
    block.experts[3].down.weight.data.mul_(2)


def widen(block):
    block.experts[3].gate = torch.nn.Linear(H, 5, bias=False)
    block.experts[3].up = torch.nn.Linear(H, 5, bias=False)
    block.experts[3].down = torch.nn.Linear(5, H, bias=False)


def add_bias(block):
    block.experts[3].down = torch.nn.Linear(16, H)


def hook_one(block):
    block.experts[3].register_forward_hook(lambda module, args, out: out * 2)


def hook_inside(block):
    block.experts[3].down.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def other_forward(block):
    expert = block.experts[3]
    expert.forward = lambda x: expert.down(x.new_ones(x.shape[0], 16))


def other_class(block):
    class Doubling(type(block.experts[3])):
        def forward(self, x):
            return super().forward(x) * 2

    block.experts[3].__class__ = Doubling


def lora(block):
    """As peft does: the layer of one expert is wrapped."""

    class Lora(torch.nn.Module):
        def __init__(self, base: torch.nn.Linear) -> None:
            super().__init__()
            self.base = base
            self.a = torch.nn.Linear(base.in_features, 2, bias=False)
            self.b = torch.nn.Linear(2, base.out_features, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + self.b(self.a(x))

    block.experts[3].down = Lora(block.experts[3].down)


def swap(block):
    block.experts[2], block.experts[3] = block.experts[3], block.experts[2]


def fewer(block):
    block.experts[3] = block.experts[2]


CHANGES = [
    replace_weight,
    change_weight,
    widen,
    add_bias,
    hook_one,
    hook_inside,
    other_forward,
    other_class,
    lora,
    swap,
    fewer,
]
ALIKE = [replace_weight, change_weight, swap, fewer]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_an_expert_that_is_changed_later(change: Any) -> None:
    """Guards hold for every expert, not only for those that were traced."""
    if change is other_class and torch.__version__.startswith("2.11"):
        pytest.skip("this Dynamo does not see it for any module, whatever the backend")
    # Dynamo does not look for hooks that come later unless it is told to, for no module.
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
        backend = layered(Layered(by_row), torch.randn(9, H), change)
    assert kinds(backend)[0] == "RolledModules"
    if change not in ALIKE:
        assert len(backend.graphs) > 1
        assert "RolledModules" not in kinds(backend)[1:]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_an_expert_that_was_changed_before(change: Any) -> None:
    block = Layered(by_row)
    change(block)
    backend = layered(block, torch.randn(9, H))
    assert kinds(backend)[:1] == (["RolledModules"] if change in ALIKE else ["Visited"])


def reads_the_first_too(block, e):
    return lambda x: block.experts[e](x) + block.experts[0].down(block.experts[1].gate(x))


def reads_another_name_of_the_first(block, e):
    return lambda x: block.experts[e](x) + F.linear(x, block.first[0].gate.weight)[:, :H]


def reads_the_second_too(block, e):
    return lambda x: block.experts[e](x) + F.linear(x, block.experts[1].gate.weight)[:, :H]


def reads_the_next(block, e):
    return lambda x: block.experts[e](x) + block.experts[(int(e) + 1) % E](x)


def reads_a_scale(block, e):
    return lambda x: block.experts[e](x) * block.experts[e].scale


@pytest.mark.parametrize(
    "pick",
    [reads_the_first_too, reads_another_name_of_the_first, reads_the_second_too, reads_the_next],
    ids=lambda pick: pick.__name__,
)
def test_other_experts_in_the_body(pick: Any) -> None:
    backend = layered(Layered(pick), torch.randn(5, H))
    assert kinds(backend) == ["RolledModules" if pick is reads_the_second_too else "Visited"]


def test_a_number_of_the_expert() -> None:
    same, other = Layered(reads_a_scale), Layered(reads_a_scale)
    for e in range(E):
        same.experts[e].scale = 2.0
        other.experts[e].scale = float(e)
    x = torch.randn(5, H)

    def rescale(block: Layered) -> None:
        block.experts[3].scale = 3.0

    assert kinds(layered(same, x, rescale)) == ["RolledModules", "Visited"]
    torch._dynamo.reset()
    assert kinds(layered(other, x)) == ["Visited"]


def test_training_step_over_modules() -> None:
    block, x, backend = Layered(by_row), torch.randn(6, H), Roller()
    block(x).sum().backward()
    expected = {n: p.grad.clone() for n, p in block.named_parameters() if p.grad is not None}
    block.zero_grad()
    with installed(backend, speculate=True, roll=True, roll_modules=True):
        torch.compile(block, backend=backend)(x).sum().backward()
    assert kinds(backend) == ["RolledModules"]
    for name, grad in expected.items():
        torch.testing.assert_close(block.get_parameter(name).grad, grad)
