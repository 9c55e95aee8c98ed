"""A number as a sum of 16-bit pieces. Layer `arithmetic`: imports torch and this package.

Tensor cores multiply 16-bit numbers exactly. An FP32 operand becomes two FP16 pieces under a
power-of-two scale per row (of the reduced dimension), or two or three BF16 pieces without a scale;
a 16-bit weight is one piece. `Pieces` holds them high first; value = scale * sum(pieces).

Errors per element, proved in the docstrings and restated by `bounds`:

| split                       | |x - value|                                  |
|-----------------------------|----------------------------------------------|
| FP32, 2 FP16 pieces, scaled | 2^-23 |x| + 2^-40 (1 + 2^-11) row maximum    |
| BF16 or FP16, 1 FP16 piece  | 2^-40 (1 + 2^-11) channel maximum            |
| FP32, 2 BF16 pieces         | 2^-17 |x| + 2^-134                           |
| FP32, 3 BF16 pieces         | 2^-134                                       |

A row whose maximum is below 2^-111 has the scale 2^-126 (the floor): the second term is then
2^-151.

Non-finite values stay in the high piece, their low pieces are 0, and they take no part in the
scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from healpass.arithmetic.bits import (
    BIAS,
    FRACTION_BITS,
    MIN_SCALE_EXPONENT,
    finite_amax,
    power_of_two,
    rounded,
)
from healpass.arithmetic.formats import BF16, FP16

#: Half a unit in the last place of FP16, in the bits of FP32: adding it carries as rounding would.
_HALF_FP16_ULP = 1 << (FRACTION_BITS - FP16.precision)


@dataclass(frozen=True)
class Pieces:
    """Pieces of one operand.

    Attributes:
        pieces: Tensors of the operand's shape in one 16-bit dtype, the high one first.
        scale: FP32 powers of two of size 1 along the reduced dimension, or None for 1.
    """

    pieces: tuple[Tensor, ...]
    scale: Tensor | None = None


def row_scale(x: Tensor, dim: int = -1) -> Tensor:
    """Power-of-two scale s with max|x / s| in [2^15 (1 - 2^-12), 65520): the top of FP16's range.

    The exponent is that of the maximum *rounded to FP16*, so the high piece cannot overflow. Never
    below 2^-126.

    Args:
        x: `[..., K]`, floating point.
        dim: The dimension that a matmul reduces.

    Returns:
        FP32, size 1 along `dim`.
    """
    bits = finite_amax(x, dim).view(torch.int32) + _HALF_FP16_ULP
    exponent = (bits >> FRACTION_BITS) - BIAS - FP16.max_exponent
    return power_of_two(exponent.clamp_min(MIN_SCALE_EXPONENT))


def split_fp16(x: Tensor, dim: int = -1) -> Pieces:
    """Two FP16 pieces of FP32 `x` under a power-of-two scale along `dim`.

    With z = x / s, hi = fp16(z) and lo = fp16(z - hi): z - hi is exact (Sterbenz-like: both are
    multiples of the FP32 ulp of z and the difference is at most 2^12 of them), and rounding those
    13 bits to 11 costs at most one ulp of z, that is 2^-23 |z|. Below FP16's normal range rounding
    costs 2^-25, which is 2^-40 (1 + 2^-11) of the row's maximum.

    What the low piece loses is one bit, a tie. It is broken so that |hi + lo| > |z|, because
    tensor cores truncate sums toward zero: the two biases oppose each other, and the bound is the
    same.
    (`examples/simulated_gpus.py` shows it where one large activation makes the sum.)

    Args:
        x: FP32 of any shape.
        dim: The dimension that a matmul reduces.
    """
    scale = row_scale(x, dim)
    scaled = x.to(torch.float32) / scale
    high = rounded(scaled, FP16)
    rest = torch.where(high.isfinite(), scaled - high, 0.0)
    low = rounded(_nudged(rest, scaled), FP16)
    return Pieces((high.to(torch.float16), low.to(torch.float16)), scale)


def _nudged(rest: Tensor, whole: Tensor) -> Tensor:
    """`rest` one FP32 neighbour further in the direction of `whole`'s sign: enough to break ties.

    That is 2^-23 of it, far less than the slack 2^-12 of the bound 2^-40 (1 + 2^-11).
    """
    bits = rest.view(torch.int32)
    outward = 1 + 2 * ((bits ^ whole.view(torch.int32)) >> 31)  # 1 where signs agree, else -1
    return torch.where(rest == 0, 0.0, (bits + outward).view(torch.float32))


def pack_fp16(weight: Tensor, dim: int = -1) -> Pieces:
    """One FP16 piece of a BF16 or FP16 `weight` under a power-of-two scale along `dim`.

    Exact, but for elements below 2^-32 (BF16) or 2^-29 (FP16) of the maximum along `dim`, whose
    loss is at most 2^-40 (1 + 2^-11) of it.

    Args:
        weight: BF16 or FP16 of any shape.
        dim: The dimension that a matmul reduces; the scale is one per output channel.
    """
    scale = row_scale(weight, dim)
    return Pieces(((weight.to(torch.float32) / scale).to(torch.float16),), scale)


def split_bf16(x: Tensor, count: int = 2) -> Pieces:
    """Two or three BF16 pieces of FP32 `x`; three are exact down to 2^-110.

    Each piece is the rest rounded to BF16. A value that would round up to infinity is clamped to
    BF16's largest number first, which leaves a rest twice as large and the bound of 2^-17 |x|
    intact.

    Args:
        x: FP32 of any shape.
        count: 2 or 3.

    Raises:
        ValueError: `count` is neither.
    """
    if count not in (2, 3):
        raise ValueError(
            f"split_bf16 got count={count}: FP32 needs 2 BF16 pieces, or 3 to be exact."
        )
    rest = x.to(torch.float32)
    pieces: list[Tensor] = []
    for _ in range(count):
        clamped = rest.clamp(-BF16.largest, BF16.largest)
        piece = rounded(torch.where(rest.isfinite(), clamped, rest), BF16)
        rest = torch.where(piece.isfinite(), rest - piece, 0.0)
        pieces.append(piece.to(torch.bfloat16))
    return Pieces(tuple(pieces))


def reassemble(split: Pieces) -> Tensor:
    """The value of the pieces in FP64, without any rounding: scale * (high + low + ...)."""
    total = sum(piece.to(torch.float64) for piece in reversed(split.pieces))
    assert isinstance(total, Tensor)
    return total if split.scale is None else total * split.scale.to(torch.float64)
