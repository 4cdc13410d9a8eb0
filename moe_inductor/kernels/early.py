"""Starting a kernel while the one before it still runs (programmatic dependent launch, sm_90 and later).

A launch costs 1 to 2 us of an idle GPU: the next kernel's programs are placed only when the last one of the kernel
before is through.  With an early start they are placed as soon as all programs of that kernel have begun, and wait in
``begin`` for its end.  What may be done before: reading what is older than the kernel before, and prefetching weights.

Why this is safe.  Each kernel waits first and lets the next start only after that.  So when a program begins, every
kernel but the one before has ended and its writes can be seen; after the wait the same holds for that one.  The first
kernel of a chain starts as launches do by themselves, after everything before it, and so does whatever follows a chain.
Source: CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization".
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def begin(EARLY):
    """Wait for the kernel before this one.  Nothing, without early starts."""
    if EARLY:
        gdc_wait()


@triton.jit
def next_may_begin(EARLY):
    """Let the next kernel start when all programs have come here or have ended.  Only after ``begin``."""
    if EARLY:
        gdc_launch_dependents()


@triton.jit
def prefetch(pointers):
    """Ask for these cache lines in L2.  Nobody waits for them; every address must be valid."""
    tl.inline_asm_elementwise(
        "mov.b32 $0, 0; prefetch.global.L2 [$1];",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


def starts_early(tensor: torch.Tensor) -> bool:
    """Do kernels on this tensor's GPU start early?"""
    return tensor.is_cuda and _supported(tensor.get_device())


@functools.cache
def _supported(device: int) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)
