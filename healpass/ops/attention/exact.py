"""Attention on integers with the bits that it has everywhere: `heal::integer_attention`, exact.

An exact `numerics` makes this of the operator. Its steps stand in `attention.exact_steps`, its
gradients in `attention.exact_gradients`; kernels compute it chunk by chunk
(`attention.exact_chunks`). Caps and sinks have no place in it: `heal::sdpa` goes by
`attention.exact_capped` where there is one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from healpass.arithmetic.digits import integer_digits
from healpass.errors import OperandError
from healpass.ops.attention import exact_gradients
from healpass.ops.attention.blockwise import results
from healpass.ops.attention.exact_steps import (
    LARGEST_HEAD,
    MOST_KEYS,
    P_DIGITS,
    attend_scores,
    visible_scores,
)
from healpass.ops.attention.gradients import memory
from healpass.ops.attention.quantize import Integers
from healpass.ops.attention.scoring import Scoring
from healpass.ops.products.exact import Adders, sum_products
from healpass.ops.products.numerics import Numerics
from healpass.ops.reproducible.reduce import from_integers


@dataclass(frozen=True)
class ExactAttention:
    """One attention on integers: operands, scoring, and whose adders add.

    Attributes:
        query: `[B, H, L, E]`; H is a multiple of Hkv.
        key: `[B, Hkv, S, E]`.
        value: `[B, Hkv, S, Ev]`.
        scoring: Scale, mask, causality and window.
        how: An exact precision; a simulated generation gives the same bits.
    """

    query: Integers
    key: Integers
    value: Integers
    scoring: Scoring
    how: Numerics

    def __post_init__(self) -> None:
        """Refuse what the steps have no room for.

        Raises:
            OperandError: A cap, or sinks; or integers of other formats than INT16 and INT24.
        """
        counts = [x.planes for x in (self.query, self.key, self.value)]
        if not set(counts) <= MOST_KEYS.keys():
            raise OperandError(
                f"exact attention got Q, K and V of {counts} digits; it takes two (INT16) or "
                "three (INT24).\nMake them by heal::quantize."
            )
        if self.scoring.softcap is not None or self.scoring.sinks is not None:
            raise OperandError(
                "heal::integer_attention was asked for an exact precision with a cap or sinks, "
                "which its integers have no room for.\nCall heal::sdpa, which takes both."
            )

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to compute, or nothing to attend to."""
        return 0 in (*self.query.shape, *self.value.shape)

    @property
    def is_plain(self) -> bool:
        """Whether kernels may compute it: no generation is simulated, no order asked for."""
        return self.how.simulate is None and self.how.order == 0

    def results(self) -> tuple[Tensor, Tensor]:
        """Memory for the output and the logsumexp."""
        return results(self.query, self.value)

    def check(self) -> None:
        """Refuse sizes that may leave INT64.

        Raises:
            OperandError: E or S is past what INT64 holds.
        """
        (*_, keys, _), size = self.key.shape, self.query.shape[-1]
        most = 1 << MOST_KEYS[self.value.planes]
        if size > LARGEST_HEAD or keys > most:
            raise OperandError(
                f"exact attention over {keys} keys of size {size} may overflow INT64: V of "
                f"{self.value.planes} digits allows {most} keys, heads may have "
                f"{LARGEST_HEAD} elements.\n"
                "Use kv='int16', which allows more keys, or a sliding window."
            )

    def attend(self) -> tuple[Tensor, Tensor]:
        """Output and the natural logarithm of each row's denominator."""
        self.check()
        if self.is_empty:
            output, logsumexp = self.results()
            return output.zero_(), logsumexp.fill_(-math.inf)
        return attend_scores(*self.scores(), self.value.scale, self._weigh)

    def scores(self) -> tuple[Tensor, Tensor]:
        """FP64 `[B, H, L, S]`, -inf where a key is hidden, and which are visible."""
        return visible_scores(self.query, self.key, self.scoring, self._adders)

    def gradients(self, grad: Tensor, output: Tensor, logsumexp: Tensor) -> tuple[Tensor, ...]:
        """Gradients with regard to the values of Q, K and V, in FP32.

        Args:
            grad: `[B, H, L, Ev]`.
            output: Of the forward pass; it is not needed.
            logsumexp: Of the forward pass; it is not needed.
        """
        del output, logsumexp
        if self.is_empty:
            return tuple(gradient.zero_() for gradient in memory(self))
        return exact_gradients.attend_gradients(
            grad, self.states, *self.scores(), self.scoring.scale, self.how.multiply
        )

    def mask_gradient(self, grad: Tensor, output: Tensor, logsumexp: Tensor) -> Tensor:
        """The gradient of a float mask, in FP32 and in its shape.

        Args:
            grad: `[B, H, L, Ev]`.
            output: Of the forward pass; it is not needed.
            logsumexp: Of the forward pass; it is not needed.
        """
        del output, logsumexp
        mask = self.scoring.attn_mask
        assert mask is not None, "asked for the gradient of a mask"
        if self.is_empty:
            return torch.zeros_like(mask, dtype=torch.float32)
        value, multiply = self.value.dequantized(), self.how.multiply
        return exact_gradients.mask_gradient(grad, value, *self.scores(), mask, multiply)

    @property
    def states(self) -> tuple[Tensor, Tensor, Tensor]:
        """Q, K and V as their integers represent them, in FP32."""
        return self.query.dequantized(), self.key.dequantized(), self.value.dequantized()

    @property
    def _adders(self) -> Adders:
        return Adders(self.how.simulate, self.how.order)

    def _weigh(self, fixed: Tensor) -> Tensor:
        """P V: INT32 `[B, H, L, S]` by V's digits, rounded once to FP64 `[B, H, L, Ev]`."""
        batch, heads, length, keys = fixed.shape
        key_heads = self.value.shape[1]
        rows = fixed.reshape(batch, key_heads, heads // key_heads * length, keys)
        digits = integer_digits(rows, P_DIGITS), self.value.digits.unbind(2)
        total = sum_products(*digits, 0, self._adders)
        return from_integers(total.reshape(batch, heads, length, -1))
