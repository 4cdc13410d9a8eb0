"""Which kernels run, and with which tiles.  Everything is decided from sizes on the host: no sync, no autotuning.

Regimes:
* decode: one GEMV per slot (decode.py), while hardly any expert is hit twice;
* grouped: align + two grouped GEMMs + combine.  BLOCK_M follows the mean number of tokens per expert, since
  every expert's rows are padded to it; up to a few hundred tokens the GEMMs only stream weights, later they are
  bound by arithmetic.

Tiles were measured on an H200 (docs/performance.md).  Other GPUs get tiles that fit in 99 KB of shared memory.
"""

from __future__ import annotations

import dataclasses

import torch

# Reading this much costs about as much as the two launches that decode saves (3.5 us on an H200).
DECODE_REPEATED_BYTES = 16e6
# So many programs of a GEMV keep an H200's memory busy.
DECODE_PROGRAMS = 256
# Rows per expert.  Up to SOME_ROWS they fit in a tile of 64, on the average; from there on an early start costs the
# GEMMs more than it gains.  Below FEW_ROWS reading the weights is the cost, and small experts are better off with
# tiles of 64 too.  Up to MANY_ROWS it pays to fill up gate_up's last tiles with down's (``overlap.py``).
SOME_ROWS, FEW_ROWS, MANY_ROWS = 48, 96, 160
# Above that, it pays while there are few tiles of gate/up, and what all programs read of the weights of down, of so
# many in-features, stays in L2 though they are not in step.
FEW_TILES, DEEP_IN_L2 = 16 * 132, 4096
# H * I of an expert: OLMoE's 2.1e6; gpt-oss's 8.3e6, DeepSeek-V3's 14.7e6; Llama-4-Scout's 42e6, Mixtral's 59e6.
SMALL_EXPERT, LARGE_EXPERT = 5e6, 2e7
# Rows per expert from which on a tile of 64 rows is better off with 128 columns of gate and of up than with 64: of
# small, of middling and of large experts.
WIDE_FROM = 16, 28, 40
# In-features from which a small tile of the down GEMM is deeper, where it is read by pointers.
DEEP = 4096
# What one tile for every T is chosen for: rows per expert.
MIDDLE_ROWS = 32
# The router's product row by row: how large it may be before a library's GEMM is as fast (each program reads its
# expert's row again for other tokens), and what one program has in registers.
MAX_ROW_PRODUCTS, ROW_BYTES = 12e6, 2**14
# In tiles: from how many tokens, up to how many, and up to what size it was faster than the other ways; how many
# programs fill a GPU, and how few do not.
MIN_TILE_TOKENS, MAX_TILE_TOKENS, MAX_TILE_PRODUCTS = 8, 1024, 1e9
ROUTER_PROGRAMS, FEW_ROUTER_PROGRAMS = 128, 48


@dataclasses.dataclass(frozen=True)
class GemmConfig:
    """Tiles of one grouped GEMM.  ``block_n`` counts columns of gate and of up each, in the gate/up GEMM.

    weights_by_tma: read the weights through a host TMA descriptor (needs ``Projection.tma_ready``).
    group_m: so many row blocks are walked per column of the weights.  Where an expert's two blocks fall into two
        groups, its weights are read twice: rare in groups of 8, where there are few experts.  In groups of 1 all of
        an expert's columns are walked before the next one's.
    persistent: one program per multiprocessor walks the tiles, in one flattened loop.
    early: start before the kernel before has ended, and let the next one do so (``early.py``; a pair that overlaps
        has its own rule for what happens between the two).
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int = 1
    num_warps: int = 4
    num_stages: int = 3
    weights_by_tma: bool = False
    persistent: bool = False
    early: bool = True
    precision: str = "ieee"  # of fp32 dots; plain tf32 would miss the accuracy contract


@dataclasses.dataclass(frozen=True)
class GemvConfig:
    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 2


@dataclasses.dataclass(frozen=True)
class DecodePlan:
    gate_up: GemvConfig
    down: GemvConfig


@dataclasses.dataclass(frozen=True)
class GroupedPlan:
    """Both GEMMs read rows padded to the same BLOCK_M.

    overlap: down runs beside the last tiles of gate_up (``overlap.py``).
    """

    gate_up: GemmConfig
    down: GemmConfig
    overlap: bool = False

    def __post_init__(self) -> None:
        if self.gate_up.block_m != self.down.block_m:
            raise ValueError("gate_up and down must use one BLOCK_M")
        if self.overlap and not (self.gate_up.weights_by_tma and self.down.weights_by_tma):
            raise ValueError("gate_up and down overlap only where their weights come by TMA")


Plan = DecodePlan | GroupedPlan


@dataclasses.dataclass(frozen=True)
class RouterRows:
    """The router's product, a program per expert's row: tokens, and elements of their rows, that it has at a time."""

    block_t: int
    block_h: int


@dataclasses.dataclass(frozen=True)
class RouterTiles:
    """The router's product on tensor cores, H in ``pieces``, which the routing kernel adds up.

    A piece is whole blocks of ``block_h``, so there are fewer pieces where H has not as many blocks.
    """

    block_t: int
    block_e: int
    pieces: int
    block_h: int = 128
    num_stages: int = 3


@dataclasses.dataclass(frozen=True)
class Problem:
    """Everything a plan may depend on.

    unit_stride: the input dimension of every weight is contiguous.
    gate_up_tma, down_tma: the weights' layout allows TMA descriptors.
    one_product: gate and up come as one tile by TMA, and one product makes both.
    batch_invariant: the bits of a token's output must not depend on which other tokens there are.
    """

    T: int
    E: int
    k: int
    H: int
    I: int
    dtype: torch.dtype
    capability: tuple[int, int]
    unit_stride: bool = True
    gate_up_tma: bool = False
    down_tma: bool = False
    one_product: bool = True
    batch_invariant: bool = False

    @property
    def slots(self) -> int:
        return self.T * self.k

    @property
    def has_large_shared_memory(self) -> bool:
        return self.capability[0] in (9, 10)  # 227 KB and TMA; others have 99 to 163 KB


def choose_plan(problem: Problem) -> Plan:
    if problem.batch_invariant:
        problem = _same_sums(problem)
    elif _few_experts_hit_twice(problem):
        return _decode_plan(problem)
    block_m = _block_m(problem)
    if problem.dtype == torch.float32:
        gemm = GemmConfig(min(block_m, 64), 32, 32, group_m=4, num_warps=4, num_stages=2)
        return GroupedPlan(gemm, gemm)
    if not problem.has_large_shared_memory:
        return _portable_plan(block_m)
    return GroupedPlan(
        _hopper_gate_up(problem, block_m), _hopper_down(problem, block_m), _overlap(problem)
    )


def router_plan(T: int, E: int, H: int, dtype: torch.dtype) -> RouterRows | RouterTiles | None:
    """How the router's product is made; None where a library's GEMM is as fast."""
    if dtype.itemsize == 2 and MIN_TILE_TOKENS <= T <= MAX_TILE_TOKENS:
        tiles, programs = _router_tiles(T, E, H)
        if programs >= FEW_ROUTER_PROGRAMS and T * E * H <= MAX_TILE_PRODUCTS:
            return tiles
    if T * E * H > MAX_ROW_PRODUCTS:
        return None
    block_t = min(1 << (T - 1).bit_length(), 4)
    elements = ROW_BYTES // dtype.itemsize // block_t
    return RouterRows(block_t, min(1 << (H - 1).bit_length(), elements))


def _router_tiles(T: int, E: int, H: int) -> tuple[RouterTiles, int]:
    """The smallest tiles, and with them the most pieces of H, that do not make too many programs; and how many."""
    block_t, block_e, block_h = 16, 16, 128
    blocks = -(-H // block_h)

    def whole(pieces: int) -> int:
        """At most so many pieces, each of as many whole blocks."""
        return -(-blocks // -(-blocks // pieces))

    def programs() -> int:
        return -(-T // block_t) * -(-E // block_e) * pieces

    pieces = whole(16)
    # Larger tiles read less: first of the weights, then of the tokens.  A piece more is read again by the routing.
    while programs() > ROUTER_PROGRAMS and block_t < min(64, T):
        block_t *= 2
    while programs() > ROUTER_PROGRAMS and block_e < min(32, E):
        block_e *= 2
    while programs() > ROUTER_PROGRAMS and pieces > 4:
        pieces = whole(max(4, pieces // 2))
    while programs() > ROUTER_PROGRAMS and block_e < min(64, E):
        block_e *= 2
    stages = 2 if 2 * pieces >= blocks else 3
    return RouterTiles(block_t, block_e, pieces, block_h, stages), programs()


def _same_sums(problem: Problem) -> Problem:
    """The problem whose plan is used for every T of a batch-invariant call.

    The GEMMs sum over k sixteen at a time and in order, whatever the tile (plain FMAs in fp32: one at a time), so all
    of their tiles give the same bits.  The GEMV kernels do not, and are left out.  Seen with every tile on an H100
    (tests/gpu/test_batch_invariant.py); where tensor cores may be made otherwise, one tile serves every T.
    """
    if problem.capability[0] in (8, 9) or problem.dtype == torch.float32:
        return problem
    return dataclasses.replace(problem, T=max(1, MIDDLE_ROWS * problem.E // problem.k))


def _few_experts_hit_twice(problem: Problem) -> bool:
    """Is what decode reads twice (experts that two tokens share) cheaper than align and combine?"""
    pairs_of_tokens = problem.T * (problem.T - 1) / 2
    repeats = pairs_of_tokens * problem.k**2 / problem.E  # expected, for even routing
    expert_bytes = 3 * problem.H * problem.I * problem.dtype.itemsize
    return repeats * expert_bytes <= DECODE_REPEATED_BYTES


def _decode_plan(problem: Problem) -> DecodePlan:
    if not problem.unit_stride:
        return DecodePlan(_transposed_gate_up(problem), _transposed_down(problem))
    # The down tile holds all experts of a token (up to 8): the more there are, the fewer rows of each.
    down = {1: (8, 512), 2: (4, 256), 3: (2, 512), 4: (2, 512)}.get(problem.k, (1, 256))
    if problem.k > 4 and problem.T == 1 and problem.I < 2048:
        down = (4, 128)
    return DecodePlan(
        GemvConfig(block_n=8, block_k=512, num_warps=4, num_stages=3),
        GemvConfig(*down, num_warps=4, num_stages=3),
    )


def _transposed_gate_up(problem: Problem) -> GemvConfig:
    """Stored ``[in, out]``, neighbouring columns are neighbours in memory: as many as leave programs for every
    multiprocessor; of interleaved pairs half as many are as long."""
    for columns, block_k in ((64, 64), (32, 128)):
        programs = problem.slots * problem.I // columns
        if programs >= DECODE_PROGRAMS and not (problem.one_product and columns == 64):
            return GemvConfig(columns, block_k, num_warps=4, num_stages=3)
    return GemvConfig(16, 128, num_warps=2, num_stages=4)


def _transposed_down(problem: Problem) -> GemvConfig:
    if problem.k > 4:
        small = GemvConfig(16, 32, num_warps=2, num_stages=4)
        return small if problem.H <= 4096 else GemvConfig(32, 16, num_warps=2, num_stages=4)
    experts = 1 << (problem.k - 1).bit_length()
    return GemvConfig(32, 512 // experts, num_warps=8, num_stages=3)


def _rows_per_expert(problem: Problem) -> float:
    return problem.slots / problem.E


def _block_m(problem: Problem) -> int:
    mean = _rows_per_expert(problem)
    if mean <= 4:
        return 16
    if mean < 16:
        return 32
    return 64 if mean < (FEW_ROWS if _is_small(problem) else SOME_ROWS) else 128


def _is_small(problem: Problem) -> bool:
    return problem.H * problem.I < SMALL_EXPERT


def _is_wide(problem: Problem) -> bool:
    """Has a tile of 64 rows 128 columns of gate and of up?"""
    size = problem.H * problem.I
    wide_from = WIDE_FROM[(size >= SMALL_EXPERT) + (size >= LARGE_EXPERT)]
    rows = _rows_per_expert(problem)
    return rows >= SOME_ROWS or (problem.gate_up_tma and problem.one_product and rows >= wide_from)


def _overlap(problem: Problem) -> bool:
    if problem.capability[0] != 9 or not (problem.gate_up_tma and problem.down_tma):
        return False  # not measured
    rows = _rows_per_expert(problem)
    return rows < SOME_ROWS or (
        not _is_small(problem) and (rows < MANY_ROWS or _has_few_tiles(problem))
    )


def _has_few_tiles(problem: Problem) -> bool:
    row_blocks = problem.slots / 128 + problem.E / 2
    return row_blocks * problem.I / 128 <= FEW_TILES and problem.I <= DEEP_IN_L2


def _portable_plan(block_m: int) -> GroupedPlan:
    warps = 8 if block_m == 128 else 4
    return GroupedPlan(
        GemmConfig(block_m, 64, 64, group_m=8, num_warps=warps, num_stages=2),
        GemmConfig(block_m, 128, 64, group_m=8, num_warps=warps, num_stages=2),
    )


def _hopper_gate_up(problem: Problem, block_m: int) -> GemmConfig:
    tma = problem.gate_up_tma
    if not tma and not problem.unit_stride:
        return _portable_plan(block_m).gate_up
    transposed = tma and not problem.unit_stride
    if block_m == 16 and transposed and not problem.one_product:
        # Columns are brought a cache line at a time, of gate and of up.
        return GemmConfig(16, 64, 128, num_warps=4, num_stages=3, weights_by_tma=True)
    if block_m == 16:
        k, stages = (256, 3) if tma else (128, 4)
        return GemmConfig(16, 32, k, num_warps=4, num_stages=stages, weights_by_tma=tma)
    if block_m == 32 and transposed:  # twice as deep, it would spill
        return GemmConfig(32, 64, 64, 4, 4, 6, weights_by_tma=True)
    if block_m == 32:
        return GemmConfig(32, 64, 128, 4, 4, 3, tma)
    # In a flattened loop, ptxas makes two products wait for each other (30 % slower).
    persistent = tma and problem.one_product
    rows = _rows_per_expert(problem)
    if block_m == 64 and _is_wide(problem):
        return GemmConfig(64, 128, 64, 8, 8, 4, tma, persistent, early=False)
    if block_m == 64:
        return GemmConfig(64, 64, 128 if tma else 64, 4, 4, 4, tma, persistent)
    if rows < FEW_ROWS and not (persistent and _overlap(problem)):
        return GemmConfig(128, 128, 64, 4, 8, 4, tma, early=False)
    return GemmConfig(128, 128, 64, 8, 8, 4, tma, persistent, early=False)


def _hopper_down(problem: Problem, block_m: int) -> GemmConfig:
    tma = problem.down_tma
    if not tma and not problem.unit_stride:
        return _portable_plan(block_m).down
    if block_m == 16 and not tma:
        k = 256 if problem.I >= DEEP else 128
        return GemmConfig(16, 64, k, num_warps=4, num_stages=4)
    if block_m == 16:
        return GemmConfig(16, 64, 256, num_warps=4, num_stages=3, weights_by_tma=True)
    if block_m == 32:
        return GemmConfig(32, 128, 128, 4, 4, 4 if tma else 3, tma, persistent=tma)
    rows, overlap = _rows_per_expert(problem), _overlap(problem)
    # Beside gate_up, programs of one tile each are dealt out as multiprocessors come free.
    persistent = tma and not overlap
    if block_m == 64 and rows >= SOME_ROWS:
        return GemmConfig(64, 128, 128, 8, 4, 4, tma, persistent, early=False)
    if block_m == 64 and _is_wide(problem):
        block_n, block_k = (256, 64) if _is_small(problem) else (128, 128)
        return GemmConfig(64, block_n, block_k, 8, 4, 4, tma, persistent, early=False)
    if block_m == 64:
        return GemmConfig(64, 128, 128, 1, 4, 4, tma, persistent)
    walks = rows >= 128 and _has_few_tiles(problem) if overlap else tma and rows >= FEW_ROWS
    return GemmConfig(128, 256, 64, 8, 8, 4 if tma else 3, tma, walks, early=False)
