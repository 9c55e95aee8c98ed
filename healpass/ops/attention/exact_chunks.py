"""Exact attention in two passes over chunks of keys: `heal::exact_tops`, `heal::exact_sums`.

`attend_in_chunks` has the bits of `attention.exact` for any chunk, because all that chunks hand on
is maxima and integer sums. It is how kernels compute it:

1. `exact_tops`: of each row and chunk, the largest visible score and the largest visible scale of
   V. A NaN as the score says that the row meets a NaN or an infinity.
2. `exact_sums`: with the maxima of the whole row, the chunk's sums of P V and of P, in INT64.

What is left, two sums over chunks, one division and one rounding, is plain tensor code. Legend:
C chunks, B batch, H query heads, L queries, S keys, E and Ev head sizes. Imports `attention.exact`
and what it may.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from healpass.arithmetic.digits import integer_digits
from healpass.ops.attention.exact import ExactAttention
from healpass.ops.attention.exact_steps import P_BITS, P_DIGITS, logsumexp, visible_scores
from healpass.ops.attention.quantize import Integers
from healpass.ops.attention.scoring import Scoring
from healpass.ops.products.exact import Adders, sum_products
from healpass.ops.reproducible import fp64
from healpass.ops.reproducible.reduce import element_bits, from_integers
from healpass.ops.reproducible.register import register_opaque

heal = torch.ops.heal


def attend_in_chunks(asked: ExactAttention, chunk: int) -> tuple[Tensor, Tensor]:
    """As `ExactAttention.attend`: output `[B, H, L, Ev]` and logsumexp `[B, H, L]`, FP32.

    Args:
        asked: The attention, not empty.
        chunk: Keys per chunk.
    """
    query, key, value, scoring = asked.query, asked.key, asked.value, asked.scoring
    how = (scoring.attn_mask, scoring.is_causal, scoring.scale, scoring.window, chunk)
    tops, scales = heal.exact_tops(*query, *key, value.scale, *how)
    top, exponent = tops.amax(0), exponent_above(scales.amax(0))
    bits = element_bits(key.shape[2])
    units = (fp64.two_to(P_BITS - exponent), 2.0**bits)
    numerators, denominators = heal.exact_sums(*query, *key, *value, *how, top, *units)
    numerator = from_integers(numerators.sum(0)) * fp64.two_to(exponent - P_BITS).unsqueeze(-1)
    denominator = from_integers(denominators.sum(0)) * 2.0**-bits
    result = numerator / denominator.unsqueeze(-1)
    result = torch.where((top == -math.inf).unsqueeze(-1), 0.0, result)
    output = fp64.to_fp32(torch.where(top.isnan().unsqueeze(-1), math.nan, result))
    return output, logsumexp(top, denominator)


def exponent_above(largest: Tensor) -> Tensor:
    """The exponent above that of each row's largest visible scale of V, INT64."""
    exponent = (largest.to(torch.float64).view(torch.int64) >> fp64.FRACTION_BITS) - fp64.BIAS + 1
    return exponent.clamp(-200, 200)


def read(*how: Any) -> tuple[Scoring, int]:
    """What decides a weight, and keys per chunk.

    Args:
        *how: `attn_mask`, `is_causal`, `scale`, `window` and `chunk` of an operator.
    """
    attn_mask, is_causal, scale, window, chunk = how
    return Scoring(scale, attn_mask, is_causal=is_causal, window=window), chunk


def _chunks(keys: int, chunk: int) -> list[slice]:
    return [slice(start, start + chunk) for start in range(0, keys, chunk)]


def _exact_tops(
    query_digits: Tensor,
    query_scale: Tensor,
    key_digits: Tensor,
    key_scale: Tensor,
    value_scale: Tensor,
    *how: Any,
) -> tuple[Tensor, Tensor]:
    """Largest score, FP64, and largest scale of V, FP32, of visible keys, `[C, B, H, L]` each.

    Args:
        query_digits: INT8 `[B, H, D, L, E]`; H is a multiple of Hkv.
        query_scale: FP32 `[B, H, L]`.
        key_digits: INT8 `[B, Hkv, D, S, E]`, S > 0.
        key_scale: FP32 `[B, Hkv, S]`.
        value_scale: FP32 `[B, Hkv, S]`.
        *how: As in `read`.
    """
    scoring, chunk = read(*how)
    query, key = Integers(query_digits, query_scale), Integers(key_digits, key_scale)
    scores, visible = visible_scores(query, key, scoring, Adders())
    scales = value_scale.repeat_interleave(scores.shape[1] // value_scale.shape[1], 1)[:, :, None]
    broken = visible & (~(scores.abs() < math.inf) | scales.isnan())
    scores = torch.where(broken, math.nan, scores)
    shown = torch.where(visible & ~scales.isnan(), scales, 0.0)
    spans = _chunks(scores.shape[-1], chunk)
    tops = torch.stack([scores[..., span].amax(-1) for span in spans])
    return tops, torch.stack([shown[..., span].amax(-1) for span in spans])


def _exact_sums(
    query_digits: Tensor,
    query_scale: Tensor,
    key_digits: Tensor,
    key_scale: Tensor,
    value_digits: Tensor,
    value_scale: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    """INT64 sums of P V, `[C, B, H, L, Ev]`, and of P, `[C, B, H, L]`; zeros where `top` is NaN.

    Args:
        query_digits: INT8 `[B, H, D, L, E]`; H is a multiple of Hkv.
        query_scale: FP32 `[B, H, L]`.
        key_digits: INT8 `[B, Hkv, D, S, E]`, S > 0.
        key_scale: FP32 `[B, Hkv, S]`.
        value_digits: INT8 `[B, Hkv, D, S, Ev]`.
        value_scale: FP32 `[B, Hkv, S]`.
        *rest: As in `read`, then `top`, FP64 `[B, H, L]`, the largest score of the row; `factor`,
            FP64 `[B, H, L]`, what p times V's scale is multiplied by before it is rounded; and
            `unit`, what p is multiplied by before it is rounded.
    """
    *how, top, factor, unit = rest
    scoring, chunk = read(*how)
    query, key = Integers(query_digits, query_scale), Integers(key_digits, key_scale)
    scores, visible = visible_scores(query, key, scoring, Adders())
    (batch, heads, length, keys), groups = scores.shape, heads_per_key(query_digits, key_digits)
    seen = visible & (top.abs() < math.inf)[..., None]
    weights = fp64.exp(torch.where(seen, scores - top[..., None], -math.inf))
    scales = value_scale.to(torch.float64).repeat_interleave(groups, 1)[:, :, None]
    folded = weights * torch.where(seen, scales, 0.0) * factor[..., None]
    fixed = torch.round(folded).to(torch.int32).reshape(batch, -1, groups * length, keys)
    rounded = torch.round(weights * unit).to(torch.int64)
    sums = [
        sum_products(
            integer_digits(fixed[..., span], P_DIGITS),
            tuple(plane[..., span, :] for plane in value_digits.unbind(2)),
            0,
            Adders(),
        ).reshape(batch, heads, length, -1)
        for span in _chunks(keys, chunk)
    ]
    return torch.stack(sums), torch.stack(
        [rounded[..., span].sum(-1) for span in _chunks(keys, chunk)]
    )


def heads_per_key(query_digits: Tensor, key_digits: Tensor) -> int:
    """Query heads that share a key head."""
    return query_digits.shape[1] // key_digits.shape[1]


def _sizes(query_digits: Tensor, key_digits: Tensor, chunk: int) -> tuple[int, ...]:
    batch, heads, _, length, _ = query_digits.shape
    return (-(-key_digits.shape[3] // chunk), batch, heads, length)


def _exact_tops_fake(*call: Any) -> tuple[Tensor, Tensor]:
    query_digits, _, key_digits, key_scale, *_ = call
    size = _sizes(query_digits, key_digits, call[-1])
    return key_scale.new_empty(size, dtype=torch.float64), key_scale.new_empty(size)


def _exact_sums_fake(*call: Any) -> tuple[Tensor, Tensor]:
    query_digits, _, key_digits, _, value_digits, *_, chunk, top, _, _ = call
    size = _sizes(query_digits, key_digits, chunk)
    whole = (*size, value_digits.shape[-1])
    return top.new_empty(whole, dtype=torch.int64), top.new_empty(size, dtype=torch.int64)


_STATES = "Tensor query_digits, Tensor query_scale, Tensor key_digits, Tensor key_scale"
_HOW = "Tensor? attn_mask, bool is_causal, float scale, SymInt? window, int chunk"
register_opaque(
    f"exact_tops({_STATES}, Tensor value_scale, {_HOW}) -> (Tensor, Tensor)",
    _exact_tops,
    _exact_tops_fake,
)
register_opaque(
    f"exact_sums({_STATES}, Tensor value_digits, Tensor value_scale, {_HOW}, Tensor top,"
    " Tensor factor, float unit) -> (Tensor, Tensor)",
    _exact_sums,
    _exact_sums_fake,
)
