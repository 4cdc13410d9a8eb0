"""Pieces that several kernels share: the activation, the order of tiles, an expert's base address, the launch.

Vocabulary of this folder.  ``T`` tokens, ``E`` experts, ``k`` experts per token, ``H`` hidden size, ``I``
intermediate size.  A *slot* is one (token, choice) pair, numbered ``token * k + choice``; there are ``T * k``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

# Activations by name.  ``activate_gate`` is the only place that knows what a name means.
ACTIVATIONS = ("silu",)


@triton.jit
def activate_gate(gate, ACTIVATION: tl.constexpr):
    """``act(gate)`` for an fp32 tile."""
    tl.static_assert(ACTIVATION == "silu", "unknown activation")
    return gate / (1.0 + tl.exp(-gate))


@triton.jit
def tile_order(tile, num_m, num_n, GROUP_M: tl.constexpr):
    """Map a linear tile number to ``(m, n)``, walking GROUP_M row blocks per column so that weights stay in L2."""
    tiles_per_group = GROUP_M * num_n
    first_m = (tile // tiles_per_group) * GROUP_M
    group_size = min(num_m - first_m, GROUP_M)
    within = tile % tiles_per_group
    return first_m + within % group_size, within // group_size


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
        address = tl.load(weight_ptr + expert).to(tl.pointer_type(ELEMENT))
        return tl.multiple_of(address, ALIGNMENT)
    else:
        return weight_ptr + expert.to(tl.int64) * stride_expert


def _allocate(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


def allow_device_descriptors() -> None:
    """Call before launching a kernel that makes TMA descriptors: Triton asks this allocator where to put them.

    The setting belongs to the current context (thread), so it is made for every launch; it costs 0.1 us.
    """
    triton.set_allocator(_allocate)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Launch a Triton kernel.  The one place to change when a cheaper launcher than Triton's JIT is used."""
    kernel[grid](*args, **meta)
