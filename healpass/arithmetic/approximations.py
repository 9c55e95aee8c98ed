"""Where the coefficients of `ops.reproducible` come from. Layer `arithmetic`: imports mpmath.

Each polynomial is the Chebyshev fit (near minimax) of an entire or analytic function that the
reduction of `reproducible.fp64` leaves over, at 60 digits. The functions are written as
hypergeometric series, which have no cancellation at zero. `python -m
healpass.arithmetic.approximations` writes the file anew; a test asserts that what is committed is
what this makes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mpmath

DIGITS = 60

HEADER = '''"""Coefficients of functions, made by `arithmetic.approximations`: do not edit.

Highest power first. The comment at each says what is approximated, where, and how far off it is.
"""

'''


@dataclass(frozen=True)
class Approximation:
    """One polynomial.

    Attributes:
        name: Its name in `reproducible.fp64_coefficients`.
        meaning: The function as text.
        function: The function on mpmath numbers.
        low: Left end of its interval.
        high: Right end.
        terms: Number of coefficients.
    """

    name: str
    meaning: str
    function: Callable[[Any], Any]
    low: float
    high: float
    terms: int

    def coefficients(self) -> tuple[list[float], float]:
        """FP64 coefficients, highest power first, and the largest error of the fit."""
        with mpmath.workdps(DIGITS):
            fit, error = mpmath.chebyfit(
                self.function, [self.low, self.high], self.terms, error=True
            )
            return [float(c) for c in fit], float(error)

    def source(self) -> str:
        """The lines of `reproducible.fp64_coefficients` for this polynomial."""
        fit, error = self.coefficients()
        numbers = "".join(f"    {c!r},\n" for c in fit)
        where = f"[{self.low:.6g}, {self.high:.6g}]"
        return f"#: {self.meaning} on {where}, within {error:.1e}.\n{self.name} = (\n{numbers})\n"


def _scaled_erfc(t: Any) -> Any:
    """exp(z^2) erfc(z) / t at z = 2 / t - 2; smooth, so t must be a number above zero."""
    z = 2 / t - 2
    return mpmath.exp(z * z) * mpmath.erfc(z) / t


#: Half of ln 2, with room for the rounding of the multiple of ln 2 that is taken off.
_HALF_LN2 = 0.3466
#: The square of (m - 1) / (m + 1) at m = sqrt(2), and a little.
_ATANH_SQUARED = 0.02944
#: The square of pi / 4, and a little.
_QUARTER_PI_SQUARED = 0.6169
#: Past z = 10.2 erfc is below half of FP32's smallest subnormal; `t = 2 / (2 + z)`.
_ERFC_FROM, _ERFC_TO = 1.0, 10.25

APPROXIMATIONS = (
    Approximation(
        "EXPM1",
        "(exp(r) - 1 - r) / r^2",
        lambda r: mpmath.hyp1f1(1, 3, r) / 2,
        -_HALF_LN2,
        _HALF_LN2,
        8,
    ),
    Approximation(
        "LOG",
        "(log((1 + s) / (1 - s)) - 2 s) / s^3 of s^2",
        lambda z: mpmath.hyp2f1(1, 1.5, 2.5, z) * 2 / 3,
        0.0,
        _ATANH_SQUARED,
        6,
    ),
    Approximation(
        "SIN",
        "(sin(r) - r) / r^3 of r^2",
        lambda z: -mpmath.hyp1f2(1, 2, 2.5, -z / 4) / 6,
        0.0,
        _QUARTER_PI_SQUARED,
        5,
    ),
    Approximation(
        "COS",
        "(cos(r) - 1 + r^2 / 2) / r^4 of r^2",
        lambda z: mpmath.hyp1f2(1, 2.5, 3, -z / 4) / 24,
        0.0,
        _QUARTER_PI_SQUARED,
        5,
    ),
    Approximation(
        "ERF",
        "erf(z) / z of z^2",
        lambda z: mpmath.hyp1f1(0.5, 1.5, -z) * 2 / mpmath.sqrt(mpmath.pi),
        0.0,
        1.0,
        10,
    ),
    Approximation(
        "ERFC",
        "exp(z^2) erfc(z) / t of t = 2 / (2 + z)",
        _scaled_erfc,
        2 / (2 + _ERFC_TO),
        2 / (2 + _ERFC_FROM),
        12,
    ),
)


def module() -> str:
    """The text of `ops/reproducible/fp64_coefficients.py`."""
    return HEADER + "\n".join(approximation.source() for approximation in APPROXIMATIONS)


if __name__ == "__main__":
    sys.stdout.write(module())
