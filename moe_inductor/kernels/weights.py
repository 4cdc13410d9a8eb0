"""One projection's weights as the kernels read them: a stacked tensor or a pointer table, with its strides.

The logical shape of a weight is always ``[out, in]``; a weight stored the other way arrives as a strided view.
Nothing here copies a weight matrix.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch

from moe_inductor.unit import Unit

from .pointer_table import pointer_table


def _three(sizes: Sequence[int]) -> tuple[int, int, int]:
    expert, outer, inner = sizes
    return expert, outer, inner


def stacked_bias(biases: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Biases are small: a list of them is stacked, so that the kernels know one form."""
    if not biases:
        return None
    return biases[0].contiguous() if biases[0].dim() == 2 else torch.stack(list(biases))


class Stored(NamedTuple):
    """What kernels read a projection's weights from: the stacked tensor, or a pointer table.

    of_list: what its table does not show of a list: length, alignment of the addresses, and of each tensor the
    shape, the strides and the dtype.
    """

    tensor: torch.Tensor
    of_list: tuple[int, int, torch.Size, tuple[int, ...], torch.dtype] | None

    @staticmethod
    def of(tensors: Sequence[torch.Tensor]) -> Stored:
        first = tensors[0]
        if first.dim() == 3:
            return Stored(first, None)
        strides = first.stride()
        if [tensor.stride() for tensor in tensors].count(strides) != len(tensors):
            raise ValueError("the weights of one projection differ in strides between experts")
        addresses = [tensor.data_ptr() for tensor in tensors]
        aligned = functools.reduce(operator.or_, addresses) % 16 == 0
        alignment = 16 if aligned else first.element_size()
        table = pointer_table(tensors, addresses)
        return Stored(table, (len(tensors), alignment, first.shape, strides, first.dtype))


@dataclasses.dataclass(frozen=True)
class Projection:
    """storage: the ``[E, out, in]`` weight itself, or the int64 table of per-expert addresses.

    alignment: bytes that every table entry is a multiple of (16 for a stacked tensor, where it is not used).
    bias: ``[E, out]``, dense; None where there is none.
    interleaved: rows are gate, up, gate, up, ...
    """

    storage: torch.Tensor
    from_table: bool
    num_experts: int
    out_features: int
    in_features: int
    stride_expert: int
    stride_out: int
    stride_in: int
    alignment: int
    dtype: torch.dtype
    bias: torch.Tensor | None = None
    interleaved: bool = False

    @staticmethod
    def of(
        stored: Stored, bias: torch.Tensor | None = None, interleaved: bool = False
    ) -> Projection:
        tensor, of_list = stored
        if of_list is None:
            return Projection(
                tensor,
                False,
                *_three(tensor.shape),
                *_three(tensor.stride()),
                alignment=16,
                dtype=tensor.dtype,
                bias=bias,
                interleaved=interleaved,
            )
        number, alignment, shape, strides, dtype = of_list
        return Projection(
            tensor,
            True,
            *_three((number, *shape)),
            *_three((0, *strides)),
            alignment=alignment,
            dtype=dtype,
            bias=bias,
            interleaved=interleaved,
        )

    @property
    def tma_ready(self) -> bool:
        """Can TMA descriptors read it: last dim contiguous, everything else 16-byte aligned."""
        size = self.dtype.itemsize
        if self.stride_in != 1 or self.stride_out <= 0 or self.stride_out * size % 16 != 0:
            return False
        if self.from_table:
            return self.alignment == 16
        aligned = self.storage.data_ptr() % 16 == 0 and self.stride_expert * size % 16 == 0
        return aligned and self.stride_expert > 0

    @property
    def halves(self) -> tuple[tuple[int, int, int], int]:
        """Strides of the gate rows alone, and the offset from a gate row to its up row, where both are in here."""
        if self.interleaved:
            return (self.stride_expert, 2 * self.stride_out, self.stride_in), self.stride_out
        return (
            self.strides,
            self.out_features // 2 * self.stride_out,
        )  # not looked at without a gate

    @property
    def strides(self) -> tuple[int, int, int]:
        return self.stride_expert, self.stride_out, self.stride_in


def layout_of(gate: Projection, up: Projection | None, unit: Unit) -> str:
    """Where the kernels find gate and up: the values of their LAYOUT."""
    if up is not None:
        return "separate"
    if not unit.gated:
        return "plain"
    return "interleaved" if gate.interleaved else "concatenated"
