"""Gradients of exact attention: those of attention at the rounded values of Q, K and V.

Straight through the rounding. Each product is one by digits and each sum exact, so they have the
same bits everywhere too. The scores have a matrix in memory. Imports `attention.exact_steps`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from healpass.ops.attention.exact_steps import exponentials
from healpass.ops.reproducible import fp64
from healpass.ops.reproducible.reduce import sum_fp64, sum_to
from healpass.ops.reproducible.softmax import denominator

#: An exact product in FP32, `[..., M, K]` by `[..., K, N]`.
Multiply = Callable[[Tensor, Tensor], Tensor]


def attend_gradients(
    grad: Tensor,
    states: tuple[Tensor, ...],
    scores: Tensor,
    visible: Tensor,
    scale: float,
    multiply: Multiply,
) -> tuple[Tensor, Tensor, Tensor]:
    """With P the probabilities, G what comes in: dV = P^T G, dS = P (G V^T - rowsum(P G V^T)).

    Then dQ = scale dS K and dK = scale dS^T Q, in FP32.

    Args:
        grad: `[B, H, L, Ev]`.
        states: Q, K and V, rounded: `[B, H, L, E]`, `[B, Hkv, S, E]`, `[B, Hkv, S, Ev]`.
        scores: FP64 `[B, H, L, S]`, -inf where a key is hidden.
        visible: Bool of that shape.
        scale: Factor of the scores.
        multiply: The products.
    """
    query, key, value = states
    probabilities = _probabilities(scores, visible)
    p, g, q = (_fold(x, key.shape[1]) for x in (probabilities, grad, query))
    grad_scores = fp64.to_fp32(_score_gradients(probabilities, grad, value, multiply) * scale)
    grad_query = multiply(grad_scores, key).reshape(query.shape)
    return grad_query, multiply(grad_scores.mT, q), multiply(p.mT, g)


def mask_gradient(
    grad: Tensor,
    value: Tensor,
    scores: Tensor,
    visible: Tensor,
    attn_mask: Tensor,
    multiply: Multiply,
) -> Tensor:
    """The gradient of a float mask in FP32: that of the scores, summed exactly to its shape.

    Args:
        grad: `[B, H, L, Ev]`.
        value: V, rounded: `[B, Hkv, S, Ev]`.
        scores: FP64 `[B, H, L, S]`, -inf where a key is hidden.
        visible: Bool of that shape.
        attn_mask: The mask.
        multiply: The products.
    """
    grad_scores = _score_gradients(_probabilities(scores, visible), grad, value, multiply)
    return sum_to(fp64.to_fp32(grad_scores).reshape(scores.shape), attn_mask.shape)


def _probabilities(scores: Tensor, visible: Tensor) -> Tensor:
    """P in FP32, 0 where a key is hidden."""
    weights = exponentials(scores)
    return fp64.to_fp32(torch.where(visible, weights / denominator(weights, -1), 0.0))


def _score_gradients(
    probabilities: Tensor,
    grad: Tensor,
    value: Tensor,
    multiply: Multiply,
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
