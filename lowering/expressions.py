"""Inductor expressions: what lowerings are written in. Imports torch only.

`call(aten.mul.Tensor, a, b)` builds the node that Inductor would build for that operator; nothing
runs, and nothing is stored unless it is realized.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor.lowering import lowerings, to_dtype
from torch._inductor.virtualized import V

aten = torch.ops.aten


def call(operator: Any, *args: Any, **kwargs: Any) -> Any:
    """The expression of one ATen operator.

    Args:
        operator: An overload of `torch.ops.aten`.
        *args: Expressions, numbers, sizes.
        **kwargs: The same.
    """
    return lowerings[operator](*args, **kwargs)


def fp32(x: Any) -> Any:
    """`x` in FP32."""
    return to_dtype(x, torch.float32)


def fp64(x: Any) -> Any:
    """`x` in FP64."""
    return to_dtype(x, torch.float64)


def mul(a: Any, b: Any) -> Any:
    """`a * b`, broadcast."""
    return call(aten.mul.Tensor, a, b)


def add(a: Any, b: Any) -> Any:
    """`a + b`, broadcast."""
    return call(aten.add.Tensor, a, b)


def sub(a: Any, b: Any) -> Any:
    """`a - b`, broadcast."""
    return call(aten.sub.Tensor, a, b)


def div(a: Any, b: Any) -> Any:
    """`a / b`, broadcast."""
    return call(aten.div.Tensor, a, b)


def clamp(x: Any, low: float, high: float) -> Any:
    """`x` between `low` and `high`; NaN stays.

    Args:
        x: An expression.
        low: The smallest result.
        high: The largest result.
    """
    return call(aten.clamp_max.default, call(aten.clamp_min.default, x, low), high)


def where(condition: Any, x: Any, y: Any) -> Any:
    """`x` where the condition holds, else `y`; numbers take the other's dtype, or FP32.

    Args:
        condition: An expression in bool.
        x: An expression or a float, broadcast.
        y: An expression or a float, broadcast.
    """
    dtype = next((z.get_dtype() for z in (x, y) if not isinstance(z, float)), torch.float32)
    x, y = (
        call(aten.scalar_tensor.default, z, dtype=dtype, device=condition.get_device())
        if isinstance(z, float)
        else z
        for z in (x, y)
    )
    return call(aten.where.self, condition, x, y)


def equals(x: Any, number: float) -> Any:
    """`x == number`."""
    return call(aten.eq.Scalar, x, number)


def unsqueeze(x: Any, dim: int) -> Any:
    """`x` with a dimension of size 1 at `dim`."""
    return call(aten.unsqueeze.default, x, dim)


def view(x: Any, sizes: list[Any]) -> Any:
    """`x` in another shape."""
    return call(aten.reshape.default, x, sizes)


def amax(x: Any) -> Any:
    """The maximum over the last dimension, which stays with size 1; 0 where it is empty."""
    empty = is_static(x.get_size()[-1]) and int(x.get_size()[-1]) == 0
    return total(x, -1) if empty else call(aten.amax.default, x, [-1], True)


def total(x: Any, dim: int) -> Any:
    """The sum over `dim`, which stays with size 1."""
    return call(aten.sum.dim_IntList, x, [dim], True)


def stored(x: Any) -> Any:
    """`x`, computed once and kept in memory."""
    x.realize()
    return x


def is_static(size: Any) -> bool:
    """Whether a size is a number when the graph is compiled."""
    return isinstance(size, int) or getattr(size, "is_number", False)


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are known to be equal."""
    return bool(V.graph.sizevars.statically_known_equals(a, b))
