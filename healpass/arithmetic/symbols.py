"""The vocabulary of error bounds: magnitudes, terms, bounds. Layer `arithmetic`.

A `Bound` is a sum of terms. Each term is a sympy expression in the magnitudes of the operands and
carries the lemma that proves it. The same expression is evaluated in tests, printed in reports and
quoted in the documentation.

Notation, for one element y = sum_k a_k b_k of a product with K terms:

| symbol | meaning                | | constant | meaning                                        |
|--------|------------------------|-|----------|------------------------------------------------|
| S      | sum_k |a_k| |b_k|      | | u        | 2^-24, unit roundoff of FP32                   |
| A, B   | max_k |a_k|, max |b_k| | | h        | 2^-11, unit roundoff of FP16                   |
| SA, SB | sums of |a_k|, |b_k|   | | L, F     | group and fraction bits of a tensor core       |
| Q      | sqrt(sum (a_k b_k)^2)  | | gamma_n  | n u / (1 - n u)                                |
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy import Expr, Rational, Symbol
from torch import Tensor

U = Rational(1, 2**24)
H = Rational(1, 2**11)
TINY = Rational(1, 2**149)

S, A, B, SA, SB, Q = sympy.symbols("S A B SA SB Q", nonnegative=True)
#: Standard deviations of a probabilistic bound.
LAMBDA = Symbol("lambda", positive=True)
DEFAULT_LAMBDA = 4.0


@dataclass(frozen=True)
class Term:
    """One summand of a bound and the lemma it rests on."""

    lemma: str
    expression: Expr


@dataclass(frozen=True)
class Bound:
    """A forward error bound of one output element.

    Attributes:
        name: What it bounds.
        terms: The summands of the worst case.
        probabilistic: The square-root companion: for rounding errors that are independent of mean
            zero and products of random sign (Higham and Mary 2019, 2020). No guarantee.
    """

    name: str
    terms: tuple[Term, ...]
    probabilistic: Expr | None = None

    @property
    def expression(self) -> Expr:
        """The worst case, the sum of the terms."""
        return sympy.Add(*(term.expression for term in self.terms))

    @property
    def text(self) -> str:
        """The worst case in one line, coefficients rounded up to two digits."""
        return describe(self.expression)

    def evaluate(self, **magnitudes: Tensor | float) -> Any:
        """The worst case for given S, A, B, SA, SB: FP64 tensors that broadcast, or numbers."""
        return evaluate(self.expression, magnitudes)

    def evaluate_probabilistic(self, **magnitudes: Tensor | float) -> Any:
        """The companion; besides the magnitudes it takes Q and, optionally, `lambda`.

        Raises:
            ValueError: There is none.
        """
        if self.probabilistic is None:
            raise ValueError(f"{self.name} has no probabilistic companion; use evaluate().")
        return evaluate(self.probabilistic, {"lambda": DEFAULT_LAMBDA, **magnitudes})


def evaluate(expression: Expr, magnitudes: dict[str, Tensor | float]) -> Any:
    """Value of `expression` in FP64; zero times infinity does not arise for finite magnitudes."""
    names = tuple(sorted(symbol.name for symbol in expression.free_symbols))
    return _function(expression, names)(*(magnitudes[name] for name in names))


@functools.cache
def _function(expression: Expr, names: tuple[str, ...]) -> Callable[..., Any]:
    symbols = sorted(expression.free_symbols, key=lambda symbol: symbol.name)
    assert tuple(symbol.name for symbol in symbols) == names
    return sympy.lambdify(symbols, sympy.N(expression, 30), modules=[{"exp": _exp}, "math"])


def _exp(x: Tensor | float) -> Tensor:
    return torch.as_tensor(x, dtype=torch.float64).exp()


def matmul_magnitudes(a: Tensor, b: Tensor) -> dict[str, Tensor | float]:
    """S, A, B, SA, SB and Q of `a [..., M, K] @ b [..., K, N]` in FP64, broadcastable."""
    left, right = a.to(torch.float64).abs(), b.to(torch.float64).abs()
    if a.shape[-1] == 0:
        return dict.fromkeys(("S", "A", "B", "SA", "SB", "Q"), 0.0)
    return {
        "S": left @ right,
        "A": left.amax(-1, keepdim=True),
        "B": right.amax(-2, keepdim=True),
        "SA": left.sum(-1, keepdim=True),
        "SB": right.sum(-2, keepdim=True),
        "Q": (left.square() @ right.square()).sqrt(),
    }


@functools.cache
def describe(expression: Expr) -> str:
    """The polynomial in one line: S's coefficient in units of u, the others as powers of two.

    Coefficients are rounded up. Terms below 2^-50, which only operands near zero can feel, are
    left out and named "tiny". Cached: a graph asks for the same few bounds at every node.
    """
    polynomial = sympy.Poly(sympy.expand(expression), S, A, B, SA, SB)
    parts, tiny = [], False
    for powers, coefficient in polynomial.terms():
        symbols = "*".join(
            s.name for s, power in zip(polynomial.gens, powers, strict=True) if power
        )
        if coefficient < Rational(1, 2**50):
            tiny = True
            continue
        in_u = symbols == "S"
        exact = float(coefficient / U if in_u else sympy.log(coefficient, 2))
        value = math.ceil(10 * exact) / 10
        parts.append(f"{value:.1f}u {symbols}" if in_u else f"2^{value:.1f} {symbols}")
    return " + ".join([*parts, "tiny"] if tiny else parts) or "0"


def gamma(n: int | Expr) -> Expr:
    """`n u / (1 - n u)`, for n u < 1 (Higham, Lemma 3.1)."""
    return n * U / (1 - n * U)
