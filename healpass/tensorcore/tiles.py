"""Operands and accumulators cut into tiles for `simulate`. Layer `tensorcore`.

Sixteen columns of the product are one tile, `[M, 16]`, and K goes in instructions of sixteen, so
the lengths of all inner loops are fixed. What an instruction reads of the right operand for a tile
is one block of 16 x 16, which stays in the first cache while all rows pass by.

Sizes 0 and 1 would each compile a program of their own. So every size that may vary is at least 2:
a single matrix is cut in two along its columns, and short ones are padded by zeros, which add
nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from healpass.tensorcore.rules import INSTRUCTION_K

#: Columns of a tile.
TILE_N = 16


@dataclass(frozen=True)
class Operand:
    """One piece by instruction, and what an instruction asks about the sizes of its elements.

    Attributes:
        values: An instruction's `[B, M, 16]` on the left, `[B, T, 16, 16]` on the right, in the
            type that the arithmetic adds in.
        sizes: As `values`; what they mean is the arithmetic's own affair.
    """

    values: tuple[Tensor, ...]
    sizes: tuple[Tensor, ...]


@dataclass(frozen=True)
class Grid:
    """How B products `[M, N]`, or one, lie in accumulators `[B, T, M, 16]`.

    Attributes:
        batch: How many products; None is one, whose columns are cut in two.
        m: Rows.
        n: Columns.
    """

    batch: int | None
    m: int
    n: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of an accumulator."""
        halves, count = (2, 2) if self.batch is None else (1, self.batch)
        return count, max(-(-self.n // (halves * TILE_N)), 2), max(self.m, 2), TILE_N

    def left(self, piece: Tensor) -> Tensor:
        """`[M, K]` or `[B, M, K]` to `[K / 16, B, M, 16]`, in the dtype of `piece`."""
        count, _, m, _ = self.shape
        rows = padded(piece, m, _whole(piece.shape[-1], INSTRUCTION_K))
        rows = rows.expand(count, *rows.shape[-2:])  # one matrix serves both halves of N
        return rows.unflatten(-1, (-1, INSTRUCTION_K)).permute(2, 0, 1, 3).contiguous()

    def right(self, piece: Tensor) -> Tensor:
        """`[K, N]` or `[B, K, N]` to `[K / 16, B, T, 16, 16]`, in the dtype of `piece`."""
        _, tiles, _, _ = self.shape
        k = _whole(piece.shape[-2], INSTRUCTION_K)
        if self.batch is None:
            cut = padded(piece, k, 2 * tiles * TILE_N).unflatten(0, (-1, INSTRUCTION_K))
            return cut.unflatten(-1, (2, tiles, TILE_N)).permute(0, 2, 3, 1, 4).contiguous()
        cut = padded(piece, k, tiles * TILE_N).unflatten(-2, (-1, INSTRUCTION_K))
        return cut.unflatten(-1, (tiles, TILE_N)).permute(1, 0, 3, 2, 4).contiguous()

    def product(self, accumulator: Tensor) -> Tensor:
        """`[B, T, M, 16]` to `[M, N]` or `[B, M, N]`."""
        if self.batch is None:
            return accumulator.permute(2, 0, 1, 3).flatten(1)[: self.m, : self.n]
        return accumulator.transpose(1, 2).flatten(2)[:, : self.m, : self.n]


def lane(a: Tensor, b: Tensor, i: int) -> tuple[Tensor, Tensor]:
    """The factors of product `i` of an instruction, to be broadcast over `[B, T, M, 16]`.

    Args:
        a: `[B, M, 16]`, an instruction's part of the left operand.
        b: `[B, T, 16, 16]`, of the right one.
        i: 0 to 15.
    """
    return a[:, None, :, i, None], b[:, :, i, None, :]


def fixed(*tensors: Tensor) -> None:
    """Tell a compiler that the last sizes are 16 whatever else varies."""
    for x in tensors:
        assert x.shape[-1] == TILE_N == INSTRUCTION_K


def _whole(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def padded(piece: Tensor, rows: int, columns: int) -> Tensor:
    """The last two dimensions filled up by zeros.

    Args:
        piece: `[..., M, N]` of any dtype.
        rows: At least M.
        columns: At least N.
    """
    if piece.shape[-2:] == (rows, columns):
        return piece
    result = piece.new_zeros((*piece.shape[:-2], rows, columns))
    result[..., : piece.shape[-2], : piece.shape[-1]] = piece
    return result
