"""Bit-reproducible functions of one tensor: `heal::exp`, `heal::silu` ... Imports `fp64`.

FP16, BF16 or FP32 in, FP32 out, the same bits on every device and from every compiler: FP64
sequences of IEEE operations (`reproducible.fp64`) with one rounding. Error: at most (1/2 + 2^-5)
ulp for sine and cosine, (1/2 + 2^-10) ulp for the others, of the exact value for the given number
(`fp64.places` of `fp64.SINE_ERROR` and `fp64.ERROR`).

Special values, the same everywhere: subnormals count, in and out; a zero is +0, whatever its sign
was, because Inductor compiles with -fno-signed-zeros; a NaN is 0x7FC00000; infinities are as in
torch.

The gradient of `heal::f` is `grad * heal::f_slope(x)`, the slope rounded once like f itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from healpass.ops.reproducible import fp64
from healpass.ops.reproducible.register import register

Formula = Callable[[Tensor], Tensor]

_SQRT_HALF = math.sqrt(0.5)
#: torch's approximation of GELU: x (1 + tanh(u)) / 2 at u = sqrt(2 / pi) (x + 0.044715 x^3).
_GELU_SCALE, _GELU_CUBE = math.sqrt(2 / math.pi), 0.044715


def _sin(x: Tensor) -> Tensor:
    return fp64.sincos(x)[0]


def _cos(x: Tensor) -> Tensor:
    return fp64.sincos(x)[1]


def _tanh_slope(x: Tensor) -> Tensor:
    """1 / cosh(x)^2."""
    return 4.0 * _sigmoid_slope(2.0 * x)


def _erf_slope(x: Tensor) -> Tensor:
    return fp64.exp(-(x * x)) * (2 / math.sqrt(math.pi))


def _sigmoid_slope(x: Tensor) -> Tensor:
    e = fp64.exp(-x.abs())
    return e / ((1.0 + e) * (1.0 + e))


def _silu(x: Tensor) -> Tensor:
    return x * fp64.sigmoid(x)


def _silu_slope(x: Tensor) -> Tensor:
    return fp64.sigmoid(x) * (1.0 + x * fp64.sigmoid(-x))


def _gelu(x: Tensor) -> Tensor:
    return 0.5 * x * fp64.erfc(x * -_SQRT_HALF)


def _gelu_slope(x: Tensor) -> Tensor:
    density = fp64.exp(-0.5 * (x * x)) * (1 / math.sqrt(2 * math.pi))
    return 0.5 * fp64.erfc(x * -_SQRT_HALF) + x * density


def _gelu_tanh(x: Tensor) -> Tensor:
    return x * fp64.sigmoid(_twice_u(x))


def _gelu_tanh_slope(x: Tensor) -> Tensor:
    inner = (2.0 * _GELU_SCALE) * (1.0 + (3.0 * _GELU_CUBE) * (x * x))
    twice_u = _twice_u(x)
    return fp64.sigmoid(twice_u) + x * _sigmoid_slope(twice_u) * inner


def _twice_u(x: Tensor) -> Tensor:
    return (2.0 * _GELU_SCALE) * (x + _GELU_CUBE * (x * x * x))


def _rsqrt(x: Tensor) -> Tensor:
    return 1.0 / torch.sqrt(x)


def _scaled(formula: Formula, factor: float) -> Formula:
    return lambda x: formula(x) * factor


@dataclass(frozen=True)
class Function:
    """A function of one variable.

    Attributes:
        value: FP64 to FP64.
        slope: Its derivative, FP64 to FP64.
    """

    value: Formula
    slope: Formula


FUNCTIONS: dict[str, Function] = {
    "exp": Function(fp64.exp, fp64.exp),
    "exp2": Function(fp64.exp2, _scaled(fp64.exp2, math.log(2))),
    "expm1": Function(fp64.expm1, fp64.exp),
    "log": Function(fp64.log, lambda x: 1.0 / x),
    "log2": Function(_scaled(fp64.log, 1 / math.log(2)), lambda x: 1 / math.log(2) / x),
    "log10": Function(_scaled(fp64.log, 1 / math.log(10)), lambda x: 1 / math.log(10) / x),
    "log1p": Function(fp64.log1p, lambda x: 1.0 / (1.0 + x)),
    "sin": Function(_sin, _cos),
    "cos": Function(_cos, lambda x: -_sin(x)),
    "tanh": Function(fp64.tanh, _tanh_slope),
    "erf": Function(fp64.erf, _erf_slope),
    "erfc": Function(fp64.erfc, lambda x: -_erf_slope(x)),
    "sigmoid": Function(fp64.sigmoid, _sigmoid_slope),
    "silu": Function(_silu, _silu_slope),
    "gelu": Function(_gelu, _gelu_slope),
    "gelu_tanh": Function(_gelu_tanh, _gelu_tanh_slope),
    "softplus": Function(fp64.softplus, fp64.sigmoid),
    "logsigmoid": Function(lambda x: -fp64.softplus(-x), lambda x: fp64.sigmoid(-x)),
    "sqrt": Function(torch.sqrt, lambda x: 0.5 / torch.sqrt(x)),
    "rsqrt": Function(_rsqrt, lambda x: -0.5 / (x * torch.sqrt(x))),
    "reciprocal": Function(lambda x: 1.0 / x, lambda x: -1.0 / (x * x)),
}


def _register(name: str, function: Function) -> None:
    """Register `heal::name` and `heal::name_slope`."""

    def value(input: Tensor) -> Tensor:
        return fp64.to_fp32(function.value(fp64.to_fp64(input)))

    def slope(input: Tensor) -> Tensor:
        return fp64.to_fp32(function.slope(fp64.to_fp64(input)))

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
        ctx.save_for_backward(inputs[0])

    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return (grad * slope_operator(x)).to(x.dtype)

    slope_operator = register(f"{name}_slope(Tensor input) -> Tensor", slope, _like)
    register(f"{name}(Tensor input) -> Tensor", value, _like, backward, save)


def _like(input: Tensor) -> Tensor:
    return torch.empty_like(fp64.checked(input), dtype=torch.float32)


def _canonical(input: Tensor) -> Tensor:
    """FP32 `input` with canonical zeros and NaN."""
    return fp64.canonical(fp64.checked(input).to(torch.float32))


def _canonical_backward(ctx: Any, grad: Tensor) -> Tensor:
    return grad.to(ctx.dtype)


def _save_dtype(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.dtype = inputs[0].dtype


register("canonical(Tensor input) -> Tensor", _canonical, _like, _canonical_backward, _save_dtype)

for _name, _function in FUNCTIONS.items():
    _register(_name, _function)
