"""Bit-reproducible norms: `heal::rms_norm` and `heal::layer_norm`. Imports `reduce`.

Everything between the FP32 (or 16-bit) operands and the FP32 result is FP64, the sums are exact
integers (`reproducible.reduce`), and the result is rounded once: it is within (1/2 + 2^-10) ulp of
the norm of the given numbers where nothing cancels. A row that holds a NaN or an infinity is NaN
where torch's is; eps > 0 keeps a row of zeros at zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from healpass.ops.reproducible import fp64
from healpass.ops.reproducible.reduce import count, sum_fp64
from healpass.ops.reproducible.register import register

heal = torch.ops.heal


def _last(x: Tensor, shape: Sequence[int]) -> list[int]:
    """The trailing dimensions that a norm of this shape runs over."""
    return list(range(x.dim() - len(shape), x.dim()))


def _mean(x: Tensor, dims: list[int]) -> Tensor:
    return sum_fp64(x, dims) / float(count(x, dims) or 1)


def _leading_sum(x: Tensor, dims: list[int]) -> Tensor:
    """The exact sum over all dimensions but `dims`, as FP32 of their shape."""
    others = [d for d in range(x.dim()) if d not in dims]
    return fp64.to_fp32(sum_fp64(x, others)).reshape([x.shape[d] for d in dims])


def _factor(weight: Tensor | None) -> Tensor | float:
    return 1.0 if weight is None else fp64.to_fp64(weight)


# ------------------------------------------------------------------------------------- rms_norm


def _rms_norm(input: Tensor, shape: Sequence[int], weight: Tensor | None, eps: float) -> Tensor:
    """Divide by sqrt(mean(x^2) + eps) over the trailing `shape`, times weight."""
    x = fp64.to_fp64(input)
    size = torch.sqrt(_mean(x * x, _last(x, shape)) + eps)
    return fp64.to_fp32(x / size * _factor(weight))


def _rms_norm_backward(
    grad: Tensor, input: Tensor, shape: Sequence[int], weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """With n = x / size: dx = (g w - n mean(g w n)) / size, dw = sum(g n)."""
    x, g = fp64.to_fp64(input), fp64.to_fp64(grad)
    dims = _last(x, shape)
    size = torch.sqrt(_mean(x * x, dims) + eps)
    unit = x / size
    scaled = g * _factor(weight)
    grad_input = (scaled - unit * _mean(scaled * unit, dims)) / size
    return fp64.to_fp32(grad_input), _leading_sum(g * unit, dims)


def _rms_norm_fake(
    input: Tensor,
    shape: Sequence[int],  # noqa: ARG001
    weight: Tensor | None,  # noqa: ARG001
    eps: float,  # noqa: ARG001
) -> Tensor:
    return torch.empty_like(fp64.checked(input), dtype=torch.float32)


def _rms_norm_backward_fake(
    grad: Tensor,  # noqa: ARG001
    input: Tensor,
    shape: Sequence[int],
    weight: Tensor | None,  # noqa: ARG001
    eps: float,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(input, dtype=torch.float32),
        input.new_empty(tuple(shape), dtype=torch.float32),
    )


def _save_rms_norm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(inputs[0], inputs[2])
    ctx.shape, ctx.eps = inputs[1], inputs[3]


def _rms_norm_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    grad_x, grad_weight = heal.rms_norm_backward(grad, x, ctx.shape, weight, ctx.eps)
    return grad_x.to(x.dtype), None, _as(grad_weight, weight), None


def _as(grad: Tensor, parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else grad.to(parameter.dtype)


register(
    "rms_norm_backward(Tensor grad, Tensor input, int[] shape, Tensor? weight, float eps) "
    "-> (Tensor, Tensor)",
    _rms_norm_backward,
    _rms_norm_backward_fake,
)
register(
    "rms_norm(Tensor input, int[] shape, Tensor? weight, float eps) -> Tensor",
    _rms_norm,
    _rms_norm_fake,
    _rms_norm_gradients,
    _save_rms_norm,
)


# ----------------------------------------------------------------------------------- layer_norm


def _layer_norm(
    input: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the trailing `shape`."""
    unit, _ = _standardized(fp64.to_fp64(input), shape, eps)
    result = unit * _factor(weight)
    return fp64.to_fp32(result if bias is None else result + fp64.to_fp64(bias))


def _standardized(x: Tensor, shape: Sequence[int], eps: float) -> tuple[Tensor, Tensor]:
    dims = _last(x, shape)
    distance = x - _mean(x, dims)
    size = torch.sqrt(_mean(distance * distance, dims) + eps)
    return distance / size, size


def _layer_norm_backward(
    grad: Tensor, input: Tensor, shape: Sequence[int], weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """With n standardized: dx = (g w - mean(g w) - n mean(g w n)) / size; dw, db sum rows."""
    x, g = fp64.to_fp64(input), fp64.to_fp64(grad)
    dims = _last(x, shape)
    unit, size = _standardized(x, shape, eps)
    scaled = g * _factor(weight)
    centered = scaled - _mean(scaled, dims) - unit * _mean(scaled * unit, dims)
    return (
        fp64.to_fp32(centered / size),
        _leading_sum(g * unit, dims),
        _leading_sum(g, dims),
    )


def _layer_norm_fake(
    input: Tensor,
    shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,  # noqa: ARG001
    eps: float,
) -> Tensor:
    return _rms_norm_fake(input, shape, weight, eps)


def _layer_norm_backward_fake(
    grad: Tensor, input: Tensor, shape: Sequence[int], weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, grad_weight = _rms_norm_backward_fake(grad, input, shape, weight, eps)
    return grad_x, grad_weight, torch.empty_like(grad_weight)


def _save_layer_norm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(inputs[0], inputs[2], inputs[3])
    ctx.shape, ctx.eps = inputs[1], inputs[4]


def _layer_norm_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = heal.layer_norm_backward(grad, x, ctx.shape, weight, ctx.eps)
    return grad_x.to(x.dtype), None, _as(grad_weight, weight), _as(grad_bias, bias), None


register(
    "layer_norm_backward(Tensor grad, Tensor input, int[] shape, Tensor? weight, float eps) "
    "-> (Tensor, Tensor, Tensor)",
    _layer_norm_backward,
    _layer_norm_backward_fake,
)
register(
    "layer_norm(Tensor input, int[] shape, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    _layer_norm,
    _layer_norm_fake,
    _layer_norm_gradients,
    _save_layer_norm,
)
