"""Integers for attention: `heal::quantize`, `heal::dequantize`, and the mark `heal::stored`.

Q, K and V become balanced INT8 digits, the lowest plane first, with one FP32 scale per (token,
head): `value = scale * sum_i digits[i] * 256^i`. Two planes are INT16, three are INT24; tensor
cores multiply the planes as they lie in memory. `arithmetic.int16` derives the error of each
element: `scale * (1/2 + 2^-26)`, with `scale <= (1 + 2^-23) max|x| / limit`.

The quantizer's gradient is the identity (straight-through, arXiv 1308.3432). Integers carry no
gradient, so the operator that quantizes and attends applies it: `heal::sdpa`.

May import `arithmetic`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from healpass.arithmetic import int16
from healpass.arithmetic.digits import BASE_BITS, integer_digits
from healpass.arithmetic.formats import FP32
from healpass.errors import DtypeError, OperandError, suggestion
from healpass.ops.library import library
from healpass.ops.products.matmul import OPERAND_DTYPES

#: The integer formats of `kv=`, by name.
FORMATS = {fmt.name: fmt for fmt in (int16.INT16, int16.INT24)}

library.define("stored(Tensor(a) states) -> Tensor(a)")


class Integers(NamedTuple):
    """Queries, keys or values as integers: `scale * sum_i digits[i] * 256^i`.

    Attributes:
        digits: INT8 `[B, H, D, S, E]`, the lowest first.
        scale: FP32 `[B, H, S]`.
    """

    digits: Tensor
    scale: Tensor

    @classmethod
    def of(cls, x: Tensor, kv: str) -> Integers:
        """Quantize `[B, H, S, E]` in FP16, BF16 or FP32 as `heal::quantize` does."""
        fmt = _format(x, kv)
        quantized = int16.quantize(x, fmt)
        planes = integer_digits(quantized.payload, fmt.digits)
        return cls(torch.stack(planes, -3), quantized.scale.squeeze(-1))

    @property
    def shape(self) -> tuple[int, ...]:
        """B, H, S, E."""
        return (*self.scale.shape, self.digits.shape[-1])

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.digits.device

    @property
    def format(self) -> int16.IntegerFormat:
        """INT16 or INT24, by the number of digits."""
        return next(fmt for fmt in FORMATS.values() if fmt.digits == self.planes)

    @property
    def planes(self) -> int:
        """How many digits an integer has."""
        return int(self.digits.shape[-3])

    def check(self, name: str) -> None:
        """Refuse what `heal::quantize` does not make."""
        torch._check(
            self.digits.dtype == torch.int8 and self.digits.dim() == 5,
            lambda: (
                f"heal::integer_attention needs INT8 {name} digits [B, H, D, S, E], got "
                f"{self.digits.dtype} of rank {self.digits.dim()}; heal::quantize makes them"
            ),
        )

    def dequantized(self) -> Tensor:
        """FP32 `[B, H, S, E]`, rounded once: within 2^-24 of the value; NaN where the scale is."""
        return int16.dequantize(int16.Quantized(integers(self.digits), self.scale.unsqueeze(-1)))

    def values(self) -> Tensor:
        """FP32 `[B, H, S, E]`, 0 in the place of a row whose scale is NaN."""
        finite = self.scale.nan_to_num(0.0).unsqueeze(-1)
        product = integers(self.digits) * finite.to(torch.float64)
        return product.clamp(-FP32.largest, FP32.largest).to(torch.float32)


@torch.library.custom_op("heal::quantize", mutates_args=())
def quantize(x: Tensor, kv: str) -> tuple[Tensor, Tensor]:
    """Quantize the rows of `x`: one row per (token, head).

    Args:
        x: `[..., S, E]` in FP16, BF16 or FP32.
        kv: `int16` or `int24`.

    Returns:
        Digits, INT8 `[..., D, S, E]` with D = 2 or 3, and scales, FP32 `[..., S]`. A row that
        holds a NaN or an infinity has the scale NaN.

    Raises:
        TypeError: `x` has another dtype.
        ValueError: `kv` is another format.
    """
    digits, scale = Integers.of(x, kv)
    return digits, scale


@quantize.register_fake
def _(x: Tensor, kv: str) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-2], _format(x, kv).digits, *x.shape[-2:])
    return x.new_empty(shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _format(x: Tensor, kv: str) -> int16.IntegerFormat:
    if x.dtype not in OPERAND_DTYPES:
        raise DtypeError(
            f"heal::quantize got {x.dtype}; it takes float16, bfloat16 and float32.\n"
            "Cast the tensor to one of them first."
        )
    if kv not in FORMATS:
        raise OperandError(
            f"kv={kv!r} is no integer format; known: {', '.join(FORMATS)}."
            + suggestion(str(kv), FORMATS)
        )
    return FORMATS[kv]


@torch.library.custom_op("heal::dequantize", mutates_args=())
def dequantize(digits: Tensor, scale: Tensor) -> Tensor:
    """`scale * sum_i digits[i] * 256^i` in FP32, rounded once: within 2^-24 of the value.

    Args:
        digits: INT8 `[..., D, S, E]`.
        scale: FP32 `[..., S]`.

    Returns:
        `[..., S, E]` in FP32.
    """
    return Integers(digits, scale).dequantized()


@dequantize.register_fake
def _(digits: Tensor, scale: Tensor) -> Tensor:
    torch._check(
        digits.dtype == torch.int8 and digits.dim() == scale.dim() + 2,
        lambda: (
            "heal::dequantize needs INT8 digits [..., D, S, E] and a scale [..., S], got "
            f"{digits.dtype} of rank {digits.dim()} and rank {scale.dim()}"
        ),
    )
    shape = (*digits.shape[:-3], *digits.shape[-2:])
    return digits.new_empty(shape, dtype=torch.float32)


@torch.library.impl(library, "stored", "CompositeImplicitAutograd")
def stored(states: Tensor) -> Tensor:
    """The states themselves, marked as a cache's: a compiled graph leaves their format alone."""
    return states.view_as(states)


def integers(digits: Tensor) -> Tensor:
    """`sum_i digits[i] * 256^i` of INT8 `[..., D, S, E]` as exact FP64 `[..., S, E]`."""
    total = digits.select(-3, -1).to(torch.float64)
    for plane in reversed(range(digits.shape[-3] - 1)):
        total = total * 2.0**BASE_BITS + digits.select(-3, plane)
    return total
