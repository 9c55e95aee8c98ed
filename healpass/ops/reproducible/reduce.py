"""Sums that have one value in any order: `heal::sum`, `mean`, `var`, `cumsum`. Imports `fp64`.

Each element becomes an integer X = round(x 2^(bits - 1 - e)), e the exponent of the exact maximum
of what is summed, so |X| <= 2^bits. Integers add without rounding, so neither order nor tiling nor
device can show. `bits` is 40 up to 2^22 terms: every partial sum stays within 2^62, which INT64
holds. With more terms elements get fewer bits, so that it still does.

Error of a sum of K terms: each is off by at most 2^-bits of the largest power of two in the
maximum, then come the roundings to FP64 and to the result: |s - sum x| <= K 2^-bits max|x| +
(1/2 + 2^-28) ulp(s). Elements whose last bit is within 40 bits of the maximum are exact.

A sum that holds NaN, or infinities of both signs, is NaN, otherwise that infinity: these are
added apart, where the order cannot matter. A finite sum past FP32's largest number is infinite;
partial sums cannot overflow. An empty sum is 0, an empty mean NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from healpass.ops.reproducible import fp64
from healpass.ops.reproducible.register import register

ELEMENT_BITS = 40
ACCUMULATOR_BITS = 62
#: Exponents of what is summed: FP32 numbers, products of two of them, and zero.
LOWEST, HIGHEST = -300, 300


def element_bits(terms: int) -> int:
    """Bits of one element such that `terms` of them stay within 2^62."""
    if terms <= 1 << (ACCUMULATOR_BITS - ELEMENT_BITS):
        return ELEMENT_BITS
    return ACCUMULATOR_BITS - (terms - 1).bit_length()


def count(x: Tensor, dims: Sequence[int]) -> int:
    """How many elements a sum over `dims` adds."""
    return math.prod(x.shape[dim] for dim in dims)


def all_dims(x: Tensor, dim: Sequence[int] | int | None) -> list[int]:
    """The dimensions that torch means by `dim`: None and () are all of them."""
    given = [dim] if isinstance(dim, int) else list(dim or range(x.dim()))
    return [d % x.dim() for d in given] if x.dim() else []


def sum_fp64(x: Tensor, dims: list[int]) -> Tensor:
    """The sum of FP64 `x` over `dims`, kept with size 1, rounded once to FP64."""
    terms = count(x, dims)
    if not dims:
        return x
    if terms == 0:
        return x.sum(dims, keepdim=True)
    integers, unit = to_integers(x, dims, element_bits(terms))
    total = from_integers(integers.sum(dims, keepdim=True)) * unit
    special = torch.where(x.abs() < math.inf, 0.0, x).sum(dims, keepdim=True)
    return torch.where(special == 0.0, total, special)


def to_integers(x: Tensor, dims: list[int], bits: int) -> tuple[Tensor, Tensor]:
    """FP64 `x` as INT64 with |X| <= 2^bits and the power of two that one stands for.

    What is not finite counts as 0. The unit is FP64, of size 1 along `dims`.

    Args:
        x: FP64.
        dims: What is summed; the unit is common along these.
        bits: Size of the integers: 40, or fewer where more than 2^22 of them are added.
    """
    finite = torch.where(x.abs() < math.inf, x, 0.0)
    top = finite.abs().amax(dims, keepdim=True).view(torch.int64) >> fp64.FRACTION_BITS
    exponent = (top - fp64.BIAS).clamp(LOWEST, HIGHEST)
    scaled = finite * fp64.two_to(bits - 1 - exponent)
    return torch.round(scaled).to(torch.int64), fp64.two_to(exponent - (bits - 1))


def from_integers(total: Tensor) -> Tensor:
    """INT64 as FP64, rounded once: both halves are exact, whatever a device's conversion does."""
    high = total >> 31
    low = total - (high << 31)
    return high.to(torch.float64) * 2.0**31 + low.to(torch.float64)


def sum_to(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Sum FP32 `x` exactly to a shape that broadcasts to its own: the gradient of broadcasting."""
    lead = x.dim() - len(shape)
    dims = [d for d in range(x.dim()) if d < lead or (shape[d - lead] == 1 and x.shape[d] != 1)]
    total = torch.ops.heal.sum(x, dims, True) if dims else x
    return total.reshape(shape)


def _dropped(x: Tensor, dims: Sequence[int], keepdim: bool) -> Tensor:
    """Without the dimensions of size 1 that a reduction leaves."""
    if keepdim:
        return x
    return x.reshape([size for d, size in enumerate(x.shape) if d not in dims])


def _kept(x: Tensor, like: Tensor, dims: Sequence[int]) -> Tensor:
    """With them again."""
    return x.reshape([1 if d in dims else size for d, size in enumerate(like.shape)])


# -------------------------------------------------------------------------------- sum and mean


def _sum(input: Tensor, dim: Sequence[int] | None = None, keepdim: bool = False) -> Tensor:
    """The sum over `dim`, all dimensions if None; `input` may have any shape. FP32."""
    dims = all_dims(input, dim)
    total = fp64.to_fp32(sum_fp64(fp64.to_fp64(input), dims))
    return _dropped(total, dims, keepdim)


def _mean(input: Tensor, dim: Sequence[int] | None = None, keepdim: bool = False) -> Tensor:
    """The sum divided by the count, rounded once after the division."""
    dims = all_dims(input, dim)
    total = sum_fp64(fp64.to_fp64(input), dims)
    terms = count(input, dims)
    mean = total / float(terms) if terms else total * math.nan
    return _dropped(fp64.to_fp32(mean), dims, keepdim)


def _reduced(input: Tensor, dim: Sequence[int] | None = None, keepdim: bool = False) -> Tensor:
    dims = all_dims(fp64.checked(input), dim)
    shape = [1 if d in dims else size for d, size in enumerate(input.shape)]
    return _dropped(input.new_empty(shape, dtype=torch.float32), dims, keepdim)


def _save_shape(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(inputs[0])
    ctx.dims = all_dims(inputs[0], inputs[1])


def _sum_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (x,) = ctx.saved_tensors
    return _kept(grad, x, ctx.dims).expand(x.shape).to(x.dtype), None, None


def _mean_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (x,) = ctx.saved_tensors
    terms = grad.new_full((), float(count(x, ctx.dims)))
    share = torch.ops.heal.div(_kept(grad, x, ctx.dims), terms)
    return share.expand(x.shape).to(x.dtype), None, None


register(
    "sum(Tensor input, int[]? dim=None, bool keepdim=False) -> Tensor",
    _sum,
    _reduced,
    _sum_backward,
    _save_shape,
)
register(
    "mean(Tensor input, int[]? dim=None, bool keepdim=False) -> Tensor",
    _mean,
    _reduced,
    _mean_backward,
    _save_shape,
)


# ------------------------------------------------------------------------------------- variance


def _var(
    input: Tensor,
    dim: Sequence[int] | None = None,
    correction: float = 1.0,
    keepdim: bool = False,
) -> Tensor:
    """The sum of squared distances from the mean over (count - correction), rounded once.

    The mean is rounded to FP64 only, so nothing cancels that an FP32 number has.
    """
    dims = all_dims(input, dim)
    x = fp64.to_fp64(input)
    terms = count(input, dims)
    distance = x - sum_fp64(x, dims) / float(terms or 1)
    degrees = max(terms - correction, 0.0)
    variance = sum_fp64(distance * distance, dims)
    variance = variance / degrees if degrees else variance * math.nan
    return _dropped(fp64.to_fp32(variance), dims, keepdim)


def _var_fake(
    input: Tensor,
    dim: Sequence[int] | None = None,
    correction: float = 1.0,
    keepdim: bool = False,
) -> Tensor:
    del correction
    return _reduced(input, dim, keepdim)


def _save_var(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _save_shape(ctx, inputs, output)
    ctx.degrees = float(count(inputs[0], ctx.dims) - inputs[2])


def _var_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """2 (x - mean) / degrees."""
    (x,) = ctx.saved_tensors
    distance = x.to(torch.float32) - torch.ops.heal.mean(x, ctx.dims, True)
    share = torch.ops.heal.div(_kept(grad, x, ctx.dims), grad.new_full((), ctx.degrees / 2))
    return (distance * share).to(x.dtype), None, None, None


register(
    "var(Tensor input, int[]? dim=None, float correction=1.0, bool keepdim=False) -> Tensor",
    _var,
    _var_fake,
    _var_backward,
    _save_var,
)


# --------------------------------------------------------------------------------------- cumsum


def _cumsum(input: Tensor, dim: int) -> Tensor:
    """Sums of all beginnings along `dim`; one unit for all of them, that of the whole row.

    So its bits depend on the row's maximum, and a longer row may have another one.
    """
    x = fp64.to_fp64(input)
    if input.numel() == 0 or input.dim() == 0:
        return fp64.to_fp32(x)
    integers, unit = to_integers(x, [dim], element_bits(input.shape[dim]))
    total = from_integers(integers.cumsum(dim)) * unit
    special = torch.where(x.abs() < math.inf, 0.0, x).cumsum(dim)
    return fp64.to_fp32(torch.where(special == 0.0, total, special))


def _cumsum_fake(input: Tensor, dim: int) -> Tensor:
    return fp64.checked(input).to(torch.float32).cumsum(dim)


def _save_dim(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.dim, ctx.dtype = inputs[1], inputs[0].dtype


def _cumsum_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Sums of all ends."""
    ends = torch.ops.heal.cumsum(grad.flip(ctx.dim), ctx.dim).flip(ctx.dim)
    return ends.to(ctx.dtype), None


register(
    "cumsum(Tensor input, int dim) -> Tensor", _cumsum, _cumsum_fake, _cumsum_backward, _save_dim
)
