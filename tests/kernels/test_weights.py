"""What the kernels know of how weights are stored."""

import pytest
import torch

pytest.importorskip("triton")

from moe_inductor.kernels.weights import Projection, Stored, come_by_tma, has_one_product

E, H, I = 3, 64, 40


def projection(rows, transposed=False, shift=0, columns=H, interleaved=False):
    memory = torch.empty(E * rows * columns + 8, dtype=torch.bfloat16)[shift:]
    weight = memory[: E * rows * columns].view(
        E, *((columns, rows) if transposed else (rows, columns))
    )
    return Projection.of(Stored.of([weight.mT if transposed else weight]), None, interleaved)


def test_gate_and_up_come_by_tma_if_both_do():
    fits, other, shifted = projection(I), projection(I, transposed=True), projection(I, shift=4)
    assert come_by_tma("separate", fits, fits)
    assert come_by_tma("separate", other, other)
    assert not come_by_tma("separate", fits, other)
    assert not come_by_tma("separate", fits, shifted)
    assert not come_by_tma("separate", shifted, fits)
    assert not come_by_tma("plain", projection(I, columns=H + 4), None)
    assert not come_by_tma("plain", projection(I + 4, transposed=True), None)


@pytest.mark.parametrize("half", [36, 40])
def test_up_begins_at_a_multiple_of_16_bytes(half):
    """Behind gate in a row of ``[in, out]``; nobody else begins inside a row."""
    assert come_by_tma("concatenated", projection(2 * half), None)
    assert come_by_tma("interleaved", projection(2 * half, True, interleaved=True), None)
    assert come_by_tma("concatenated", projection(2 * half, transposed=True), None) == (half == 40)


def test_what_one_product_makes():
    assert has_one_product("concatenated", projection(2 * I))
    assert has_one_product("interleaved", projection(2 * I, transposed=True))
    assert has_one_product("plain", projection(I, transposed=True))
    assert not has_one_product("concatenated", projection(2 * I, transposed=True))
    assert not has_one_product("separate", projection(I))
