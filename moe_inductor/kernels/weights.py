"""One projection's weights as the kernels read them: a stacked tensor or a pointer table, with its strides.

The logical shape of a weight is always ``[out, in]``; a weight stored the other way arrives as a strided view.
Nothing here copies a weight matrix.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch

from moe_inductor.unit import Unit

from .pointer_table import MAX_PLACE, pointer_table


def _three(sizes: Sequence[int]) -> tuple[int, int, int]:
    expert, outer, inner = sizes
    return expert, outer, inner


def stacked_bias(biases: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Biases are small: a list of them is stacked, so that the kernels know one form."""
    if not biases:
        return None
    return biases[0].contiguous() if biases[0].dim() == 2 else torch.stack(list(biases))


class Listed(NamedTuple):
    """What a table does not show of a list.  step, alignment: see ``pointer_table.Span``; the rest of each tensor."""

    number: int
    step: int
    alignment: int
    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype


class Stored(NamedTuple):
    """What kernels read a projection's weights from: the stacked tensor, or the pointer table of a list.

    lowest: of a list, the tensor with the lowest address.
    """

    tensor: torch.Tensor
    lowest: torch.Tensor | None
    of_list: Listed | None

    @staticmethod
    def of(tensors: Sequence[torch.Tensor]) -> Stored:
        first = tensors[0]
        if first.dim() == 3:
            return Stored(first, None, None)
        strides = first.stride()
        if [tensor.stride() for tensor in tensors].count(strides) != len(tensors):
            raise ValueError("the weights of one projection differ in strides between experts")
        table, span = pointer_table(tensors)
        known = len(tensors), span.step, span.alignment, first.shape, strides, first.dtype
        return Stored(table, tensors[span.lowest], Listed(*known))


@dataclasses.dataclass(frozen=True)
class Projection:
    """storage: the ``[E, out, in]`` weight itself, or the int64 table of per-expert addresses and places.

    base, places, step: a TMA descriptor's first dimension, of which an expert is one index (of a list, its place):
        where it begins, its length, and its stride in bytes.
    alignment: bytes that every address of a table is a multiple of (16 for a stacked tensor, where it is not used).
    bias: ``[E, out]``, dense; None where there is none.
    interleaved: rows are gate, up, gate, up, ...
    """

    storage: torch.Tensor
    from_table: bool
    base: torch.Tensor
    places: int
    step: int
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
        tensor, lowest, listed = stored
        if listed is None or lowest is None:
            return Projection(
                tensor,
                False,
                tensor,
                tensor.shape[0],
                tensor.stride(0) * tensor.element_size(),
                *_three(tensor.shape),
                *_three(tensor.stride()),
                alignment=16,
                dtype=tensor.dtype,
                bias=bias,
                interleaved=interleaved,
            )
        return Projection(
            tensor,
            True,
            lowest,
            MAX_PLACE + 1,
            listed.step,
            *_three((listed.number, *listed.shape)),
            *_three((0, *listed.strides)),
            alignment=listed.alignment,
            dtype=listed.dtype,
            bias=bias,
            interleaved=interleaved,
        )

    @property
    def transposed(self) -> bool:
        """Is it stored ``[in, out]``?"""
        return self.stride_in != 1

    @property
    def tma_ready(self) -> bool:
        """Can TMA descriptors read it: one dim of a matrix contiguous, everything else 16-byte aligned."""
        if self.stride_in == 1:
            row = self.stride_out
        elif self.stride_out == 1:
            row = self.stride_in
        else:
            return False
        strides = row * self.dtype.itemsize, self.step
        regular = all(0 < stride < 2**40 and stride % 16 == 0 for stride in strides)
        return regular and self.base.data_ptr() % 16 == 0

    @property
    def gate_and_up(self) -> tuple[tuple[int, int, int], int]:
        """Strides of the gate rows alone, and the offset from a gate row to its up row, where both are in here."""
        if self.interleaved:
            return (self.stride_expert, 2 * self.stride_out, self.stride_in), self.stride_out
        return self.strides, self.out_features // 2 * self.stride_out

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


def has_one_product(layout: str, gate: Projection) -> bool:
    """Can a TMA box bring all of what one tile multiplies: the columns of gate and of up, or only gate's?"""
    return layout != "separate" and not _halves_of_columns(layout, gate)


def come_by_tma(layout: str, gate: Projection, up: Projection | None) -> bool:
    """Can TMA boxes bring gate and up?"""
    if up is not None and not (up.tma_ready and up.transposed == gate.transposed):
        return False
    # Where up begins inside a row, the innermost coordinate of a box, is a multiple of 16 bytes too.
    first_up = gate.out_features // 2 if _halves_of_columns(layout, gate) else 0
    return gate.tma_ready and first_up * gate.dtype.itemsize % 16 == 0


def _halves_of_columns(layout: str, gate: Projection) -> bool:
    return layout == "concatenated" and gate.transposed
