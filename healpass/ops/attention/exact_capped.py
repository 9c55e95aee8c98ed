"""Exact attention with a cap or with sinks, by scores and weights. Imports `attention.quantize`.

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
from healpass.ops.attention.quantize import FORMATS
from healpass.ops.attention.scoring import Scoring

heal = torch.ops.heal


def attend_by_weights(
    states: tuple[Tensor, Tensor, Tensor], scoring: Scoring, kv: str, numerics: str
) -> Tensor:
    """Attention in FP32, `[B, H, L, Ev]`.

    Args:
        states: Q `[B, H, L, E]`, K `[B, Hkv, S, E]`, V `[B, Hkv, S, Ev]`.
        scoring: All that decides a weight, but no dropout.
        kv: `int16` or `int24`.
        numerics: An exact precision.
    """
    query, key, value = (round_trip(x, FORMATS[kv]) for x in states)
    (batch, heads, length, size), kv_heads, keys = query.shape, key.shape[1], key.shape[2]
    rows = query.reshape(batch, kv_heads, heads // max(kv_heads, 1) * length, size)
    products = heal.matmul(rows, key.mT, numerics).reshape(batch, heads, length, keys)
    scores = _hidden(_capped(products * scoring.scale, scoring.softcap), scoring)
    weights = _softmax(scores, scoring.sinks)
    folded = weights.reshape(*rows.shape[:-1], keys)
    result: Tensor = heal.weighted_sum(folded, value, numerics)
    return result.reshape(batch, heads, length, value.shape[-1])


def _capped(scores: Tensor, softcap: float | None) -> Tensor:
    if softcap is None:
        return scores
    bent = heal.tanh(heal.div(scores, scores.new_full((), softcap)))
    return bent * softcap


def _hidden(scores: Tensor, scoring: Scoring) -> Tensor:
    """The scores with a float mask added, -inf where a key is hidden, whatever its score is."""
    mask, (length, keys) = scoring.attn_mask, scores.shape[-2:]
    near = scoring.near(slice(0, length), slice(0, keys), scores.device)
    if mask is not None and mask.dtype != torch.bool:
        scores, mask = heal.add(scores, mask), mask != -math.inf
    for visible in (mask, near):
        scores = scores if visible is None else torch.where(visible, scores, -math.inf)
    return scores


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Weights over the keys; a row that sees none has weights of 0."""
    if sinks is not None:  # an addition, whose gradient is an exact sum
        column = heal.add(torch.zeros_like(scores[..., :1]), sinks.reshape(1, -1, 1, 1))
        return heal.softmax(torch.cat([scores, column], -1), -1)[..., : scores.shape[-1]]
    seen = (scores != -math.inf).any(-1, keepdim=True)
    return torch.where(seen, heal.softmax(scores, -1), 0.0)
