"""Steps of a simulated tensor core in FP64, right for all operands. Layer `tensorcore`.

Every lane is an FP64 number that holds an exact product or an FP32 value. The largest exponent of
a group is found as the largest *power of two* 2^(ea + eb), so alignment is one multiplication and
truncation one `trunc`. The operations are exact but for the roundings that the rule asks for.

Only the accumulator brings in the exponent of zero. Where it is zero it has that exponent, where
it is not it has a larger one, so a product that is zero never decides.
"""

from __future__ import annotations

import torch
from torch import Tensor

from healpass.arithmetic.formats import FP32, FloatFormat
from healpass.tensorcore.rules import INSTRUCTION_K, AccumulationRule
from healpass.tensorcore.tiles import fixed, lane

_FP64_EXPONENT = 0x7FF << 52
_NEGATIVE_ZERO = -(1 << 63)
#: Bits of an FP64 number below those of a normal FP32 one.
FP64_BELOW_FP32 = (1 << (53 - FP32.precision)) - 1


def powers(values: Tensor, fmt: FloatFormat) -> Tensor:
    """2^exponent of each element as its format stores it; 0 for zeros, any for non-finite ones."""
    values = values.to(torch.float64)
    power = _leading_bit(values).clamp_(fmt.smallest_normal, 2.0**fmt.max_exponent)
    return torch.where(values == 0, 0.0, power)


def truncated(
    c: Tensor, a: Tensor, b: Tensor, pa: Tensor, pb: Tensor, rule: AccumulationRule
) -> Tensor:
    """One instruction of a tensor core on all tiles; returns the new accumulators.

    Args:
        c: FP64 `[B, T, M, 16]`, the accumulators.
        a: FP64 `[B, M, 16]`, the left operand's part of the instruction.
        b: FP64 `[B, T, 16, 16]`, the right operand's.
        pa: FP64, `powers` of `a`.
        pb: FP64, `powers` of `b`.
        rule: A rule that truncates.
    """
    fixed(c, a, b, pa, pb)
    for start in range(0, INSTRUCTION_K, rule.group):
        lanes = range(start, start + rule.group)
        c = _truncated_group(c, a, b, pa, pb, lanes, rule)
    return c


def _truncated_group(
    c: Tensor,
    a: Tensor,
    b: Tensor,
    pa: Tensor,
    pb: Tensor,
    lanes: range,
    rule: AccumulationRule,
) -> Tensor:
    """Align the products of some lanes and the accumulator, truncate, add, round toward zero."""
    top = _leading_bit(c).clamp(FP32.smallest_normal, 2.0**FP32.max_exponent)
    top = torch.where(c == 0, 2.0**rule.zero_exponent, top)
    for i in lanes:
        x, y = lane(pa, pb, i)
        top = torch.maximum(top, x * y)
    scale = 2.0**rule.fraction_bits / top
    total = torch.trunc(c * scale)
    for i in lanes:
        x, y = lane(a, b, i)
        total = total + torch.trunc((x * y) * scale)
    return _toward_zero(total * (top * 2.0**-rule.fraction_bits))


def _leading_bit(x: Tensor) -> Tensor:
    """2^floor(log2|x|) for normal FP64 `x`, by clearing the other bits."""
    return (x.view(torch.int64) & _FP64_EXPONENT).view(torch.float64)


def _toward_zero(x: Tensor) -> Tensor:
    """FP64 `x` rounded toward zero to FP32, kept in FP64; past the largest number is infinity.

    A zero is +0. It is made so by its bits: compilers of C++ may take -0 and +0 for the same.
    """
    normal = (x.view(torch.int64) & ~FP64_BELOW_FP32).view(torch.float64)
    step = FP32.smallest_subnormal
    bits = (torch.trunc(x * (1.0 / step)) * step).view(torch.int64)
    subnormal = torch.where(bits == _NEGATIVE_ZERO, 0, bits).view(torch.float64)
    result = torch.where(x.abs() < FP32.smallest_normal, subnormal, normal)
    return torch.where(x.abs() >= 2.0 ** (FP32.max_exponent + 1), x * torch.inf, result)


def fused(c: Tensor, a: Tensor, b: Tensor, pa: Tensor, pb: Tensor) -> Tensor:
    """Sixteen fused multiply-adds in FP32, one after the other.

    Args:
        c: FP64 `[B, T, M, 16]`, the accumulators: FP32 values.
        a: FP64 `[B, M, 16]`, the left operand's part of the instruction.
        b: FP64 `[B, T, 16, 16]`, the right operand's.
        pa: As in `truncated`; not read.
        pb: As in `truncated`; not read.
    """
    fixed(c, a, b, pa, pb)
    for i in range(INSTRUCTION_K):
        x, y = lane(a, b, i)
        c = _fma(c, x * y)
    return c


def _fma(c: Tensor, product: Tensor) -> Tensor:
    """C + product rounded once to FP32: FP64 addition rounded to odd, then to nearest.

    Rounding to odd in 53 bits before rounding to 24 is innocuous (Boldo and Melquiond 2008); the
    error that says which way to go is Knuth's TwoSum.
    """
    total = c + product
    back = total - c
    error = (c - (total - back)) + (product - back)
    inexact = (error > 0) | (error < 0)
    away = inexact & ((error > 0) != (total > 0))
    bits = total.view(torch.int64) - away.to(torch.int64)
    odd = (bits | inexact.to(torch.int64)).view(torch.float64)
    return torch.where(total.isfinite(), odd, total).to(torch.float32).to(torch.float64)
