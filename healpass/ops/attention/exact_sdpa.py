"""`F.scaled_dot_product_attention` in integers: `heal::exact_sdpa`. Imports `attention.exact`.

Q, K and V in FP32 or 16 bits are rounded to integers per (token, head), then `exact_attention`
does the rest; a cap or sinks go by `exact_capped`. The gradient is that of attention at the
rounded values (straight through the rounding), each product by digits and each sum exact, so it
has the same bits everywhere too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from healpass.arithmetic.int16 import round_trip
from healpass.ops.attention.exact import FORMATS, exponentials, planes, visible_scores
from healpass.ops.attention.exact_capped import attend_by_weights
from healpass.ops.attention.scoring import Scoring
from healpass.ops.attention.sdpa import four_dimensional, leading, mask_four_dimensional
from healpass.ops.library import library
from healpass.ops.products.exact import Adders
from healpass.ops.products.numerics import Numerics
from healpass.ops.reproducible import fp64
from healpass.ops.reproducible.reduce import sum_fp64, sum_to
from healpass.ops.reproducible.register import register_opaque
from healpass.ops.reproducible.softmax import denominator

heal = torch.ops.heal


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    kv: str,
    numerics: str,
) -> Tensor:
    """Attention of `[B, H, L, E]`, `[B, Hkv, S, E]`, `[B, Hkv, S, Ev]` rounded to `kv`, FP32."""
    digits = [part for x in (query, key, value) for part in planes(x, kv)]
    return heal.exact_attention(*digits, attn_mask, is_causal, scale, numerics)


def _attend_fake(query: Tensor, key: Tensor, value: Tensor, *_rest: Any) -> Tensor:
    for x in (query, key, value):
        fp64.checked(x)
    return query.new_empty((*query.shape[:-1], value.shape[-1]), dtype=torch.float32)


def _attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    kv: str,
    numerics: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of Q, K and V, in FP32."""
    how = Numerics.parse(numerics)
    scoring = Scoring(scale, attn_mask, is_causal=is_causal)
    scores, visible = _scores(query, key, scoring, kv, how)
    states = tuple(round_trip(x, FORMATS[kv]) for x in (query, key, value))
    return attend_gradients(grad, states, scores, visible, scale, how.multiply)


def _mask_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor,
    is_causal: bool,
    scale: float,
    kv: str,
    numerics: str,
) -> Tensor:
    """The gradient of the mask in FP32: that of the scores, summed exactly to its shape."""
    how = Numerics.parse(numerics)
    scoring = Scoring(scale, attn_mask, is_causal=is_causal)
    scores, visible = _scores(query, key, scoring, kv, how)
    p = _probabilities(scores, visible)
    grad_scores = _score_gradients(p, grad, round_trip(value, FORMATS[kv]), how.multiply)
    return sum_to(fp64.to_fp32(grad_scores).reshape(scores.shape), attn_mask.shape)


def _scores(
    query: Tensor, key: Tensor, scoring: Scoring, kv: str, how: Numerics
) -> tuple[Tensor, Tensor]:
    adders = Adders(how.simulate, how.order)
    return visible_scores(planes(query, kv), planes(key, kv), scoring, adders)


def attend_gradients(
    grad: Tensor,
    states: tuple[Tensor, ...],
    scores: Tensor,
    visible: Tensor,
    scale: float,
    multiply: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """With P the probabilities, G what comes in: dV = P^T G, dS = P (G V^T - rowsum(P G V^T)).

    Then dQ = scale dS K and dK = scale dS^T Q, in FP32.

    Args:
        grad: `[B, H, L, Ev]`.
        states: Q, K and V, rounded: `[B, H, L, E]`, `[B, Hkv, S, E]`, `[B, Hkv, S, Ev]`.
        scores: FP64 `[B, H, L, S]`, -inf where a key is hidden.
        visible: Bool of that shape.
        scale: Factor of the scores.
        multiply: An exact product in FP32, `[..., M, K]` by `[..., K, N]`.
    """
    query, key, value = states
    probabilities = _probabilities(scores, visible)
    p, g, q = (_fold(x, key.shape[1]) for x in (probabilities, grad, query))
    grad_scores = fp64.to_fp32(_score_gradients(probabilities, grad, value, multiply) * scale)
    grad_query = multiply(grad_scores, key).reshape(query.shape)
    return grad_query, multiply(grad_scores.mT, q), multiply(p.mT, g)


def _probabilities(scores: Tensor, visible: Tensor) -> Tensor:
    """P in FP32, 0 where a key is hidden."""
    weights = exponentials(scores)
    return fp64.to_fp32(torch.where(visible, weights / denominator(weights, -1), 0.0))


def _score_gradients(
    probabilities: Tensor,
    grad: Tensor,
    value: Tensor,
    multiply: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """P (G V^T - rowsum(P G V^T)) in FP64, `[B, Hkv, G * L, S]`."""
    p, g = (_fold(x, value.shape[1]) for x in (probabilities, grad))
    grad_p = multiply(g, value.mT).to(torch.float64)
    p64 = p.to(torch.float64)
    return p64 * (grad_p - sum_fp64(p64 * grad_p, [3]))


def _fold(states: Tensor, heads: int) -> Tensor:
    """`[B, H, L, E]` to `[B, Hkv, G * L, E]`: query heads that share a key head become rows."""
    batch, all_heads, length, size = states.shape
    return states.reshape(batch, heads, (all_heads // heads) * length, size)


def _attend_backward_fake(
    grad: Tensor,  # noqa: ARG001
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *_rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        query.new_empty(query.shape, dtype=torch.float32),
        key.new_empty(key.shape, dtype=torch.float32),
        value.new_empty(value.shape, dtype=torch.float32),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs[:4])
    ctx.rest = inputs[4:]


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, attn_mask = ctx.saved_tensors
    found = heal.exact_attend_backward(grad, query, key, value, attn_mask, *ctx.rest)
    states = (query, key, value)
    grad_mask = None
    if attn_mask is not None and ctx.needs_input_grad[3]:
        grad_mask = heal.exact_attend_mask_backward(grad, *states, attn_mask, *ctx.rest)
        grad_mask = grad_mask.to(attn_mask.dtype)
    return (*(g.to(x.dtype) for g, x in zip(found, states, strict=True)), grad_mask, *[None] * 4)


_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? attn_mask, bool is_causal, float scale, "
    "str kv, str numerics"
)
register_opaque(
    f"exact_attend_backward(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    _attend_backward,
    _attend_backward_fake,
)
register_opaque(
    f"exact_attend_mask_backward(Tensor grad, {_ARGUMENTS.replace('?', '')}) -> Tensor",
    _mask_backward,
    lambda grad, q, k, v, mask, *_rest: mask.new_empty(mask.shape, dtype=torch.float32),  # noqa: ARG005
)
register_opaque(f"exact_attend({_ARGUMENTS}) -> Tensor", _attend, _attend_fake, _gradients, _save)

library.define(
    "exact_sdpa(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, "
    "float dropout_p=0.0, bool is_causal=False, *, float? scale=None, bool enable_gqa=False, "
    'str kv="int16", str numerics="exact5", SymInt? window=None, float? softcap=None, '
    "Tensor? sinks=None) -> Tensor"
)


@torch.library.impl(library, "exact_sdpa", "CompositeImplicitAutograd")
def exact_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    kv: str = "int16",
    numerics: str = "exact5",
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """SDPA with any leading dimensions; arguments as `heal::sdpa`, but no dropout.

    Args:
        query: `[..., H, L, E]`.
        key: `[..., Hkv, S, E]`.
        value: `[..., Hkv, S, Ev]`.
        attn_mask: Bool or float, broadcastable to `[..., H, L, S]`; excludes `is_causal`.
        dropout_p: 0: random numbers differ between devices.
        is_causal: Counted from the first query and the first key.
        scale: Factor of the scores, `1 / sqrt(E)` if None.
        enable_gqa: Allow `H` to be a multiple of `Hkv`.
        kv: `int16` or `int24`.
        numerics: An exact precision.
        window: Hide key s from query l where s <= l - window.
        softcap: Scores become `softcap * tanh(score / softcap)` before they are masked.
        sinks: `[H]`: one more logit per head, in the denominator only.
    """
    torch._check(
        not (is_causal and attn_mask is not None),
        lambda: "heal::exact_sdpa: attn_mask and is_causal exclude each other, as in torch",
    )
    torch._check(
        dropout_p == 0.0, lambda: "heal::exact_sdpa: dropout_p must be 0, it draws random numbers"
    )
    factor = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    shape = (*leading(query, key, value, enable_gqa), query.shape[-2], value.shape[-1])
    states = four_dimensional(query, key, value, enable_gqa)
    mask = None if attn_mask is None else mask_four_dimensional(attn_mask, shape)
    if window is not None:
        mask, is_causal = _within(mask, is_causal, window, states[0], states[1]), False
    if softcap is None and sinks is None:
        result = heal.exact_attend(*states, mask, is_causal, factor, kv, numerics)
        return result.reshape(shape)
    if is_causal:
        mask = _within(mask, True, None, states[0], states[1])
    result = attend_by_weights(states, mask, factor, kv, numerics, softcap, sinks)
    return result.reshape(shape)


def _within(
    mask: Tensor | None, is_causal: bool, window: int | None, query: Tensor, key: Tensor
) -> Tensor:
    """The mask, and what causality and a window hide, as one mask `[..., L, S]`."""
    rows = torch.arange(query.shape[-2], device=query.device)[:, None]
    columns = torch.arange(key.shape[-2], device=query.device)
    visible = columns <= rows if is_causal else columns >= 0
    if window is not None:
        visible = visible & (columns > rows - window)
    if mask is None:
        return visible.expand(query.shape[-2], key.shape[-2])
    return mask & visible if mask.dtype == torch.bool else torch.where(visible, mask, -math.inf)
