"""Attention in integers, on digit planes: `heal::exact_attention`.

Q, K and V are integers under one FP32 scale per (token, head), as digit planes `[B, H, D, S, E]`
INT8, the lowest first, and scales `[B, H, S]` (`arithmetic.int16`: scale = maximum / 32639 for
INT16). Then, every step in the one order written here:

1. Scores: the exact integer sum over E, in FP64 times (query scale x key scale), times `scale`,
   plus the mask. |sum| < 2^46 E stays in INT64 for E <= 2^16.
2. The exact maximum over the visible keys, and p = exp(score - maximum) in FP64
   (`reproducible.fp64`).
3. V's scale varies along the sum, so it is folded into p: p scale_V 2^-(e + 1), e the largest
   exponent among the *visible* keys, becomes a fixed-point number of 22 bits, three digits.
4. P V: integer sums, |sum| < 2^45 S with INT24 V, 2^37 S with INT16; they fit INT64 up to
   S = 2^17 and 2^25. The denominator: integer sums of p in units of 2^-40
   (`reproducible.softmax`).
5. One division and one rounding to FP32.

Nothing depends on how keys are tiled, split, padded or ordered, nor on other rows: prefill,
chunked prefill and decode agree bit for bit. Error beside that of the quantization, V being the
largest visible |v|, S keys: at most V 2^-21 S / sum(p) from step 3, and half an ulp at the end.

A row that sees no key is 0. A NaN or an infinity in a visible row of Q, K or V (scale NaN) makes
the query's row NaN. A mask of -inf hides. Imports `products.exact` and `reproducible.softmax`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from healpass.arithmetic.digits import integer_digits
from healpass.arithmetic.int16 import INT16, INT24, quantize
from healpass.errors import OperandError
from healpass.ops.attention.scoring import Scoring
from healpass.ops.products.exact import Adders, sum_products
from healpass.ops.products.numerics import Numerics
from healpass.ops.reproducible import fp64
from healpass.ops.reproducible.reduce import from_integers
from healpass.ops.reproducible.register import register_opaque
from healpass.ops.reproducible.softmax import denominator

FORMATS = {"int16": INT16, "int24": INT24}
#: Bits of P in fixed point: three balanced digits hold more than 2^22.
P_BITS, P_DIGITS = 22, 3
#: log2 of the most keys, by the number of V's digits, such that P V fits INT64.
MOST_KEYS = {2: 25, 3: 17}
LARGEST_HEAD = 1 << 16


def bound_text(kv: str) -> str:
    """The error in one line, beside that of the quantization."""
    return f"2^-21 S / sum(p) max|v| + u |y|, Q, K and V as {kv} holds them"


class Planes(NamedTuple):
    """Queries, keys or values as integers: `digits` times 256^d times `scale`.

    Attributes:
        digits: INT8 `[B, H, D, S, E]`, the lowest first.
        scale: FP32 `[B, H, S]`.
    """

    digits: Tensor
    scale: Tensor


def planes(x: Tensor, kv: str) -> Planes:
    """`[B, H, S, E]` as digits `[B, H, D, S, E]` and scales `[B, H, S]`.

    Args:
        x: FP16, BF16 or FP32.
        kv: `int16` or `int24`.
    """
    fmt = FORMATS[kv]
    quantized = quantize(x, fmt)
    digits = torch.stack(integer_digits(quantized.payload, fmt.digits), 2)
    return Planes(digits, quantized.scale.squeeze(-1))


def _exact_attention(
    query_digits: Tensor,
    query_scale: Tensor,
    key_digits: Tensor,
    key_scale: Tensor,
    value_digits: Tensor,
    value_scale: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    numerics: str,
) -> Tensor:
    """Attention of digit planes, `[B, H, L, Ev]` FP32.

    Args:
        query_digits: INT8 `[B, H, D, L, E]`; H is a multiple of Hkv.
        query_scale: FP32 `[B, H, L]`.
        key_digits: INT8 `[B, Hkv, D, S, E]`.
        key_scale: FP32 `[B, Hkv, S]`.
        value_digits: INT8 `[B, Hkv, D, S, Ev]`.
        value_scale: FP32 `[B, Hkv, S]`.
        attn_mask: Bool (True is visible) or float (added), broadcastable to `[B, H, L, S]`.
        is_causal: Hide key s from query l where s > l.
        scale: Factor of the scores.
        numerics: An exact precision; a simulated generation gives the same bits.

    Raises:
        OperandError: E or S is past what INT64 holds.
    """
    _check_budget(query_digits, value_digits)
    batch, heads, _, length, size = query_digits.shape
    keys, shape = key_digits.shape[3], (batch, heads, length, value_digits.shape[-1])
    if 0 in (*shape, keys, size):
        return query_scale.new_zeros(shape)
    how = Numerics.parse(numerics)
    adders = Adders(how.simulate, how.order)
    groups = heads // key_digits.shape[1]
    scoring = Scoring(scale, attn_mask, is_causal=is_causal)
    query, key = Planes(query_digits, query_scale), Planes(key_digits, key_scale)
    scores, visible = visible_scores(query, key, scoring, adders)

    def weigh(fixed: Tensor) -> Tensor:
        rows = fixed.reshape(batch, heads // groups, groups * length, keys)
        total = sum_products(integer_digits(rows, P_DIGITS), value_digits.unbind(2), 0, adders)
        return from_integers(total.reshape(shape))

    return attend_scores(scores, visible, value_scale, weigh)


def attend_scores(
    scores: Tensor, visible: Tensor, value_scale: Tensor, weigh: Callable[[Tensor], Tensor]
) -> Tensor:
    """Steps 2 to 5: the attention `[B, H, L, Ev]` of FP64 scores.

    Args:
        scores: `[B, H, L, S]`, -inf where a key is hidden.
        visible: Bool of that shape.
        value_scale: FP32 `[B, Hkv, S]`.
        weigh: P as INT32 of the scores' shape -> P V in integers, rounded once to FP64.
    """
    weights = exponentials(scores)
    value_scales = _per_head(value_scale, scores.shape[1] // value_scale.shape[1])
    fixed, exponent = _fixed_point(weights, value_scales, visible)
    numerator = weigh(fixed) * fp64.two_to(exponent - P_BITS)
    result = numerator / denominator(weights, -1)
    broken = visible & (~(scores.abs() < math.inf) | value_scales.isnan())
    result = torch.where(visible.any(-1, keepdim=True), result, 0.0)
    return fp64.to_fp32(torch.where(broken.any(-1, keepdim=True), math.nan, result))


def visible_scores(
    query: Planes, key: Planes, scoring: Scoring, adders: Adders
) -> tuple[Tensor, Tensor]:
    """Scores `[B, H, L, S]` in FP64, -inf where a key is hidden, and which are visible.

    Args:
        query: Of `[B, H, L, E]`; H is a multiple of Hkv.
        key: Of `[B, Hkv, S, E]`.
        scoring: Its scale, its mask, and whether it is causal.
        adders: Who adds the products of digits.
    """
    batch, heads, _, length, size = query.digits.shape
    groups = heads // key.digits.shape[1]
    shape = (batch, heads // groups, groups * length, size)
    left = tuple(plane.reshape(shape) for plane in query.digits.unbind(2))
    right = tuple(plane.mT for plane in key.digits.unbind(2))
    products = sum_products(left, right, 0, adders)
    sums = from_integers(products.reshape(batch, heads, length, key.digits.shape[3]))
    return scaled_scores(sums, query.scale, key.scale, scoring)


def scaled_scores(
    sums: Tensor, query_scale: Tensor, key_scale: Tensor, scoring: Scoring, first_row: int = 0
) -> tuple[Tensor, Tensor]:
    """Step 1 from the integer sums on: scores, FP64 `[B, H, L, S]`, and which are visible.

    Args:
        sums: FP64 `[B, H, L, S]`: Q K^T of the integers.
        query_scale: FP32 `[B, H, L]`.
        key_scale: FP32 `[B, Hkv, S]`.
        scoring: Its scale, its mask, and whether it hides key s from query l where
            s > first_row + l.
        first_row: Which query of the whole the first one is.
    """
    groups = query_scale.shape[1] // key_scale.shape[1]
    scales = query_scale.to(torch.float64).unsqueeze(-1) * _per_head(key_scale, groups)
    return _masked(sums * scales * scoring.scale, scoring, first_row)


def _check_budget(query_digits: Tensor, value_digits: Tensor) -> None:
    size, keys = query_digits.shape[-1], value_digits.shape[3]
    most = 1 << MOST_KEYS[value_digits.shape[2]]
    if size > LARGEST_HEAD or keys > most:
        raise OperandError(
            f"exact attention over {keys} keys of size {size} may overflow INT64: V of "
            f"{value_digits.shape[2]} digits allows {most} keys, heads may have {LARGEST_HEAD} "
            "elements.\nUse kv='int16', which allows more keys, or a sliding window."
        )


def _per_head(scale: Tensor, groups: int) -> Tensor:
    """`[B, Hkv, S]` as FP64 `[B, H, 1, S]`."""
    return scale.to(torch.float64).repeat_interleave(groups, 1).unsqueeze(2)


def _masked(scores: Tensor, scoring: Scoring, first_row: int) -> tuple[Tensor, Tensor]:
    """The scores with the mask added, -inf where hidden, and what is visible."""
    attn_mask, visible = scoring.attn_mask, torch.ones_like(scores, dtype=torch.bool)
    if scoring.is_causal:
        visible = visible.tril(first_row)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        visible = visible & attn_mask
    elif attn_mask is not None:
        visible = visible & (attn_mask != -math.inf)
        scores = scores + attn_mask.to(torch.float64)
    return torch.where(visible, scores, -math.inf), visible


def exponentials(scores: Tensor) -> Tensor:
    """Exp(score - maximum); 0 in a row that sees nothing."""
    top = scores.amax(-1, keepdim=True)
    return fp64.exp(torch.where(top > -math.inf, scores - top, -math.inf))


def _fixed_point(weights: Tensor, scale: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """INT32 `weights * scale` in units of 2^(exponent - P_BITS), and that exponent, `[..., 1]`.

    The exponent is the one above the largest scale's among the visible keys, so that the integers
    stay below 2^P_BITS.
    """
    shown = torch.where(visible & ~scale.isnan(), scale, 0.0)
    top = shown.amax(-1, keepdim=True).view(torch.int64) >> fp64.FRACTION_BITS
    exponent = (top - fp64.BIAS + 1).clamp(-200, 200)
    fixed = torch.round(weights * shown * fp64.two_to(P_BITS - exponent))
    return torch.where(fixed.isnan(), 0.0, fixed).to(torch.int32), exponent


def _exact_attention_fake(
    query_digits: Tensor,
    query_scale: Tensor,
    key_digits: Tensor,  # noqa: ARG001
    key_scale: Tensor,  # noqa: ARG001
    value_digits: Tensor,
    value_scale: Tensor,  # noqa: ARG001
    attn_mask: Tensor | None,  # noqa: ARG001
    is_causal: bool,  # noqa: ARG001
    scale: float,  # noqa: ARG001
    numerics: str,  # noqa: ARG001
) -> Tensor:
    batch, heads, _, length, _ = query_digits.shape
    return query_scale.new_empty((batch, heads, length, value_digits.shape[-1]))


register_opaque(
    "exact_attention(Tensor query_digits, Tensor query_scale, Tensor key_digits, Tensor key_scale,"
    " Tensor value_digits, Tensor value_scale, Tensor? attn_mask, bool is_causal, float scale,"
    " str numerics) -> Tensor",
    _exact_attention,
    _exact_attention_fake,
)
