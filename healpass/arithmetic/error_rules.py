"""What torch's functions add to an error. Layer `arithmetic`: imports `estimate` and `bounds`.

Each rule takes an `Analysis` and the arguments of the function it is named after. It records steps
(`estimate` has the theory): the exact value, |F'| times the operands' errors, the rounding of FP32
arithmetic, and the remainder that F' leaves. `compound_rules` builds norms and attention of these.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from healpass.arithmetic.bounds import matmul_bound
from healpass.arithmetic.estimate import (
    ELEMENTARY,
    TINY,
    Analysis,
    Estimate,
    U,
    exact,
    within,
)
from healpass.arithmetic.formats import FORMATS, FP32, FloatFormat
from healpass.arithmetic.symbols import matmul_magnitudes
from healpass.errors import NoRuleError

Rule = Callable[..., Any]
FORMATS_BY_NAME = {fmt.name: fmt for fmt in FORMATS.values()}


# ------------------------------------------------------------------------------ sums and products


def operand(x: Any) -> Estimate:
    """An estimate of a Python number, an integer tensor or a mask, too."""
    if isinstance(x, Estimate):
        return x
    if isinstance(x, Tensor):
        return Estimate(x.double(), torch.zeros_like(x, dtype=torch.float64))
    return exact(torch.tensor(float(x), dtype=torch.float32))


def add(run: Analysis, a: Any, b: Any, *, alpha: float = 1) -> Estimate:
    """`a + alpha * b`.

    Args:
        run: Records the steps.
        a: An estimate, an exact tensor or a number.
        b: Any of those, broadcast.
        alpha: Factor of `b`.
    """
    a, b = operand(a), operand(b)
    if alpha != 1:
        b = mul(run, b, alpha)
    return run.rounded(a.value + b.value, a.error + b.error)


def sub(run: Analysis, a: Any, b: Any, *, alpha: float = 1) -> Estimate:
    """`a - alpha * b`.

    Args:
        run: Records the steps.
        a: An estimate, an exact tensor or a number.
        b: Any of those, broadcast.
        alpha: Factor of `b`.
    """
    b = operand(b)
    return add(run, a, Estimate(-b.value, b.error, b.format), alpha=alpha)


def mul(run: Analysis, a: Any, b: Any) -> Estimate:
    """`a * b`.

    Args:
        run: Records the steps.
        a: An estimate, an exact tensor or a number.
        b: Any of those, broadcast.
    """
    a, b = operand(a), operand(b)
    inherited = a.size * b.error + b.size * a.error
    return run.rounded(a.value * b.value, inherited, a.error * b.error)


def div(run: Analysis, a: Any, b: Any) -> Estimate:
    """`a / b`; unbounded where b may be 0.

    With r = db / b: (a + da) / (b + db) - a/b - da/b + r a/b = -r da/b + r^2 / (1 + r) (a + da)/b.
    By a number, CUDA multiplies by its reciprocal: three roundings of half an ulp instead of one.

    Args:
        run: Records the steps.
        a: An estimate, an exact tensor or a number.
        b: Any of those, broadcast.
    """
    roundings = 1 if isinstance(b, Estimate) else 3
    a, b = operand(a), operand(b)
    r = torch.where(b.error == 0, 0.0, b.error / b.size)
    room = (1 - r).clamp_min(0)
    inherited = (a.error + a.size * r) / b.size
    remainder = (r * a.error + torch.where(r == 0, 0.0, r.square() / room) * a.magnitude) / b.size
    return run.rounded(a.value / b.value, inherited, remainder, roundings * U)


def total(run: Analysis, x: Estimate, dim: Any = None, keepdim: bool = False) -> Estimate:
    """`x.sum(dim)`, in any order.

    Args:
        run: Records the steps.
        x: What is summed.
        dim: One or several dimensions; None for all.
        keepdim: Keep them with size 1.
    """
    dims = tuple(range(x.value.dim())) if dim is None else dim
    value = x.value.sum(dims, keepdim)
    n = x.value.numel() // max(value.numel(), 1)
    own = n * U / (1 - n * U) * x.magnitude.sum(dims, keepdim)
    return run.step(value, x.error.sum(dims, keepdim), own, None, own / math.sqrt(3 * max(n, 1)))


def mean(run: Analysis, x: Estimate, dim: Any = None, keepdim: bool = False) -> Estimate:
    """`x.mean(dim)`.

    Args:
        run: Records the steps.
        x: What is averaged.
        dim: One or several dimensions; None for all.
        keepdim: Keep them with size 1.
    """
    summed = total(run, x, dim, keepdim)
    return div(run, summed, x.value.numel() // max(summed.value.numel(), 1))


def matmul(run: Analysis, a: Estimate, b: Estimate) -> Estimate:
    """`a @ b` by the arithmetic of the run.

    Args:
        run: Records the steps; its `how` says which arithmetic.
        a: `[..., M, K]` or `[K]`.
        b: `[..., K, N]` or `[K]`.
    """
    if b.value.dim() == 1:
        return matmul(run, a, b.moved(lambda x: x[:, None])).moved(lambda y: y.squeeze(-1))
    if a.value.dim() == 1:
        return matmul(run, a.moved(lambda x: x[None]), b).moved(lambda y: y.squeeze(-2))
    how, inherited = run.how, a.size @ b.error + a.error @ b.size
    bound = matmul_bound(
        how.precision, a.value.shape[-1], left=a.format, right=b.format, rule=how.rule
    )
    sizes = matmul_magnitudes(a.magnitude, b.magnitude)
    own, spread = (
        torch.as_tensor(limit, dtype=torch.float64, device=a.value.device)
        for limit in (
            bound.evaluate(**sizes),
            bound.evaluate_probabilistic(**sizes, **{"lambda": 1.0}),
        )
    )
    return run.step(a.value @ b.value, inherited, own, a.error @ b.error, spread)


def linear(run: Analysis, x: Estimate, weight: Estimate, bias: Any = None) -> Estimate:
    """`x @ weight.T + bias`.

    Args:
        run: Records the steps.
        x: `[..., K]`.
        weight: `[N, K]`.
        bias: `[N]`, or None.
    """
    y = matmul(run, x, weight.moved(lambda w: w.mT))
    return y if bias is None else add(run, y, bias)


# -------------------------------------------------------------------------------------- functions


def _smooth(
    function: Callable[..., Tensor], curvature: float, scale: str, largest: float = torch.inf
) -> Rule:
    """A function with |f''| <= `curvature` and |f| <= `largest`, computed within `ELEMENTARY`.

    `scale` says what its rounding is relative to: result, argument, or 1. Where exp(-x) overflows
    inside, a result below 2^-120 may be lost.
    """

    def rule(run: Analysis, x: Estimate, **kwargs: Any) -> Estimate:
        value = function(x.value, **kwargs)
        slope = _slope(function, x.value, kwargs)
        inherited, remainder = slope.abs() * x.error, curvature / 2 * x.error.square()
        size = {"result": value.detach().abs(), "argument": x.size, "one": torch.ones_like(slope)}
        own = ELEMENTARY * (size[scale] + x.error + inherited + remainder) + 2.0**-120
        return within(run.step(value, inherited, own, remainder), largest)

    return rule


def _slope(function: Callable[..., Tensor], x: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """f'(x), elementwise."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(function(x, **kwargs).sum(), x)[0]


def relu(run: Analysis, x: Estimate, inplace: bool = False) -> Estimate:
    """Exact; its slope is wrong where the error may change the sign.

    Args:
        run: Records the steps.
        x: Of any shape.
        inplace: Refused where it is True.
    """
    refuse_in_place(inplace)
    unsure = torch.where(x.size <= x.error, x.error, 0.0)
    inherited = torch.where(x.value.detach() > 0, x.error, 0.0)
    return run.step(x.value.relu(), inherited, torch.zeros_like(unsure), unsure)


def exp(run: Analysis, x: Estimate) -> Estimate:
    """An error e becomes a factor of 1 + e + (exp(e) - 1 - e)."""
    value = x.value.exp()
    size = value.detach()
    beyond = torch.where(
        size > 0, size * (torch.expm1(x.error) - x.error), (x.value.detach() + x.error).exp()
    )
    return run.rounded(value, size * x.error, beyond, ELEMENTARY)


def _root(function: Callable[[Tensor], Tensor], power: float) -> Rule:
    """x^power for power 1/2 or -1/2; unbounded where the argument may be 0.

    |f''| = |power (power - 1)| x^(power - 2) is largest at the lower end of [x - e, x + e].
    """

    def rule(run: Analysis, x: Estimate) -> Estimate:
        lowest = (x.value.detach() - x.error).clamp_min(0)
        curvature = abs(power * (power - 1)) * lowest ** (power - 2)
        remainder = torch.where(x.error == 0, 0.0, curvature / 2 * x.error.square())
        slope = abs(power) * x.size ** (power - 1)
        inherited = torch.where(x.error == 0, 0.0, slope * x.error)
        return run.rounded(function(x.value), inherited, remainder, ELEMENTARY)

    return rule


sqrt, rsqrt = _root(torch.sqrt, 0.5), _root(torch.rsqrt, -0.5)


def power(run: Analysis, x: Estimate, exponent: float) -> Estimate:
    """`x ** exponent` for the exponents that norms use.

    Args:
        run: Records the steps.
        x: The base.
        exponent: 2, 0.5 or -0.5.
    """
    if exponent == 2:
        return mul(run, x, x)
    if exponent in (0.5, -0.5):
        return (sqrt if exponent > 0 else rsqrt)(run, x)
    raise NoRuleError(
        f"no error rule for pow with exponent {exponent}: rules cover 2, 0.5 and -0.5."
    )


def refuse_in_place(inplace: bool) -> None:
    """Refuse to write into an operand: other names of its memory would not know.

    Raises:
        NoRuleError: `inplace` is set.
    """
    if inplace:
        raise NoRuleError("no error rule for inplace=True: it writes into its operand.")


def masked_fill(_run: Analysis, x: Estimate, mask: Tensor, value: float) -> Estimate:
    """Constants in some places.

    Args:
        _run: Not read: nothing is rounded.
        x: Of any shape.
        mask: Bool, broadcastable to `x`; True is filled.
        value: An exact number.
    """
    return Estimate(x.value.masked_fill(mask, value), x.error.masked_fill(mask, 0.0))


def cast(dtype: torch.dtype | None) -> Rule:
    """A cast to fewer bits rounds once, unless a pass drops it; one to more bits is exact."""

    def rule(run: Analysis, x: Any, *args: Any, **kwargs: Any) -> Any:
        source, target = FORMATS_BY_NAME[x.format], _target(dtype, (*args, *kwargs.values()))
        narrow = target.precision < FP32.precision
        if target.precision >= source.precision or (narrow and not run.how.casts):
            return replace(x, format=FP32.name) if target is FP32 else x
        lost = target.smallest_subnormal + TINY
        rounded = run.rounded(x.value, x.error, None, target.unit_roundoff, lost)
        return replace(rounded, format=target.name)

    return rule


def _target(dtype: torch.dtype | None, given: tuple[Any, ...]) -> FloatFormat:
    """The format that a cast's arguments name: by a dtype, or by a tensor that has one."""
    for argument in (dtype, *given):
        if isinstance(argument, Estimate):
            return FORMATS_BY_NAME[argument.format]
        found = argument.dtype if isinstance(argument, Tensor) else argument
        if isinstance(found, torch.dtype):
            return FORMATS[found]
    return FP32


#: Rules by the name of the function. Curvatures are the largest |f''|: 4 / (3 sqrt(3)) of tanh,
#: 1 / (6 sqrt(3)) of sigmoid, 1/2 of SiLU and sqrt(2 / pi) of GELU, both at 0.
RULES: dict[str, Rule] = {
    "add": add,
    "sub": sub,
    "mul": mul,
    "truediv": div,
    "div": div,
    "sum": total,
    "mean": mean,
    **dict.fromkeys(("matmul", "mm", "bmm"), matmul),
    "linear": linear,
    "relu": relu,
    "sigmoid": _smooth(torch.sigmoid, 0.0963, "result", 1.0),
    "tanh": _smooth(torch.tanh, 0.77, "one", 1.0),
    "silu": _smooth(torch.nn.functional.silu, 0.5, "result"),
    "gelu": _smooth(torch.nn.functional.gelu, 0.798, "argument"),
    "cos": _smooth(torch.cos, 1.0, "one", 1.0),
    "sin": _smooth(torch.sin, 1.0, "one", 1.0),
    "exp": exp,
    "sqrt": sqrt,
    "rsqrt": rsqrt,
    "pow": power,
    "square": lambda run, x: mul(run, x, x),
    "masked_fill": masked_fill,
    "to": cast(None),
    "type_as": cast(None),
    "float": cast(torch.float32),
    "half": cast(torch.float16),
    "bfloat16": cast(torch.bfloat16),
}
