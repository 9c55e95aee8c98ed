"""Attention in FP32: `heal::attention` (primitive). `ops.sdpa` has all of SDPA's arguments.

Meaning, in FP32 throughout: `softmax(scale * Q K^T + mask) V`. A row whose keys are all masked
gives zeros, as torch's SDPA does. Error: `arithmetic.attention_bounds`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from healpass.ops.ieee import ieee_fp32
from healpass.ops.matmul import check_operands
from healpass.ops.numerics import Numerics
from healpass.tensorcore.attention import heal_attention
from healpass.tensorcore.matmul import Accumulation


def _mask_scores(scores: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    """Add a float mask, or put -inf where a bool mask or causality hides a key."""
    if is_causal:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~visible, -math.inf)
    if attn_mask is None:
        return scores
    if attn_mask.dtype == torch.bool:
        return scores.masked_fill(~attn_mask, -math.inf)
    return scores + attn_mask


def _probabilities(scores: Tensor) -> Tensor:
    """Softmax over the keys; a row of nothing but -inf gives zeros instead of NaN."""
    empty = (scores == -math.inf).all(-1, keepdim=True)
    return torch.softmax(scores, -1).masked_fill(empty, 0.0)


def _fold(states: Tensor, heads: int) -> Tensor:
    """`[B, H, L, E]` to `[B * heads, (H / heads) * L, E]`: query heads that share a key head."""
    batch, all_heads, length, size = states.shape
    return states.reshape(batch * heads, (all_heads // heads) * length, size)


def _attention_probabilities(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    numerics: str,
) -> Tensor:
    """`softmax(scale * Q K^T + mask)`, `[B, H, L, S]`, query heads grouped over their key head."""
    heads = key.shape[1]
    scores = torch.ops.heal.bmm(_fold(query, heads), _fold(key, heads).mT, numerics) * scale
    scores = scores.reshape(*query.shape[:-1], key.shape[-2])
    return _probabilities(_mask_scores(scores, attn_mask, is_causal))


@torch.library.custom_op("heal::attention", mutates_args=())
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    numerics: str = "heal",
) -> Tensor:
    """Attention in FP32 over `[B, H, L, E]`, `[B, Hkv, S, E]`, `[B, Hkv, S, Ev]`.

    Args:
        query: FP16, BF16 or FP32; `H` is a multiple of `Hkv` (grouped-query attention).
        key: Its dtype may differ from the query's, as 16-bit caches do.
        value: `Ev` may differ from `E`.
        attn_mask: Bool (True is visible) or float (added), broadcastable to `[B, H, L, S]`.
        is_causal: Hide key `s` from query `l` where `s > l`, counted from the first of each.
        scale: Factor of the scores.
        numerics: As `heal::mm`.

    Returns:
        `[B, H, L, Ev]` in FP32.
    """
    check_operands("attention", numerics, query, key, value)
    how = Numerics.parse(numerics)
    if how.simulate is not None and how.precision == "heal":
        adders = Accumulation(how.simulate, order=how.order)
        with ieee_fp32(query.device.type):
            return heal_attention(
                query, key, value, attn_mask, is_causal=is_causal, scale=scale, accumulate=adders
            )
    heads = key.shape[1]
    weights = _attention_probabilities(query, key, attn_mask, is_causal, scale, numerics)
    result = torch.ops.heal.bmm(_fold(weights, heads), _fold(value, heads), numerics)
    return result.reshape(*query.shape[:-1], value.shape[-1])


@attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,  # noqa: ARG001
    is_causal: bool,  # noqa: ARG001
    scale: float,  # noqa: ARG001
    numerics: str = "heal",
) -> Tensor:
    check_operands("attention", numerics, query, key, value)
    torch._check(
        query.dim() == key.dim() == value.dim() == 4,
        lambda: "heal::attention needs [B, H, L, E] tensors; heal::sdpa takes other ranks",
    )
    torch._check(
        query.shape[-1] == key.shape[-1] and key.shape[-2] == value.shape[-2],
        lambda: "heal::attention: head sizes of Q and K, or lengths of K and V, differ",
    )
    return query.new_empty((*query.shape[:-1], value.shape[-1]), dtype=torch.float32)


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4], output)
    ctx.is_causal, ctx.scale, ctx.numerics = inputs[4:]


def _attention_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The standard gradient of attention, P being the probabilities, G what comes in.

    dV = P^T G,  dP = G V^T,  dS = P * (dP - rowsum(G * O)),  dQ = scale dS K,  dK = scale dS^T Q.
    """
    query, key, value, attn_mask, output = ctx.saved_tensors
    heads, bmm, numerics = key.shape[1], torch.ops.heal.bmm, ctx.numerics
    weights = _attention_probabilities(query, key, attn_mask, ctx.is_causal, ctx.scale, numerics)
    grad_rows, weight_rows = _fold(grad, heads), _fold(weights, heads)
    grad_value = bmm(weight_rows.mT, grad_rows, numerics)
    grad_weights = bmm(grad_rows, _fold(value, heads).mT, numerics).reshape(weights.shape)
    grad_scores = weights * (grad_weights - (grad * output).sum(-1, keepdim=True))
    score_rows = _fold(grad_scores, heads)
    grad_query = bmm(score_rows, _fold(key, heads), numerics) * ctx.scale
    grad_key = bmm(score_rows.mT, _fold(query, heads), numerics) * ctx.scale
    grad_mask = None
    if attn_mask is not None and ctx.needs_input_grad[3]:
        grad_mask = grad_scores.sum_to_size(attn_mask.shape).to(attn_mask.dtype)
    return (
        grad_query.reshape(query.shape).to(query.dtype),
        grad_key.reshape(key.shape).to(key.dtype),
        grad_value.reshape(value.shape).to(value.dtype),
        grad_mask,
        None,
        None,
        None,
    )


attention.register_autograd(_attention_backward, setup_context=_save_attention)
