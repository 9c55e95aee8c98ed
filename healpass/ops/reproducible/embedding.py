"""A trained embedding: `heal::embedding`, whose gradient adds in integers. Imports `reduce`.

The lookup moves numbers. Its gradient sums the rows of equal tokens, in the order of the device if
torch does it; here the rows become integers with one unit per column
(`reproducible.reduce.to_integers`), which add to one value in any order, and the sum is rounded
once. Error per element: a term is off by at most 2^-bits of its column's maximum over all tokens
(`reproducible.reduce`), then half an ulp.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from healpass.ops.reproducible import fp64
from healpass.ops.reproducible.reduce import element_bits, from_integers, to_integers
from healpass.ops.reproducible.register import register_opaque

heal = torch.ops.heal


def _embedding(weight: Tensor, indices: Tensor, padding_idx: int) -> Tensor:  # noqa: ARG001
    """Rows `[..., *E]` of `weight` `[V, *E]` (FP16, BF16 or FP32), in its dtype.

    Args:
        weight: The table.
        indices: INT64 or INT32 of any shape.
        padding_idx: A token that gets no gradient; -1 for none.
    """
    return fp64.checked(weight)[indices]


def _embedding_fake(weight: Tensor, indices: Tensor, padding_idx: int) -> Tensor:  # noqa: ARG001
    return fp64.checked(weight).new_empty((*indices.shape, *weight.shape[1:]))


def _scatter_rows(grad: Tensor, indices: Tensor, rows: int, padding_idx: int) -> Tensor:
    """The exact sum of the rows of `grad` `[..., E]` with equal `indices`, FP32 `[rows, E]`."""
    x = fp64.to_fp64(grad.reshape(indices.numel(), grad.shape[-1]))
    index = indices.reshape(-1)
    x = torch.where((index == padding_idx)[:, None], 0.0, x)
    if x.numel() == 0:
        return grad.new_zeros((rows, grad.shape[-1]), dtype=torch.float32)
    integers, unit = to_integers(x, [0], element_bits(x.shape[0]))
    total = integers.new_zeros((rows, x.shape[1])).index_add_(0, index, integers)
    # Infinities and NaN in any order; finite numbers count as 0 there.
    apart = torch.where(x.abs() < math.inf, 0.0, x)
    special = x.new_zeros((rows, x.shape[1])).index_add_(0, index, apart)
    return fp64.to_fp32(torch.where(special == 0.0, from_integers(total) * unit, special))


def _scatter_rows_fake(grad: Tensor, indices: Tensor, rows: int, padding_idx: int) -> Tensor:  # noqa: ARG001
    return grad.new_empty((rows, grad.shape[-1]), dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    weight, indices, padding_idx = inputs
    ctx.save_for_backward(indices)
    ctx.shape, ctx.padding_idx, ctx.dtype = weight.shape, padding_idx, weight.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (indices,) = ctx.saved_tensors
    rows, *columns = ctx.shape
    flat = grad.reshape(indices.numel(), math.prod(columns))
    found = heal.scatter_rows(flat, indices.reshape(-1), rows, ctx.padding_idx)
    return found.reshape(ctx.shape).to(ctx.dtype), None, None


register_opaque(
    "scatter_rows(Tensor grad, Tensor indices, SymInt rows, int padding_idx) -> Tensor",
    _scatter_rows,
    _scatter_rows_fake,
)
register_opaque(
    "embedding(Tensor weight, Tensor indices, int padding_idx) -> Tensor",
    _embedding,
    _embedding_fake,
    _backward,
    _save,
)
