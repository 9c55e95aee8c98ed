"""How errors pass through torch's functions. Layer `arithmetic`: imports `estimate` and `bounds`.

Each rule takes an `Arithmetic` and the arguments of the function it is named after, and returns an
estimate: f(x + e) - f(x), bounded over the whole interval, plus the roundings of f in FP32.
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
    Arithmetic,
    Estimate,
    U,
    exact,
    lifted,
    rounded_result,
    within,
)
from healpass.arithmetic.formats import FORMATS, FP32
from healpass.arithmetic.symbols import matmul_magnitudes

Rule = Callable[..., Any]


def _mapped(x: Estimate, function: Callable[[Tensor], Tensor]) -> Estimate:
    """A move of elements, applied to value and error alike."""
    return replace(x, value=function(x.value), error=function(x.error))


# ------------------------------------------------------------------------------ sums and products


def _operand(x: Any) -> Estimate:
    """An estimate of a Python number, too."""
    return x if isinstance(x, Estimate) else exact(torch.tensor(float(x), dtype=torch.float32))


def _add(how: Arithmetic, a: Any, b: Any, *, alpha: float = 1) -> Estimate:
    a, b = _operand(a), _operand(b)
    if alpha != 1:
        b = _mul(how, b, alpha)
    return rounded_result(a.value + b.value, a.error + b.error)


def _sub(how: Arithmetic, a: Any, b: Any, *, alpha: float = 1) -> Estimate:
    b = _operand(b)
    return _add(how, a, replace(b, value=-b.value), alpha=alpha)


def _mul(_how: Arithmetic, a: Any, b: Any) -> Estimate:
    a, b = _operand(a), _operand(b)
    error = a.value.abs() * b.error + b.value.abs() * a.error + a.error * b.error
    return rounded_result(a.value * b.value, error)


def _div(_how: Arithmetic, a: Any, b: Any) -> Estimate:
    a, b = _operand(a), _operand(b)
    value = a.value / b.value
    room = (b.value.abs() - b.error).clamp_min(0)
    return rounded_result(value, (a.error + value.abs() * b.error) / room)


def _sum(_how: Arithmetic, x: Estimate, dim: Any = None, keepdim: bool = False) -> Estimate:
    dims = tuple(range(x.value.dim())) if dim is None else dim
    value = x.value.sum(dims, keepdim)
    n = x.value.numel() // max(value.numel(), 1)
    spread = n * U / (1 - n * U) * x.magnitude.sum(dims, keepdim)
    return Estimate(value, x.error.sum(dims, keepdim) + spread)


def _mean(how: Arithmetic, x: Estimate, dim: Any = None, keepdim: bool = False) -> Estimate:
    total = _sum(how, x, dim, keepdim)
    return _div(how, total, x.value.numel() // max(total.value.numel(), 1))


def _matmul(how: Arithmetic, a: Estimate, b: Estimate) -> Estimate:
    if a.value.dim() < 2 or b.value.dim() < 2:
        raise ValueError("no error rule for a matmul with a vector: unsqueeze it to a matrix.")
    error = a.value.abs() @ b.error + a.error @ (b.value.abs() + b.error)
    bound = matmul_bound(
        how.precision, a.value.shape[-1], left=a.format, right=b.format, rule=how.rule
    )
    own = bound.evaluate(**matmul_magnitudes(a.magnitude, b.magnitude))
    return Estimate(a.value @ b.value, error + own)


def _linear(how: Arithmetic, x: Estimate, weight: Estimate, bias: Any = None) -> Estimate:
    y = _matmul(how, x, _mapped(weight, lambda w: w.mT))
    return y if bias is None else _add(how, y, bias)


# -------------------------------------------------------------------------------------- functions


def _lipschitz(function: Callable[[Tensor], Tensor], constant: float, scale: str) -> Rule:
    """A function of slope at most `constant`; `scale` says what its error is relative to.

    Where exp(-x) overflows inside, a result below 2^-120 may be lost.
    """

    def rule(_how: Arithmetic, x: Estimate, **kwargs: Any) -> Estimate:
        value = function(x.value, **kwargs)
        own = {"result": value.abs(), "argument": x.magnitude, "one": torch.ones_like(value)}[
            scale
        ]
        error = constant * x.error
        estimate = Estimate(value, error + ELEMENTARY * (own + error) + 2.0**-120)
        return within(estimate, 1.0) if function in (torch.sigmoid, torch.tanh) else estimate

    return rule


def _relu(_how: Arithmetic, x: Estimate, inplace: bool = False) -> Estimate:
    del inplace
    return Estimate(x.value.relu(), x.error)


def _exp(_how: Arithmetic, x: Estimate) -> Estimate:
    value = x.value.exp()
    return rounded_result(value, value * torch.expm1(x.error), ELEMENTARY)


def _root(function: Callable[[Tensor], Tensor]) -> Rule:
    """Sqrt or rsqrt on [value - error, value + error]; unbounded where rsqrt's reaches 0."""

    def rule(_how: Arithmetic, x: Estimate) -> Estimate:
        value = function(x.value)
        low = function((x.value - x.error).clamp_min(0))
        high = function(x.value + x.error)
        error = torch.maximum((low - value).abs(), (high - value).abs())
        return rounded_result(value, error, ELEMENTARY)

    return rule


SQRT, RSQRT = _root(torch.sqrt), _root(torch.rsqrt)


def _pow(how: Arithmetic, x: Estimate, exponent: float) -> Estimate:
    if exponent == 2:
        return _mul(how, x, x)
    if exponent in (0.5, -0.5):
        return (SQRT if exponent > 0 else RSQRT)(how, x)
    raise ValueError(
        f"no error rule for pow with exponent {exponent}: rules cover 2, 0.5 and -0.5."
    )


def _softmax(_how: Arithmetic, x: Estimate, dim: int = -1, **_kwargs: Any) -> Estimate:
    """Theta of `attention_bounds`, its delta and spread measured: weights move in proportion."""
    weights, shift = _softmax_shift(x, dim)
    n = x.value.shape[dim]
    theta = torch.expm1(shift + shift.amax(dim, keepdim=True)) * (1 + 4 * n * U) + 4 * n * U
    error = torch.where(weights > 0, theta * weights, 0.0) + x.value.isfinite() * 2.0**-126
    return within(Estimate(weights, error), 1.0)


def _softmax_shift(x: Estimate, dim: int) -> tuple[Tensor, Tensor]:
    """Exact weights, and by how much the logarithm of each computed exponential is off.

    The score's own error, the rounding of its difference to the maximum, and that of exp.
    """
    visible = x.value.isfinite()
    error = torch.where(visible, x.error, 0.0)
    below = torch.where(visible, x.value.amax(dim, keepdim=True) - x.value, 0.0)
    rounding = U * (below + error + error.amax(dim, keepdim=True))
    shift = torch.where(visible, error + rounding + 2 * ELEMENTARY, 0.0)
    return torch.softmax(x.value, dim).nan_to_num(0.0), shift


# -------------------------------------------------------------------------------------- compounds


def _rms_norm(
    how: Arithmetic, x: Estimate, shape: Any, weight: Any = None, eps: float | None = None
) -> Estimate:
    dims = tuple(range(-len(shape), 0))
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    mean_square = _add(how, _mean(how, _mul(how, x, x), dims, True), eps)
    y = _mul(how, x, RSQRT(how, mean_square))
    # No element of a normalized row is larger than the square root of the row's length.
    n = math.prod(shape)
    y = within(y, math.sqrt(n) * (1 + 2 * n * U))
    return y if weight is None else _mul(how, y, lifted(weight))


def _layer_norm(
    how: Arithmetic,
    x: Estimate,
    shape: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
) -> Estimate:
    dims = tuple(range(-len(shape), 0))
    centred = _sub(how, x, _mean(how, x, dims, True))
    y = _rms_norm(how, centred, shape, weight, eps)
    return y if bias is None else _add(how, y, lifted(bias))


def _sdpa(
    how: Arithmetic, query: Estimate, key: Estimate, value: Estimate, attn_mask: Any = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
    enable_gqa: bool = False,
) -> Estimate:  # fmt: skip
    """Scores, softmax and weighted sum; dropout has no error rule."""
    if dropout_p:
        raise ValueError("no error rule for attention with dropout: its result is random.")
    if enable_gqa:
        groups = query.value.shape[-3] // key.value.shape[-3]
        key, value = (_mapped(t, lambda x: x.repeat_interleave(groups, -3)) for t in (key, value))
    scale = 1 / math.sqrt(query.value.shape[-1]) if scale is None else scale
    scores = _mul(how, _matmul(how, query, _mapped(key, lambda x: x.mT)), scale)
    if is_causal:
        hidden = torch.ones(scores.value.shape[-2:], dtype=torch.bool).triu(1)
        scores = _masked_fill(how, scores, hidden, -math.inf)
    if attn_mask is not None:
        if isinstance(attn_mask, Tensor):  # a boolean one: the others are estimates by now
            scores = _masked_fill(how, scores, ~attn_mask, -math.inf)
        else:
            scores = _add(how, scores, attn_mask)
    return _weighted_mean(how, scores, value)


def _weighted_mean(how: Arithmetic, scores: Estimate, value: Estimate) -> Estimate:
    """softmax(scores) V, where errors of the weights cancel as far as the values agree.

    With computed exponentials e^d_j times the exact ones, the result moves by exactly sum_j w_j
    (e^d_j - 1) (v_j - o) / sum_j w_j e^d_j, because sum_j w_j (v_j - o) = 0. Here |v_j - o| <=
    |v_j - c| + |o - c| with c the mean of the values.
    """
    weights, shift = _softmax_shift(scores, -1)
    n = value.value.shape[-2]
    result = weights @ value.value
    centre = value.value.mean(-2, keepdim=True)
    moved = weights * torch.expm1(shift)
    spread = (
        moved @ (value.value - centre).abs()
        + moved.sum(-1, keepdim=True) * (result - centre).abs()
    )
    # The rest of the arithmetic: one sum and one division of the weights, and the product.
    growth = shift.amax(-1, keepdim=True).exp()
    grown = growth.square() * (1 + 4 * n * U)
    product = _matmul(how, Estimate(weights * grown, torch.zeros_like(weights)), value)
    own = product.error + 4 * n * U * grown * (weights @ value.magnitude)
    lost = 2.0**-126 * n * value.magnitude.amax(-2, keepdim=True)
    estimate = rounded_result(result, growth * spread + own + lost)
    # A weighted mean of values is no larger than the largest of them, but for the weights'
    # roundings.
    largest = value.magnitude.amax(-2, keepdim=True) * (1 + 4 * n * U)
    return replace(estimate, error=torch.minimum(estimate.error, result.abs() + largest))


def _masked_fill(_how: Arithmetic, x: Estimate, mask: Tensor, value: float) -> Estimate:
    return replace(x, value=x.value.masked_fill(mask, value), error=x.error.masked_fill(mask, 0.0))


def _cast(dtype: torch.dtype | None) -> Rule:
    """A cast to 16 bits rounds once, unless a pass drops it; counting it covers both."""

    def rule(how: Arithmetic, x: Any, *args: Any, **kwargs: Any) -> Any:
        target = dtype or next(
            (a for a in (*args, *kwargs.values()) if isinstance(a, torch.dtype)), torch.float32
        )
        if not isinstance(x, Estimate) or not how.casts:
            return x
        fmt = FORMATS[target]
        if fmt.precision >= FP32.precision or fmt.name == x.format:
            return x
        rounded = rounded_result(x.value, x.error, fmt.unit_roundoff)
        return replace(rounded, error=rounded.error + fmt.smallest_subnormal)

    return rule


#: Rules by the name of the function.
RULES: dict[str, Rule] = {
    "add": _add,
    "iadd": _add,
    "sub": _sub,
    "mul": _mul,
    "imul": _mul,
    "truediv": _div,
    "div": _div,
    "sum": _sum,
    "mean": _mean,
    **dict.fromkeys(("matmul", "mm", "bmm"), _matmul),
    "linear": _linear,
    "relu": _relu,
    "sigmoid": _lipschitz(torch.sigmoid, 0.25, "result"),
    "tanh": _lipschitz(torch.tanh, 1.0, "one"),
    "silu": _lipschitz(torch.nn.functional.silu, 1.1, "result"),
    "gelu": _lipschitz(torch.nn.functional.gelu, 1.13, "argument"),
    "exp": _exp,
    "sqrt": SQRT,
    "rsqrt": RSQRT,
    "pow": _pow,
    "square": lambda how, x: _mul(how, x, x),
    "softmax": _softmax,
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "scaled_dot_product_attention": _sdpa,
    "masked_fill": _masked_fill,
    "to": _cast(None),
    "type_as": _cast(None),
    "float": _cast(torch.float32),
    "half": _cast(torch.float16),
    "bfloat16": _cast(torch.bfloat16),
}
