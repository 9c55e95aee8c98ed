"""Bit-reproducible functions of two: `heal::add`, `sub`, `mul`, `div`, `pow`. Imports `reduce`.

FP16, BF16 or FP32 in any mixture and any broadcast, FP32 out. A sum, difference or product is one
IEEE FP32 operation, whose contraction the compile settings forbid. A quotient is rounded from FP64
(correctly: 53 bits are enough for 24, Figueroa 1995; below 2^-126 within (1/2 + 2^-29) of the
smallest subnormal), because `/` on FP32 is an approximation in Triton. A power is within
(1/2 + 2^-10) ulp. Zeros and NaN are canonical as in `reproducible.elementary`.

What a gradient gets from broadcasting is summed exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from healpass.ops.reproducible import fp64
from healpass.ops.reproducible.reduce import sum_to
from healpass.ops.reproducible.register import register

heal = torch.ops.heal
Gradients = tuple[Tensor, Tensor]


def _fp32(operation: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def compute(a: Tensor, b: Tensor) -> Tensor:
        a, b = (fp64.checked(x).to(torch.float32) for x in (a, b))
        return fp64.canonical(operation(a, b))

    return compute


def _div(a: Tensor, b: Tensor) -> Tensor:
    return fp64.to_fp32(fp64.to_fp64(a) / fp64.to_fp64(b))


def _pow(a: Tensor, b: Tensor) -> Tensor:
    return fp64.to_fp32(fp64.power(fp64.to_fp64(a), fp64.to_fp64(b)))


def _pow_scalar(a: Tensor, exponent: float) -> Tensor:
    """`a ** exponent`; short ways for squares, inverses and roots (NaN at -inf, as in torch)."""
    x = fp64.to_fp64(a)
    short = _SHORT_POWERS.get(exponent)
    return fp64.to_fp32(short(x) if short else fp64.power(x, torch.full_like(x, exponent)))


_SHORT_POWERS: dict[float, Callable[[Tensor], Tensor]] = {
    -1.0: lambda x: 1.0 / x,
    -0.5: lambda x: 1.0 / torch.sqrt(x),
    0.5: torch.sqrt,
    1.0: lambda x: x,
    2.0: lambda x: x * x,
    3.0: lambda x: x * x * x,
}


def _fake(a: Tensor, b: Tensor) -> Tensor:
    return fp64.checked(a).to(torch.float32) + fp64.checked(b).to(torch.float32)


# ---------------------------------------------------------------------------------- gradients


def _add_gradients(grad: Tensor, a: Tensor, b: Tensor) -> Gradients:  # noqa: ARG001
    return grad, grad


def _sub_gradients(grad: Tensor, a: Tensor, b: Tensor) -> Gradients:  # noqa: ARG001
    return grad, -grad


def _mul_gradients(grad: Tensor, a: Tensor, b: Tensor) -> Gradients:
    return heal.mul(grad, b), heal.mul(grad, a)


def _div_gradients(grad: Tensor, a: Tensor, b: Tensor) -> Gradients:
    """1 / b and -a / b^2."""
    share = heal.div(grad, b)
    return share, -heal.mul(share, heal.div(a, b))


def _pow_gradients(grad: Tensor, a: Tensor, b: Tensor) -> Gradients:
    """B a^(b - 1) and a^b log(a), the latter 0 at a = 0, as in torch."""
    less = heal.pow(a, b.to(torch.float32) - 1.0)
    logarithm = torch.where(a == 0, 0.0, heal.log(a))
    return heal.mul(grad, heal.mul(b, less)), heal.mul(grad, heal.mul(heal.pow(a, b), logarithm))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _backward(gradients: Callable[[Tensor, Tensor, Tensor], Gradients]) -> Callable[..., Any]:
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        operands = ctx.saved_tensors
        found = gradients(grad, *operands)
        return tuple(
            sum_to(g, x.shape).to(x.dtype) if needed else None
            for g, x, needed in zip(found, operands, ctx.needs_input_grad, strict=True)
        )

    return backward


def _pow_scalar_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (x,) = ctx.saved_tensors
    exponent = ctx.exponent
    if exponent == 0.0:
        return torch.zeros_like(x), None
    return (grad * (heal.pow_scalar(x, exponent - 1.0) * exponent)).to(x.dtype), None


def _save_pow_scalar(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(inputs[0])
    ctx.exponent = inputs[1]


for _name, _meaning, _gradients in (
    ("add", _fp32(torch.add), _add_gradients),
    ("sub", _fp32(torch.sub), _sub_gradients),
    ("mul", _fp32(torch.mul), _mul_gradients),
    ("div", _div, _div_gradients),
    ("pow", _pow, _pow_gradients),
):
    register(
        f"{_name}(Tensor a, Tensor b) -> Tensor", _meaning, _fake, _backward(_gradients), _save
    )

register(
    "pow_scalar(Tensor a, float exponent) -> Tensor",
    _pow_scalar,
    lambda a, exponent: torch.empty_like(fp64.checked(a), dtype=torch.float32),  # noqa: ARG005
    _pow_scalar_backward,
    _save_pow_scalar,
)
