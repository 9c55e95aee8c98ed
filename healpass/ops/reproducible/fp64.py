"""Functions on FP64 tensors as fixed sequences of IEEE operations. Imports `fp64_coefficients`.

Every step is one torch operator on FP64 or INT64 (add, multiply, divide, square root, round,
shift, compare), each of which has one right result. So eager code, Inductor's C++ at any vector
width and Triton give the same bits, if only nothing contracts a product and a sum into an fma,
which torch's eager operators never do and the compile settings of `backend` forbid.

They serve FP32 arguments: `ERROR` and `SINE_ERROR` bound what is left before the one rounding to
FP32, `places` after it. Hence arguments outside FP32's range are not looked after.

Derivations (Muller, Elementary Functions, 3rd ed.; the fits are in `arithmetic.approximations`):

* exp: x = n ln 2 + r, |r| <= ln 2 / 2, the multiple taken off in two steps of which the first is
  exact (Cody and Waite); exp(x) = 2^n (1 + r + r^2 P(r)).
* log: x = 2^k m, m in [sqrt(1/2), sqrt(2)), s = (m - 1) / (m + 1) exact up to one rounding;
  log m = 2 s + s^3 P(s^2).
* sin, cos: the fraction of |x| 2 / pi comes from integer products with the bits of 2 / pi (Payne
  and Hanek), to 2^-60 of a quarter turn. No FP32 number but 0 is nearer to a multiple of pi / 2
  than 2^-30, so the reduced argument is good to 2^-30 of itself.
* erfc: exp(-z^2) t P(t), t = 2 / (2 + z); z^2 is exact for an FP32 z.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from healpass.errors import DtypeError
from healpass.ops.reproducible import fp64_coefficients

FRACTION_BITS = 52
BIAS = 1023
#: Largest relative error: a fit within a quarter of it (`reproducible.fp64_coefficients` has
#: them), and some roundings of 2^-53 each, of which a power's exponent, up to 158, multiplies a
#: few.
ERROR = 2.0**-34
#: Of sine and cosine, whose reduced argument is good to 2^-30 of itself.
SINE_ERROR = 2.0**-29
#: ln 2 in two parts; the first has 32 bits, so that its multiples up to 2^21 are exact.
LN2_HIGH = float.fromhex("0x1.62e42feep-1")
LN2_LOW = float.fromhex("0x1.a39ef35793c76p-33")
#: e^-110 times 110 rounds to zero in FP32, e^110 to infinity.
EXP_LIMIT = 110.0
SQRT_HALF_BITS = 0x3FE6A09E667F3BCD
#: 2 / pi in words of 32 bits, the first after the binary point (224 bits, OEIS A060294).
TWO_OVER_PI = (
    0xA2F9836E,
    0x4E441529,
    0xFC2757D1,
    0xF534DDC0,
    0xDB629599,
    0x3C439041,
    0xFE5163AB,
)
WORD_BITS = 32
WORD = (1 << WORD_BITS) - 1


#: What an exact operator takes; it returns FP32.
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SIGN_BIT = -(1 << 31)
MAGNITUDE = 0x7FFFFFFF
INFINITY = 0x7F800000
QUIET_NAN = 0x7FC00000


def places(relative: float) -> float:
    """The error in ulp of FP32 that a relative error and one rounding leave: 2^-24 is an ulp."""
    return 0.5 + relative * 2.0**24


def to_fp64(x: Tensor) -> Tensor:
    """`x` in FP64, exactly, but that a zero is +0."""
    return canonical(checked(x).to(torch.float32)).to(torch.float64)


def checked(x: Tensor) -> Tensor:
    """`x`.

    Raises:
        DtypeError: It is not FP16, BF16 or FP32.
    """
    if x.dtype not in DTYPES:
        raise DtypeError(
            f"an exact operator got a {x.dtype} operand; it takes float16, bfloat16 and float32. "
            "Use torch's own operator for other dtypes."
        )
    return x


def to_fp32(x: Tensor) -> Tensor:
    """FP64 `x` rounded once to FP32, canonical."""
    return canonical(x.to(torch.float32))


def canonical(x: Tensor) -> Tensor:
    """FP32 `x` with every zero as +0 and every NaN as 0x7FC00000.

    By integers: compilers may drop `x + 0.0` and `x == 0 ? 0 : x` under -fno-signed-zeros.
    """
    bits = x.view(torch.int32)
    bits = torch.where(bits == SIGN_BIT, 0, bits)
    return torch.where((bits & MAGNITUDE) > INFINITY, QUIET_NAN, bits).view(torch.float32)


def polynomial(terms: tuple[float, ...], x: Tensor) -> Tensor:
    """The polynomial by Horner's rule, highest power first."""
    total = x * terms[0] + terms[1]
    for term in terms[2:]:
        total = total * x + term
    return total


def two_to(n: Tensor) -> Tensor:
    """2^n for whole FP64 or INT64 `n` in [-1022, 1023]."""
    return ((n.to(torch.int64) + BIAS) << FRACTION_BITS).view(torch.float64)


def expm1(x: Tensor) -> Tensor:
    """exp(x) - 1, accurate near 0 too; saturates outside +-110."""
    power, rest = _exp_parts(x)
    return power * rest + (power - 1.0)


def exp(x: Tensor) -> Tensor:
    """The exponential: 0 below -110, so that 110 e^-110 is 0 too; saturates above 110."""
    power, rest = _exp_parts(x)
    return torch.where(x < -EXP_LIMIT, 0.0, power * rest + power)


def _exp_parts(x: Tensor) -> tuple[Tensor, Tensor]:
    """2^n and exp(r) - 1."""
    x = x.clamp(-EXP_LIMIT, EXP_LIMIT)
    n = torch.round(x * (1 / math.log(2)))
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    return two_to(n), r * r * polynomial(fp64_coefficients.EXPM1, r) + r


def exp2(x: Tensor) -> Tensor:
    """2^x; saturates outside +-158."""
    x = x.clamp(-158.0, 158.0)
    n = torch.round(x)
    r = (x - n) * math.log(2)
    power = two_to(n)
    return power * (r * r * polynomial(fp64_coefficients.EXPM1, r) + r) + power


def log(x: Tensor) -> Tensor:
    """The natural logarithm of `x >= 0`; NaN below."""
    bits = x.view(torch.int64)
    k = (bits - SQRT_HALF_BITS) >> FRACTION_BITS
    m = (bits - (k << FRACTION_BITS)).view(torch.float64)
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    k = k.to(torch.float64)
    result = k * LN2_HIGH + (s * z * polynomial(fp64_coefficients.LOG, z) + 2.0 * s + k * LN2_LOW)
    result = torch.where(x == math.inf, math.inf, result)
    result = torch.where(x == 0.0, -math.inf, result)
    return torch.where(x >= 0.0, result, math.nan)


def log1p(x: Tensor) -> Tensor:
    """log(1 + x), accurate near 0 too: what 1 + x loses is added to first order."""
    total = 1.0 + x
    lost = x - (total - 1.0)
    corrected = log(total) + lost / total
    return torch.where((total > 0.0) & (x < math.inf), corrected, log(total))


def sincos(x: Tensor) -> tuple[Tensor, Tensor]:
    """Sine and cosine of FP64 numbers that are FP32 numbers, over all of their range."""
    quarter, r = _reduced(x.abs())
    z = r * r
    sine = r * z * polynomial(fp64_coefficients.SIN, z) + r
    cosine = z * z * polynomial(fp64_coefficients.COS, z) - 0.5 * z + 1.0
    odd = (quarter & 1) == 1
    sin = torch.where(odd, cosine, sine)
    cos = torch.where(odd, sine, cosine)
    sin = torch.where(((quarter & 2) == 2) != (x < 0.0), -sin, sin)
    cos = torch.where(((quarter + 1) & 2) == 2, -cos, cos)
    finite = x.abs() < math.inf
    return torch.where(finite, sin, math.nan), torch.where(finite, cos, math.nan)


def _reduced(x: Tensor) -> tuple[Tensor, Tensor]:
    """The quarter turn nearest to `x >= 0`, modulo 4, and the rest in [-pi / 4, pi / 4]."""
    bits = x.view(torch.int64)
    # x = m 2^(e - 24) with a 24-bit integer m; e is 0 for 0.5 <= x < 1 and at most 128.
    e = ((bits >> FRACTION_BITS) - (BIAS - 1)).clamp(0, 128)
    m = ((bits >> (FRACTION_BITS - 23)) & 0x7FFFFF) | 0x800000
    first, second, third = _words_of_two_over_pi(e)
    # In units of 2^-60 quarter turns. What is cut from the first product is a multiple of 4.
    turn = (((m * first) & ((1 << 26) - 1)) << 36) + ((m * second) << 4) + ((m * third) >> 28)
    turn = turn & ((1 << 62) - 1)
    quarter = (turn + (1 << 59)) >> 60
    rest = (turn - (quarter << 60)).to(torch.float64) * (math.pi / 2 * 2.0**-60)
    small = x < 0.75
    return torch.where(small, 0, quarter), torch.where(small, x, rest)


def _words_of_two_over_pi(e: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Three words of 2^e (2 / pi): the last 32 bits before the binary point, and 64 after it."""
    index, shift = e >> 5, e & 31
    words = []
    for offset in range(-1, 3):
        word = torch.zeros_like(e)
        for i in range(5):
            if 0 <= i + offset < len(TWO_OVER_PI):
                word = torch.where(index == i, TWO_OVER_PI[i + offset], word)
        words.append(word)
    shifted = [
        ((high << shift) | (low >> (WORD_BITS - shift))) & WORD
        for high, low in itertools.pairwise(words)
    ]
    return shifted[0], shifted[1], shifted[2]


def erf(x: Tensor) -> Tensor:
    """The error function."""
    z = x.abs().clamp(max=6.0)
    near = x * polynomial(fp64_coefficients.ERF, x.clamp(-1.0, 1.0) * x.clamp(-1.0, 1.0))
    far = 1.0 - _erfc_tail(z)
    return torch.where(z <= 1.0, near, torch.where(x < 0.0, -far, far))


def erfc(x: Tensor) -> Tensor:
    """1 - erf(x), accurate where it is small too; 0 past 10.25."""
    z = x.abs()
    inner = x.clamp(-1.0, 1.0)
    near = 1.0 - inner * polynomial(fp64_coefficients.ERF, inner * inner)
    far = torch.where(z > 10.25, 0.0, _erfc_tail(z.clamp(max=10.25)))
    far = torch.where(x < 0.0, 2.0 - far, far)
    return torch.where(z <= 1.0, near, far)


def _erfc_tail(z: Tensor) -> Tensor:
    """Erfc of 1 <= z <= 10.25."""
    t = 2.0 / (2.0 + z)
    return exp(-(z * z)) * t * polynomial(fp64_coefficients.ERFC, t)


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x))."""
    e = exp(-x.abs())
    return torch.where(x >= 0.0, 1.0, e) / (1.0 + e)


def tanh(x: Tensor) -> Tensor:
    """(exp(2 x) - 1) / (exp(2 x) + 1)."""
    e = expm1(-2.0 * x.abs())
    result = -e / (e + 2.0)
    return torch.where(x < 0.0, -result, result)


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), accurate where it is small too."""
    return x.clamp(min=0.0) + log1p(exp(-x.abs()))


def power(base: Tensor, exponent: Tensor) -> Tensor:
    """base^exponent with the special cases of C's pow, a zero base being +0."""
    size = base.abs()
    result = exp2(exponent * log(size) * (1 / math.log(2)))
    result = torch.where((size == 1.0) & (exponent.abs() == math.inf), 1.0, result)
    whole = exponent == torch.round(exponent)
    odd = whole & (0.5 * exponent != torch.round(0.5 * exponent))
    result = torch.where((base < 0.0) & odd, -result, result)
    result = torch.where((base < 0.0) & (size < math.inf) & ~whole, math.nan, result)
    return torch.where((base == 1.0) | (exponent == 0.0), 1.0, result)
