"""`heal::with_special`: what infinities and NaN make of an exact product. Imports `exact`.

Compiled code multiplies digits without asking whether the operands are finite. Where one is not,
its row's or column's scale is NaN, and no element of that row or column is finite: infinity times
anything is infinite or NaN, and stays so in a sum. So every finite element is right already, and
the others are those of `special`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from healpass.ops.products.exact import special
from healpass.ops.reproducible import fp64
from healpass.ops.reproducible.register import register_opaque


def _with_special(
    result: Tensor, a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor
) -> Tensor:
    """The product of `a` `[..., M, K]` and `b` `[..., K, N]`.

    Args:
        result: FP32 `[..., M, N]`, right in the rows and columns that are finite.
        a: FP16, BF16 or FP32.
        b: Any of those.
        a_scale: Per row, NaN for one that is not finite; of any shape, positive otherwise.
        b_scale: Per column, likewise.
    """
    if not math.isnan(a_scale.sum().item() + b_scale.sum().item()):  # scales are positive
        return result.clone()
    apart = special(a, b)
    return fp64.canonical(torch.where(apart == 0, result, apart))


def _with_special_fake(
    result: Tensor,
    a: Tensor,  # noqa: ARG001
    b: Tensor,  # noqa: ARG001
    a_scale: Tensor,  # noqa: ARG001
    b_scale: Tensor,  # noqa: ARG001
) -> Tensor:
    return torch.empty_like(result)


register_opaque(
    "with_special(Tensor result, Tensor a, Tensor b, Tensor a_scale, Tensor b_scale) -> Tensor",
    _with_special,
    _with_special_fake,
)
