"""The same steps in FP32 and INT32, where that loses nothing. Layer `tensorcore`.

Vectors hold twice as many of these lanes as of FP64, and conversion to INT32 is truncation.

**Truncating rules**, F fraction bits, 23 <= F <= 25. Let w be a power of two that divides every
product of the call: 2^(ea + eb + 2 - 2p) for the smallest stored exponents of nonzero elements
and precision p. `fits` asks for finite operands, w >= 2^-124, and sums of all products below
2^127.

- A product has 2p <= 22 bits, is 0 or at least w, and is below 2^127: FP32 holds it exactly.
- Truncation keeps a multiple of w one: the quantum 2^(top - F) divides w, and nothing is lost, or
  w divides the quantum. So does chopping to 24 bits. Hence an accumulator is 0 or at least w, so
  it is normal; truncation lets no sum of magnitudes grow, so it is below 2^127.
- `top` counts from 2^-101 on, which keeps 2^(F - top) <= 2^126 finite and 2^(top - F) >= 2^-126
  normal. Nothing is lost: below that the right quantum is smaller than 2^(-101 - F) <= 2^-124,
  which is at most w, so both divide w, and truncation to either is exact. That goes for the
  exponent of zero, too, which lies below -126: where it decides, nothing is lost.
- Scaling is a multiplication by a power of two: exact, or its result is below 2^-126, which
  truncates to the same 0. The zero that comes of it is +0, as in FP64: there the addend that
  `top` comes from is not truncated to 0, being at least 2^(top + 2 - 2p) even where operands are
  subnormal, so no sum is one of negative zeros only.
- A scaled product is below 2^(F + 2), as |a| < 2^(ea + 1), and the scaled accumulator below
  2^(F + 1). Eight products and it are below 2^(F + 5) + 2^(F + 1) < 2^31, so INT32 adds them
  exactly; two such sums are added in FP64.

**Fused multiply-adds** are one instruction of the processor, for all operands. Whether the
compiler really emits it is tested (`is_fused`), since torch says so nowhere.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from healpass.arithmetic.formats import FORMATS, FP32, FloatFormat
from healpass.tensorcore import wide
from healpass.tensorcore.rules import INSTRUCTION_K, AccumulationRule
from healpass.tensorcore.tiles import TILE_N, fixed, lane

#: Products that one INT32 sum holds beside the accumulator.
LANES = 8
_FRACTION = FP32.precision - 1
_BIAS = FP32.max_exponent
_EXPONENT = 0xFF
#: The smallest exponent that a group is aligned to; see above.
_LOWEST_TOP = -101
#: The power of two w that must divide all products, and what all sums must stay below.
_SMALLEST_UNIT = -124
_LARGEST_SUM = 127
#: The exponent of zero: below `_LOWEST_TOP` whatever it is added to.
_OF_ZERO = -1000
#: All bits of a 16-bit float but its sign.
_SIZE = 0x7FFF


def fits(a_pieces: Sequence[Tensor], b_pieces: Sequence[Tensor]) -> bool:
    """Whether the products of these 16-bit pieces, and all their sums, are as the module says."""
    fmt = FORMATS[a_pieces[0].dtype]
    low_a, high_a = _range(a_pieces, fmt)
    low_b, high_b = _range(b_pieces, fmt)
    terms = len(a_pieces) * a_pieces[0].shape[-1]
    return (
        max(high_a, high_b) <= fmt.max_exponent
        and low_a + low_b + 2 - 2 * fmt.precision >= _SMALLEST_UNIT
        and high_a + high_b + 2 + math.log2(terms) <= _LARGEST_SUM
    )


def _range(pieces: Sequence[Tensor], fmt: FloatFormat) -> tuple[int, int]:
    """The smallest stored exponent of all nonzero elements, and the largest."""
    low, high = fmt.max_exponent, fmt.min_exponent
    for piece in {id(piece): piece for piece in pieces}.values():
        size = piece.view(torch.int16) & _SIZE  # grows with the magnitude; NaN is the largest
        smallest = int((size - 1).bitwise_and_(_SIZE).min()) + 1  # a zero is past all others
        low = min(low, _stored_exponent(smallest, fmt))
        high = max(high, _stored_exponent(int(size.max()), fmt))
    return low, high


def _stored_exponent(size: int, fmt: FloatFormat) -> int:
    return max(size >> (fmt.precision - 1), 1) - fmt.max_exponent


def exponents(values: Tensor, fmt: FloatFormat) -> Tensor:
    """The exponent of each 16-bit element as its format stores it, in INT32."""
    size = values.view(torch.int16) & _SIZE
    stored = (size >> (fmt.precision - 1)).clamp_(min=1).sub_(fmt.max_exponent)
    return stored.masked_fill_(size == 0, _OF_ZERO).to(torch.int32)


def truncated(
    c: Tensor, a: Tensor, b: Tensor, ea: Tensor, eb: Tensor, rule: AccumulationRule
) -> Tensor:
    """One instruction of a tensor core on all tiles; returns the new accumulators.

    Args:
        c: FP32 `[B, T, M, 16]`, the accumulators.
        a: FP32 `[B, M, 16]`, the left operand's part of the instruction.
        b: FP32 `[B, T, 16, 16]`, the right operand's.
        ea: INT32, `exponents` of `a`.
        eb: INT32, `exponents` of `b`.
        rule: A rule that truncates.
    """
    fixed(c, a, b, ea, eb)
    for start in range(0, INSTRUCTION_K, rule.group):
        lanes = range(start, start + rule.group)
        c = _truncated_group(c, a, b, ea, eb, lanes, rule.fraction_bits)
    return c


def _truncated_group(
    c: Tensor, a: Tensor, b: Tensor, ea: Tensor, eb: Tensor, lanes: range, fraction_bits: int
) -> Tensor:
    """Align the products of some lanes and the accumulator, truncate, add, round toward zero."""
    top = _exponent(c).clamp(min=_LOWEST_TOP)
    for i in lanes:
        x, y = lane(ea, eb, i)
        top = torch.maximum(top, x + y)
    scale, quantum = _power_of_two(fraction_bits - top), _power_of_two(top - fraction_bits)
    sums: list[Tensor] = []
    for start in range(0, len(lanes), LANES):
        total = (c * scale).to(torch.int32) if start == 0 else torch.zeros_like(sums[0])
        for i in lanes[start : start + LANES]:
            x, y = lane(a, b, i)
            total = total + ((x * y) * scale).to(torch.int32)
        sums.append(total)
    chopped = _chopped(sums[0]) if len(sums) == 1 else _chopped_sum(sums)
    return chopped * quantum


def _exponent(x: Tensor) -> Tensor:
    """floor(log2|x|) for normal FP32 `x`, and less than all of those for zero."""
    return ((x.view(torch.int32) >> _FRACTION) & _EXPONENT) - _BIAS


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent in FP32, where that is normal."""
    return ((exponent + _BIAS) << _FRACTION).view(torch.float32)


def _chopped(total: Tensor) -> Tensor:
    """INT32 up to 2^30 rounded toward zero to FP32: to nearest, and back where that went up."""
    nearest = total.to(torch.float32)
    up = nearest.to(torch.int32).abs() > total.abs()
    return (nearest.view(torch.int32) - up.to(torch.int32)).view(torch.float32)


def _chopped_sum(sums: Sequence[Tensor]) -> Tensor:
    """The sum of INT32 numbers, exact in FP64, rounded toward zero to FP32."""
    exact = functools.reduce(torch.add, [total.to(torch.float64) for total in sums])
    return (exact.view(torch.int64) & ~wide.FP64_BELOW_FP32).view(torch.float64).to(torch.float32)


# ------------------------------------------------------------------------------ fused multiply-add


def fused_step() -> Callable[..., Tensor] | None:
    """Sixteen fused multiply-adds, one after the other; None if this torch has no name for one.

    Only for a compiler: eagerly torch rounds twice.
    """
    try:
        from torch._inductor.inductor_prims import fma
    except ImportError:
        return None

    def fused(c: Tensor, a: Tensor, b: Tensor, size_a: Tensor, size_b: Tensor) -> Tensor:
        fixed(c, a, b, size_a, size_b)
        for i in range(INSTRUCTION_K):
            x, y = lane(a, b, i)
            c = fma(x, y, c)
        return c

    return fused


def is_fused(step: Callable[..., Tensor]) -> bool:
    """Whether a step rounds as `wide.fused` does where two roundings would show.

    Each case is one product on an accumulator: a product that FP32 cannot hold; a sum that FP64
    rounds to a tie of FP32, from below and from above; results that are subnormal, vanish or
    overflow; a product past FP32's range.
    """
    tiny = 2.0**-20
    cases = [  # accumulator, factors
        (-(1 + 2.0**-22), 1 + 2.0**-23, 1 + 2.0**-23),
        (1 + 2.0**-23, 2.0**-24 * (1 + tiny), 1 - tiny),
        (-1.0, -(2.0**-24) * (1 + tiny), 1 + tiny + 2.0**-23),
        (0.0, 3 * 2.0**-75, 2.0**-75),
        (2.0**-149, 2.0**-100, -(2.0**-100)),
        (-(2.0**127), 2.0**64, 2.0**64),
        (2.0**127, 2.0**64, 2.0**63),
        (2.0**-126, -(2.0**-75), 1.25 * 2.0**-75),
    ]
    m = len(cases)
    c = torch.zeros(2, 2, m, TILE_N)
    a, b = torch.zeros(2, m, INSTRUCTION_K), torch.zeros(2, 2, INSTRUCTION_K, TILE_N)
    for i, (start, x, y) in enumerate(cases):
        c[:, :, i, i], a[:, i, 0], b[:, :, 0, i] = start, x, y
    got = step(c, a, b, a, b)
    want = wide.fused(*(x.to(torch.float64) for x in (c, a, b, a, b)))
    return torch.equal(got.view(torch.int32), want.to(torch.float32).view(torch.int32))
