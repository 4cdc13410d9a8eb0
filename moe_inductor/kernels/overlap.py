"""Running ``down`` beside the last tiles of ``gate_up``, row block by row block.

While gate_up's last tiles are computed, the other multiprocessors have nothing to do: up to the time of a whole tile.
Started early (``early.py``), programs of down take their place, and each waits for the row block that it reads.

    array     shape       dtype  written by      read by
    finished  max_blocks  int32  align, gate_up  down

``align`` sets ``finished[m]`` to 0, each tile of gate_up adds 1 to its row block's when it is stored, and down reads
row block m of ``intermediate`` when all tiles have been counted.

Why nobody waits for ever: programs of down are placed only when every program of gate_up has been, so what is waited
for is running, whatever else the GPU does.  Where launches do not overlap, everything is finished when down starts.

Why what is read is what was written: the barrier puts a program's stores before its release, which down acquires.  TMA
reads on a path of its own, which the proxy fence orders after that.  What align wrote is put before the start of down
by the fence of ``before_overlap``.  Source: PTX ISA, "Memory Consistency Model" and "griddepcontrol".

Why combine may start beside down and wait for it alone: it touches nothing before its wait, and one program of down
waits for the end of gate_up before it ends.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .early import begin


@triton.jit
def before_overlap(EARLY: tl.constexpr):
    """In gate_up, before ``next_may_begin``: down shall see all that can be seen here.

    One program is enough, for down starts when all have called.
    """
    if EARLY and tl.program_id(0) == 0:
        tl.inline_asm_elementwise(
            "fence.acq_rel.gpu; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def after_overlap(EARLY: tl.constexpr):
    """At the end of down: what waits for it shall wait for gate_up too."""
    if tl.program_id(0) == tl.num_programs(0) - 1:
        begin(EARLY)


@triton.jit
def finish_tile(finished_ptr, m, EARLY: tl.constexpr):
    """All threads have stored their part of a tile of row block m."""
    if EARLY:
        # In one piece: of ``tl.debug_barrier`` and ``tl.atomic_add``, either ends the pipelining of a flattened loop.
        tl.inline_asm_elementwise(
            """{
            .reg .pred first;
            .reg .u32 thread;
            .reg .u64 address;
            mov.u32 thread, %tid.x;
            setp.eq.u32 first, thread, 0;
            mad.wide.s32 address, $2, 4, $1;
            bar.sync 0;
            @first red.release.gpu.global.add.s32 [address], 1;
            mov.u32 $0, 0;
            }""",
            "=r,l,r",
            [finished_ptr.to(tl.int64), m],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        tl.atomic_add(finished_ptr + m, 1)


@triton.jit
def wait_until_finished(finished_ptr, m, num_tiles, EARLY: tl.constexpr):
    """m, once all tiles of row block m are stored.  Loads whose addresses come from the result are made after that."""
    if EARLY:
        return tl.inline_asm_elementwise(
            """{
            .reg .pred wait;
            .reg .s32 finished;
            again:
            ld.acquire.gpu.global.s32 finished, [$1];
            setp.lt.s32 wait, finished, $2;
            @wait bra again;
            fence.proxy.async.global;
            mov.u32 $0, $3;
            }""",
            "=r,l,r,r",
            [(finished_ptr + m).to(tl.int64), num_tiles, m],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        return m
