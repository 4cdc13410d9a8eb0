import threading

import pytest
import torch

from moe_inductor.kernels.pointer_table import PointerTables


def weights(n=3):
    return [torch.randn(2, 2) for _ in range(n)]


def test_holds_the_addresses_and_is_built_once():
    tables, tensors = PointerTables(), weights()
    table = tables.get(tensors)
    assert table.dtype == torch.int64
    assert table.tolist() == [t.data_ptr() for t in tensors]
    assert tables.get(list(tensors)) is table
    assert len(tables) == 1


def test_a_replaced_parameter_gets_another_table():
    tables, tensors = PointerTables(), weights()
    first = tables.get(tensors)
    replaced = [tensors[0], torch.randn(2, 2), tensors[2]]
    second = tables.get(replaced)
    assert second.tolist() == [t.data_ptr() for t in replaced]
    assert first.tolist() == [t.data_ptr() for t in tensors]
    tensors[1].data = torch.randn(2, 2)  # in place, the same Parameter object
    assert tables.get(tensors).tolist() == [t.data_ptr() for t in tensors]


def test_ragged_lists_are_refused():
    tables = PointerTables()
    with pytest.raises(ValueError, match=r"expert 2 \[3, 2\]"):
        tables.get([*weights(2), torch.randn(3, 2)])
    with pytest.raises(ValueError, match=r"float64"):
        tables.get([*weights(2), torch.randn(2, 2).double()])


def test_bounded():
    tables = PointerTables(max_tables=4)
    kept = [weights(1) for _ in range(50)]
    for tensors in kept:
        assert tables.get(tensors).tolist() == [tensors[0].data_ptr()]
    assert len(tables) <= 4


def test_order_matters():
    tables, tensors = PointerTables(), weights()
    assert tables.get(tensors[::-1]).tolist() == [t.data_ptr() for t in tensors[::-1]]


def test_threads():
    tables = PointerTables(max_tables=8)
    sets = [weights(2) for _ in range(16)]
    wrong = []

    def work():
        for _ in range(20):
            for tensors in sets:
                if tables.get(tensors).tolist() != [t.data_ptr() for t in tensors]:
                    wrong.append(tensors)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
