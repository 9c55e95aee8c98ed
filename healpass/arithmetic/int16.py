"""INT16 and INT24 with one scale per (token, head). Layer `arithmetic`.

value = scale * payload, |payload| <= limit. The limits are those of two and three balanced INT8
digits (32639 = 127 * 257, 8355711 = 127 * 65793), so that the same payload splits into digits
without a carry out of the top one. Scales are plain (maximum / limit) or powers of two.

Error of each element, as computed: |x - scale * payload| <= scale * (1/2 + 2^-26), and scale <=
maximum / limit * (1 + 2^-23) for a plain scale, 2 maximum / limit for a power of two; never below
2^-126.

A row that holds a NaN or an infinity gets the scale NaN: integers have no room for either, and
silence would be worse.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from healpass.arithmetic.bits import exponent, finite_amax, power_of_two
from healpass.arithmetic.formats import FP32

ScaleKind = Literal["plain", "power_of_two"]


@dataclass(frozen=True)
class IntegerFormat:
    """A signed integer format for rows of Q, K or V.

    Attributes:
        name: As in `kv=`.
        dtype: torch dtype that holds a payload (INT24 is kept in INT32; packing is the cache's
            matter).
        digits: Number of balanced INT8 digits.
        limit: Largest magnitude of a payload.
    """

    name: str
    dtype: torch.dtype
    digits: int

    @property
    def limit(self) -> int:
        """127 * (256^digits - 1) / 255: what balanced digits in [-127, 127] reach."""
        return 127 * (256**self.digits - 1) // 255


INT16 = IntegerFormat("int16", torch.int16, 2)
INT24 = IntegerFormat("int24", torch.int32, 3)
#: By name, as in `kv=`.
INTEGER_FORMATS = {fmt.name: fmt for fmt in (INT16, INT24)}


@dataclass(frozen=True)
class Quantized:
    """Payload and scale: value = scale * payload.

    Attributes:
        payload: INT16 or INT32, the shape of the quantized tensor.
        scale: FP32, size 1 along the last dimension.
    """

    payload: Tensor
    scale: Tensor


def quantize(x: Tensor, fmt: IntegerFormat = INT16, kind: ScaleKind = "plain") -> Quantized:
    """Quantize the rows of `x` along its last dimension.

    Args:
        x: `[..., E]`, floating point: one row per (token, head).
        fmt: INT16 or INT24.
        kind: A plain scale is finer, a power of two makes the dequantization exact.
    """
    # In FP32 the division alone would cost INT24 another quarter of a step.
    scale = _scale(finite_amax(x, -1), fmt.limit, kind)
    quotient = x.detach().to(torch.float64) / scale.to(torch.float64)
    finite = quotient.isfinite()
    payload = torch.where(finite, quotient, 0.0).round().clamp(-fmt.limit, fmt.limit)
    scale = torch.where(finite.all(-1, keepdim=True), scale, torch.nan)
    return Quantized(payload.to(fmt.dtype), scale)


def dequantize(quantized: Quantized) -> Tensor:
    """Return scale * payload in FP32, rounded once: at most 2^-24 of the value more.

    With INT16 and a power-of-two scale nothing is rounded. A maximum that rounds up past FP32's
    largest number is kept at that number, not made infinite.
    """
    product = quantized.payload.to(torch.float64) * quantized.scale.to(torch.float64)
    return product.clamp(-FP32.largest, FP32.largest).to(torch.float32)


def round_trip(x: Tensor, fmt: IntegerFormat = INT16, kind: ScaleKind = "plain") -> Tensor:
    """`x` as its integers represent it, in FP32, with the gradient of the identity.

    The straight-through estimator (arXiv 1308.3432): rounding has a derivative of zero almost
    everywhere, which would stop training.

    Args:
        x: `[..., E]`, floating point: one row per (token, head).
        fmt: INT16 or INT24.
        kind: As in `quantize`.
    """
    return _RoundTrip.apply(x, fmt, kind)


def _scale(amax: Tensor, limit: int, kind: ScaleKind) -> Tensor:
    smallest = FP32.smallest_normal
    if kind == "plain":
        return (amax.to(torch.float64) / limit).to(torch.float32).clamp_min(smallest)
    # The largest power of two below limit, then one more where the maximum would not fit.
    bits = limit.bit_length() - 1
    scale = power_of_two((exponent(amax) - bits).clamp(FP32.min_exponent, FP32.max_exponent))
    return torch.where(amax.to(torch.float64) / scale.to(torch.float64) > limit, 2 * scale, scale)


class _RoundTrip(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, fmt: IntegerFormat, kind: ScaleKind) -> Tensor:
        return dequantize(quantize(x, fmt, kind))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.to(ctx.dtype), None, None
