"""The error of attention's gradients, evaluated on data. Layer `arithmetic`: imports `bounds`.

To first order in u, for FP32 arithmetic with any order of summation. Hats are computed values, G
the incoming gradient, O the output, K the dropout's factors, D the slope of the cap.

1. Weights. p^ = exp(s^ - lse^): s^ is off by Delta (the forward bound); lse^ by Delta, by the
   roundings of a sum of n exponentials ((n + 2 EXP_ULPS) u) and by its own (u |lse|); the
   difference rounds (u (|s| + |lse|)). So p^ = p (1 + theta) with
   |theta| <= exp(2 Delta + u (n + 4 EXP_ULPS + |s| + 2 |lse|)) - 1.
2. dV = (P K)^T G: theta of P, and gamma of a sum over L with two more factors.
3. dP = K (G V^T): gamma of a sum over Ev; V is dequantized with one rounding.
4. r = rowsum(G O): gamma of a sum over Ev, and |G| times the output's own error.
5. dS = P (dP - r) D: theta, the errors of dP and r, three roundings, and the slope's error,
   2 (Delta / cap + 4 u).
6. dQ = scale dS K and dK = scale dS^T Q: gamma of sums over S and L, dS's error, dequantization.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from healpass.arithmetic.attention_bounds import EXP_ULPS

#: FP32's unit roundoff.
U = 2.0**-24


@dataclass(frozen=True)
class AttentionValues:
    """One attention in FP64, exact: what its gradients are made of.

    Attributes:
        query: `[..., L, E]`.
        key: `[..., S, E]`, as many heads as `query`.
        value: `[..., S, Ev]`.
        grad: `[..., L, Ev]`.
        scores: `[..., L, S]`, capped and masked.
        weights: `[..., L, S]`, the softmax.
        logsumexp: `[..., L, 1]`.
        kept: The dropout's factors, broadcastable to `weights`.
        scale: Factor of the scores.
        slope: Derivative of the cap, broadcastable to `weights`.
        softcap: The cap, or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    grad: Tensor
    scores: Tensor
    weights: Tensor
    logsumexp: Tensor
    kept: Tensor
    scale: float
    slope: Tensor
    softcap: float | None = None

    @property
    def output(self) -> Tensor:
        """`[..., L, Ev]`."""
        return (self.weights * self.kept) @ self.value

    @property
    def grad_scores(self) -> Tensor:
        """The gradient with regard to the masked scores."""
        grad_weights = self.kept * (self.grad @ self.value.mT)
        return self.weights * (grad_weights - (self.grad * self.output).sum(-1, keepdim=True))

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Exact gradients of Q, K and V, one per query head."""
        products = self.grad_scores * self.slope
        of_value = (self.weights * self.kept).mT @ self.grad
        return self.scale * products @ self.key, self.scale * products.mT @ self.query, of_value


def gradient_bounds(
    exact: AttentionValues, delta: Tensor, output_error: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Bounds of the gradients of Q, K and V, one per query head.

    Args:
        exact: The attention.
        delta: Bound of a score's error, broadcastable to `[..., L, S]`.
        output_error: Bound of the output's error, `[..., L, Ev]`.
    """
    length, keys, size = *exact.scores.shape[-2:], exact.value.shape[-1]
    visible = exact.scores.isfinite()
    scores, logsumexp = exact.scores.abs().where(visible, 0.0), exact.logsumexp.abs()
    logsumexp = logsumexp.where(logsumexp.isfinite(), 0.0)
    roundings = keys + 4 * EXP_ULPS + scores + 2 * logsumexp
    theta = torch.expm1(2 * delta + U * roundings)
    grad, value, kept = exact.grad.abs(), exact.value.abs(), exact.kept
    weights = exact.weights * (1 + theta)
    of_value = ((theta + _gamma(length + 3)) * exact.weights * kept).mT @ grad

    products = kept * (grad @ value.mT)
    inner = (grad * (exact.output.abs() + output_error)).sum(-1, keepdim=True)
    inner_error = _gamma(size) * inner + (grad * output_error).sum(-1, keepdim=True)
    difference = _gamma(size + 3) * products + inner_error + 2 * U * (products + inner)
    of_scores = theta * exact.grad_scores.abs() + weights * difference
    slope = exact.slope.abs()
    bend = 0.0 if exact.softcap is None else 2 * (delta / exact.softcap + 4 * U)
    of_scores = slope * of_scores + (bend + 2 * U) * (exact.grad_scores.abs() + of_scores)
    magnitude = slope * exact.grad_scores.abs() + of_scores
    of_query = (of_scores + _gamma(keys + 4) * magnitude) @ exact.key.abs()
    of_key = (of_scores + _gamma(length + 4) * magnitude).mT @ exact.query.abs()
    return abs(exact.scale) * of_query, abs(exact.scale) * of_key, of_value


def _gamma(n: int) -> float:
    """N u / (1 - n u) (Higham, Lemma 3.1)."""
    return n * U / (1 - n * U)
