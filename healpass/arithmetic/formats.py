"""Floating-point formats as data. Layer `arithmetic`: imports torch only.

A format is IEEE-like: precision p (significand bits, the hidden one counted), exponents from
`min_exponent` to `max_exponent`, gradual underflow. Everything else follows from these three
numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class FloatFormat:
    """One binary floating-point format.

    Attributes:
        name: Short name, as in options and reports.
        dtype: The torch dtype.
        precision: Bits of the significand, the hidden bit counted.
        min_exponent: Exponent of the smallest normal number.
        max_exponent: Exponent of the largest finite number.
    """

    name: str
    dtype: torch.dtype
    precision: int
    min_exponent: int
    max_exponent: int

    @property
    def unit_roundoff(self) -> float:
        """u: half the distance from 1 to the next number (Higham, section 2.1)."""
        return 2.0**-self.precision

    @property
    def smallest_normal(self) -> float:
        """Below this, precision is lost bit by bit."""
        return 2.0**self.min_exponent

    @property
    def smallest_subnormal(self) -> float:
        """The distance between neighbours at zero."""
        return 2.0 ** (self.min_exponent - self.precision + 1)

    @property
    def largest(self) -> float:
        """The largest finite number."""
        return (2.0 - 2.0 ** (1 - self.precision)) * 2.0**self.max_exponent


FP64 = FloatFormat("fp64", torch.float64, 53, -1022, 1023)
FP32 = FloatFormat("fp32", torch.float32, 24, -126, 127)
FP16 = FloatFormat("fp16", torch.float16, 11, -14, 15)
BF16 = FloatFormat("bf16", torch.bfloat16, 8, -126, 127)

FORMATS: dict[torch.dtype, FloatFormat] = {f.dtype: f for f in (FP64, FP32, FP16, BF16)}


def unit_roundoff(dtype: torch.dtype) -> float:
    """Unit roundoff of a torch floating-point dtype: 2^-24 for FP32.

    Raises:
        KeyError: `dtype` is not FP64, FP32, FP16 or BF16.
    """
    return FORMATS[dtype].unit_roundoff
