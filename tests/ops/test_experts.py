"""Forward of ``fused_experts`` on the CPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import (
    Inputs,
    assert_within_fp64_rule,
    reference_experts,
    reference_experts_fp64,
    storages,
    unit_scale_inputs,
)
from torch.utils._python_dispatch import TorchDispatchMode

from moe_inductor import ops
from moe_inductor.ops import cpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """New memory holds NaN, so that reading a row nobody wrote is an error on every run."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def call(data: Inputs, out_dtype=None, **change) -> torch.Tensor:
    data = data._replace(**change)
    return ops.fused_experts(
        data.hidden_states,
        data.topk_ids,
        data.topk_weights,
        [data.gate_up_proj],
        [],
        [data.down_proj],
        "silu",
        out_dtype or data.hidden_states.dtype,
    )


def check(data: Inputs, ours: torch.Tensor, what: str = "y") -> None:
    args = (
        data.hidden_states,
        data.topk_ids,
        data.topk_weights,
        data.gate_up_proj,
        [],
        data.down_proj,
    )
    eager = reference_experts(*args).to(ours.dtype)
    assert_within_fp64_rule(ours, eager, reference_experts_fp64(*args), what)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 7, 33, 70])
def test_against_fp64(dtype, tokens):
    data = unit_scale_inputs(tokens, 6, 2, 48, 40, dtype=dtype)
    ours = call(data)
    assert ours.dtype == dtype
    assert ours.is_contiguous()
    check(data, ours)


@pytest.mark.parametrize("intel", [True, False])
@pytest.mark.parametrize("tokens", [1, 3, 16])
@pytest.mark.parametrize("size", [40, 512])
def test_products_are_chosen_by_processor_and_size(size, tokens, intel, monkeypatch):
    """On an Intel processor torch.mm makes all of them; elsewhere oneDNN makes those with large weights."""
    calls = []
    linear = cpu._onednn_linear() or torch.nn.functional.linear
    monkeypatch.setattr(cpu, "_mkl_on_intel", lambda: intel)
    monkeypatch.setattr(
        cpu, "_onednn_linear", lambda: lambda *args: calls.append(args) or linear(*args)
    )
    data = unit_scale_inputs(tokens, 2, 1, size, size)
    check(data, call(data))
    few = 2 <= tokens <= 8  # two experts: at most 3 rows each, which take W @ x^T
    assert bool(calls) == (not intel and size == 512 and not few)


def test_large_weights_in_bf16():
    data = unit_scale_inputs(16, 2, 1, 512, 512, dtype=torch.bfloat16)
    check(data, call(data))


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixed_dtypes(dtype, weights_dtype, out_dtype):
    data = unit_scale_inputs(9, 4, 2, 32, 24, dtype=dtype, weights_dtype=weights_dtype)
    ours = call(data, out_dtype)
    assert ours.dtype == out_dtype
    check(data, ours)


@pytest.mark.parametrize("size", [1, 15, 17, 63, 65])
def test_odd_sizes(size):
    data = unit_scale_inputs(5, 3, 2, size, size + 2)
    check(data, call(data))


# 24 experts in bf16 take torch's own grouped product where the weights are stacked.
@pytest.mark.parametrize("experts", [5, 24])
@pytest.mark.parametrize("tokens", [1, 5, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_storage_does_not_change_the_result(tokens, dtype, experts):
    data = unit_scale_inputs(tokens, experts, 4, 32, 16, dtype=dtype)
    results = {
        name: ops.fused_experts(*data[:1], *data[2:4], *weights, "silu", dtype)
        for name, weights in storages(data).items()
    }
    for name, result in results.items():
        check(data, result, name)
    # The same matrices in the same order: the same bits.
    assert torch.equal(results["stacked"], results["per expert"])
    assert torch.equal(results["stacked"], results["per expert, own memory"])
    assert torch.equal(results["stacked, two"], results["per expert, two"])


class NoWeightCopies(TorchDispatchMode):
    """Fails on any op whose result is new memory of at least ``limit`` elements."""

    def __init__(self, limit: int, weights: list[torch.Tensor]) -> None:
        super().__init__()
        self.limit = limit
        self.owned = {weight.untyped_storage().data_ptr() for weight in weights}
        self.seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.seen += 1
                view = tensor.untyped_storage().data_ptr() in self.owned
                assert view or tensor.numel() < self.limit, f"{func} made {list(tensor.shape)}"
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 8, 40])
def test_no_weight_is_copied(tokens, dtype):
    # Few tokens and large experts: the smallest single expert matrix is larger than any activation.
    data = unit_scale_inputs(tokens, 4, 2, 128, 160, dtype=dtype)
    limit = data.down_proj[0].numel()
    assert 2 * tokens * 2 * 160 < 2 * limit
    for name, weights in storages(data).items():
        flat = [*weights[0], *weights[1], *weights[2]]
        with NoWeightCopies(limit if tokens < 40 else 2 * limit, flat) as mode:
            # Through the implementation, because a mode sees an op from outside only.
            ops.cpu.fused_experts(*data[:1], *data[2:4], *weights, "silu", dtype)
        assert mode.seen > 10, name


def test_no_tokens():
    for k in (1, 2):
        assert call(unit_scale_inputs(0, 4, k, 8, 8)).shape == (0, 8)
    assert call(unit_scale_inputs(8, 4, 2, 8, 8)).shape == (8, 8)


@pytest.mark.parametrize("tokens", [1, 6, 80])
def test_all_experts_for_every_token(tokens):
    data = unit_scale_inputs(tokens, 4, 4, 16, 8)
    check(data, call(data))


@pytest.mark.parametrize("expert", [0, 6])
@pytest.mark.parametrize("tokens", [1, 5, 90])
def test_all_tokens_to_one_expert(tokens, expert):
    data = unit_scale_inputs(tokens, 7, 1, 16, 8)
    data = data._replace(topk_ids=torch.full_like(data.topk_ids, expert))
    check(data, call(data))


@pytest.mark.parametrize("tokens", [1, 4, 50])
def test_one_expert_twice_in_a_row(tokens):
    data = unit_scale_inputs(tokens, 4, 3, 16, 8)
    data = data._replace(topk_ids=torch.full_like(data.topk_ids, 2))
    check(data, call(data))


@pytest.mark.parametrize("tokens", [5, 50])
def test_strides_and_offsets(tokens):
    data = unit_scale_inputs(tokens, 4, 2, 16, 8)
    expected = call(data)
    wide = torch.randn(tokens, 40)
    wide[:, 3:19] = data.hidden_states
    assert torch.equal(call(data, hidden_states=wide[:, 3:19]), expected)
    assert torch.equal(call(data, hidden_states=data.hidden_states.t().contiguous().t()), expected)
    ids = data.topk_ids.t().contiguous().t()
    weights = data.topk_weights.t().contiguous().t()
    assert torch.equal(call(data, topk_ids=ids, topk_weights=weights), expected)
    same = data.hidden_states[:1].expand(tokens, -1)
    changed = data._replace(hidden_states=same)
    check(changed, call(changed))


@pytest.mark.parametrize("tokens", [1, 5, 50])
def test_int32_ids(tokens):
    data = unit_scale_inputs(tokens, 4, 2, 16, 8)
    assert torch.equal(call(data, topk_ids=data.topk_ids.int()), call(data))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("tokens", [1, 6, 60])
def test_ids_out_of_range_contribute_nothing(tokens, dtype):
    data = unit_scale_inputs(tokens, 5, 3, 16, 8)
    ids, weights = data.topk_ids.clone(), data.topk_weights.clone()
    ids[:, 1] = torch.tensor([-1, 5, 1000, -7])[torch.arange(tokens) % 4]
    weights[:, 1] = float("nan")
    ours = call(data, topk_ids=ids.to(dtype), topk_weights=weights)
    kept = data._replace(topk_ids=ids[:, [0, 2]], topk_weights=weights[:, [0, 2]].contiguous())
    check(kept, ours)
    nothing = call(data, topk_ids=torch.full_like(ids, -1), topk_weights=weights)
    assert torch.equal(nothing, torch.zeros_like(nothing))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("tokens", [6, 60])
def test_a_bad_row_does_not_disturb_others(tokens, poison, dtype):
    data = unit_scale_inputs(tokens, 4, 2, 16, 8, dtype=dtype)
    x = data.hidden_states.clone()
    x[3] = poison
    ours, clean = call(data, hidden_states=x), call(data)
    rest = torch.arange(tokens) != 3
    assert ours[3].isnan().any()
    assert torch.equal(ours[rest], clean[rest])


def test_inputs_stay_and_runs_are_equal():
    data = unit_scale_inputs(40, 8, 2, 32, 16)
    before = [tensor.clone() for tensor in data]
    first = call(data)
    assert all(torch.equal(call(data), first) for _ in range(20))
    assert all(torch.equal(a, b) for a, b in zip(before, data, strict=True))
    assert all(first.untyped_storage().data_ptr() != t.untyped_storage().data_ptr() for t in data)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, 80),
    experts=st.sampled_from([1, 2, 3, 8, 20]),
    data=st.data(),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_random_sizes(tokens, experts, data, seed, dtype):
    k = data.draw(st.integers(1, experts))
    inputs = unit_scale_inputs(tokens, experts, k, 16, 16, dtype=dtype, seed=seed)
    # Any ids, not only those that a router gives: repeated ones and unused experts.
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, experts, (tokens, k), generator=generator)
    inputs = inputs._replace(topk_ids=ids)
    check(inputs, call(inputs))


GOOD = unit_scale_inputs(4, 3, 2, 16, 8)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"hidden_states": torch.randn(4, 15)}, ValueError, r"\[4, 15\]"),
        ({"hidden_states": torch.randn(5, 16)}, ValueError, r"\[5, 16\]"),
        ({"hidden_states": torch.randn(1, 4, 16)}, ValueError, r"\[1, 4, 16\]"),
        ({"hidden_states": torch.randn(4, 16).bfloat16()}, TypeError, "bfloat16"),
        ({"hidden_states": torch.ones(4, 16, dtype=torch.int64)}, TypeError, "int64"),
        ({"topk_ids": torch.zeros(4, 3, dtype=torch.int64)}, ValueError, r"\[4, 3\]"),
        ({"topk_ids": torch.zeros(4, 2)}, TypeError, "float32"),
        ({"topk_ids": torch.zeros(8, dtype=torch.int64)}, ValueError, r"\[8\]"),
        ({"topk_weights": torch.ones(4, 2, dtype=torch.int64)}, TypeError, "int64"),
        ({"down_proj": torch.randn(3, 16, 9)}, ValueError, r"\[3, 16, 9\]"),
        ({"down_proj": torch.randn(2, 16, 8)}, ValueError, r"\[2, 16, 8\]"),
        ({"gate_up_proj": torch.randn(3, 15, 16)}, ValueError, r"\[3, 15, 16\]"),
        ({"gate_up_proj": torch.randn(16, 16)}, ValueError, r"\[16, 16\]"),
    ],
)
def test_wrong_arguments(change, error, words):
    with pytest.raises(error, match=f"fused_experts: .*{words}"):
        call(GOOD, **change)


def test_wrong_lists():
    x, _, ids, weights, gate_up, down = GOOD
    gate_up, down = list(gate_up), list(down)
    with pytest.raises(ValueError, match="2 down_proj"):
        ops.fused_experts(x, ids, weights, gate_up, [], down[:2], "silu", x.dtype)
    with pytest.raises(ValueError, match="must not be empty"):
        ops.fused_experts(x, ids, weights, [], [], [], "silu", x.dtype)
    with pytest.raises(ValueError, match=r"activation: .*mish"):
        ops.fused_experts(x, ids, weights, gate_up, [], down, "mish(g)", x.dtype)
    wrong = [*gate_up[:2], torch.randn(18, 16)]
    with pytest.raises(ValueError, match=r"of expert 2 is \[18, 16\]"):
        ops.fused_experts(x, torch.full_like(ids, 2), weights, wrong, [], down, "silu", x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_invariant(dtype):
    """Sizes at which BLAS sums in another order for one row than for many."""
    data = unit_scale_inputs(70, 4, 2, 96, 160, dtype=dtype)
    args = ([data.gate_up_proj], [], [data.down_proj], "silu", dtype)

    def run(rows: slice) -> torch.Tensor:
        few = (data.hidden_states[rows], data.topk_ids[rows], data.topk_weights[rows])
        return ops.fused_experts(*few, *args, batch_invariant=True)

    whole = run(slice(None))
    check(data, whole)
    for first, count in ((0, 1), (5, 2), (11, 9), (20, 50)):
        rows = slice(first, first + count)
        assert torch.equal(run(rows), whole[rows])
