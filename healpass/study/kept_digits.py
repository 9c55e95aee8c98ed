"""Exact linear layers that cut each weight into digits once, for graphs that run node by node.

Layer: study. Imports `arithmetic` and `ops`.

`heal::linear` cuts its weight in every call; compiled code does so while it reads it, but node by
node that takes longer than the product. The bits are those of `heal::linear`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from healpass.arithmetic.digits import scaled_digits
from healpass.ops.exact_matmul import (
    Adders,
    Digits,
    Scheme,
    scale_of,
    scheme,
    sum_products,
    total_to_fp32,
)
from healpass.ops.numerics import Numerics


class KeptDigits:
    """Stands for `heal::linear` of weights that nobody writes to; holds a byte per digit."""

    def __init__(self) -> None:
        """Hold nothing yet."""
        self._kept: Any = WeakTensorKeyDictionary()

    def functions(self) -> dict[Any, Any]:
        """What stands for which operator."""
        return {torch.ops.heal.linear.default: self.linear}

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, numerics: str = "heal"
    ) -> Tensor:
        """As `heal::linear`: `[..., K]` by `[N, K]`, FP32 `[..., N]`."""
        how = Numerics.parse(numerics)
        plain = how.products is not None and how.simulate is None and not how.order
        if not plain or weight.dim() != 2 or x.numel() == 0:
            return torch.ops.heal.linear(x, weight, bias, numerics)
        assert how.products is not None
        plan = scheme(how.products, weight.dtype)
        rows = x.reshape(-1, x.shape[-1])
        row_scale, (column_scale, right) = scale_of(rows, -1, plan.left), self._of(weight, plan)
        if bool(row_scale.isnan().any()) or bool(column_scale.isnan().any()):
            return torch.ops.heal.linear(x, weight, bias, numerics)
        left = scaled_digits(rows, row_scale, plan.left)
        total = sum_products(left, right, plan.cut, Adders())
        result = total_to_fp32(total, row_scale, column_scale, plan)
        result = result.reshape(*x.shape[:-1], weight.shape[0])
        return result if bias is None else torch.ops.heal.add(result, bias)

    def _of(self, weight: Tensor, plan: Scheme) -> tuple[Tensor, Digits]:
        if weight not in self._kept:
            scale = scale_of(weight.t(), -2, plan.right)
            self._kept[weight] = scale, scaled_digits(weight.t(), scale, plan.right)
        found: tuple[Tensor, Digits] = self._kept[weight]
        return found
