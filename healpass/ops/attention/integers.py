"""Attention on integer digits: `heal::integer_attention` and its gradients.

Q, K and V come as `heal::quantize` makes them; the reference implementation is that of
`attention.blockwise`, for `x = scale * integer`. `q . k` is a sum of products of integers. It is
exact (INT24: within 2^-53 of the sum of magnitudes), rounded to FP32 once, and a score past FP32's
range saturates instead of becoming infinite. A hidden key counts for nothing, even if its scale is
NaN.

Error: `arithmetic.attention_bounds` with `kv=`. May import `tensorcore`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from healpass.arithmetic.formats import FP32
from healpass.ops.attention import register
from healpass.ops.attention.blockwise import Attends, fold
from healpass.ops.attention.exact import ExactAttention
from healpass.ops.attention.gradients import DifferentiableAttention
from healpass.ops.attention.quantize import Integers, integers
from healpass.ops.attention.scoring import Scoring
from healpass.ops.products.numerics import Numerics
from healpass.tensorcore.attention import weighted_digits
from healpass.tensorcore.matmul import Accumulation


@dataclass(frozen=True)
class IntegerAttention(DifferentiableAttention):
    """Attention on `Integers`."""

    query: Integers
    key: Integers
    value: Integers

    def products(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Exact in FP64, rounded once."""
        query, key = integers(self.query.digits), integers(self.key.digits)
        scale = self.query.scale.to(torch.float64) * self.scoring.scale
        key_scale = self.per_head(self.key.scale.to(torch.float64)).unsqueeze(-2)
        for rows, columns in self.blocks():
            block = fold(query[:, :, rows], self.heads) @ key[:, :, columns].flatten(0, 1).mT
            shape = (*scale.shape[:-1], rows.stop - rows.start, columns.stop - columns.start)
            scores = block.reshape(shape) * scale[..., rows, None] * key_scale[..., columns]
            yield rows, columns, scores.clamp(-FP32.largest, FP32.largest).to(torch.float32)

    def weighted_sum(self, weights: Tensor, visible: Tensor, columns: slice) -> Tensor:
        """A row is NaN where it sees a key whose scale is NaN."""
        how = self.how
        digits, scale = self.value.digits[..., columns, :], self.value.scale[..., columns]
        rows = fold(weights, self.heads)
        if how.simulate is not None and how.precision == "heal":
            adders = Accumulation(how.simulate, order=how.order)
            folded = scale.nan_to_num(0.0).flatten(0, 1)
            result = weighted_digits(rows, digits.flatten(0, 1), folded, adders)
        else:
            result = how.multiply(rows, Integers(digits, scale).values().flatten(0, 1))
        result = result.reshape(*weights.shape[:-1], digits.shape[-1])
        lost = self.per_head(scale.isnan()).unsqueeze(-2) & visible
        return result.masked_fill(lost.any(-1, keepdim=True), torch.nan)

    def per_head(self, states: Tensor) -> Tensor:
        """`[B, Hkv, ...]` for every query head."""
        return states.repeat_interleave(self.query.shape[1] // self.heads, 1)


def read(
    query_digits: Tensor,
    query_scale: Tensor,
    key_digits: Tensor,
    key_scale: Tensor,
    value_digits: Tensor,
    value_scale: Tensor,
    *rest: Any,
) -> Attends:
    """Read and check the arguments of one call.

    Args:
        query_digits: INT8 `[B, H, D, L, E]`; H is a multiple of Hkv.
        query_scale: FP32 `[B, H, L]`.
        key_digits: INT8 `[B, Hkv, D, S, E]`; D may differ from the query's.
        key_scale: FP32 `[B, Hkv, S]`.
        value_digits: INT8 `[B, Hkv, D, S, Ev]`.
        value_scale: FP32 `[B, Hkv, S]`.
        *rest: What `Scoring.read` takes, and `numerics` as `heal::mm` does: digit products are
            exact, so `heal` and `layercast` decide about P V only. An exact precision makes it
            `attention.exact`, unless there is dropout.

    Raises:
        RuntimeError: Dtypes, ranks or sizes do not fit, or the seed is missing.
        ValueError: `numerics` is unknown; or it is exact, and there is a cap or there are sinks.
    """
    query, key = Integers(query_digits, query_scale), Integers(key_digits, key_scale)
    value = Integers(value_digits, value_scale)
    for name, operand in (("query", query), ("key", key), ("value", value)):
        operand.check(name)
    torch._check(
        query_digits.shape[-1] == key_digits.shape[-1]
        and key_digits.shape[-2] == value_digits.shape[-2],
        lambda: "heal::integer_attention: head sizes of Q and K, or lengths of K and V, differ",
    )
    scoring, numerics = Scoring.read(*rest[:-1]), rest[-1]
    scoring.check_mask(query.shape, key.shape)
    return attention_of(query, key, value, scoring, Numerics.parse(numerics))


def attention_of(
    query: Integers, key: Integers, value: Integers, scoring: Scoring, how: Numerics
) -> Attends:
    """Exact where the precision is, unless there is dropout: random numbers are not.

    Args:
        query: `[B, H, L, E]`; H is a multiple of Hkv.
        key: `[B, Hkv, S, E]`.
        value: `[B, Hkv, S, Ev]`.
        scoring: All else that decides a weight.
        how: The precision.
    """
    exact = how.products is not None and not scoring.dropout_p
    return (ExactAttention if exact else IntegerAttention)(query, key, value, scoring, how)


OPERATORS = register.define(
    "integer_attention",
    "Tensor query_digits, Tensor query_scale, Tensor key_digits, Tensor key_scale, "
    "Tensor value_digits, Tensor value_scale",
    read,
)
