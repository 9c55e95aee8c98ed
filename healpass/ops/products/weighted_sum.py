"""Sums weighted by probabilities: `heal::weighted_sum`, P V of attention written by hand.

`exact_matmul` scales each column of V by its maximum over all keys, hidden ones included, and so
would let padding, or keys that are yet to come, show in the last bits. Here each key's row of V
has its own power of two 2^e(s), which is folded into P: P V = sum_s (P(l, s) 2^e(s)) V'(s), and
the rows of P 2^e are scaled by their own maximum. A key of weight 0 then has no influence at all.

Digits, budgets, routes and bits in any order are those of `products.exact`. Error for row l:
half a unit of P 2^e, which is the row's maximum times 2^(2 - 8 digits), for each |V'| <
2^(8 digits), and each V(s) is off by 2^(1 - 8 digits) of its own row's maximum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from healpass.arithmetic.bits import exponent
from healpass.arithmetic.digits import BASE_BITS, scaled_digits
from healpass.ops.products.exact import (
    Adders,
    Digits,
    Scheme,
    scale_of,
    scheme,
    special,
    sum_products,
)
from healpass.ops.products.numerics import Numerics
from healpass.ops.reproducible import fp64
from healpass.ops.reproducible.reduce import from_integers
from healpass.ops.reproducible.register import register_opaque

heal = torch.ops.heal


def _weighted_sum(weights: Tensor, values: Tensor, numerics: str) -> Tensor:
    """`weights [..., L, S] @ values [..., S, E]` in FP32; leading dimensions are equal.

    Args:
        weights: FP16, BF16 or FP32.
        values: Any of those.
        numerics: An exact precision.
    """
    how = Numerics.parse(numerics)
    assert how.products is not None, "only exact precisions get here"
    plan = scheme(how.products, values.dtype)
    row_scale = scale_of(values, -1, plan.right)
    finite = bool(row_scale.isfinite().all() and weights.isfinite().all())
    if finite:
        adders = Adders(how.simulate, how.order)
        return finite_sum(
            weights, values, plan, lambda left, right: sum_products(left, right, plan.cut, adders)
        )
    apart = special(weights, values)
    weights, values = (torch.where(x.isfinite(), x, 0.0) for x in (weights, values))
    result = _weighted_sum(weights, values, numerics)
    return fp64.canonical(torch.where(apart == 0, result, apart))


def finite_sum(
    weights: Tensor, values: Tensor, plan: Scheme, add: Callable[[Digits, Digits], Tensor]
) -> Tensor:
    """The sum for operands that are finite.

    Args:
        weights: `[..., L, S]`.
        values: `[..., S, E]`.
        plan: Digits of both.
        add: `products.exact.sum_products` with the plan's cut.
    """
    shape = (*weights.shape[:-1], values.shape[-1])
    if 0 in (*shape, weights.shape[-1]):
        return weights.new_zeros(shape, dtype=torch.float32)
    row_scale = scale_of(values, -1, plan.right)
    folded, top = _folded(weights, exponent(row_scale).mT)
    scale = scale_of(folded, -1, plan.left)
    left = scaled_digits(folded, scale, plan.left)
    right = scaled_digits(values, row_scale, plan.right)
    total = from_integers(add(left, right))
    unit = scale.to(torch.float64) * fp64.two_to(top.to(torch.int64) + BASE_BITS * plan.cut)
    return fp64.to_fp32(total * unit)


def _folded(weights: Tensor, exponents: Tensor) -> tuple[Tensor, Tensor]:
    """Weights times 2^(e(s) - top) in FP32, top being the largest e among those that count."""
    counts = weights != 0
    top = torch.where(counts, exponents, -126).amax(-1, keepdim=True)
    power = fp64.two_to((exponents - top).clamp(-300, 0).to(torch.int64))
    return (weights.to(torch.float64) * power).to(torch.float32), top


def _weighted_sum_fake(weights: Tensor, values: Tensor, numerics: str) -> Tensor:  # noqa: ARG001
    shape = (*fp64.checked(weights).shape[:-1], fp64.checked(values).shape[-1])
    return weights.new_empty(shape, dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs[:2])
    ctx.numerics = inputs[2]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """G V^T, by the columns of V^T, which are keys; and P^T G."""
    weights, values = ctx.saved_tensors
    grad_weights = heal.matmul(grad, values.mT, ctx.numerics).to(weights.dtype)
    return grad_weights, heal.matmul(weights.mT, grad, ctx.numerics).to(values.dtype), None


register_opaque(
    "weighted_sum(Tensor weights, Tensor values, str numerics) -> Tensor",
    _weighted_sum,
    _weighted_sum_fake,
    _backward,
    _save,
)
