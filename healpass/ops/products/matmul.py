"""Matrix products: `heal::mm`, `bmm`, `grouped_mm` (primitive), `linear`, `matmul` (composite).

All take FP16, BF16 or FP32 operands in any mixture and return FP32: the product is never rounded
to 16 bits. A gradient comes back in the dtype of its operand, rounded once.

Meaning and bound: every product is FP32 arithmetic on the upcast operands, so for K terms `|y - a
@ b| <= K * 2^-24 * (|a| @ |b|)` to first order (Higham, section 3.5), for `numerics="heal"` (arXiv
2606.21023) and `numerics="layercast"` (arXiv 2506.09501, section 4) alike. A `numerics` that names
a GPU generation adds as its tensor cores would (`products.numerics`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from healpass.errors import DerivativeError, DtypeError
from healpass.ops.library import library
from healpass.ops.products.numerics import Numerics

#: The dtypes that a `heal::` operator takes.
OPERAND_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def check_operands(op: str, numerics: str, *operands: Tensor) -> None:
    """Refuse dtypes, numerics and derivatives that a `heal::` operator has no meaning for.

    Args:
        op: The operator's name without `heal::`, for the message.
        numerics: As the operator takes it.
        *operands: The tensors that are multiplied.

    Raises:
        DtypeError: An operand is not FP16, BF16 or FP32.
        OperandError: `numerics` is unknown.
        DerivativeError: Forward-mode differentiation (`jvp`) is on: torch gives a custom operator
            the tangent zero there, without a word.
    """
    if forward_ad._current_level >= 0:
        raise DerivativeError(
            f"heal::{op} has no forward-mode derivative (torch.func.jvp, forward_ad). Use reverse "
            "mode, or torch's own operator inside the jvp."
        )
    for operand in operands:
        if operand.dtype not in OPERAND_DTYPES:
            raise DtypeError(
                f"heal::{op} got a {operand.dtype} operand; it takes float16, bfloat16 and "
                "float32. Use torch's own operator for other dtypes."
            )
    Numerics.parse(numerics)


# ---------------------------------------------------------------------------------------- mm


@torch.library.custom_op("heal::mm", mutates_args=())
def mm(a: Tensor, b: Tensor, numerics: str = "heal") -> Tensor:
    """`a @ b` in FP32: `[M, K]` times `[K, N]` gives `[M, N]`."""
    check_operands("mm", numerics, a, b)
    return Numerics.parse(numerics).multiply(a, b)


@mm.register_fake
def _(a: Tensor, b: Tensor, numerics: str = "heal") -> Tensor:
    check_operands("mm", numerics, a, b)
    torch._check(a.dim() == 2 and b.dim() == 2, lambda: "heal::mm needs two matrices")
    torch._check(
        a.shape[1] == b.shape[0],
        lambda: f"heal::mm cannot multiply {tuple(a.shape)} by {tuple(b.shape)}",
    )
    return a.new_empty((a.shape[0], b.shape[1]), dtype=torch.float32)


def _save_operands(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(inputs[0], inputs[1])
    ctx.numerics = inputs[2]


def _mm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    a, b = ctx.saved_tensors
    need_a, need_b = ctx.needs_input_grad[:2]
    grad_a = torch.ops.heal.mm(grad, b.t(), ctx.numerics).to(a.dtype) if need_a else None
    grad_b = torch.ops.heal.mm(a.t(), grad, ctx.numerics).to(b.dtype) if need_b else None
    return grad_a, grad_b, None


mm.register_autograd(_mm_backward, setup_context=_save_operands)


# --------------------------------------------------------------------------------------- bmm


@torch.library.custom_op("heal::bmm", mutates_args=())
def bmm(a: Tensor, b: Tensor, numerics: str = "heal") -> Tensor:
    """`a @ b` in FP32 for a batch: `[B, M, K]` times `[B, K, N]` gives `[B, M, N]`."""
    check_operands("bmm", numerics, a, b)
    return Numerics.parse(numerics).multiply(a, b)


@bmm.register_fake
def _(a: Tensor, b: Tensor, numerics: str = "heal") -> Tensor:
    check_operands("bmm", numerics, a, b)
    torch._check(a.dim() == 3 and b.dim() == 3, lambda: "heal::bmm needs two batches of matrices")
    torch._check(
        a.shape[0] == b.shape[0], lambda: f"heal::bmm got batches {a.shape[0]} and {b.shape[0]}"
    )
    torch._check(
        a.shape[2] == b.shape[1],
        lambda: f"heal::bmm cannot multiply {tuple(a.shape)} by {tuple(b.shape)}",
    )
    return a.new_empty((a.shape[0], a.shape[1], b.shape[2]), dtype=torch.float32)


def _bmm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    a, b = ctx.saved_tensors
    need_a, need_b = ctx.needs_input_grad[:2]
    grad_a = torch.ops.heal.bmm(grad, b.mT, ctx.numerics).to(a.dtype) if need_a else None
    grad_b = torch.ops.heal.bmm(a.mT, grad, ctx.numerics).to(b.dtype) if need_b else None
    return grad_a, grad_b, None


bmm.register_autograd(_bmm_backward, setup_context=_save_operands)


# ------------------------------------------------------------------------------- linear, matmul

library.define(
    'linear(Tensor input, Tensor weight, Tensor? bias=None, str numerics="heal") -> Tensor'
)
library.define('matmul(Tensor a, Tensor b, str numerics="heal") -> Tensor')


@torch.library.impl(library, "linear", "CompositeImplicitAutograd")
def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    numerics: str = "heal",
) -> Tensor:
    """`input @ weight.T + bias` in FP32: `[..., K]` with `[N, K]` (or `[K]`) gives `[..., N]`."""
    if weight.dim() == 1:
        result = matmul(input, weight, numerics)
    else:
        rows = input.reshape(math.prod(input.shape[:-1]), input.shape[-1])
        product = torch.ops.heal.mm(rows, weight.t(), numerics)
        result = product.reshape(*input.shape[:-1], weight.shape[0])
    if bias is None:
        return result
    if Numerics.parse(numerics).products is not None:  # the bias's gradient is an exact sum
        return torch.ops.heal.add(result, bias)
    return result + bias


@torch.library.impl(library, "matmul", "CompositeImplicitAutograd")
def matmul(a: Tensor, b: Tensor, numerics: str = "heal") -> Tensor:
    """`torch.matmul(a, b)` in FP32, for every pair of ranks and every broadcast it allows.

    A vector is a row on the left and a column on the right; leading dimensions broadcast. Where
    the right operand is one matrix, the leading dimensions of the left one are folded into its
    rows, so that the matrix is read once.
    """
    torch._check(
        a.dim() > 0 and b.dim() > 0,
        lambda: "heal::matmul needs operands of at least one dimension",
    )
    left, right = (a.unsqueeze(0) if a.dim() == 1 else a), (b.unsqueeze(1) if b.dim() == 1 else b)
    if right.dim() == 2:
        rows = left.reshape(math.prod(left.shape[:-1]), left.shape[-1])
        result = torch.ops.heal.mm(rows, right, numerics)
        result = result.reshape(*left.shape[:-1], right.shape[-1])
    else:
        result = _batched(left, right, numerics)
    if a.dim() == 1:
        result = result.squeeze(-2)
    return result.squeeze(-1) if b.dim() == 1 else result


def _batched(left: Tensor, right: Tensor, numerics: str) -> Tensor:
    batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    size = math.prod(batch)
    a = left.expand(*batch, *left.shape[-2:]).reshape(size, *left.shape[-2:])
    b = right.expand(*batch, *right.shape[-2:]).reshape(size, *right.shape[-2:])
    result = torch.ops.heal.bmm(a, b, numerics)
    return result.reshape(*batch, left.shape[-2], right.shape[-1])


# -------------------------------------------------------------------------------- grouped_mm


@torch.library.custom_op("heal::grouped_mm", mutates_args=())
def grouped_mm(a: Tensor, b: Tensor, offs: Tensor, numerics: str = "heal") -> Tensor:
    """One product per group in FP32, the groups being consecutive ranges of one dimension.

    `offs` `[G]` (int32) holds where each group ends. Which dimension is ragged follows from the
    ranks, as in `torch._grouped_mm`:

    * `[T, K]` with `[G, K, N]` gives `[T, N]`: rows are routed (a mixture of experts, forward);
    * `[M, T]` with `[T, N]` gives `[G, M, N]`: the sum is ragged (gradient of the experts'
    weights);
    * `[G, M, K]` with `[K, T]` gives `[M, T]`: columns are routed.

    What lies past the last offset belongs to no group and is zero.
    """
    check_operands("grouped_mm", numerics, a, b)
    multiply = Numerics.parse(numerics).multiply
    result = a.new_zeros(_grouped_shape(a, b, offs), dtype=torch.float32)
    start = 0
    for group, end in enumerate(offs.tolist()):
        span = slice(start, end)
        if a.dim() == 2 and b.dim() == 3:
            result[span] = multiply(a[span], b[group])
        elif a.dim() == 2:
            result[group] = multiply(a[:, span], b[span])
        else:
            result[:, span] = multiply(a[group], b[:, span])
        start = end
    return result


def _grouped_shape(a: Tensor, b: Tensor, offs: Tensor) -> tuple[int, ...]:
    torch._check(
        (a.dim(), b.dim()) in ((2, 3), (2, 2), (3, 2)),
        lambda: f"heal::grouped_mm got ranks {a.dim()} and {b.dim()}; it takes 2x3, 2x2 and 3x2",
    )
    if a.dim() == 2 and b.dim() == 3:
        return (a.shape[0], b.shape[2])
    if a.dim() == 2:
        return (offs.shape[0], a.shape[0], b.shape[1])
    return (a.shape[1], b.shape[1])


@grouped_mm.register_fake
def _(a: Tensor, b: Tensor, offs: Tensor, numerics: str = "heal") -> Tensor:
    check_operands("grouped_mm", numerics, a, b)
    return a.new_empty(_grouped_shape(a, b, offs), dtype=torch.float32)


def _save_groups(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs[:3])
    ctx.numerics = inputs[3]


def _grouped_mm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    a, b, offs = ctx.saved_tensors
    need_a, need_b = ctx.needs_input_grad[:2]
    grouped = torch.ops.heal.grouped_mm
    grad_a = grouped(grad, b.mT, offs, ctx.numerics).to(a.dtype) if need_a else None
    grad_b = grouped(a.mT, grad, offs, ctx.numerics).to(b.dtype) if need_b else None
    return grad_a, grad_b, None, None


grouped_mm.register_autograd(_grouped_mm_backward, setup_context=_save_groups)
