"""Exact products of shards: `heal::exact_scales`, `mm_partial`, `mm_total`.

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
Imports `ops.exact_matmul`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from healpass.ops import fp64
from healpass.ops.exact_matmul import (
    SCHEMES,
    Adders,
    digit_sums,
    scale_of,
    total_to_fp32,
)
from healpass.ops.pinned import register_opaque


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
