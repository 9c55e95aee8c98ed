"""Powers of two and roundings by their bits: exact on every device. Layer `arithmetic`.

A scale that is a power of two costs no rounding unless a result leaves the range of normal
numbers. Scales here lie in [2^-126, 2^113], so that neither they nor their inverses are subnormal:
GPUs flush subnormals in places.
"""

from __future__ import annotations

import torch
from torch import Tensor

from healpass.arithmetic.formats import FP32, FloatFormat

FRACTION_BITS = 23
BIAS = 127
MIN_SCALE_EXPONENT = -126


def exponent(x: Tensor) -> Tensor:
    """floor(log2|x|) of FP32 `x` as INT32; -127 for zeros and subnormals."""
    return ((x.view(torch.int32) >> FRACTION_BITS) & 0xFF) - BIAS


def power_of_two(e: Tensor) -> Tensor:
    """2^e in FP32 for INT32 `e` in [-126, 127]."""
    return ((e + BIAS) << FRACTION_BITS).view(torch.float32)


def times_power_of_two(y: Tensor, e: Tensor) -> Tensor:
    """Return y * 2^e in FP32, rounded at most once where |y| is 0 or in [2^-48, 2^127].

    2^e itself may be out of FP32's range, so half of it is applied twice. The first step is exact
    wherever the second is not zero or infinite.
    """
    e = e.clamp(-252, 254)
    half = e >> 1
    return y * power_of_two(half) * power_of_two(e - half)


def finite_amax(x: Tensor, dim: int) -> Tensor:
    """max|x| of the finite elements over `dim`, kept with size 1, in FP32; 0 if none is finite."""
    magnitude = x.detach().to(torch.float32).abs()
    finite = torch.where(magnitude.isfinite(), magnitude, 0.0)
    if x.shape[dim] == 0:
        return finite.sum(dim, keepdim=True)
    return finite.amax(dim, keepdim=True)


def rounded(x: Tensor, fmt: FloatFormat) -> Tensor:
    """FP32 `x` rounded to nearest even in `fmt`, still in FP32; not for |x| that overflows.

    Written in integer and FP32 operations because a compiler may drop a cast to 16 bits and back
    (Inductor does, unless `emulate_precision_casts` is set), and a split whose rounding is dropped
    has an empty low piece.
    """
    drop = FP32.precision - fmt.precision
    bits = x.view(torch.int32)
    to_even = ((bits >> drop) & 1) + ((1 << (drop - 1)) - 1)
    result = (((bits + to_even) >> drop) << drop).view(torch.float32)
    if fmt.min_exponent > FP32.min_exponent:
        # Adding a number whose last place is the format's smallest subnormal rounds to that place.
        anchor = 1.5 * 2.0**FRACTION_BITS * fmt.smallest_subnormal
        subnormal = (x + anchor) - anchor
        result = torch.where(x.abs() < fmt.smallest_normal, subnormal, result)
    return torch.where(x.isfinite(), result, x)
