"""The accumulation rules, one scalar at a time, in exact rationals. Layer `tensorcore`.

Slow and obvious on purpose: this is the specification that `simulate` must match bit for bit. It
takes lists of Python floats and shares nothing with the fast version but the rules and the
schedule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from healpass.arithmetic.formats import FP32, FloatFormat
from healpass.tensorcore.rules import INSTRUCTION_K, AccumulationRule, Schedule

Row = Sequence[float]


def reference_dot(
    products: Sequence[tuple[Row, Row]],
    rule: AccumulationRule,
    schedule: Schedule,
    fmt: FloatFormat,
) -> float:
    """One element of a matmul: the sum over pairs of pieces and over K, as the hardware adds it.

    Args:
        products: Pairs (row of A's piece, column of B's piece), in the order of the chain.
        rule: How to add.
        schedule: In which order.
        fmt: Format of the pieces, which says what exponent a subnormal operand has.
    """
    k = len(products[0][0])
    total = 0.0
    for part, steps in enumerate(schedule.splits(k)):
        register = 0.0
        for index, chains in enumerate(steps):
            tile = 0.0
            for number, dots in enumerate(chains):
                chain = _chain(products, dots, rule, fmt)
                tile = chain if number == 0 else _add_fp32(tile, chain, rule)
            register = tile if index == 0 else _add_fp32(register, tile, rule)
        total = register if part == 0 else _add_fp32(total, register, rule)
    return round_fp32(total, toward_zero=False) if rule.kind == "exact" else total


def _chain(
    products: Sequence[tuple[Row, Row]],
    dots: Sequence[range],
    rule: AccumulationRule,
    fmt: FloatFormat,
) -> float:
    accumulator = 0.0
    for dot in dots:
        for left, right in products:
            for start in range(dot.start, dot.stop, INSTRUCTION_K):
                stop = min(start + INSTRUCTION_K, dot.stop)
                for group in range(start, stop, rule.group):
                    end = min(group + rule.group, stop)
                    pairs = list(zip(left[group:end], right[group:end], strict=True))
                    accumulator = _step(accumulator, pairs, rule, fmt)
    return accumulator


def _step(
    accumulator: float, pairs: list[tuple[float, float]], rule: AccumulationRule, fmt: FloatFormat
) -> float:
    terms = [a * b for a, b in pairs]  # exact in FP64: 48 bits at most
    if not all(map(math.isfinite, [*terms, accumulator])):
        return sum(terms, accumulator)
    exact = sum((Fraction(a) * Fraction(b) for a, b in pairs), Fraction(accumulator))
    if rule.kind == "exact":
        return float(exact)
    if rule.kind == "fma":
        return round_fp32(exact, toward_zero=False)
    return _aligned_sum(accumulator, pairs, rule, fmt)


def _aligned_sum(
    accumulator: float, pairs: list[tuple[float, float]], rule: AccumulationRule, fmt: FloatFormat
) -> float:
    zero = rule.zero_exponent
    exponents = [_exponent(a, fmt) + _exponent(b, fmt) if a and b else zero for a, b in pairs]
    largest = max([_exponent(accumulator, FP32) if accumulator else zero, *exponents])
    quantum = Fraction(2) ** (largest - rule.fraction_bits)
    addends = [Fraction(accumulator), *(Fraction(a) * Fraction(b) for a, b in pairs)]
    total = sum((int(addend / quantum) * quantum for addend in addends), Fraction(0))
    return round_fp32(total, toward_zero=True)


def _exponent(x: float, fmt: FloatFormat) -> int:
    """The exponent that `x`, not zero, is stored with: subnormals have the smallest."""
    return max(math.frexp(x)[1] - 1, fmt.min_exponent)


def _add_fp32(x: float, y: float, rule: AccumulationRule) -> float:
    if rule.kind == "exact" or not (math.isfinite(x) and math.isfinite(y)):
        return x + y
    return round_fp32(Fraction(x) + Fraction(y), toward_zero=False)


def round_fp32(x: Fraction | float, *, toward_zero: bool) -> float:
    """`x` rounded to FP32, to nearest even or toward zero; past the largest number is infinity."""
    if isinstance(x, float) and not math.isfinite(x):
        return x
    x = Fraction(x)
    if x == 0:
        return 0.0
    quantum = Fraction(2) ** max(_floor_log2(abs(x)) - FP32.precision + 1, -149)
    steps = int(x / quantum) if toward_zero else round(x / quantum)
    if abs(steps * quantum) >= Fraction(2) ** (FP32.max_exponent + 1):
        return math.copysign(math.inf, steps)
    return float(steps * quantum)


def _floor_log2(x: Fraction) -> int:
    guess = x.numerator.bit_length() - x.denominator.bit_length()
    return guess if Fraction(2) ** guess <= x else guess - 1
