"""Exact attention with a cap or with sinks, by scores and weights. Imports `attention.exact`.

Digit planes under one softmax, as `attention.exact` has them, have no room for a cap or for a
sink's logit. Here the scores are numbers in FP32: a product by digits, then bit-reproducible
operators, a bit-reproducible softmax, and `heal::weighted_sum`, which no hidden key influences.
Each has one result, so tiles, batches and splits cannot show, and prefill and decode agree. Q, K
and V are rounded to integers first, as a cache holds them; the rounding's gradient is the
identity.

A NaN in V shows even where its key is hidden, as in torch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from healpass.arithmetic.int16 import round_trip
from healpass.ops.attention.exact import FORMATS

heal = torch.ops.heal


def attend_by_weights(
    states: tuple[Tensor, Tensor, Tensor],
    attn_mask: Tensor | None,
    scale: float,
    kv: str,
    numerics: str,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention in FP32, `[B, H, L, Ev]`.

    Args:
        states: Q `[B, H, L, E]`, K `[B, Hkv, S, E]`, V `[B, Hkv, S, Ev]`.
        attn_mask: Bool or float, broadcastable to `[B, H, L, S]`.
        scale: Factor of the products.
        kv: `int16` or `int24`.
        numerics: An exact precision.
        softcap: Scores become `softcap * tanh(score / softcap)` before they are masked.
        sinks: `[H]`: one more logit per head, in the denominator only.
    """
    query, key, value = (round_trip(x, FORMATS[kv]) for x in states)
    (batch, heads, length, size), kv_heads, keys = query.shape, key.shape[1], key.shape[2]
    rows = query.reshape(batch, kv_heads, (heads // kv_heads) * length, size)
    products = heal.matmul(rows, key.mT, numerics).reshape(batch, heads, length, keys)
    scores = _hidden(_capped(products * scale, softcap), attn_mask)
    weights = _softmax(scores, sinks)
    folded = weights.reshape(*rows.shape[:-1], keys)
    result: Tensor = heal.weighted_sum(folded, value, numerics)
    return result.reshape(batch, heads, length, value.shape[-1])


def _capped(scores: Tensor, softcap: float | None) -> Tensor:
    if softcap is None:
        return scores
    bent = heal.tanh(heal.div(scores, scores.new_full((), softcap)))
    return bent * softcap


def _hidden(scores: Tensor, attn_mask: Tensor | None) -> Tensor:
    """The scores with a float mask added, -inf where a key is hidden, whatever its score is."""
    if attn_mask is None:
        return scores
    if attn_mask.dtype == torch.bool:
        return torch.where(attn_mask, scores, -math.inf)
    return torch.where(attn_mask != -math.inf, heal.add(scores, attn_mask), -math.inf)


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Weights over the keys; a row that sees none has weights of 0."""
    if sinks is not None:  # an addition, whose gradient is an exact sum
        column = heal.add(torch.zeros_like(scores[..., :1]), sinks.reshape(1, -1, 1, 1))
        return heal.softmax(torch.cat([scores, column], -1), -1)[..., : scores.shape[-1]]
    seen = (scores != -math.inf).any(-1, keepdim=True)
    return torch.where(seen, heal.softmax(scores, -1), 0.0)
