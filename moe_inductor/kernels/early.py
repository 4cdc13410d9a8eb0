"""Starting a kernel while the one before it still runs (programmatic dependent launch, sm_90 and later).

Between two kernels the GPU is idle for about a microsecond: the next one's programs are placed when the last program
of the kernel before is through.  With an early start they are placed when all of them have called ``next_may_begin``,
and wait in ``begin`` for its end.  At a kernel's beginning is the best moment for that call, except in the decode
kernels, all of whose programs run at once: what waits beside them is placed unevenly.

Why this is safe.  Each kernel waits first and lets the next start only after that.  So when a program begins, every
kernel but the one before has ended and its writes can be seen; after the wait the same holds for that one.  The first
kernel of a chain starts as launches do by themselves, after everything before it, and so does whatever follows a chain.
One kernel waits at its end instead: down beside gate_up (``overlap.py``).
Source: CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization".
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def begin(EARLY: tl.constexpr):
    """Wait for the kernel before this one.  Nothing, without early starts."""
    if EARLY:
        gdc_wait()


@triton.jit
def next_may_begin(EARLY: tl.constexpr):
    """Let the next kernel start when all programs have come here or have ended.  Only after ``begin``, but for
    ``overlap.py``."""
    if EARLY:
        gdc_launch_dependents()


def starts_early(tensor: torch.Tensor) -> bool:
    """Do kernels on this tensor's GPU start early?"""
    return tensor.is_cuda and _supported(tensor.get_device())


@functools.cache
def _supported(device: int) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)
