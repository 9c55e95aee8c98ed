"""A tensor's exact value beside a bound on its error. Layer `arithmetic`: imports `formats`."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from healpass.arithmetic.formats import FORMATS, FP32

#: Relative error of an elementary function (exp, log, tanh, sqrt ...) or short sequence of them.
ELEMENTARY = 8 * FP32.unit_roundoff
U = FP32.unit_roundoff
TINY = FP32.smallest_subnormal


@dataclass(frozen=True)
class Arithmetic:
    """Which arithmetic runs a program.

    Attributes:
        precision: Of the matmuls, as in `matmul_bound`.
        rule: Who adds, as in `matmul_bound`.
        casts: Whether casts of activations to 16 bits are kept; the promote pass drops them.
    """

    precision: str = "heal"
    rule: str | None = None
    casts: bool = True


@dataclass(frozen=True)
class Estimate:
    """A tensor with its error.

    Attributes:
        value: FP64, what exact arithmetic gives.
        error: FP64 of the same shape, >= |computed - value| elementwise.
        format: Format of the computed tensor: `fp32`, or what a 16-bit input or weight has.
    """

    value: Tensor
    error: Tensor
    format: str = "fp32"

    @property
    def magnitude(self) -> Tensor:
        """An upper bound of |computed|."""
        return self.value.abs() + self.error


def exact(x: Tensor) -> Estimate:
    """A tensor that is what it is: an input or a weight."""
    return Estimate(x.double(), torch.zeros_like(x, dtype=torch.float64), FORMATS[x.dtype].name)


def lifted(x: Any) -> Any:
    """A floating-point tensor as an exact estimate, anything else as it is."""
    floating = isinstance(x, Tensor) and x.is_floating_point()
    return exact(x) if floating else x


def rounded_result(value: Tensor, error: Tensor, relative: float = U) -> Estimate:
    """An estimate whose computation ends in one rounding; an undefined error is infinite."""
    total = error + relative * (value.abs() + error) + TINY
    return Estimate(value, torch.where(total.isnan(), math.inf, total))


def within(x: Estimate, largest: float) -> Estimate:
    """What is computed is at most `largest`, so the error is at most |value| + largest."""
    return replace(x, error=torch.minimum(x.error, x.value.abs() + largest * (1 + ELEMENTARY)))
