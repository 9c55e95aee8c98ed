"""Exact sums over ranks, of products (`heal::mm_partial`) and of tensors (`heal::sum_partial`).

A tensor-parallel layer whose K is spread over ranks sums partial products across them. In floating
point that sum depends on the number of ranks; in integers it does not:

    a_scale, b_scale = heal.exact_scales(a, b, 5)     # of this rank's part of K
    (all-reduce both with MAX)                        # the scale of a whole is that of its largest
    partial = heal.mm_partial(a, b, a_scale, b_scale, 5)
    (all-reduce it with SUM: INT64)
    y = heal.mm_total(partial, a_scale, b_scale, 5)   # the one rounding

`y` has the bits of `exact_matmul` of the whole, for any number of ranks. K of the whole is at most
2^24; each part is checked, the whole is the caller's. Where an operand is not finite its row's or
column's scale is NaN, and so is the result there: integers have no room for infinities.

A plain sum of tensors that lie on several ranks (gradients of micro-batches) goes the same way:

    scale = heal.sum_scale(x)                   # of each row; maximum over tensors and ranks
    partial = heal.sum_partial(x, scale)        # INT64; sum over tensors and ranks
    y = heal.sum_total(partial, scale, 1.0)     # the one rounding, here of the sum divided by 1

An element is off by at most 2^-40 of the largest power of two in its row's maximum, per tensor;
2^22 tensors fit. Imports `products.exact`, `reproducible.reduce`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from healpass.ops.products.exact import (
    SCHEMES,
    Adders,
    digit_sums,
    scale_of,
    total_to_fp32,
)
from healpass.ops.reproducible import fp64
from healpass.ops.reproducible.reduce import ELEMENT_BITS, HIGHEST, LOWEST, from_integers
from healpass.ops.reproducible.register import register_opaque


def _exact_scales(a: Tensor, b: Tensor, products: int) -> tuple[Tensor, Tensor]:
    """Scales `[M, 1]` of the rows of `a` `[M, K]`, `[1, N]` of the columns of `b` `[K, N]`."""
    plan = SCHEMES[products]
    return scale_of(fp64.checked(a), -1, plan.left), scale_of(fp64.checked(b), -2, plan.right)


def _exact_scales_fake(a: Tensor, b: Tensor, products: int) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    rows, columns = (*a.shape[:-1], 1), (*b.shape[:-2], 1, b.shape[-1])
    return a.new_empty(rows, dtype=torch.float32), b.new_empty(columns, dtype=torch.float32)


def _mm_partial(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, products: int) -> Tensor:
    """The sum of kept digit products of this part of K, `[M, N]` INT64, for the given scales."""
    a, b = (torch.where(x.isfinite(), x, 0.0) for x in (a, b))
    a_scale, b_scale = (torch.where(s.isfinite(), s, 1.0) for s in (a_scale, b_scale))
    return digit_sums(a, b, a_scale, b_scale, SCHEMES[products], Adders())


def _mm_partial_fake(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,  # noqa: ARG001
    b_scale: Tensor,  # noqa: ARG001
    products: int,  # noqa: ARG001
) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[1]), dtype=torch.int64)


def _mm_total(partial: Tensor, a_scale: Tensor, b_scale: Tensor, products: int) -> Tensor:
    """The summed partials as FP32 `[M, N]`."""
    return total_to_fp32(partial, a_scale, b_scale, SCHEMES[products])


def _mm_total_fake(partial: Tensor, a_scale: Tensor, b_scale: Tensor, products: int) -> Tensor:  # noqa: ARG001
    return partial.new_empty(partial.shape, dtype=torch.float32)


register_opaque(
    "exact_scales(Tensor a, Tensor b, int products) -> (Tensor, Tensor)",
    _exact_scales,
    _exact_scales_fake,
)
register_opaque(
    "mm_partial(Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, int products) -> Tensor",
    _mm_partial,
    _mm_partial_fake,
)
register_opaque(
    "mm_total(Tensor partial, Tensor a_scale, Tensor b_scale, int products) -> Tensor",
    _mm_total,
    _mm_total_fake,
)


# --------------------------------------------------------------------------------- plain sums


def _sum_scale(x: Tensor) -> Tensor:
    """The largest magnitude of each row of `x` `[..., K]`, FP32 `[..., 1]`; inf if not finite."""
    size = fp64.checked(x).detach().to(torch.float32).abs()
    if x.shape[-1] == 0:
        return size.sum(-1, keepdim=True)
    return torch.where(size < math.inf, size, math.inf).amax(-1, keepdim=True)


def _sum_scale_fake(x: Tensor) -> Tensor:
    return fp64.checked(x).new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def _exponent(scale: Tensor) -> Tensor:
    bits = scale.to(torch.float64).view(torch.int64) >> fp64.FRACTION_BITS
    return (bits - fp64.BIAS).clamp(LOWEST, HIGHEST)


def _sum_partial(x: Tensor, scale: Tensor) -> Tensor:
    """`x` as INT64 of its shape, at most 2^40; 0 where a number is not finite."""
    wide = fp64.to_fp64(x)
    power = fp64.two_to(ELEMENT_BITS - 1 - _exponent(scale))
    return torch.round(torch.where(wide.abs() < math.inf, wide, 0.0) * power).to(torch.int64)


def _sum_partial_fake(x: Tensor, scale: Tensor) -> Tensor:  # noqa: ARG001
    return x.new_empty(x.shape, dtype=torch.int64)


def _sum_of_partials(partial: Tensor, scale: Tensor, count: float) -> Tensor:
    """The summed partials divided by `count`, FP32; NaN in a row that is not finite."""
    unit = fp64.two_to(_exponent(scale) - (ELEMENT_BITS - 1))
    mean = fp64.to_fp32(from_integers(partial) * unit / count)
    return torch.where(scale < math.inf, mean, math.nan)


def _sum_of_partials_fake(partial: Tensor, scale: Tensor, count: float) -> Tensor:  # noqa: ARG001
    return partial.new_empty(partial.shape, dtype=torch.float32)


register_opaque("sum_scale(Tensor x) -> Tensor", _sum_scale, _sum_scale_fake)
register_opaque("sum_partial(Tensor x, Tensor scale) -> Tensor", _sum_partial, _sum_partial_fake)
register_opaque(
    "sum_total(Tensor partial, Tensor scale, float count) -> Tensor",
    _sum_of_partials,
    _sum_of_partials_fake,
)
