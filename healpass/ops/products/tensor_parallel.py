"""Linear layers whose weight is cut over ranks: `heal::column_linear`, `heal::row_linear`.

A tensor-parallel pair of layers cuts the first weight by output features (columns of the product)
and the second by input features (its sum over K, which the ranks then add up):

    y = row_linear(f(column_linear(x, W1 part)), W2 part)     one all-reduce for two layers

A column's product lies on one rank whole. A row's is a sum over ranks, and so is the gradient of a
column layer's input. In `exact` such a sum goes through integers (`products.sharded`): scales are
reduced with MAX, digit products with SUM, and the total is rounded once, so that the result has
the bits of one process for any number of ranks. Otherwise the FP32 parts are added by the
all-reduce, in its order: K u of the whole sum bounds that too, since the parts are parts of it.

Where an operand of an exact sum is not finite, its row or column is NaN on every rank.
Imports `products.sharded` and `products.matmul`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from healpass.ops.library import library
from healpass.ops.products import sharded  # noqa: F401  its operators must be registered
from healpass.ops.products.exact import SCHEMES, scheme
from healpass.ops.products.matmul import check_operands
from healpass.ops.products.numerics import Numerics
from healpass.ops.reproducible.register import register_opaque

heal = torch.ops.heal


def _all_reduce(x: Tensor, operation: str, group: str) -> Tensor:
    """`x` reduced over the ranks of a group, named as torch's functional collectives name it."""
    reduced = torch.ops._c10d_functional.all_reduce(x.contiguous(), operation, group)
    return torch.ops._c10d_functional.wait_tensor(reduced)


def _largest_scale(scale: Tensor, group: str) -> Tensor:
    """The largest of all ranks; NaN on all where it is NaN on one (MAX may lose a NaN)."""
    largest = _all_reduce(torch.where(scale.isnan(), math.inf, scale), "max", group)
    return torch.where(largest.isinf(), math.nan, largest)


def _summed_mm(a: Tensor, b: Tensor, group: str, numerics: str) -> Tensor:
    """`a @ b` with K cut over the ranks, in FP32: `[M, K part]` by `[K part, N]`."""
    check_operands("summed_mm", numerics, a, b)
    arithmetic = Numerics.parse(numerics)
    if arithmetic.products is None:
        return _all_reduce(arithmetic.multiply(a, b), "sum", group)
    plan = scheme(arithmetic.products, b.dtype)
    products = next(number for number, known in SCHEMES.items() if known == plan)
    a_scale, b_scale = (_largest_scale(s, group) for s in heal.exact_scales(a, b, products))
    partial = heal.mm_partial(a, b, a_scale, b_scale, products)
    return heal.mm_total(_all_reduce(partial, "sum", group), a_scale, b_scale, products)


def _mm(a: Tensor, b: Tensor, group: str, numerics: str) -> Tensor:  # noqa: ARG001
    """`a @ b` of one rank; the group is for the gradient."""
    check_operands("cut_mm", numerics, a, b)
    return Numerics.parse(numerics).multiply(a, b)


def _mm_fake(a: Tensor, b: Tensor, group: str, numerics: str) -> Tensor:  # noqa: ARG001
    check_operands("cut_mm", numerics, a, b)
    return a.new_empty((a.shape[0], b.shape[1]), dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(inputs[0], inputs[1])
    ctx.group, ctx.numerics = inputs[2:]


def _summed_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient is whole on every rank, and so the products are this rank's own."""
    a, b = ctx.saved_tensors
    need_a, need_b = ctx.needs_input_grad[:2]
    grad_a = heal.mm(grad, b.t(), ctx.numerics).to(a.dtype) if need_a else None
    grad_b = heal.mm(a.t(), grad, ctx.numerics).to(b.dtype) if need_b else None
    return grad_a, grad_b, None, None


def _cut_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Every rank has the gradient of its columns; that of the whole input sums over them."""
    a, b = ctx.saved_tensors
    need_a, need_b = ctx.needs_input_grad[:2]
    grad_a = heal.summed_mm(grad, b.t(), ctx.group, ctx.numerics).to(a.dtype) if need_a else None
    grad_b = heal.mm(a.t(), grad, ctx.numerics).to(b.dtype) if need_b else None
    return grad_a, grad_b, None, None


_SCHEMA = "(Tensor a, Tensor b, str group, str numerics) -> Tensor"
register_opaque(f"summed_mm{_SCHEMA}", _summed_mm, _mm_fake, _summed_backward, _save)
register_opaque(f"cut_mm{_SCHEMA}", _mm, _mm_fake, _cut_backward, _save)

_LINEAR = "(Tensor input, Tensor weight, Tensor? bias, str group, str numerics) -> Tensor"
library.define(f"column_linear{_LINEAR}")
library.define(f"row_linear{_LINEAR}")


@torch.library.impl(library, "column_linear", "CompositeImplicitAutograd")
def column_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, group: str, numerics: str
) -> Tensor:
    """`input @ weight.T + bias` in FP32, cut by output: `[..., K]`, `[N part, K]`, `[N part]`."""
    return _linear(heal.cut_mm, input, weight, bias, group, numerics)


@torch.library.impl(library, "row_linear", "CompositeImplicitAutograd")
def row_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, group: str, numerics: str
) -> Tensor:
    """`input @ weight.T + bias` in FP32, cut by input: `[..., K part]`, `[N, K part]`, `[N]`."""
    return _linear(heal.summed_mm, input, weight, bias, group, numerics)


def _linear(
    product: Any, input: Tensor, weight: Tensor, bias: Tensor | None, group: str, numerics: str
) -> Tensor:
    rows = input.reshape(math.prod(input.shape[:-1]), input.shape[-1])
    result = product(rows, weight.t(), group, numerics)
    result = result.reshape(*input.shape[:-1], weight.shape[0])
    if bias is None:
        return result
    exact = Numerics.parse(numerics).products is not None  # the bias's gradient is an exact sum
    return heal.add(result, bias) if exact else result + bias
