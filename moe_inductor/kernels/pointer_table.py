"""Tables of weight addresses, so that kernels can read a list of per-expert tensors without copying them.

    array   shape  dtype  written by       read by
    table   E      int64  pointer_table()  gate_up, down, decode (``expert_address``)

A table is cached under the addresses it holds, so a stale entry cannot be returned: a parameter that is
replaced, moved or resized has another address and gets another table.  Building one costs a small blocking
copy, once per parameter set.

CUDA graphs.  A graph replays with the table's own address.  A table that was handed out during a capture is
therefore kept for the life of the process.  Normally it exists by then, because graphs are captured after a
warm-up run.  If it does not, a copy from the host cannot be captured, so the addresses are written by one fill
kernel each: correct, but E more graph nodes; warm up first.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

import torch

MAX_TABLES = 4096  # a table is a few KB; a 94-layer model with gate, up and down lists needs 282


class PointerTables:
    def __init__(self, max_tables: int = MAX_TABLES) -> None:
        self._max_tables = max_tables
        self._tables: OrderedDict[tuple, torch.Tensor] = OrderedDict()
        self._pinned: dict[tuple, torch.Tensor] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._tables) + len(self._pinned)

    def get(
        self, tensors: Sequence[torch.Tensor], addresses: Sequence[int] | None = None
    ) -> torch.Tensor:
        """int64 ``[len(tensors)]`` on their device: the address of each tensor's first element.

        Raises:
            ValueError: they differ in shape, dtype or device (looked at when the table is built).
        """
        device = tensors[0].device
        key = (device, *(addresses or [tensor.data_ptr() for tensor in tensors]))
        pinned = self._pinned.get(key)
        if pinned is not None:
            return pinned
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        with self._lock:
            table = self._tables.get(key)
            if table is None:
                _check_alike(tensors)
                if capturing:
                    return _table_inside_graph(device, key[1:])
                self._make_room(device)
                # A blocking copy on purpose: the table may be read next from any stream.
                table = torch.tensor(key[1:], dtype=torch.int64, device=device)
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


def _table_inside_graph(device: torch.device, addresses: Sequence[int]) -> torch.Tensor:
    # Not cached: the memory belongs to the graph and holds the addresses only once the graph has run.
    table = torch.empty(len(addresses), dtype=torch.int64, device=device)
    for index, address in enumerate(addresses):
        table[index].fill_(address)
    return table


_TABLES = PointerTables()


def pointer_table(
    tensors: Sequence[torch.Tensor], addresses: Sequence[int] | None = None
) -> torch.Tensor:
    return _TABLES.get(tensors, addresses)
