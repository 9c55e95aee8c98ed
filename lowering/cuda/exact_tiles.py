"""Tile shapes of the kernels on digits, by architecture. Imports `tiles` and the scheme's record.

Tuning, all of it: sums of digits are exact, so that no shape here changes a bit. The shapes come
from ahead-of-time compiles (`python -m tests.sass`). None was timed.
"""

from __future__ import annotations

from dataclasses import dataclass

from healpass.lowering.cuda.tiles import SHARED_MEMORY, SMALLEST_SHARED_MEMORY, AttentionTile
from healpass.ops.products.exact import Scheme


@dataclass(frozen=True)
class ExactTile:
    """The tuning knobs of one kernel; `swap`: B is the left operand and is cut as it is read."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    swap: bool = False

    @property
    def knobs(self) -> dict[str, int]:
        """As the template takes them; `swap` is a choice of the lowering's."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "GROUP_M": self.group_m,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }

    def bytes(self, plan: Scheme) -> int:
        """Shared memory of the pipelined INT8 planes."""
        rows = plan.left * self.block_m + plan.right * self.block_n
        return rows * self.block_k * self.num_stages


def prefers_half(capability: int) -> bool:
    """Whether digits should go through the tensor core in FP16: the bits are the same.

    The data-centre chips after B200 (sm_100), from B300 (sm_103) on, have little INT8 left.
    """
    return 100 < capability < 120


def exact_tiles(
    capability: int, m: int, n: int, plan: Scheme, *, cuts: bool, groups: bool = False
) -> list[ExactTile]:
    """Tiles of the kernel for about `m` x `n` outputs, best guess first.

    Args:
        capability: As 90 for 9.0.
        m: Rows, a hint.
        n: Columns, a hint.
        plan: Digits of both operands.
        cuts: B is cut into digits as it is read.
        groups: Rows or terms are in groups; what is known of a group takes registers.
    """
    if cuts:
        rows = 16 if m <= 16 else 32
        tiles = [
            ExactTile(rows, 64, 64, 4, 4, swap=True),
            ExactTile(rows, 32, 64, 4, 4, swap=True),
        ]
        return tiles[1:] if groups and capability < 90 else tiles
    if groups:
        return [_fit(tile, capability, plan) for tile in _tiles_of_groups(capability, plan)]
    small = [ExactTile(64, 64, 64, 8, 3)]
    tiles = [ExactTile(128, 64, 64, 8, 4), *small]
    if prefers_half(capability):  # wider tiles and more stages spill
        tiles = [ExactTile(128, 32, 64, 8, 3), *small] if plan.right == 3 else small
    elif capability == 100 and plan.right == 3:  # wider tiles spill under Triton 3.7
        tiles = [ExactTile(128, 32, 64, 8, 3), ExactTile(64, 32, 64, 8, 3)]
    elif plan.right == 3 and not 90 <= capability < 120:
        tiles = small if plan.cut else [ExactTile(64, 32, 64, 4, 3)]  # five levels spill
    whole = [tile for tile in tiles if tile.block_m <= max(64, m) and tile.block_n <= max(64, n)]
    return [_fit(tile, capability, plan) for tile in whole]


def _tiles_of_groups(capability: int, plan: Scheme) -> list[ExactTile]:
    narrow = ExactTile(64, 32, 64, 8, 3)
    if prefers_half(capability):
        return [ExactTile(128, 32, 64, 8, 3), narrow]
    if plan.right == 3 and capability < 90:
        return [narrow]
    return [ExactTile(64, 64, 64, 8, 3), narrow]


def _fit(tile: ExactTile, capability: int, plan: Scheme) -> ExactTile:
    """Fewer stages, until the tile fits into shared memory."""
    room = SHARED_MEMORY.get(capability, SMALLEST_SHARED_MEMORY) * 1024
    while tile.bytes(plan) > room and tile.num_stages > 2:
        tile = ExactTile(
            tile.block_m, tile.block_n, tile.block_k, tile.num_warps, tile.num_stages - 1
        )
    return tile


def exact_attention_tiles(
    capability: int, head_block: int, digits: int, *, decodes: bool
) -> list[AttentionTile]:
    """Tiles of both kernels of exact attention, best guess first.

    Args:
        capability: As 90 for 9.0.
        head_block: The larger padded head size.
        digits: Of Q, K and V.
        decodes: At most 16 rows.
    """
    # (With 64 rows and heads of 128, Triton 3.9 compiles a trap stub for sm_100.)
    if head_block > 128 or (prefers_half(capability) and head_block > 64):
        return [AttentionTile(16, 8, 1)]
    if decodes:
        return [AttentionTile(16, 4, 2), AttentionTile(16, 4, 1)]
    # (With 64 rows on sm_100 Triton 3.7 spills.)
    if head_block > 64 or digits == 3 or 100 <= capability < 120:
        return [AttentionTile(32, 8, 2), AttentionTile(32, 8, 1)]
    return [AttentionTile(64, 8, 2), AttentionTile(64, 8, 1)]


def exact_paged_tile(
    capability: int, head_block: int, digits: int, *, decodes: bool
) -> AttentionTile:
    """The tile of both kernels of exact attention over pages.

    Args:
        capability: As 90 for 9.0.
        head_block: The larger padded head size.
        digits: Of Q, K and V.
        decodes: Requests have few rows.
    """
    if head_block > 128 or (prefers_half(capability) and head_block > 64):
        return AttentionTile(16, 8, 1)
    if decodes or (digits == 3 and head_block > 64):
        return AttentionTile(16, 8, 4 - digits)  # with the other number of stages one spills
    return AttentionTile(32, 8, 2)
