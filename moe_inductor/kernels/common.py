"""Pieces that several kernels share: the order of tiles, an expert's base address, biases.

Vocabulary of this folder.  ``T`` tokens, ``E`` experts, ``k`` experts per token, ``H`` hidden size, ``I``
intermediate size.  A *slot* is one (token, choice) pair, numbered ``token * k + choice``; there are ``T * k``.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_order(tile, num_m, num_n, GROUP_M: tl.constexpr):
    """Map a linear tile number to ``(m, n)``, walking GROUP_M row blocks per column so that weights stay in L2."""
    tiles_per_group = GROUP_M * num_n
    first_m = (tile // tiles_per_group) * GROUP_M
    group_size = min(num_m - first_m, GROUP_M)
    within = tile % tiles_per_group
    return first_m + within % group_size, within // group_size


@triton.jit
def tiles_of_program(num_tiles, PERSISTENT: tl.constexpr):
    """First, last and step of the tile numbers that this program walks.

    Without PERSISTENT there is a program per possible tile, which walks one or none: a loop that the compiler can see
    the end of needs fewer registers.
    """
    first = tl.program_id(0)
    if PERSISTENT:
        return first, num_tiles, tl.num_programs(0)
    else:
        return first, min(first + 1, num_tiles), 1


@triton.jit
def expert_address(
    weight_ptr,
    expert,
    stride_expert,
    ELEMENT: tl.constexpr,
    FROM_TABLE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """Address of one expert's 2-D weight, from an int64 pointer table or inside a stacked tensor.

    ALIGNMENT (bytes) holds for every entry of the table; without it Triton would assume one element and
    fall back to narrow loads.  The expert offset is int64: E * 2I * H passes 2**31 for large models.
    """
    if FROM_TABLE:
        address = tl.load(weight_ptr + 2 * expert).to(tl.pointer_type(ELEMENT))
        return tl.multiple_of(address, ALIGNMENT)
    else:
        return weight_ptr + expert.to(tl.int64) * stride_expert


@triton.jit
def load_bias(bias_ptr, expert, rows, columns, used):
    """One expert's bias ``[E, rows]`` at ``columns``, as fp32."""
    offsets = expert.to(tl.int64) * rows + columns
    return tl.load(bias_ptr + offsets, mask=used, other=0.0).to(tl.float32)


@triton.jit
def load_biases(
    gate_bias_ptr, up_bias_ptr, expert, column, I, BLOCK_N: tl.constexpr, LAYOUT: tl.constexpr
):
    """Biases of BLOCK_N gate columns from ``column`` on, and of the up columns, from wherever ``LAYOUT`` has them."""
    columns = column + tl.arange(0, BLOCK_N)
    if LAYOUT == "interleaved":
        pairs = 2 * column + tl.arange(0, 2 * BLOCK_N)
        both = load_bias(gate_bias_ptr, expert, 2 * I, pairs, pairs < 2 * I)
        gate, up = tl.split(tl.reshape(both, (BLOCK_N, 2)))
    elif LAYOUT == "concatenated":
        gate = load_bias(gate_bias_ptr, expert, 2 * I, columns, columns < I)
        up = load_bias(gate_bias_ptr, expert, 2 * I, I + columns, columns < I)
    else:
        gate = load_bias(gate_bias_ptr, expert, I, columns, columns < I)
        up = gate
        if LAYOUT == "separate":
            up = load_bias(up_bias_ptr, expert, I, columns, columns < I)
    return gate, up
