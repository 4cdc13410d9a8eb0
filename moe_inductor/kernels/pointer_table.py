"""Tables of weight addresses, so that kernels can read a list of per-expert tensors without copying them.

    array   shape  dtype  written by       read by
    table   E, 2   int64  pointer_table()  gate_up, down (``expert_place``, ``expert_address``), decode

Of each expert: the address of its weight, and its *place*, how many steps that is behind the lowest address.  With
places one TMA descriptor reads all tensors of the list (``box.py``).

A table is cached under the addresses it holds, so a stale entry cannot be returned: a parameter that is
replaced, moved or resized has another address and gets another table.  Building one costs a small blocking
copy, once per parameter set.

CUDA graphs.  A graph replays with the table's own address.  A table that was handed out during a capture is
therefore kept for the life of the process.  Normally it exists by then, because graphs are captured after a
warm-up run.  If it does not, a copy from the host cannot be captured, so the table is written by one fill
kernel per number: correct, but 2 E more graph nodes; warm up first.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch

MAX_TABLES = 4096  # a table is a few KB; a 94-layer model with gate, up and down lists needs 282
# Bytes.  torch's allocator on a GPU gives multiples of 512, the driver of 256, and TMA needs 16.  Few values, so that
# the layers of a model run the same program (launch.py).
STEPS = (512, 256, 16)
MAX_PLACE = 2**31 - 2


class Span(NamedTuple):
    """Where the tensors of a list are in memory.

    lowest: index of the tensor with the lowest address.
    step: bytes; the largest of ``STEPS`` that every distance is a multiple of.  0 where there is none, or places
        would be too large for it.
    alignment: bytes, up to 16; every address is a multiple of it.
    """

    lowest: int
    step: int
    alignment: int

    @staticmethod
    def of(addresses: Sequence[int]) -> Span:
        lowest = min(addresses)
        furthest, common = max(addresses) - lowest, math.gcd(*(a - lowest for a in addresses))
        step = next((s for s in STEPS if common % s == 0 and furthest // s <= MAX_PLACE), 0)
        return Span(addresses.index(lowest), step, math.gcd(*addresses, 16))


class PointerTable(NamedTuple):
    """addresses_and_places: int64 ``[E, 2]``."""

    addresses_and_places: torch.Tensor
    span: Span


class PointerTables:
    def __init__(self, max_tables: int = MAX_TABLES) -> None:
        self._max_tables = max_tables
        self._tables: OrderedDict[tuple, PointerTable] = OrderedDict()
        self._pinned: dict[tuple, PointerTable] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._tables) + len(self._pinned)

    def get(self, tensors: Sequence[torch.Tensor]) -> PointerTable:
        """The table ``[len(tensors), 2]`` on their device, and where they lie.

        Raises:
            ValueError: they differ in shape, dtype or device (looked at when the table is built).
        """
        device = tensors[0].device
        key = (device, *[tensor.data_ptr() for tensor in tensors])
        pinned = self._pinned.get(key)
        if pinned is not None:
            return pinned
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        with self._lock:
            table = self._tables.get(key)
            if table is None:
                _check_alike(tensors)
                addresses = key[1:]
                span = Span.of(addresses)
                lowest = addresses[span.lowest]
                rows = [(a, (a - lowest) // span.step if span.step else 0) for a in addresses]
                if capturing:
                    return PointerTable(_table_inside_graph(device, rows), span)
                self._make_room(device)
                # A blocking copy on purpose: the table may be read next from any stream.
                table = PointerTable(torch.tensor(rows, dtype=torch.int64, device=device), span)
                self._tables[key] = table
            elif capturing:
                self._pinned[key] = self._tables.pop(key)
            else:
                self._tables.move_to_end(key)
        return table

    def _make_room(self, device: torch.device) -> None:
        if len(self._tables) < self._max_tables:
            return
        if device.type == "cuda":
            # Kernels on any stream may still read the tables that are dropped now.  Once per MAX_TABLES
            # parameter sets, outside any capture.
            torch.cuda.synchronize(device)
        for _ in range(max(1, self._max_tables // 2)):
            self._tables.popitem(last=False)


def _check_alike(tensors: Sequence[torch.Tensor]) -> None:
    first = tensors[0]
    for index, tensor in enumerate(tensors):
        if (tensor.shape, tensor.dtype, tensor.device) != (first.shape, first.dtype, first.device):
            raise ValueError(
                f"the weights of one projection differ between experts: expert 0 has {list(first.shape)} {first.dtype}"
                f" on {first.device}, expert {index} {list(tensor.shape)} {tensor.dtype} on {tensor.device}"
            )


def _table_inside_graph(device: torch.device, rows: Sequence[tuple[int, int]]) -> torch.Tensor:
    # Not cached: the memory belongs to the graph and holds the addresses only once the graph has run.
    table = torch.empty((len(rows), 2), dtype=torch.int64, device=device)
    for row, values in enumerate(rows):
        for column, value in enumerate(values):
            table[row, column].fill_(value)
    return table


_TABLES = PointerTables()


def pointer_table(tensors: Sequence[torch.Tensor]) -> PointerTable:
    return _TABLES.get(tensors)
