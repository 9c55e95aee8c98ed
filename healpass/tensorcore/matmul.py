"""What `heal` means by a matmul: pieces, their products, and who adds them. Layer `tensorcore`.

Operands decide the products: 16-bit x 16-bit is one, FP32 x 16-bit two, FP32 x FP32 three (low x
low is dropped). Low pieces come first in every chain, where the accumulator is still small and
truncation costs nothing; a chain ends after four additions of the hardware and is added to FP32
registers (`arithmetic.promotion`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from healpass.arithmetic.bits import exponent, times_power_of_two
from healpass.arithmetic.pieces import Pieces, pack_fp16, split_fp16
from healpass.arithmetic.promotion import TILE_K
from healpass.tensorcore.rules import RULES, Schedule
from healpass.tensorcore.simulate import simulate_matmul

#: FP32 additions rounded to nearest, 64 of K at a time: a tensor core with an ideal accumulator.
IDEAL = "fp32"


@dataclass(frozen=True)
class Accumulation:
    """Who adds the products, and in which order.

    Attributes:
        rule: `fp32` (an ideal accumulator, torch's own FP32 matmul per block) or a name in
            `RULES`.
        order: Seed of another order of the K tiles.
        split_k: Parts of K that are summed apart.
        promote_every: K of a chain; by default what the rule asks for, None is one over all of K.

    Raises:
        ValueError: The rule is unknown.
    """

    rule: str = IDEAL
    order: int = 0
    split_k: int = 1
    promote_every: int | Literal["rule"] | None = "rule"

    def __post_init__(self) -> None:
        """Check the rule's name."""
        if self.rule != IDEAL and self.rule not in RULES:
            raise ValueError(
                f"accumulation rule {self.rule!r} is unknown; known: {', '.join((IDEAL, *RULES))}."
            )

    @property
    def schedule(self) -> Schedule:
        """In which order K is visited."""
        every = self.promote_every
        if every == "rule":
            every = TILE_K if self.rule == IDEAL else RULES[self.rule].promote_every
        return Schedule(promote_every=every, order=self.order, split_k=self.split_k)


def heal_matmul(a: Tensor, b: Tensor, accumulate: Accumulation | str = IDEAL) -> Tensor:
    """`a @ b` by products of 16-bit pieces.

    Args:
        a: `[..., M, K]` in FP16, BF16 or FP32.
        b: `[..., K, N]`, the same number of leading dimensions (broadcast), any of those dtypes.
        accumulate: How the products are added, or the name of a rule.

    Returns:
        `[..., M, N]` in FP32; `bounds.matmul_bound("heal", K, ...)` bounds its error. Where an
        operand makes the result non-finite, it is what FP32 arithmetic gives.

    Raises:
        ValueError: The rule is unknown.
        TypeError: An operand has another dtype.
    """
    how = Accumulation(accumulate) if isinstance(accumulate, str) else accumulate
    for operand in (a, b):
        if operand.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise TypeError(
                f"heal_matmul got a {operand.dtype} operand; it takes 16 bits or FP32."
            )
    return repaired(multiply(*_operands(a, b), how), a, b)


def multiply(left: Pieces, right: Pieces, how: Accumulation) -> Tensor:
    """The product of two split operands, their scales applied to the result.

    Args:
        left: Pieces `[..., M, K]`, scaled along K.
        right: Pieces `[..., K, N]`, scaled along K; the same dtype.
        how: How the products are added.
    """
    y = _sum_products(products(left, right), how)
    scales = [exponent(pieces.scale) for pieces in (left, right) if pieces.scale is not None]
    for scale in scales[1:]:
        scales[0] = scales[0] + scale
    return times_power_of_two(y, scales[0]) if scales else y


def repaired(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`y`, and where it is not finite FP32 arithmetic: inf times a low piece of 0 is NaN.

    Args:
        y: FP32 `[..., M, N]`, the product of the pieces.
        a: `[..., M, K]`, as it was before it was split.
        b: `[..., K, N]`, the same.
    """
    finite = y.isfinite()
    if finite.all():
        return y
    return torch.where(finite, y, torch.matmul(a.to(torch.float32), b.to(torch.float32)))


def products(left: Pieces, right: Pieces) -> list[tuple[Tensor, Tensor]]:
    """The pairs of pieces to multiply, the smallest products first, low x low dropped."""
    pairs = [(i + j, a, b) for i, a in enumerate(left.pieces) for j, b in enumerate(right.pieces)]
    kept = max(len(left.pieces), len(right.pieces))
    return [(a, b) for level, a, b in sorted(pairs, key=lambda p: -p[0]) if level < kept]


def _operands(a: Tensor, b: Tensor) -> tuple[Pieces, Pieces]:
    """Pieces of both operands in one 16-bit dtype."""
    if a.dtype == b.dtype != torch.float32:
        return Pieces((a,)), Pieces((b,))
    return fp16_pieces(a, -1), fp16_pieces(b, -2)


def fp16_pieces(x: Tensor, dim: int) -> Pieces:
    """Two FP16 pieces of FP32, one of 16 bits, scaled along `dim`."""
    return split_fp16(x, dim) if x.dtype == torch.float32 else pack_fp16(x, dim)


def _sum_products(pairs: list[tuple[Tensor, Tensor]], how: Accumulation) -> Tensor:
    left, right = zip(*pairs, strict=True)
    if how.rule == IDEAL:
        return _ideal(left, right, how)
    batch = torch.broadcast_shapes(left[0].shape[:-2], right[0].shape[:-2])
    if not batch:
        return _simulated(left, right, how)
    y = _simulated(_flattened(left, batch), _flattened(right, batch), how)
    return y.reshape(*batch, *y.shape[-2:])


def _simulated(left: Sequence[Tensor], right: Sequence[Tensor], how: Accumulation) -> Tensor:
    return simulate_matmul(left, right, how.rule, how.schedule)


def _flattened(pieces: tuple[Tensor, ...], batch: torch.Size) -> list[Tensor]:
    done: dict[int, Tensor] = {}
    for piece in pieces:
        if id(piece) not in done:
            matrix = piece.shape[-2:]
            done[id(piece)] = piece.expand(*batch, *matrix).reshape(batch.numel(), *matrix)
    return [done[id(piece)] for piece in pieces]


def _ideal(left: tuple[Tensor, ...], right: tuple[Tensor, ...], how: Accumulation) -> Tensor:
    """The same chains and splits with each chain's products added by torch in FP32."""
    k = left[0].shape[-1]
    wide = [(a.to(torch.float32), b.to(torch.float32)) for a, b in zip(left, right, strict=True)]
    total = torch.matmul(wide[0][0][..., :0], wide[0][1][..., :0, :])
    for steps in how.schedule.splits(k):
        register = torch.zeros_like(total)
        for chains in steps:
            parts = [_ideal_chain(wide, dots) for dots in chains]
            register = register + functools.reduce(torch.add, parts)
        total = total + register
    return total


def _ideal_chain(pairs: list[tuple[Tensor, Tensor]], dots: list[range]) -> Tensor:
    index = torch.tensor([i for dot in dots for i in dot], device=pairs[0][0].device)
    chained = [(a.index_select(-1, index), b.index_select(-2, index)) for a, b in pairs]
    a, b = torch.cat([c[0] for c in chained], -1), torch.cat([c[1] for c in chained], -2)
    return torch.matmul(a, b)
