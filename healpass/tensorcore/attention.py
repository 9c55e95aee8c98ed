"""What `heal` means by attention: products of pieces around an FP32 softmax. Layer `tensorcore`.

V's scale is one per token and is folded into that token's weights. One scale per column of V would
be shared by all keys, and a huge value that a mask hides would cost the visible ones their digits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from healpass.arithmetic.digits import BASE_BITS
from healpass.arithmetic.pieces import Pieces, split_fp16
from healpass.tensorcore.matmul import (
    IDEAL,
    Accumulation,
    fp16_pieces,
    heal_matmul,
    multiply,
    repaired,
)

#: Weights times V's scales lie in [0, 2^113]: this keeps small ones out of FP32's subnormal range.
_LIFT = 2.0**13


def heal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    accumulate: Accumulation | str = IDEAL,
) -> Tensor:
    """softmax(scale * Q K^T + mask) V, both products by 16-bit pieces, everything else in FP32.

    FP32 operands make three products each for Q K^T and P V. Integer caches enter dequantized: the
    quantization is the error that `bounds.attention_bound` adds for them.

    Args:
        query: `[B, H, L, E]`, FP16, BF16 or FP32; H is a multiple of Hkv.
        key: `[B, Hkv, S, E]`.
        value: `[B, Hkv, S, Ev]`.
        attn_mask: Bool (True is visible) or float (added), broadcastable to `[B, H, L, S]`.
        is_causal: Hide key s from query l where s > l.
        scale: Factor of the scores; 1 / sqrt(E) if None.
        accumulate: How products are added.

    Returns:
        `[B, H, L, Ev]` in FP32. A row that sees no key is zero.
    """
    groups = query.shape[1] // key.shape[1]
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    key, value = (states.repeat_interleave(groups, 1) for states in (key, value))
    scores = heal_matmul(query, key.mT, accumulate) * scale
    if is_causal:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~visible, -math.inf)
    if attn_mask is not None:
        added = (
            torch.where(attn_mask, 0.0, -math.inf) if attn_mask.dtype == torch.bool else attn_mask
        )
        scores = scores + added
    hidden = (scores == -math.inf).all(-1, keepdim=True)
    weights = torch.softmax(scores, -1).masked_fill(hidden, 0.0)
    return weighted_values(weights, value, accumulate)


def weighted_values(weights: Tensor, value: Tensor, accumulate: Accumulation | str) -> Tensor:
    """`weights [..., L, S] @ value [..., S, Ev]`, V's token scales folded into the weights.

    Args:
        weights: FP32, at least 0.
        value: FP16, BF16 or FP32.
        accumulate: How the products are added, or the name of a rule.
    """
    how = Accumulation(accumulate) if isinstance(accumulate, str) else accumulate
    split = fp16_pieces(value, -1)
    assert split.scale is not None
    folded = split_fp16(weights * (split.scale.mT * _LIFT))
    return repaired(multiply(folded, Pieces(split.pieces), how) / _LIFT, weights, value)


def weighted_digits(
    weights: Tensor, digits: Tensor, scale: Tensor, accumulate: Accumulation | str
) -> Tensor:
    """P V with V in integer digits: P in two FP16 pieces, V's planes one FP16 piece each.

    V's scale is folded into P before P is split. Each plane has an accumulator of its own; the
    planes are joined in FP32, the highest first.

    Args:
        weights: FP32 `[B, L, S]`, at least 0.
        digits: INT8 `[B, D, S, Ev]`, the lowest plane first.
        scale: FP32 `[B, S]`, at most 2^113.
        accumulate: How products are added.

    Returns:
        `[B, L, Ev]` in FP32.
    """
    how = Accumulation(accumulate) if isinstance(accumulate, str) else accumulate
    split = split_fp16(weights * (scale * _LIFT).unsqueeze(-2))
    assert split.scale is not None
    total = weights.new_zeros(*weights.shape[:-1], digits.shape[-1])
    for plane in reversed(digits.unbind(1)):
        product = multiply(Pieces(split.pieces), Pieces((plane.to(torch.float16),)), how)
        total = total * 2.0**BASE_BITS + product
    return (total / _LIFT) * split.scale
