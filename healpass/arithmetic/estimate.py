"""A program run in FP64 that collects what each step adds to the error. Layer `arithmetic`.

Let v_k be the exact values of a program's steps and w_k the computed ones. A step F with the
errors d = w - v of its operands computes F(v + d) + own, so that its own error is

    d_k = F'(v) d + fresh,    |fresh| <= own rounding + second-order remainder of F over +-|d|.

This is a linear recursion. Its solution is d_y = sum_k J_k fresh_k with J_k the derivative of the
output by step k, everything in between included, and so

    |d_y| <= sum_k |J_k| |fresh_k|                                                        (adjoint)

for every output element. `Analysis` adds a zero, the step's noise, to each exact value; J_k is
then what autograd gives for that noise. The remainder needs a bound of |d| first: that of the step
before, (adjoint) again, or the running error analysis |F'| |d| + fresh (Wilkinson 1986; Higham,
section 3.3), whichever is less. Because J_k belongs to the whole way from step k to the output,
the factor sqrt(K) that a running analysis loses in every matmul is lost once (compare affine
arithmetic, Stolfi and de Figueiredo 1997). FP64's own roundings are not counted, and nothing is
said of results that overflow FP32.

If the steps' own errors are independent and of mean zero with the deviation s_k (Higham and Mary
2019), that of the output is sqrt(sum_k J_k^2 s_k^2): the square-root companion of the bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from healpass.arithmetic.formats import FORMATS, FP32

#: Relative error of an elementary function (exp, log, tanh, sqrt ...) or short sequence of them.
ELEMENTARY = 8 * FP32.unit_roundoff
U = FP32.unit_roundoff
TINY = FP32.smallest_subnormal
#: Output elements whose derivatives are taken at once: what a batched backward holds in memory.
ROWS = 128


@dataclass(frozen=True)
class Arithmetic:
    """Which arithmetic runs a program.

    Attributes:
        precision: Of the matmuls, as in `matmul_bound`.
        rule: Who adds, as in `matmul_bound`.
        kv: Format of Q, K and V in attention.
        casts: Whether casts of activations to 16 bits are kept; the promote pass drops them.
    """

    precision: str = "heal"
    rule: str | None = None
    kv: str = "fp32"
    casts: bool = True


@dataclass(frozen=True)
class Estimate:
    """A tensor with its error.

    Attributes:
        value: FP64, what exact arithmetic gives; part of an autograd graph.
        error: FP64 of the same shape, >= |computed - value| elementwise.
        format: Format of the computed tensor: `fp32`, or what a 16-bit input or weight has.
    """

    value: Tensor
    error: Tensor
    format: str = "fp32"

    @property
    def size(self) -> Tensor:
        """|value|, a constant for autograd."""
        return self.value.detach().abs()

    @property
    def magnitude(self) -> Tensor:
        """An upper bound of |computed|."""
        return self.size + self.error

    def moved(self, function: Callable[[Tensor], Tensor]) -> Estimate:
        """A move of elements, applied to value and error alike."""
        return replace(self, value=function(self.value), error=function(self.error))


def exact(x: Tensor) -> Estimate:
    """A tensor that is what it is: an input or a weight."""
    value = x.detach().to(torch.float64, copy=True)  # of its own, whoever writes to `x` later
    return Estimate(value, torch.zeros_like(value), FORMATS[x.dtype].name)


def lifted(x: Any) -> Any:
    """A floating-point tensor as an exact estimate, anything else as it is."""
    floating = isinstance(x, Tensor) and x.is_floating_point()
    return exact(x) if floating else x


@dataclass(frozen=True)
class Step:
    """One step: its noise, a zero with a gradient, and what the noise stands for.

    Attributes:
        noise: FP64 of the step's shape.
        fresh: The most that the step adds to the error.
        deviation: The standard deviation of its rounding.
    """

    noise: Tensor
    fresh: Tensor
    deviation: Tensor


#: A factor made of a derivative, and the size that it weighs.
Weigh = Callable[[Tensor, Step], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Analysis:
    """One run of a program: the noises of its steps so far.

    Attributes:
        how: The arithmetic.
        first_order: Leave the remainders out and take magnitudes from exact values. For programs
            too long for a rigorous bound; of the order of the square of the bound is missing.
        steps: A noise per step and what it stands for, filled as the program runs.
    """

    how: Arithmetic = field(default_factory=Arithmetic)
    first_order: bool = False
    steps: list[Step] = field(default_factory=list)

    def step(
        self,
        value: Tensor,
        inherited: Tensor,
        own: Tensor,
        remainder: Tensor | None = None,
        deviation: Tensor | None = None,
    ) -> Estimate:
        """Record a step; all arguments are FP64 tensors of one shape (or broadcast to it).

        Args:
            value: Its exact result, computed from the operands' values under autograd.
            inherited: |F'| times the operands' errors.
            own: Its rounding, for operands as large as they may be.
            remainder: What F adds to F' over the operands' errors; None for a linear F.
            deviation: Standard deviation of its rounding; None if that is uniform in +-own.
        """
        fresh = own if self.first_order or remainder is None else own + remainder
        fresh = infinite_if_undefined(fresh.detach().expand_as(value))
        noise = torch.zeros_like(value, requires_grad=True)
        spread = own / math.sqrt(3) if deviation is None else deviation
        self.steps.append(Step(noise, fresh, spread.detach().expand_as(value)))
        error = torch.zeros_like(fresh) if self.first_order else fresh + inherited.detach()
        return Estimate(value + noise, infinite_if_undefined(error))

    def rounded(
        self,
        value: Tensor,
        inherited: Tensor,
        remainder: Tensor | None = None,
        relative: float = U,
        absolute: float = TINY,
    ) -> Estimate:
        """A step that ends in one rounding of its result.

        Args:
            value: FP64, as in `step`.
            inherited: As in `step`.
            remainder: As in `step`.
            relative: Largest error of the rounding relative to its result.
            absolute: Largest error beside that, of an underflow.
        """
        moved = value.detach().abs() + inherited.detach()
        moved = moved if remainder is None else moved + remainder
        return self.step(value, inherited, relative * moved + absolute, remainder)

    def bound(self, y: Estimate) -> Tensor:
        """|computed - exact| of every element of `y` by (adjoint), FP64 of its shape."""
        return self._over_all_steps(y.value, lambda jacobian, step: (jacobian.abs(), step.fresh))

    def deviation(self, y: Estimate) -> Tensor:
        """The standard deviation that the steps' roundings give each element of `y`, FP64."""
        return self._over_all_steps(
            y.value, lambda jacobian, step: (jacobian.square(), step.deviation.square())
        ).sqrt()

    def refined(self, y: Estimate) -> Estimate:
        """`y` with the smaller of its running and its adjoint bound."""
        if self.first_order or not y.value.requires_grad:
            return y
        return replace(y, error=torch.minimum(y.error, self.bound(y)))

    def _over_all_steps(self, y: Tensor, weigh: Weigh) -> Tensor:
        """The sum over the steps of weighted derivatives, for each element of `y`."""
        with torch.enable_grad():
            flat = y.reshape(-1)
        rows = [self._rows(flat, start, weigh) for start in range(0, flat.numel(), ROWS)]
        return torch.cat(rows).reshape(y.shape) if rows else torch.zeros_like(y)

    def _rows(self, flat: Tensor, start: int, weigh: Weigh) -> Tensor:
        """The same for up to `ROWS` elements of `flat`."""
        chosen = torch.arange(start, min(start + ROWS, flat.numel()), device=flat.device)
        total = torch.zeros(len(chosen), dtype=torch.float64, device=flat.device)
        if not flat.requires_grad:
            return total
        noises = [step.noise for step in self.steps]
        seeds = torch.nn.functional.one_hot(chosen, flat.numel()).double()
        grads = torch.autograd.grad(
            flat, noises, seeds, retain_graph=True, allow_unused=True, is_grads_batched=True
        )
        for jacobian, step in zip(grads, self.steps, strict=True):
            if jacobian is not None:
                factor, size = weigh(jacobian, step)
                total = total + _weighted(factor.reshape(len(chosen), -1), size.reshape(-1))
        return infinite_if_undefined(total)


def _weighted(jacobian: Tensor, fresh: Tensor) -> Tensor:
    """`jacobian [R, E] @ fresh [E]`; an infinite error that is not looked at adds nothing."""
    unbounded = fresh.isinf()
    if not unbounded.any():
        return jacobian @ fresh
    reached = (jacobian[:, unbounded] != 0).any(1)
    finite = jacobian @ fresh.masked_fill(unbounded, 0.0)
    return finite.masked_fill(reached, torch.inf)


def infinite_if_undefined(error: Tensor) -> Tensor:
    """An error that is not a number is no bound at all: infinity."""
    return torch.where(error.isnan(), torch.inf, error)


def within(x: Estimate, largest: float | Tensor) -> Estimate:
    """What is computed is at most `largest`, so the error is at most |value| + largest."""
    return replace(x, error=torch.minimum(x.error, x.size + largest * (1 + ELEMENTARY)))
