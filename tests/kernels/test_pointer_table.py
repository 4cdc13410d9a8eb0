import threading

import pytest
import torch

from moe_inductor.kernels.pointer_table import MAX_PLACE, PointerTables, Span, _table_inside_graph


def weights(n=3):
    return [torch.randn(2, 2) for _ in range(n)]


def addresses(table):
    return table.addresses_and_places[:, 0].tolist()


def test_holds_the_addresses_and_is_built_once():
    tables, tensors = PointerTables(), weights()
    table = tables.get(tensors)
    assert table.addresses_and_places.dtype == torch.int64
    assert addresses(table) == [t.data_ptr() for t in tensors]
    assert tables.get(list(tensors)) is table
    assert len(tables) == 1


def test_a_replaced_parameter_gets_another_table():
    tables, tensors = PointerTables(), weights()
    first = tables.get(tensors)
    replaced = [tensors[0], torch.randn(2, 2), tensors[2]]
    second = tables.get(replaced)
    assert addresses(second) == [t.data_ptr() for t in replaced]
    assert addresses(first) == [t.data_ptr() for t in tensors]
    tensors[1].data = torch.randn(2, 2)  # in place, the same Parameter object
    assert addresses(tables.get(tensors)) == [t.data_ptr() for t in tensors]


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
        assert addresses(tables.get(tensors)) == [tensors[0].data_ptr()]
    assert len(tables) <= 4


def test_order_matters():
    tables, tensors = PointerTables(), weights()
    assert addresses(tables.get(tensors[::-1])) == [t.data_ptr() for t in tensors[::-1]]


def test_threads():
    tables = PointerTables(max_tables=8)
    sets = [weights(2) for _ in range(16)]
    wrong = []

    def work():
        for _ in range(20):
            for tensors in sets:
                if addresses(tables.get(tensors)) != [t.data_ptr() for t in tensors]:
                    wrong.append(tensors)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    ("distances", "step"),
    [
        ([0], 512),
        ([0, 512, 1536], 512),
        ([0, 512, 1040], 16),
        ([0, 8], 0),
        ([0, 512 * MAX_PLACE], 512),
        ([0, 512 * (MAX_PLACE + 1)], 0),
        ([0, 16, 16 * MAX_PLACE], 16),
        ([0, 16, 16 * (MAX_PLACE + 1)], 0),
    ],
)
def test_places_are_whole_and_small(distances, step):
    start = 2**46 + 16
    for turn in range(len(distances)):
        moved = [start + d for d in (*distances[turn:], *distances[:turn])]
        span = Span.of(moved)
        assert (span.lowest, span.step) == (moved.index(start), step)
        assert span.alignment == (16 if step else 8 if 8 in distances else 16)


def test_places_lead_to_the_tensors():
    memory = torch.arange(4096, dtype=torch.int64)
    tensors = [memory[start : start + 8] for start in (640, 64, 2048)]
    table, span = PointerTables().get(tensors)
    assert (span.lowest, span.step) == (1, 512)
    lowest = tensors[span.lowest].data_ptr()
    for tensor, place in zip(tensors, table[:, 1].tolist(), strict=True):
        assert lowest + place * span.step == tensor.data_ptr()


def test_a_table_made_inside_a_graph_holds_the_same():
    memory = torch.arange(4096, dtype=torch.int64)
    tensors = [memory[start : start + 8] for start in (640, 64, 2048)]
    table, _ = PointerTables().get(tensors)
    rows = [tuple(row) for row in table.tolist()]
    assert torch.equal(_table_inside_graph(torch.device("cpu"), rows), table)
