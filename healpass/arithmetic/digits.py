"""Balanced base-256 digits and the sums of digit products that stay exact. Layer `arithmetic`.

An integer X with |X| <= 127 * (256^n - 1) / 255 is sum_i d_i 256^i with every d_i in [-128, 127]:
n INT8 numbers. Products of digits are integers, and integers below 2^24 pass through every
generation's FP32 accumulator unchanged, in any order (numerics as of arXiv 2511.10909: 23 fraction
bits or more are kept).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from healpass.arithmetic.bits import exponent, finite_amax, power_of_two
from healpass.arithmetic.formats import FP32

BASE_BITS = 8
#: Largest magnitude of a balanced digit.
DIGIT_MAX = 128
#: Sums up to here are exact in an FP32 accumulator, on every generation.
FP32_ACCUMULATOR = 1 << 24
#: Sums up to here are exact in an INT32 accumulator.
INT32_ACCUMULATOR = (1 << 31) - 1


@dataclass(frozen=True)
class Digits:
    """Digits of one operand: value = scale * sum_i digits[i] * 256^i.

    Attributes:
        digits: INT8 tensors of the operand's shape, the lowest first.
        scale: FP32 powers of two of size 1 along the reduced dimension.
    """

    digits: tuple[Tensor, ...]
    scale: Tensor


def digit_limit(count: int) -> int:
    """127 (256^count - 1) / 255: the magnitude `count` balanced digits hold in either sign."""
    return (DIGIT_MAX - 1) * (256**count - 1) // 255


def split_digits(x: Tensor, count: int, dim: int = -1) -> Digits:
    """`x` as `count` balanced digits under a power-of-two scale along `dim`.

    |x - value| <= scale / 2, and scale <= 2 max|x| / digit_limit(count) or 2^-126. The scale
    grows by one step where the top digit would leave [-128, 127].

    Args:
        x: Floating point, finite.
        count: 1 to 4 digits.
        dim: The dimension that a matmul reduces.
    """
    scale = digit_scale(finite_amax(x, dim), count)
    return Digits(scaled_digits(x, scale, count), scale)


def digit_scale(amax: Tensor, count: int) -> Tensor:
    """The FP32 power of two under which numbers up to `amax` (FP32) fit `count` digits.

    It grows with `amax`, so the scale of a whole is the largest scale of its parts.
    """
    limit = digit_limit(count)
    scale = power_of_two(
        (exponent(amax) - limit.bit_length() + 1).clamp(FP32.min_exponent, FP32.max_exponent)
    )
    wide = amax.to(torch.float64) / scale.to(torch.float64)
    return torch.where(wide.round() > limit, 2 * scale, scale)


def scaled_digits(x: Tensor, scale: Tensor, count: int) -> tuple[Tensor, ...]:
    """Digits of round(x / scale), the lowest first, for finite `x` and a `digit_scale` of it.

    Three digits need 23 bits: FP32 divides by the power of two without an error but where the
    quotient is subnormal, and rounds to 0 then.

    Args:
        x: Floating point, finite.
        scale: FP32 power of two, size 1 along the dimension that a matmul reduces.
        count: 1 to 4 digits.
    """
    wide = count > 3
    quotient = x.to(torch.float64 if wide else torch.float32) / scale
    return integer_digits(quotient.round().to(torch.int64 if wide else torch.int32), count)


def integer_digits(integers: Tensor, count: int) -> tuple[Tensor, ...]:
    """Balanced INT8 digits of `integers`, the lowest first; exact for |X| <= digit_limit(count).

    Args:
        integers: Any signed integer dtype.
        count: Number of digits.
    """
    rest = integers if integers.dtype == torch.int32 else integers.to(torch.int64)
    digits = []
    for _ in range(count):
        digit = ((rest + DIGIT_MAX) & 0xFF) - DIGIT_MAX
        digits.append(digit.to(torch.int8))
        rest = (rest - digit) >> BASE_BITS
    return tuple(digits)


def join_digits(digits: tuple[Tensor, ...]) -> Tensor:
    """sum_i digits[i] * 256^i as INT64, exactly."""
    total = torch.zeros_like(digits[0], dtype=torch.int64)
    for digit in reversed(digits):
        total = (total << BASE_BITS) + digit
    return total


def exact_terms(left_max: int, right_max: int, accumulator: int = FP32_ACCUMULATOR) -> int:
    """How many products of integers up to `left_max` and `right_max` may be summed exactly.

    Every partial sum of so many products is at most `accumulator` in magnitude, so nothing is
    rounded, truncated or wrapped, in any order. 1024 for two balanced digits in FP32.

    Args:
        left_max: Largest magnitude of a left factor.
        right_max: Largest magnitude of a right factor.
        accumulator: Largest magnitude up to which every integer is exact.
    """
    return accumulator // (left_max * right_max)
