"""Exact products with the digits given: `heal::digit_mm`, `digit_grouped_mm`, `digit_sums`.

`exact_matmul` in two steps, for compilers: `by_digits` cuts operands into digits by plain tensor
operations, which fuse with what produced them and are shared by the products that read them;
`heal::digit_mm` multiplies and rounds once. Together they have the bits of `exact_matmul`.

A row or column that is not finite has the scale NaN. Its digits mean nothing then, and so the
operator takes the operands, too: `products.exact.special` says what infinities and NaN make.

`groups_by_digits` and `heal::digit_grouped_mm` are the same for products of groups.
`heal::digit_sums` stops before the rounding: its result is the integers. With it operators whose
scales do not factor out of a product (scores of attention, weighted sums) are graphs as well, and
so are sums that go on elsewhere (`partial_by_digits`). Imports `products.exact`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from healpass.arithmetic.digits import digit_scale, scaled_digits
from healpass.ops.products.exact import (
    SCHEMES,
    Adders,
    Scheme,
    scale_of,
    scheme,
    special,
    sum_products,
    total_to_fp32,
)
from healpass.ops.reproducible import fp64
from healpass.ops.reproducible.register import register_opaque


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


# ------------------------------------------------------------------------------------- groups


def groups_by_digits(a: Tensor, b: Tensor, offs: Tensor, products: int) -> Tensor:
    """`heal::grouped_mm` of two operands, FP32: the bits of `exact_matmul` per group, as a graph.

    Args:
        a: FP16, BF16 or FP32; ranks of both as `heal::grouped_mm` takes them.
        b: Any of those.
        offs: `[G]`, where each group ends.
        products: 3, 5, 6 or 8. The caller sees to it that K is at most 2^24.
    """
    plan = scheme(products, b.dtype)
    if a.dim() == b.dim():  # both 2-D: the sum is ragged
        group = _group_of_each(a.shape[1], offs)
        (a_scale, a_of_each), (b_scale, b_of_each) = (
            _scales_of_groups(x, group, offs.shape[0], count)
            for x, count in ((a.t(), plan.left), (b, plan.right))
        )
        left = scaled_digits(a, a_of_each.t(), plan.left)
        right = scaled_digits(b, b_of_each, plan.right)
        a_scale, b_scale = a_scale.unsqueeze(-1), b_scale.unsqueeze(-2)
    else:
        a_scale, b_scale = scale_of(a, -1, plan.left), scale_of(b, -2, plan.right)
        left, right = scaled_digits(a, a_scale, plan.left), scaled_digits(b, b_scale, plan.right)
    multiply = torch.ops.heal.digit_grouped_mm
    if a.dim() <= b.dim():
        return multiply(a, b, offs, left, right, a_scale, b_scale, plan.cut)
    # Columns are routed: the transpose of routed rows.
    planes = [[x.mT for x in digits] for digits in (right, left)]
    return multiply(b.mT, a.mT, offs, *planes, b_scale.mT, a_scale.mT, plan.cut).t()


def _group_of_each(count: int, offs: Tensor) -> Tensor:
    """The group of each of `count` terms, `[count]` INT64; G for those past the last group."""
    return torch.searchsorted(
        offs, torch.arange(count, device=offs.device, dtype=offs.dtype), right=True
    )


def _scales_of_groups(x: Tensor, group: Tensor, groups: int, count: int) -> tuple[Tensor, Tensor]:
    """`scale_of` per group of rows of `x` `[T, N]`: `[G, N]`, and for each row `[T, N]`."""
    size = x.detach().abs().to(torch.float32)
    size = torch.where(size < math.inf, size, math.inf)
    index = group.unsqueeze(-1).expand(size.shape)
    largest = size.new_zeros(groups + 1, x.shape[1]).scatter_reduce(0, index, size, "amax")
    scale = torch.where(largest < math.inf, digit_scale(largest, count), math.nan)
    return scale.narrow(0, 0, groups), scale.gather(0, index)


def _digit_grouped_mm(
    a: Tensor,
    b: Tensor,
    offs: Tensor,
    a_digits: Sequence[Tensor],
    b_digits: Sequence[Tensor],
    a_scale: Tensor,
    b_scale: Tensor,
    cut: int,
) -> Tensor:
    """As `heal::digit_mm` for every group; `b` has rank 3 (rows are routed) or 2 (a ragged sum).

    Args:
        a: `[T, K]` or `[M, T]`.
        b: `[G, K, N]` or `[T, N]`.
        offs: `[G]`, where each group ends.
        a_digits: INT8 planes of `a`, the lowest first.
        b_digits: INT8 planes of `b`.
        a_scale: FP32 `[T, 1]` or `[G, M, 1]`.
        b_scale: FP32 `[G, 1, N]`.
        cut: Pairs of digits with i + j below this are dropped.
    """
    routed = b.dim() == 3
    result = _digit_grouped_mm_fake(a, b, offs).zero_()
    start = 0
    for group, end in enumerate(offs.tolist()):
        terms = slice(start, end)
        here = (terms,) if routed else (slice(None), terms)
        there = group if routed else terms
        result[terms if routed else group] = _digit_mm(
            a[here],
            b[there],
            [plane[here] for plane in a_digits],
            [plane[there] for plane in b_digits],
            a_scale[terms if routed else group],
            b_scale[group],
            cut,
        )
        start = end
    return result


def _digit_grouped_mm_fake(a: Tensor, b: Tensor, offs: Tensor, *rest: object) -> Tensor:  # noqa: ARG001
    size = (*([] if b.dim() == 3 else offs.shape), a.shape[0], b.shape[-1])
    return a.new_empty(size, dtype=torch.float32)


register_opaque(
    "digit_grouped_mm(Tensor a, Tensor b, Tensor offs, Tensor[] a_digits, Tensor[] b_digits,"
    " Tensor a_scale, Tensor b_scale, int cut) -> Tensor",
    _digit_grouped_mm,
    _digit_grouped_mm_fake,
)


# --------------------------------------------------------------------------------------- sums


def partial_by_digits(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, products: int
) -> Tensor:
    """`heal::mm_partial` as a graph: INT64 `[M, N]` of this part of K, at most 2^24 terms.

    Args:
        a: `[M, K]` in FP16, BF16 or FP32.
        b: `[K, N]`, any of those.
        a_scale: FP32 `[M, 1]`, powers of two, of the whole K; NaN where a row is not finite.
        b_scale: FP32 `[1, N]`, the same of the columns.
        products: 3, 5, 6 or 8; with 5 `b` gets two digits, whatever its dtype is.
    """
    plan = SCHEMES[products]
    left, right = (
        scaled_digits(torch.where(x.isfinite(), x, 0.0), torch.where(s.isfinite(), s, 1.0), count)
        for x, s, count in ((a, a_scale, plan.left), (b, b_scale, plan.right))
    )
    return digit_sums(left, right, plan.cut)


def digit_sums(left: Sequence[Tensor], right: Sequence[Tensor], cut: int = 0) -> Tensor:
    """`products.exact.sum_products` by `heal::digit_sums`: `[..., M, K]`, `[..., K, N]`, INT64.

    Leading dimensions are equal. The caller proves that the total fits INT64.

    Args:
        left: INT8 planes `[..., M, K]`, the lowest first.
        right: INT8 planes `[..., K, N]`, the lowest first.
        cut: Pairs of digits with i + j below this are dropped.
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
