"""Linear layers that prepare each weight once, for graphs that run node by node.

Layer: study. Imports `arithmetic` and `ops`.

`heal::linear` makes digits of its weight, or FP32, in every call. Compiled code does so while it
reads the weight; node by node it takes longer than the product. The bits are those of
`heal::linear`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from healpass.arithmetic.digits import scaled_digits
from healpass.ops.products.exact import (
    Adders,
    Digits,
    Scheme,
    scale_of,
    scheme,
    sum_products,
    total_to_fp32,
)
from healpass.ops.products.numerics import Numerics


class KeptWeights:
    """Stands for `heal::linear` of weights that nobody writes to.

    It holds two or three bytes per weight with `exact`, else four.
    """

    def __init__(self) -> None:
        """Hold nothing yet."""
        self._kept: Any = WeakTensorKeyDictionary()

    def functions(self) -> dict[Any, Any]:
        """What stands for which operator."""
        return {torch.ops.heal.linear.default: self.linear}

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, numerics: str = "heal"
    ) -> Tensor:
        """As `heal::linear`: `[..., K]` by `[N, K]`, FP32 `[..., N]`.

        Args:
            x: FP16, BF16 or FP32.
            weight: Any of those; what is prepared of it is kept for the next call.
            bias: `[N]`, or None.
            numerics: As `heal::linear` takes it.
        """
        how = Numerics.parse(numerics)
        if how.simulate or how.order or weight.dim() != 2 or x.numel() == 0:
            return torch.ops.heal.linear(x, weight, bias, numerics)
        if how.products is None:  # FP32 arithmetic
            if weight.dtype == torch.float32:
                return torch.ops.heal.linear(x, weight, bias, numerics)
            wide = self._prepared(weight, None, lambda: weight.to(torch.float32))
            return torch.ops.heal.linear(x, wide, bias, numerics)
        plan = scheme(how.products, weight.dtype)
        rows = x.reshape(-1, x.shape[-1])
        row_scale = scale_of(rows, -1, plan.left)
        column_scale, right = self._prepared(weight, plan, lambda: _digits(weight, plan))
        if bool(row_scale.isnan().any()) or bool(column_scale.isnan().any()):
            return torch.ops.heal.linear(x, weight, bias, numerics)
        left = scaled_digits(rows, row_scale, plan.left)
        total = sum_products(left, right, plan.cut, Adders())
        result = total_to_fp32(total, row_scale, column_scale, plan)
        result = result.reshape(*x.shape[:-1], weight.shape[0])
        return result if bias is None else torch.ops.heal.add(result, bias)

    def _prepared(self, weight: Tensor, plan: Scheme | None, make: Callable[[], Any]) -> Any:
        known = self._kept.setdefault(weight, {})
        if plan not in known:
            known[plan] = make()
        return known[plan]


def _digits(weight: Tensor, plan: Scheme) -> tuple[Tensor, Digits]:
    scale = scale_of(weight.t(), -2, plan.right)
    return scale, scaled_digits(weight.t(), scale, plan.right)
