"""Lowerings of `heal::quantize` and `heal::dequantize`, on every device. May import `ops`.

They are plain Inductor expressions, so that quantization is written by the kernel that makes its
operand (a projection's epilogue, RoPE) and dequantization by the one that reads it. Each mirrors
`arithmetic.int16` operation for operation, in FP64 where it matters, and has its bits: exact
attention reads what it writes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from sympy import Eq
from torch._inductor.lowering import to_dtype

from healpass.arithmetic.digits import BASE_BITS, DIGIT_MAX
from healpass.arithmetic.formats import FP32
from healpass.lowering.compat import is_true
from healpass.lowering.expressions import (
    add,
    amax,
    aten,
    call,
    clamp,
    div,
    equals,
    fp32,
    fp64,
    mul,
    sub,
    unsqueeze,
    view,
    where,
)
from healpass.ops.attention.quantize import FORMATS

_IOTA = {"start": 0, "step": 1, "dtype": torch.int64, "requires_grad": False}


def lower_quantize(x: Any, kv: str) -> tuple[Any, Any]:
    """`heal::quantize`: two reductions over a row, then its digits."""
    limit = FORMATS[kv].limit
    magnitude = call(aten.abs.default, fp32(x))
    finite = call(aten.lt.Scalar, magnitude, math.inf)
    largest = amax(where(finite, magnitude, 0.0))
    lost = amax(where(finite, 0.0, 1.0))
    scale = fp32(div(fp64(largest), float(limit)))
    scale = call(aten.clamp_min.default, scale, FP32.smallest_normal)
    nearest = call(aten.round.default, where(finite, div(fp64(x), fp64(scale)), 0.0))
    payload = to_dtype(clamp(nearest, -limit, limit), torch.int32)
    scale = where(equals(lost, 0.0), scale, math.nan)
    return _digits(payload, FORMATS[kv].digits), call(aten.squeeze.dim, scale, -1)


def lower_dequantize(digits: Any, scale: Any) -> Any:
    """`heal::dequantize`: an expression that its reader evaluates."""
    product = mul(integers(digits, torch.float64), fp64(unsqueeze(scale, -1)))
    return fp32(clamp(product, -FP32.largest, FP32.largest))


def integers(digits: Any, dtype: torch.dtype) -> Any:
    """`sum_i digits[i] * 256^i` of `[..., D, S, E]` as an expression; exact in FP32 and FP64."""
    planes = next(
        f.digits for f in FORMATS.values() if is_true(Eq(digits.get_size()[-3], f.digits))
    )
    joined = to_dtype(call(aten.select.int, digits, -3, planes - 1), dtype)
    for plane in reversed(range(planes - 1)):
        lower = to_dtype(call(aten.select.int, digits, -3, plane), dtype)
        joined = add(mul(joined, 2.0**BASE_BITS), lower)
    return joined


def _digits(payload: Any, count: int) -> Any:
    """Balanced base-256 digits of INT32 `[..., S, E]`, INT8 `[..., D, S, E]`, the lowest first."""
    planes, rest = [], payload
    for _ in range(count):
        low = call(aten.bitwise_and.Scalar, add(rest, DIGIT_MAX), (1 << BASE_BITS) - 1)
        digit = sub(low, DIGIT_MAX)
        planes.append(unsqueeze(to_dtype(digit, torch.int8), -3))
        rest = call(aten.bitwise_right_shift.Tensor_Scalar, sub(rest, digit), BASE_BITS)
    device = payload.get_device()
    if device.type == "cpu":
        return call(aten.cat.default, planes, -3)
    # Inductor's `cat` for GPUs asks for the size of the graph node's value; ours has two values.
    index = view(call(torch.ops.prims.iota.default, count, **_IOTA, device=device), [count, 1, 1])
    stacked = planes[-1]
    for plane in reversed(range(count - 1)):
        stacked = where(equals(index, plane), planes[plane], stacked)
    return stacked


LOWERINGS = {
    torch.ops.heal.quantize.default: lower_quantize,
    torch.ops.heal.dequantize.default: lower_dequantize,
}
