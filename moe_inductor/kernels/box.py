"""Weights by TMA: one descriptor, made on the host, for all experts of a projection, stacked or in a list.

A descriptor's first dimension is the expert.  Of a stacked tensor its stride is that of the experts.  The tensors of a
list lie anywhere, so there it is memory itself, from the lowest address on, in steps that all distances are multiples
of, and an expert's index is its place in the pointer table.  (Dimensions of a descriptor may overlap.)

Storage of a matrix ``[out, in]``, and the box that is brought at a time:

    rows       stride_in 1   [experts, out, in]        [1, columns, BLOCK_K]
    halves     stride_in 1   [experts, 2, out / 2, in] [1, 2, columns / 2, BLOCK_K]
    transposed stride_out 1  [experts, in, out]        [1, BLOCK_K, columns]

Outside a matrix a box is filled with zeros.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .weights import Projection


def box_of(
    weight: Projection, columns: int, block_k: int, halves: bool = False
) -> TensorDescriptor:
    """The descriptor of a ``tma_ready`` projection, for boxes of ``columns`` out-features and ``block_k`` in-features.

    halves: the same columns of the first and of the second half of the out-features.
    """
    step = weight.step // weight.dtype.itemsize
    rows, depth = weight.out_features, weight.in_features
    if weight.transposed:
        shape, strides = [depth, rows], [weight.stride_in, 1]
        block = [block_k, columns]
    elif halves:
        shape = [2, rows // 2, depth]
        strides = [rows // 2 * weight.stride_out, weight.stride_out, 1]
        block = [2, columns // 2, block_k]
    else:
        shape, strides = [rows, depth], [weight.stride_out, 1]
        block = [columns, block_k]
    return TensorDescriptor(weight.base, [weight.places, *shape], [step, *strides], [1, *block])


@triton.jit
def expert_place(table_ptr, expert, FROM_TABLE: tl.constexpr):
    """An expert's index in a box."""
    if FROM_TABLE:
        return tl.load(table_ptr + 2 * expert + 1).to(tl.int32)
    else:
        return expert


@triton.jit
def load_columns(
    box, place, column, start, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """``[BLOCK_K, COLUMNS]`` of an expert's weight, in-features from ``start`` on."""
    if TRANSPOSED:
        return box.load([place, start, column]).reshape(BLOCK_K, COLUMNS)
    else:
        return box.load([place, column, start]).reshape(COLUMNS, BLOCK_K).T


@triton.jit
def load_halves(box, place, column, start, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr):
    """``[BLOCK_K, COLUMNS]``: ``COLUMNS / 2`` of the first half, then the same of the second."""
    return box.load([place, 0, column, start]).reshape(COLUMNS, BLOCK_K).T
