"""The error bounds of matmuls. Layer `arithmetic`: imports `symbols`, which defines the notation.

Lemmas, cited by name:

* **gamma**: n roundings to nearest in any order, each relative u, err by at most gamma_n times
  the sum of magnitudes (Higham, Accuracy and Stability of Numerical Algorithms, Lemma 3.1 and
  section 3.1).
* **split**: the pieces of an operand differ from it by at most sigma |x| + l, with sigma = 2u for
  two FP16 pieces of FP32 and 0 for one piece, and l = 2^-40 (1 + 2^-11) max|x| + 2^-151, proved in
  `pieces`.
* **dropped**: |low piece| <= h (1 + h) |x| + 3 l, so low x low is at most what this product says.
* **align**: one step of a tensor core (`tensorcore.rules`, arXiv 2511.10909) has L + 1 addends.
  One has the largest exponent e and loses nothing, since its 23 or 20 bits of fraction are at most
  F; the others lose less than 2^(e-F) each, and 2^e is at most the sum of magnitudes so far. A
  subnormal operand is stored with its format's smallest exponent, which adds alpha = 2^11 l to its
  magnitude there. Where e is that of a zero (-131 or less) or of a subnormal accumulator (-126),
  each addend loses less than 2^-149, which is in the underflow term.
* **chop**: a sum rounded toward zero to FP32 loses at most 2^-23 of itself, and rounding toward
  zero never makes a partial sum larger than the sum of magnitudes.
* **promote**: FP32 adds the chains of a tile, the tiles and the splits in turn, which is the gamma
  lemma with the number of roundings that one product can go through (`promotion`).
* **underflow**: a result that a power of two takes below 2^-126 is rounded to a multiple of
  2^-149.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import sympy
from sympy import Expr, Integer, Rational

from healpass.arithmetic.promotion import TILE_K, promotion_interval
from healpass.arithmetic.symbols import (
    LAMBDA,
    SA,
    SB,
    TINY,
    A,
    B,
    Bound,
    H,
    Q,
    S,
    Term,
    U,
    gamma,
    matmul_magnitudes,
)
from healpass.errors import NoRuleError

__all__ = ["HARDWARE", "Bound", "Hardware", "Kernel", "Term", "matmul_bound", "matmul_magnitudes"]

#: What a tiny element loses beside its row's maximum: 2^-25 under a scale that maps that to 2^15.
LOST = Rational(1, 2**40) * (1 + H)
FLOOR = Rational(1, 2**151)


@dataclass(frozen=True)
class _Side:
    """How one operand enters: relative split error, absolute loss, and growth of its pieces."""

    sigma: Expr
    lost: Expr
    alpha: Expr
    pieces: int

    @property
    def high(self) -> Expr:
        """|high piece| <= high |x| + lost."""
        return 1 + H if self.pieces == 2 else Integer(1)

    @property
    def low(self) -> Expr:
        """|low piece| <= low |x| + 3 lost."""
        return H * (1 + H)


@dataclass(frozen=True)
class Hardware:
    """How a chain is added, as the bounds need it; `tensorcore.rules` has the same numbers.

    Attributes:
        group: L; 0 for FP32 additions rounded to nearest in any order.
        fraction_bits: F.
    """

    group: int
    fraction_bits: int

    @property
    def promote_every(self) -> int:
        """K between promotions to FP32."""
        return promotion_interval(self.group)


HARDWARE: dict[str, Hardware] = {
    "v100": Hardware(4, 23),
    "a100": Hardware(8, 24),
    "ada": Hardware(8, 24),
    "h100": Hardware(16, 25),
    "h200": Hardware(16, 25),
    "b200": Hardware(16, 25),
    "fp32": Hardware(0, 0),
    "sgemm": Hardware(0, 0),
}


@dataclass(frozen=True)
class Kernel:
    """How a kernel cuts a reduction.

    Attributes:
        promote_every: K of a chain; by default what the rule asks for, None for one over all K.
        tile_k: K of a tile: all low products of a tile (or of a shorter chain) come before its
            high ones.
        split_k: Parts of K summed apart.
        headroom: Bits that row and channel scales leave unused: 0 for `pieces`, 1 for a kernel
            that maps the maximum to [2^14, 2^15). Each doubles what a tiny element loses.
    """

    promote_every: int | Literal["rule"] | None = "rule"
    tile_k: int = TILE_K
    split_k: int = 1
    headroom: int = 0


PLAIN = Kernel()


@functools.cache
def matmul_bound(
    precision: str,
    k: int,
    *,
    left: str = "fp32",
    right: str = "bf16",
    rule: str | None = None,
    kernel: Kernel = PLAIN,
) -> Bound:
    """Forward error of one element of `heal::mm` with `k` terms.

    Args:
        precision: `heal`; or `layercast` and `fp32`, FP32 arithmetic in any order; or `bf16` and
            `fp16`, the same with operands of that format and the result rounded to it.
        k: Length of the reduced dimension.
        left: Format of the left operand: `fp32`, `fp16` or `bf16`.
        right: Format of the right operand.
        rule: For `heal`, who adds: a GPU generation, `fp32` (pieces and FP32 additions), or None
            for what CPU runs unsimulated, FP32 arithmetic on the upcast operands.
        kernel: For `heal` with a rule, how the reduction is cut.

    Raises:
        NoRuleError: The precision or the rule has no bound here.
    """
    if precision in ("layercast", "fp32") or (precision == "heal" and rule is None):
        return _fp32_bound(k)
    if precision in ("bf16", "fp16"):
        return _rounded_bound(_fp32_bound(k), precision)
    if precision != "heal" or rule not in HARDWARE:
        raise NoRuleError(
            f"no error bound for precision={precision!r}, rule={rule!r}: bounds cover heal (with "
            f"a rule among {', '.join(HARDWARE)}), layercast, fp32, bf16 and fp16."
        )
    hardware = HARDWARE[rule]
    asked = kernel.promote_every
    every = hardware.promote_every if asked == "rule" else asked
    problem = _Problem.of(k, every or max(k, 1), kernel.tile_k, kernel.split_k)
    return _heal_bound(problem, *_sides(left, right, kernel.headroom), hardware, rule)


@dataclass(frozen=True)
class _Problem:
    """A reduction: terms, terms per chain, FP32 additions that one product can go through.

    `one_tile`: no chain is longer than a tile.
    """

    k: int
    chain: int
    additions: int
    one_tile: bool

    @classmethod
    def of(cls, k: int, promote_every: int, tile_k: int, splits: int) -> _Problem:
        """Chains of a tile are added to one another, tiles (or longer chains) to the register."""
        chain, step = min(k, promote_every), max(promote_every, tile_k)
        in_tile, in_register = -(-min(k, step) // promote_every), -(-k // step)
        additions = sum(max(count - 1, 0) for count in (in_tile, in_register, splits))
        return cls(k, chain, additions, chain <= tile_k)


def _fp32_bound(k: int) -> Bound:
    terms = (Term("gamma", gamma(k) * S), Term("underflow", k * TINY))
    probabilistic = LAMBDA * sympy.sqrt(_rounding_variance(k)) * Q + k * TINY
    return Bound(f"FP32 arithmetic, K={k}", terms, probabilistic)


def _rounded_bound(inner: Bound, fmt: str) -> Bound:
    """The result, at most S + its own error, is rounded once more to 16 bits."""
    u16, tiny = (
        (Rational(1, 2**8), Rational(1, 2**134)) if fmt == "bf16" else (H, Rational(1, 2**25))
    )
    last = Term("gamma", u16 * (S + inner.expression) + tiny)
    assert inner.probabilistic is not None
    # The result has the standard deviation Q, and its rounding error is uniform.
    probabilistic = inner.probabilistic + LAMBDA * u16 / sympy.sqrt(3) * Q + tiny
    return Bound(f"{inner.name}, {fmt} result", (*inner.terms, last), probabilistic)


def _sides(left: str, right: str, headroom: int) -> tuple[_Side, _Side]:
    if left == right != "fp32":
        alpha = Rational(1, 2**126) if left == "bf16" else Rational(1, 2**14)
        native = _Side(Integer(0), Integer(0), alpha, 1)
        return native, native
    lost = LOST * 2**headroom
    return _scaled_side(left, lost * A), _scaled_side(right, lost * B)


def _scaled_side(fmt: str, lost: Expr) -> _Side:
    lost = lost + FLOOR
    split = fmt == "fp32"
    return _Side(2 * U if split else Integer(0), lost, 2**11 * lost, 2 if split else 1)


def _product(k: int, p: Expr, p_abs: Expr, q: Expr, q_abs: Expr) -> Expr:
    """sum_k (p |a_k| + p_abs) (q |b_k| + q_abs)."""
    return p * q * S + p * q_abs * SA + q * p_abs * SB + k * p_abs * q_abs


def _heal_bound(problem: _Problem, a: _Side, b: _Side, hw: Hardware, rule: str) -> Bound:
    k = problem.k
    split = _product(k, 1 + a.sigma, a.lost, 1 + b.sigma, b.lost) - S
    terms = [Term("split", sympy.expand(split))]
    if a.pieces == b.pieces == 2:
        dropped = _product(k, a.low, 3 * a.lost, b.low, 3 * b.lost)
        terms.append(Term("dropped", sympy.expand(dropped)))
    high, low, products = _magnitudes_of_pieces(k, a, b)
    terms += _chain_terms(problem, hw, high, low, products)
    additions = problem.additions
    growth = 1 if hw.group else 1 + gamma(products * problem.chain)
    terms.append(Term("promote", sympy.expand(gamma(additions) * growth * (high + low))))
    terms.append(Term("underflow", TINY if a.lost != 0 else k * 2 * TINY))
    return Bound(
        f"heal on {rule}, K={k}, {products} product(s)",
        tuple(terms),
        _heal_probabilistic(problem, a, b, hw, products),
    )


def _magnitudes_of_pieces(k: int, a: _Side, b: _Side) -> tuple[Expr, Expr, int]:
    """Magnitude of the high product, of the low ones together, and the number of products."""
    a_abs, b_abs = 3 * a.lost + a.alpha, 3 * b.lost + b.alpha
    high = _product(k, a.high, a_abs, b.high, b_abs)
    low: Expr = Integer(0)
    if a.pieces == 2:
        low += _product(k, a.low, a_abs, b.high, b_abs)
    if b.pieces == 2:
        low += _product(k, a.high, a_abs, b.low, b_abs)
    return high, low, a.pieces + b.pieces - 1


def _chain_terms(
    problem: _Problem, hw: Hardware, high: Expr, low: Expr, products: int
) -> list[Term]:
    """The chains' own errors. Low products run while the accumulator holds only low products."""
    if not hw.group:
        return [Term("gamma", sympy.expand(gamma(products * problem.chain) * (high + low)))]
    during_low = low if problem.one_tile else high + low
    total = sympy.expand((products - 1) * during_low + high + low)
    align = Rational(problem.chain, 2**hw.fraction_bits)
    chop = Rational(-(-problem.chain // hw.group), 2**23)
    return [
        Term("align", sympy.expand(align * total)),
        Term("chop", sympy.expand(chop * total)),
    ]


def _rounding_variance(n: int) -> Expr:
    """Variance, in units of Q^2, of n roundings to nearest along a sum of n products.

    A rounding of the partial sum s is uniform in +-u |s|, with variance u^2 s^2 / 3, and the
    partial sum of i of n products has the variance i / n: together u^2 / 3 * (n + 1) / 2.
    """
    return U**2 * Rational(n + 1, 6)


def _heal_probabilistic(
    problem: _Problem, a: _Side, b: _Side, hw: Hardware, products: int
) -> Expr:
    """Variances add over splits, chains and promotions.

    An addend's loss by aligning is uniform in [0, 2^(e-F)) with the addend's sign, so of mean
    zero, and 4^e is at most the variance of the sum so far: B / 6 (1 + 1 / G) 4^-F over the G
    groups of a chain. Chopping always goes toward zero, so its losses within a chain may all have
    one sign: their standard deviations add, to at most 2^-23 / sqrt(3) * (2 G / 3 + 1).
    """
    dropped = H**2 if products == 3 else Integer(0)
    variance = (a.sigma**2 + b.sigma**2 + dropped**2) / 3
    if hw.group:
        groups = -(-problem.chain // hw.group)
        variance += Rational(problem.chain, 6 * 4**hw.fraction_bits) * (
            1 + Rational(1, max(groups, 1))
        )
        variance += Rational(1, 3 * 4**23) * (Rational(2 * groups, 3) + 1) ** 2
    else:
        variance += _rounding_variance(products * problem.chain)
    variance += _rounding_variance(problem.additions)
    normwise = a.lost * SB + b.lost * SA + TINY
    return LAMBDA * sympy.sqrt(variance) * Q + normwise
