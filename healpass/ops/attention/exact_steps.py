"""The steps of exact attention, whose order and rounding are the same wherever it runs.

Q, K and V are `attention.quantize.Integers`, under one FP32 scale per (token, head). Then, every
step in the one order written here:

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
the query's row NaN. A mask of -inf hides. The denominator's logarithm is FP64's, rounded once.
Imports `attention.quantize`, `products.exact` and `reproducible.softmax`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from healpass.ops.attention.quantize import Integers
from healpass.ops.attention.scoring import Scoring
from healpass.ops.products.exact import Adders, sum_products
from healpass.ops.reproducible import fp64
from healpass.ops.reproducible.reduce import from_integers
from healpass.ops.reproducible.softmax import denominator

#: Bits of P in fixed point: three balanced digits hold more than 2^22.
P_BITS, P_DIGITS = 22, 3
#: log2 of the most keys, by the number of V's digits, such that P V fits INT64.
MOST_KEYS = {2: 25, 3: 17}
#: Elements of a head at most, such that Q K^T fits INT64.
LARGEST_HEAD = 1 << 16


def bound_text(kv: str) -> str:
    """The error in one line, beside that of the quantization."""
    return f"2^-21 S / sum(p) max|v| + u |y|, Q, K and V as {kv} holds them"


def attend_scores(
    scores: Tensor, visible: Tensor, value_scale: Tensor, weigh: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Steps 2 to 5: the attention `[B, H, L, Ev]` of FP64 scores, and its logsumexp `[B, H, L]`.

    Args:
        scores: `[B, H, L, S]`, -inf where a key is hidden.
        visible: Bool of that shape.
        value_scale: FP32 `[B, Hkv, S]`.
        weigh: P as INT32 of the scores' shape -> P V in integers, rounded once to FP64.
    """
    weights = exponentials(scores)
    value_scales = _per_head(value_scale, scores.shape[1] // value_scale.shape[1])
    fixed, exponent = _fixed_point(weights, value_scales, visible)
    total = denominator(weights, -1)
    result = weigh(fixed) * fp64.two_to(exponent - P_BITS) / total
    broken = visible & (~(scores.abs() < math.inf) | value_scales.isnan())
    seen, lost = visible.any(-1, keepdim=True), broken.any(-1, keepdim=True)
    top = torch.where(lost, math.nan, scores.amax(-1, keepdim=True))
    return _settled(result, seen, lost), logsumexp(top, total).squeeze(-1)


def _settled(result: Tensor, seen: Tensor, lost: Tensor) -> Tensor:
    result = torch.where(seen, result, 0.0)
    return fp64.to_fp32(torch.where(lost, math.nan, result))


def logsumexp(top: Tensor, total: Tensor) -> Tensor:
    """FP32 `top + log(total)`, -inf where no key is visible.

    Args:
        top: FP64, the largest visible score; -inf where there is none, NaN where one is broken.
        total: FP64, the denominator relative to it; anything where there is none.
    """
    return fp64.to_fp32(torch.where(top == -math.inf, top, top + fp64.log(total)))


def visible_scores(
    query: Integers, key: Integers, scoring: Scoring, adders: Adders
) -> tuple[Tensor, Tensor]:
    """Scores `[B, H, L, S]` in FP64, -inf where a key is hidden, and which are visible.

    Args:
        query: `[B, H, L, E]`; H is a multiple of Hkv.
        key: `[B, Hkv, S, E]`.
        scoring: Its scale, its mask, causality and window.
        adders: Who adds the products of digits.
    """
    batch, heads, length, size = query.shape
    shape = (batch, key.shape[1], heads // key.shape[1] * length, size)
    left = tuple(plane.reshape(shape) for plane in query.digits.unbind(2))
    right = tuple(plane.mT for plane in key.digits.unbind(2))
    products = sum_products(left, right, 0, adders)
    sums = from_integers(products.reshape(batch, heads, length, key.shape[2]))
    return scaled_scores(sums, query.scale, key.scale, scoring)


def scaled_scores(
    sums: Tensor,
    query_scale: Tensor,
    key_scale: Tensor,
    scoring: Scoring,
    rows: slice | None = None,
    columns: slice | None = None,
) -> tuple[Tensor, Tensor]:
    """Step 1 from the integer sums on: scores, FP64 `[B, H, L, S]`, and which are visible.

    Args:
        sums: FP64 `[B, H, L, S]`: Q K^T of the integers.
        query_scale: FP32 `[B, H, L]`.
        key_scale: FP32 `[B, Hkv, S]`.
        scoring: Its scale, its mask, causality and window.
        rows: Which queries of the whole these are; None for all.
        columns: Which keys of the whole these are; None for all.
    """
    groups = query_scale.shape[1] // key_scale.shape[1]
    scales = query_scale.to(torch.float64).unsqueeze(-1) * _per_head(key_scale, groups)
    rows, columns = rows or slice(0, sums.shape[-2]), columns or slice(0, sums.shape[-1])
    scores, visible = scoring.masked(sums * scales * scoring.scale, rows, columns)
    if visible is None:
        visible = torch.ones((), dtype=torch.bool, device=sums.device)
    visible = visible.expand(scores.shape)
    return torch.where(visible, scores, -math.inf), visible


def _per_head(scale: Tensor, groups: int) -> Tensor:
    """`[B, Hkv, S]` as FP64 `[B, H, 1, S]`."""
    return scale.to(torch.float64).repeat_interleave(groups, 1).unsqueeze(2)


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
