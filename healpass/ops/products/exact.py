"""Matrix products by integer digits: the same bits in any order, on any device.

Every row of `a` and every column of `b` gets a power-of-two scale and becomes balanced INT8 digits
(`arithmetic.digits`); products of digits are integers, their sums are exact, and the total is
rounded once. What the digits lose is the whole error, and it depends on a row and a column only:
not on batch, tile, split or generation.

`products` says how many pairs of digits are multiplied (i, j count from the lowest digit):

====  ===========  =========================  ============================================
3     2 x 2        i + j >= 1
5     3 x 2        i + j >= 1                 `b` has 16 bits; for an FP32 `b` it means 6
6     3 x 3        i + j >= 2
8     3 x 3        i + j >= 1
====  ===========  =========================  ============================================

Error (`error_bound`): each number is off by at most half a unit of its lowest digit, the scale s,
s <= 2^(2 - 8 digits) of the maximum; each dropped pair loses at most 2^14 256^(i + j) s_a s_b per
term; the total is rounded once.

Budgets, proved where they are used: INT32 holds 131,071 products of digits, FP64 2^22 of a digit
by three digits, and the total, in units of 256^cut, at most 2^38 (1 + 2^-7) per term, fits INT64
up to K = 2^24. Longer sums over K are split; beyond 2^24 the product is refused.

A NaN or an infinity gives what FP32 arithmetic gives: those are multiplied apart, as signs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from healpass.arithmetic.digits import (
    BASE_BITS,
    DIGIT_MAX,
    FP32_ACCUMULATOR,
    INT32_ACCUMULATOR,
    digit_scale,
    exact_terms,
    scaled_digits,
)
from healpass.errors import OperandError
from healpass.ops.reproducible import fp64
from healpass.ops.reproducible.reduce import from_integers
from healpass.tensorcore.rules import RULES, Schedule
from healpass.tensorcore.simulate import simulate_matmul

#: Most terms of one sum: their total stays within INT64.
MOST_TERMS = 1 << 24
#: Terms that one INT32 accumulator, one FP64 sum, and one chain in FP32 hold exactly.
INT32_TERMS = exact_terms(DIGIT_MAX, DIGIT_MAX, INT32_ACCUMULATOR)
FP64_TERMS = 1 << 22
FP32_TERMS = exact_terms(DIGIT_MAX, DIGIT_MAX, FP32_ACCUMULATOR)

Digits = tuple[Tensor, ...]


@dataclass(frozen=True)
class Scheme:
    """Which pairs of digits are multiplied.

    Attributes:
        left: Number of digits of `a`.
        right: Number of digits of `b`.
        cut: Pairs with i + j below this are dropped.
    """

    left: int
    right: int
    cut: int

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """The pairs (i, j) that are kept, the smallest first."""
        return sorted((p for p in self._every if sum(p) >= self.cut), key=sum)

    @property
    def dropped(self) -> int:
        """The sum of 256^(i + j) over the pairs that are dropped."""
        return sum(256 ** sum(p) for p in self.dropped_pairs)

    @property
    def dropped_pairs(self) -> list[tuple[int, int]]:
        """The pairs (i, j) that are not multiplied."""
        return [p for p in self._every if sum(p) < self.cut]

    @property
    def _every(self) -> list[tuple[int, int]]:
        return [(i, j) for i in range(self.left) for j in range(self.right)]


SCHEMES = {3: Scheme(2, 2, 1), 5: Scheme(3, 2, 1), 6: Scheme(3, 3, 2), 8: Scheme(3, 3, 1)}


def scheme(products: int, right: torch.dtype) -> Scheme:
    """The scheme of `exact_products`; two digits hold a 16-bit weight, but not an FP32 one."""
    return SCHEMES[6 if products == 5 and right == torch.float32 else products]


@dataclass(frozen=True)
class Adders:
    """Who adds the products of digits; the bits are the same, so this is for showing that.

    Attributes:
        route: `int8`, `fp64` or `int32` (torch's own products), a GPU generation to simulate, or
            None for the fastest route that is right on the device.
        order: Seed of the order of the K tiles of a simulated generation.
        split_k: Parts of K that a simulated generation sums apart.
    """

    route: str | None = None
    order: int = 0
    split_k: int = 1


def exact_matmul(a: Tensor, b: Tensor, products: int = 5, adders: Adders | None = None) -> Tensor:
    """`a @ b`, `[..., M, K]` by `[..., K, N]`, in FP32, zeros and NaN canonical.

    Args:
        a: FP16, BF16 or FP32.
        b: Any of those; leading dimensions broadcast.
        products: 3, 5, 6 or 8.
        adders: Who adds.

    Raises:
        OperandError: K is past 2^24.
    """
    plan = scheme(products, b.dtype)
    a_scale, b_scale = scale_of(a, -1, plan.left), scale_of(b, -2, plan.right)
    finite = bool(a_scale.isfinite().all() and b_scale.isfinite().all())
    if not finite:
        apart = special(a, b)
        a, b = (torch.where(x.isfinite(), x, 0.0) for x in (a, b))
        a_scale, b_scale = scale_of(a, -1, plan.left), scale_of(b, -2, plan.right)
    total = digit_sums(a, b, a_scale, b_scale, plan, adders or Adders())
    result = total_to_fp32(total, a_scale, b_scale, plan)
    return result if finite else fp64.canonical(torch.where(apart == 0, result, apart))


def scale_of(x: Tensor, dim: int, count: int) -> Tensor:
    """The scale of `x` along `dim`, size 1 there; NaN where a number is not finite.

    Args:
        x: FP16, BF16 or FP32.
        dim: The dimension that the product reduces.
        count: Number of digits.
    """
    if x.shape[dim] == 0:
        return torch.ones_like(x.sum(dim, keepdim=True), dtype=torch.float32)
    # FP32 first: Inductor's C++ names what it narrows after a reduction, and where an operand is
    # read twice (a layer that is run again) it declares that name twice.
    amax = x.detach().abs().to(torch.float32).amax(dim, keepdim=True)
    return torch.where(amax < math.inf, digit_scale(amax, count), math.nan)


def total_to_fp32(total: Tensor, a_scale: Tensor, b_scale: Tensor, plan: Scheme) -> Tensor:
    """The one rounding: INT64 totals in units of 256^cut times the scales.

    Args:
        total: INT64 `[..., M, N]`, as `digit_sums` gives it.
        a_scale: FP32 `[..., M, 1]`, powers of two or NaN.
        b_scale: FP32 `[..., 1, N]`.
        plan: Its `cut` is the unit's.
    """
    unit = a_scale.to(torch.float64) * b_scale.to(torch.float64) * 2.0 ** (BASE_BITS * plan.cut)
    return fp64.to_fp32(from_integers(total) * unit)


def error_bound(a: Tensor, b: Tensor, products: int = 5) -> Tensor:
    """The largest |y - a @ b| that finite operands allow, per element, FP64 `[..., M, N]`.

    With a' = a + d, |d| <= s_a / 2, and b' likewise: |a' b' - a b| <= s_a / 2 |b| + s_b / 2 |a| +
    s_a s_b / 4 for each of the K terms. Then the dropped pairs, and half an ulp of what came out.

    Args:
        a: `[..., M, K]` in FP16, BF16 or FP32.
        b: `[..., K, N]`, any of those.
        products: 3, 5, 6 or 8.
    """
    plan, k = scheme(products, b.dtype), a.shape[-1]
    s_a, s_b = (
        scale_of(x, dim, count).to(torch.float64)
        for x, dim, count in ((a, -1, plan.left), (b, -2, plan.right))
    )
    size_a, size_b = (x.to(torch.float64).abs() for x in (a, b))
    split = s_a / 2 * size_b.sum(-2, keepdim=True) + s_b / 2 * size_a.sum(-1, keepdim=True)
    split = split + k * s_a * s_b * (0.25 + plan.dropped * DIGIT_MAX**2)
    largest = torch.matmul(size_a, size_b) + split
    return split + largest * (2.0**-24 * (1 + 2.0**-28)) + 2.0**-150


def error_deviation(a: Tensor, b: Tensor, products: int = 5) -> Tensor:
    """The standard deviation that goes with `error_bound`, per element, FP64 `[..., M, N]`.

    What the digits of these operands lose, and the digits of the pairs that are dropped, with
    signs that are independent (Higham and Mary 2019). No guarantee.

    Args:
        a: `[..., M, K]` in FP16, BF16 or FP32, finite.
        b: `[..., K, N]`, any of those.
        products: 3, 5, 6 or 8.
    """
    plan = scheme(products, b.dtype)
    scales = scale_of(a, -1, plan.left), scale_of(b, -2, plan.right)
    digits = [
        [scale.double() * digit.double() for digit in scaled_digits(x, scale, count)]
        for x, scale, count in zip((a, b), scales, (plan.left, plan.right), strict=True)
    ]
    lost_a, lost_b = (
        (x.double() - scale * (x.double() / scale).round()).square()
        for x, scale in zip((a, b), scales, strict=True)
    )
    variance = torch.matmul(lost_a, b.double().square() + lost_b)
    variance = variance + torch.matmul(a.double().square(), lost_b)
    for i, j in plan.dropped_pairs:
        pair = torch.matmul(digits[0][i].square(), digits[1][j].square())
        variance = variance + 256.0 ** (2 * (i + j)) * pair
    last = torch.matmul(a.double(), b.double()).square() * (2.0**-48 / 3)
    return (variance + last).sqrt()


def bound_text(products: int, right: torch.dtype) -> str:
    """`error_bound` in one line: half a scale is 1.004 2^(1 - 8 digits) of a maximum at most."""
    plan = scheme(products, right)
    x, w = 1 - 8 * plan.left, 1 - 8 * plan.right
    per_term = 1.01 * 2.0 ** (x + w + 2) * (0.25 + plan.dropped * DIGIT_MAX**2)
    return (
        f"1.01 (2^{x} max|x| sum|w| + 2^{w} max|w| sum|x|) + "
        f"K 2^{math.ceil(math.log2(per_term))} max|x| max|w| + u S"
    )


def special(a: Tensor, b: Tensor) -> Tensor:
    """0 where the product is finite, else what infinities and NaN make of it, in any order.

    Finite numbers count as their signs, so that nothing overflows; their sum must not count.
    """
    signs = [torch.where(x.isfinite(), x.sign(), x).to(torch.float64) for x in (a, b)]
    product = torch.matmul(*signs)
    return torch.where(product.isfinite(), 0.0, product).to(torch.float32)


# ---------------------------------------------------------------------------------- integer sums


def digit_sums(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, plan: Scheme, adders: Adders
) -> Tensor:
    """Sum over kept pairs of 256^(i + j - cut) (a_i @ b_j), as INT64, exactly.

    Args:
        a: `[..., M, K]` in FP16, BF16 or FP32, finite.
        b: `[..., K, N]`, any of those; leading dimensions broadcast.
        a_scale: FP32 `[..., M, 1]`, powers of two.
        b_scale: FP32 `[..., 1, N]`.
        plan: Digits of both, and the pairs that are kept.
        adders: Who adds.

    Raises:
        OperandError: K is past 2^24.
    """
    (m, k), n = a.shape[-2:], b.shape[-1]
    if k > MOST_TERMS:
        raise OperandError(
            f"an exact product over K={k} terms may overflow INT64, which holds {MOST_TERMS} of "
            "them.\nSplit the sum: heal::mm_partial on parts of K with common scales, added in "
            "a wider type."
        )
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    if 0 in (m, k, n, *batch):
        return a.new_zeros((*batch, m, n), dtype=torch.int64)
    left, right = scaled_digits(a, a_scale, plan.left), scaled_digits(b, b_scale, plan.right)
    return sum_products(left, right, plan.cut, adders)


def sum_products(left: Digits, right: Digits, cut: int, adders: Adders) -> Tensor:
    """As `digit_sums`, for digits `[..., M, K]` and `[..., K, N]`; no size may be 0.

    The caller proves that the total fits INT64.

    Args:
        left: INT8 planes, the lowest first.
        right: INT8 planes; leading dimensions broadcast.
        cut: Pairs of digits with i + j below this are dropped.
        adders: Who adds.
    """
    route = adders.route or fastest_route(left[0].device.type)
    if route == "fp64":
        return _fp64_sums(left, right, cut)
    multiply, terms = _multiplier(route, adders)
    batch = torch.broadcast_shapes(left[0].shape[:-2], right[0].shape[:-2])
    shape = (*batch, left[0].shape[-2], right[0].shape[-1])
    total = left[0].new_zeros(shape, dtype=torch.int64)
    for i, j in Scheme(len(left), len(right), cut).pairs:
        for start in range(0, left[0].shape[-1], terms):
            x, y = left[i][..., start : start + terms], right[j][..., start : start + terms, :]
            part = _each(multiply, x, y, batch, together=route in RULES).to(torch.int64)
            total += part << (BASE_BITS * (i + j - cut))
    return total


def _each(
    multiply: Callable[..., Tensor], x: Tensor, y: Tensor, batch: torch.Size, together: bool
) -> Tensor:
    """`multiply` on every matrix of a batch, or on all of them where it takes them together."""
    if not batch:
        return multiply(x, y)
    x = x.expand(*batch, *x.shape[-2:]).reshape(-1, *x.shape[-2:])
    y = y.expand(*batch, *y.shape[-2:]).reshape(-1, *y.shape[-2:])
    if together:
        result = multiply(x, y)
    else:
        result = torch.stack([multiply(one, other) for one, other in zip(x, y, strict=True)])
    return result.reshape(*batch, x.shape[-2], y.shape[-1])


def _multiplier(route: str, adders: Adders) -> tuple[Callable[[Tensor, Tensor], Tensor], int]:
    """The product of two INT8 matrices on a route, and for how many terms it is exact."""
    if route == "int8":
        return int8_mm, INT32_TERMS
    if route == "int32":
        return lambda x, y: torch.mm(x.to(torch.int32), y.to(torch.int32)), INT32_TERMS

    def simulated(x: Tensor, y: Tensor) -> Tensor:
        schedule = Schedule(promote_every=None, order=adders.order, split_k=adders.split_k)
        return simulate_matmul([x.to(torch.float16)], [y.to(torch.float16)], route, schedule)

    return simulated, FP32_TERMS


def _fp64_sums(left: Digits, right: Digits, cut: int) -> Tensor:
    """Each digit of `a` by all digits of `b` that it meets: 2^22 terms stay below 2^53."""
    total: Tensor | int = 0
    for i, digit in enumerate(left):
        lowest = max(cut - i, 0)
        if lowest >= len(right):
            continue  # it meets none
        joined = sum(
            right[j].to(torch.float64) * 2.0 ** (BASE_BITS * (j - lowest))
            for j in range(lowest, len(right))
        )
        assert isinstance(joined, Tensor)
        x, shift = digit.to(torch.float64), BASE_BITS * (i + lowest - cut)
        for start in range(0, x.shape[-1], FP64_TERMS):
            stop = start + FP64_TERMS
            part = torch.matmul(x[..., start:stop], joined[..., start:stop, :])
            total = total + (part.to(torch.int64) << shift)
    assert isinstance(total, Tensor)
    return total


# ------------------------------------------------------------------------------- torch's INT8 mm


def int8_mm(x: Tensor, y: Tensor) -> Tensor:
    """`torch._int_mm` of `[M, K]` and `[K, N]` INT8, K up to 131,071.

    torch's kernel for CPU reads a single row at its stride although nothing says that it counts
    (a stride below K gives wrong sums), and `.contiguous()` leaves such a view as it is.
    """
    return torch._int_mm(_with_plain_strides(x), _with_plain_strides(y.t()).t())


def _with_plain_strides(x: Tensor) -> Tensor:
    if x.shape[0] != 1 or x.stride() == (x.shape[1], 1):
        return x
    return torch.empty_like(x, memory_format=torch.contiguous_format).copy_(x)


@cache
def fastest_route(device: str) -> str:
    """`int8` where torch's INT8 product passes its self-test on CPU, else `fp64`.

    On CUDA torch's INT8 product refuses few rows and odd sizes; FP64 takes every shape.
    """
    with _disable_current_modes():  # a compiler may be tracing the caller
        return "int8" if device == "cpu" and int8_mm_is_exact() else "fp64"


def int8_mm_is_exact(multiply: Callable[[Tensor, Tensor], Tensor] = int8_mm) -> bool:
    """Whether an INT8 product keeps the largest digits: without VNNI oneDNN saturates at INT16."""
    for m, k, n in ((1, 64, 16), (5, 576, 33), (64, 129, 64)):
        for high, low in ((127, -128), (-128, -128), (127, 127)):
            x = torch.full((m, k), high, dtype=torch.int8)
            y = torch.full((n, k), low, dtype=torch.int8).t()
            if not bool((multiply(x, y) == high * low * k).all()):
                return False
    return True
