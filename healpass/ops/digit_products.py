"""Exact products with the digits given: `heal::digit_mm` and `heal::digit_sums`, and `by_digits`.

`exact_matmul` in two steps, for compilers: `by_digits` cuts operands into digits by plain tensor
operations, which fuse with what produced them and are shared by the products that read them;
`heal::digit_mm` multiplies and rounds once. Together they have the bits of `exact_matmul`.

A row or column that is not finite has the scale NaN. Its digits mean nothing then, and so the
operator takes the operands, too: `exact_matmul.special` says what infinities and NaN make.

`heal::digit_sums` stops before the rounding: its result is the integers. With it operators whose
scales do not factor out of a product (scores of attention, weighted sums) are graphs as well.
Imports `ops.exact_matmul`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from healpass.arithmetic.digits import scaled_digits
from healpass.ops import fp64
from healpass.ops.exact_matmul import (
    Adders,
    Scheme,
    scale_of,
    scheme,
    special,
    sum_products,
    total_to_fp32,
)
from healpass.ops.pinned import register_opaque


def by_digits(a: Tensor, b: Tensor, products: int) -> Tensor:
    """`a @ b`, `[(Q,) M, K]` by `[(Q,) K, N]`, FP32: the bits of `exact_matmul`, as a graph.

    Args:
        a: FP16, BF16 or FP32.
        b: Any of those.
        products: 3, 5, 6 or 8. The caller sees to it that K is at most 2^24.
    """
    plan = scheme(products, b.dtype)
    a_scale, b_scale = scale_of(a, -1, plan.left), scale_of(b, -2, plan.right)
    left, right = scaled_digits(a, a_scale, plan.left), scaled_digits(b, b_scale, plan.right)
    return torch.ops.heal.digit_mm(a, b, left, right, a_scale, b_scale, plan.cut)


def _digit_mm(
    a: Tensor,
    b: Tensor,
    a_digits: Sequence[Tensor],
    b_digits: Sequence[Tensor],
    a_scale: Tensor,
    b_scale: Tensor,
    cut: int,
) -> Tensor:
    """The product of two operands of which the digits are known, FP32 `[(Q,) M, N]`.

    Args:
        a: `[(Q,) M, K]`; only where it or `b` is not finite do these two count.
        b: `[(Q,) K, N]`.
        a_digits: INT8 planes of `a`, the lowest first.
        b_digits: INT8 planes of `b`.
        a_scale: FP32 `[(Q,) M, 1]`, powers of two; NaN where a row is not finite.
        b_scale: FP32 `[(Q,) 1, N]`.
        cut: Pairs of digits with i + j below this are dropped.
    """
    size = (*a.shape[:-1], b.shape[-1])
    if 0 in (*size, a.shape[-1]):
        return a.new_zeros(size, dtype=torch.float32)
    total = sum_products(tuple(a_digits), tuple(b_digits), cut, Adders())
    plan = Scheme(len(a_digits), len(b_digits), cut)
    result = total_to_fp32(total, a_scale, b_scale, plan)
    broken = a_scale.isnan() | b_scale.isnan()
    return fp64.canonical(torch.where(broken, special(a, b), result)) if broken.any() else result


def _digit_mm_fake(
    a: Tensor,
    b: Tensor,
    a_digits: Sequence[Tensor],  # noqa: ARG001
    b_digits: Sequence[Tensor],  # noqa: ARG001
    a_scale: Tensor,  # noqa: ARG001
    b_scale: Tensor,  # noqa: ARG001
    cut: int,  # noqa: ARG001
) -> Tensor:
    return a.new_empty((*a.shape[:-1], b.shape[-1]), dtype=torch.float32)


register_opaque(
    "digit_mm(Tensor a, Tensor b, Tensor[] a_digits, Tensor[] b_digits, Tensor a_scale,"
    " Tensor b_scale, int cut) -> Tensor",
    _digit_mm,
    _digit_mm_fake,
)


def digit_sums(left: Sequence[Tensor], right: Sequence[Tensor], cut: int = 0) -> Tensor:
    """As `exact_matmul.sum_products`, by `heal::digit_sums`: `[..., M, K]`, `[..., K, N]`, INT64.

    Leading dimensions are equal. The caller proves that the total fits INT64.
    """
    lead = left[0].shape[:-2]
    a, b = ([x.reshape(-1, *x.shape[-2:]) for x in planes] for planes in (left, right))
    total: Tensor = torch.ops.heal.digit_sums(a, b, cut)
    return total.reshape(*lead, *total.shape[-2:])


def _digit_sums(a_digits: Sequence[Tensor], b_digits: Sequence[Tensor], cut: int) -> Tensor:
    """Sum over kept pairs of 256^(i + j - cut) (a_i @ b_j), INT64 `[Q, M, N]`.

    Args:
        a_digits: INT8 planes `[Q, M, K]`, the lowest first.
        b_digits: INT8 planes `[Q, K, N]`.
        cut: Pairs of digits with i + j below this are dropped.
    """
    size = (*a_digits[0].shape[:-1], b_digits[0].shape[-1])
    if 0 in (*size, a_digits[0].shape[-1]):
        return a_digits[0].new_zeros(size, dtype=torch.int64)
    return sum_products(tuple(a_digits), tuple(b_digits), cut, Adders())


def _digit_sums_fake(a_digits: Sequence[Tensor], b_digits: Sequence[Tensor], cut: int) -> Tensor:  # noqa: ARG001
    size = (*a_digits[0].shape[:-1], b_digits[0].shape[-1])
    return a_digits[0].new_empty(size, dtype=torch.int64)


register_opaque(
    "digit_sums(Tensor[] a_digits, Tensor[] b_digits, int cut) -> Tensor",
    _digit_sums,
    _digit_sums_fake,
)
