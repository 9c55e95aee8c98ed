"""Tile shapes by architecture. Imports nothing of healpass.

A tile is tuning: it changes speed and never bits. What changes bits (K tile, chunk, pieces, keys
per block) is in `matmul.py` and `attention.py`, a function of sizes and dtypes alone. The shapes
come from ahead-of-time compiles: no spills, no serialised tensor-core chain (`python -m
tests.sass` prints the table). None was timed.

One choice serves every Triton that a supported torch requires. Triton 3.6 and 3.7 take more of
sm_100's tensor memory for attention than 3.9, and a kernel that wants more than there is (512
columns) does not start: where a tile of 64 rows did, it has fewer.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Shared memory that one block may use, by compute capability (CUDA C++ programming guide, table
#: of technical specifications). Other capabilities take the smallest.
SHARED_MEMORY = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}
SMALLEST_SHARED_MEMORY = 99
#: From sm_100 on FP32 operands get tiles with fewer rows than the 64 of a tcgen05 instruction.
#: Seen: Triton 3.6 compiles a dot of 64 rows to TF32 there, `input_precision="ieee"` or not.
FEW_FP32_ROWS = 32


@dataclass(frozen=True)
class Tile:
    """The tuning knobs of one kernel."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    group_m: int = 8

    @property
    def knobs(self) -> dict[str, int]:
        """As templates take them."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "GROUP_M": self.group_m,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }

    def gemm_bytes(self, block_k: int, planes_a: int, planes_b: int) -> int:
        """Shared memory of the pipelined 16-bit operand tiles.

        Args:
            block_k: Depth of a K tile, in elements.
            planes_a: 16-bit planes of A.
            planes_b: 16-bit planes of B.
        """
        return 2 * block_k * self.num_stages * (planes_a * self.block_m + planes_b * self.block_n)


def gemm_tiles(
    capability: int,
    m: int,
    n: int,
    planes: tuple[int, int],
    block_k: int,
    *,
    cut: bool,
    tma: bool = False,
) -> list[Tile]:
    """Tiles of the tensor-core kernel for about `m` x `n` outputs, best guess first.

    Args:
        capability: As 90 for 9.0.
        m: Rows, a hint.
        n: Columns, a hint.
        planes: 16-bit tiles of A and of B that one K tile needs (an operand cut in registers
            counts its stored width).
        block_k: Depth of a K tile.
        cut: Operands are cut into pieces in registers.
        tma: Tiles are fetched by descriptor, which leaves registers for a larger one.
    """
    small = [Tile(64, 64, 4, 3)]
    if capability >= 100:  # Triton 3.6 spills with 128 x 128, Triton 3.9 with a third stage
        tiles = [*([Tile(128, 128, 8, 2)] if tma else []), Tile(128, 64, 8, 2), *small]
    elif capability >= 90 and not cut:
        tiles = [Tile(128, 128, 8, 3), Tile(64, 128, 4, 3), *small]
    else:  # mma.sync, and operands cut in registers: larger tiles spill
        tiles = [Tile(128, 64, 8, 3), Tile(64, 128, 8, 3), Tile(64, 64, 8, 3)]
    # No tile larger than the result, but for the smallest.
    whole = [tile for tile in tiles if tile.block_m <= max(64, m) and tile.block_n <= max(64, n)]
    return [_fit(tile, capability, planes, block_k) for tile in whole]


def _fit(tile: Tile, capability: int, planes: tuple[int, int], block_k: int) -> Tile:
    """Fewer stages, until the tile fits into shared memory."""
    room = SHARED_MEMORY.get(capability, SMALLEST_SHARED_MEMORY) * 1024
    for stages in range(tile.num_stages, 1, -1):
        fitted = Tile(tile.block_m, tile.block_n, tile.num_warps, stages, tile.group_m)
        if fitted.gemm_bytes(block_k, *planes) <= room:
            return fitted
    return Tile(64, 64, 4, 2, tile.group_m)


def decode_tiles(capability: int, n: int, *, pieces_b: int, fma: bool) -> list[Tile]:
    """Tiles of the kernel for at most 16 rows: many small blocks, to keep many loads in flight.

    Args:
        capability: As 90 for 9.0.
        n: Columns, a hint.
        pieces_b: BF16 pieces of B.
        fma: FP32 multiply-adds instead of the tensor core.
    """
    if fma and capability >= 100:
        return [Tile(16, FEW_FP32_ROWS, 4, 3)]
    # Chains of sm_80 are half as long, and so are K tiles: more stages keep as much in flight.
    most, fewer = (4, 3) if fma or capability >= 90 else (7, 5)
    # On sm_100 the three pieces of an FP32 weight spill in four warps, under Triton 3.7.
    warps = 8 if 100 <= capability < 120 and pieces_b == 3 else 4
    tiles = [Tile(16, 64, warps, most), Tile(16, 64, warps, fewer), Tile(16, 128, warps, fewer)]
    return tiles if n > 64 else tiles[:2]


def layercast_tiles(capability: int, m: int, n: int) -> list[Tile]:
    """Tiles of the FP32 kernel for about `m` x `n` outputs.

    Args:
        capability: As 90 for 9.0.
        m: Rows, a hint.
        n: Columns, a hint.
    """
    if capability >= 100:
        return [Tile(FEW_FP32_ROWS, 128, 8, 3)] if n >= 128 else [Tile(FEW_FP32_ROWS, 32, 4, 3)]
    if min(m, n) < 64:
        return [Tile(32, 32, 4, 3)]
    return [Tile(128, 64, 8, 3), Tile(64, 64, 4, 3)][m <= 64 :]


@dataclass(frozen=True)
class AttentionTile:
    """The tuning knobs of an attention kernel; `block` counts the rows or keys of a program."""

    block: int
    num_warps: int
    num_stages: int

    def halved(self) -> AttentionTile:
        """With half the rows, where there is a second accumulator."""
        return AttentionTile(max(16, self.block // 2), self.num_warps, self.num_stages)


def attention_tiles(
    capability: int, head_block: int, digits: int, decodes: bool
) -> list[AttentionTile]:
    """Tiles of the attention kernel, best guess first.

    Args:
        capability: As 90 for 9.0.
        head_block: The larger padded head size.
        digits: Of Q and K; 0 for FP32 states.
        decodes: At most 16 rows.
    """
    blackwell = 100 <= capability < 120
    if digits == 0 and head_block > 128:  # one stage, or sm_86 has too little shared memory
        stages = 2 if blackwell and not decodes else 1
        return [AttentionTile(16 if decodes else 32, 8, stages)]
    if decodes:
        return [AttentionTile(16, 8, 2), AttentionTile(16, 8, 1)]
    if blackwell and head_block <= 128 and digits < 3:
        return [AttentionTile(64, 8 if digits else 4, 2)]
    if head_block > 128:
        return [AttentionTile(32, 8, 2), AttentionTile(32, 8, 1)]
    if 90 <= capability < 100:
        return [AttentionTile(128, 8, 2), AttentionTile(64, 4, 2)]
    if digits == 3:
        return [AttentionTile(32, 8, 2), AttentionTile(32, 8, 1)]
    return [AttentionTile(64, 8, 2), AttentionTile(64, 8, 1)]


def paged_tile(
    capability: int, head_block: int, digits: int, *, decodes: bool, layercast: bool
) -> AttentionTile:
    """The tile of attention over pages, which has two accumulators.

    Args:
        capability: As 90 for 9.0.
        head_block: The larger padded head size.
        digits: Of Q, K and V.
        decodes: Requests have few rows.
        layercast: P V is in FP32; more rows spill.
    """
    tile = attention_tiles(capability, head_block, digits, decodes)[0].halved()
    if layercast:
        return AttentionTile(16, tile.num_warps, 1)
    # On sm_100 a second stage spills.
    stages = 1 if 100 <= capability < 120 and not decodes else tile.num_stages
    return AttentionTile(tile.block, tile.num_warps, stages)


def attention_backward_tiles(
    capability: int, head_block: int, digits: int
) -> tuple[list[AttentionTile], list[AttentionTile]]:
    """Tiles of the backward kernels for Q and for K and V, best guess first.

    Args:
        capability: As 90 for 9.0.
        head_block: The larger padded head size.
        digits: Of Q and K; 0 for FP32 states.
    """
    blackwell, hopper = 100 <= capability < 120, 90 <= capability < 100
    if digits == 0 and head_block > 128:  # one stage, or sm_86 has too little shared memory
        return [AttentionTile(16, 8, 2 if blackwell else 1)], [AttentionTile(16, 8, 1)]
    if head_block > 128:  # with the fewest spills: under Triton 3.7 on sm_100 12 and 14, else none
        stages = 1 if hopper else 2 if blackwell else 3
        return [AttentionTile(16, 8, 2)], [AttentionTile(16, 8, stages)]
    if blackwell and head_block <= 64:
        return [AttentionTile(64, 4 if digits else 8, 1)], [AttentionTile(64, 8, 1)]
    if blackwell:
        rows, keys = (16 if digits == 2 else 64), (16 if digits else 32)
        return [AttentionTile(rows, 8, 1)], [AttentionTile(keys, 8, 1)]
    if hopper:
        rows = 64 if digits or head_block <= 64 else 32
        return [AttentionTile(rows, 8, 1)], [AttentionTile(64 if head_block <= 64 else 16, 8, 1)]
    return [AttentionTile(32, 8, 1)], [AttentionTile(32, 8, 1)]


def invariant_tiles(capability: int, pieces_b: int, *, fma: bool) -> list[Tile]:
    """Tiles of the decode kernel for many rows: three accumulators, and all is cut in registers.

    Args:
        capability: As 90 for 9.0.
        pieces_b: BF16 pieces of B.
        fma: FP32 multiply-adds instead of the tensor core.
    """
    small = Tile(16, 64, 4, 3)
    if fma:
        columns = FEW_FP32_ROWS if capability >= 100 else 64
        return [Tile(64, columns, 8, 2), Tile(16, columns, 4, 3)]
    if not 90 <= capability < 120:  # mma.sync keeps the pieces of both operands in registers
        return [small] if pieces_b == 2 else [Tile(32, 128, 8, 2), small]
    return [Tile(64, 64, 8, 2) if pieces_b == 3 else Tile(64, 128, 8, 2), small]
