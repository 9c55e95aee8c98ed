"""What norms, softmax and attention add to an error. Layer `arithmetic`: imports `error_rules`.

They are written in the steps they consist of, so that the derivative of the whole (in which, for
one, a shift of all scores cancels) is autograd's affair and only roundings are stated here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from healpass.arithmetic.error_rules import (
    RULES,
    add,
    div,
    exp,
    masked_fill,
    matmul,
    mean,
    mul,
    operand,
    rsqrt,
    sub,
    total,
)
from healpass.arithmetic.estimate import ELEMENTARY, Analysis, Estimate, U, lifted, within
from healpass.arithmetic.formats import FP32
from healpass.arithmetic.int16 import INTEGER_FORMATS
from healpass.errors import NoRuleError

#: Keys that a flash-style kernel handles between two rescalings of what it has summed, at least.
KEY_BLOCK = 16


# ------------------------------------------------------------------------------------------ norms


def rms_norm(
    run: Analysis, x: Estimate, shape: Any, weight: Any = None, eps: float | None = None
) -> Estimate:
    """`x / sqrt(mean(x^2) + eps) * weight`.

    Args:
        run: Records the steps.
        x: `[..., *shape]`.
        shape: Sizes of the last dimensions, those that are normalized.
        weight: Of shape `shape`, exact or an estimate; None for 1.
        eps: Added to the mean square; None for FP32's machine epsilon.
    """
    dims = tuple(range(-len(shape), 0))
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    mean_square = add(run, mean(run, mul(run, x, x), dims, True), eps)
    y, n = mul(run, x, rsqrt(run, mean_square)), math.prod(shape)
    if eps >= FP32.smallest_normal:
        # The computed mean is of the computed squares (an underflow is below eps), so that no
        # element is larger than the square root of the row's length.
        y = within(y, math.sqrt(n) * (1 + (2 * n + 16) * U))
    return y if weight is None else mul(run, y, lifted(weight))


def layer_norm(
    run: Analysis,
    x: Estimate,
    shape: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
) -> Estimate:
    """The same of `x - mean(x)`, whose moments may be updated element by element.

    Welford's update errs by n u max|x| in the mean and n u k relative in the variance, with k^2 =
    1 + mean^2 / variance, to first order (Chan, Golub and LeVeque 1983, table 1), two passes by
    less. Taken four times, for constants that the table drops, and with the square of it.

    Args:
        run: Records the steps.
        x: `[..., *shape]`.
        shape: Sizes of the last dimensions, those that are normalized.
        weight: Of shape `shape`, exact or an estimate; None for 1.
        bias: As `weight`; None for 0.
        eps: Added to the variance.
    """
    dims, n = tuple(range(-len(shape), 0)), math.prod(shape)
    middle = mean(run, x, dims, True)
    middle = _also(run, middle, n * U * x.magnitude.amax(dims, keepdim=True))
    centred = sub(run, x, middle)
    variance = mean(run, mul(run, centred, centred), dims, True)
    spread = (variance.magnitude * (variance.magnitude + middle.magnitude.square())).sqrt()
    size = variance.magnitude + middle.magnitude.square()
    variance = _also(run, variance, 4 * n * U * spread + (4 * n * U) ** 2 * size)
    y = mul(run, centred, rsqrt(run, add(run, variance, eps)))
    y = within(y, _largest_normalized(x.magnitude.amax(dims, keepdim=True), n, eps))
    y = y if weight is None else mul(run, y, lifted(weight))
    return y if bias is None else add(run, y, lifted(bias))


def _largest_normalized(largest: Tensor, n: int, eps: float) -> Tensor:
    """No element of a computed `layer_norm` of rows of n elements up to `largest` is larger.

    Let v be the exact variance of the computed row, M its largest element, a = 4 n u. The computed
    mean errs by n u M, so an element is at most sqrt(n v) + n u M before the division. The
    computed variance errs by a sqrt(v (v + M^2)) + a^2 (v + M^2) <= v (1/2 + a + a^2) + 1.5 a^2
    M^2, hence is at least 0.15 v where v >= 10 a^2 M^2 (a <= 0.1). Elsewhere it is at least
    -(4 u M)^2: squares are not negative, and a product of Welford's update, (x - old mean) (x -
    new mean), is so only where both factors are a few u M.
    """
    a = 4 * n * U
    floor = eps - (4 * U * largest).square()
    usual = math.sqrt(n / 0.15) + 0.25
    flat = (math.sqrt(10 * n) * a + n * U) * largest / floor.clamp(min=0.0).sqrt()
    known = (floor > 0) & (a <= 0.1)
    return torch.where(known, flat.clamp(min=usual), torch.inf)


def _also(run: Analysis, x: Estimate, own: Tensor) -> Estimate:
    """`x` as it is after one more error of its own."""
    return run.step(x.value, x.error, own)


# ------------------------------------------------------------------------------ softmax, attention


def softmax(
    run: Analysis, x: Estimate, dim: int = -1, dtype: Any = None, **_private: Any
) -> Estimate:
    """`exp(x - max x)` over its sum.

    Args:
        run: Records the steps.
        x: The scores.
        dim: The dimension that is normalized.
        dtype: Not read: the arithmetic is FP32.
        **_private: Not read: torch's own arguments, as `_stacklevel`.
    """
    del dtype
    numerator = _exponentials(run, x, dim)
    return within(div(run, numerator, _denominator(run, numerator, dim)), 1.0)


def _exponentials(run: Analysis, x: Estimate, dim: int) -> Estimate:
    """exp(x - c) with c the exact maximum.

    Softmax is the same for every shift, so c is a constant; the computed difference to the
    computed maximum is rounded once. What exp loses to underflow is below 2^-126.
    """
    visible = x.value.detach().isfinite()
    top = x.value.detach().amax(dim, keepdim=True)
    top = torch.where(top.isfinite(), top, 0.0)
    error = torch.where(visible, x.error, 0.0)
    below = torch.where(visible, top - x.value.detach(), 0.0)
    highest, lowest = ((x.value.detach() + e).amax(dim, keepdim=True) for e in (error, -error))
    shift = torch.where(visible, torch.maximum(highest - top, top - lowest), 0.0)
    rounding = U * (below + error + shift)
    shifted = run.step(x.value - top, error, rounding)
    powers = exp(run, replace(shifted, error=torch.where(visible, shifted.error, 0.0)))
    return _also(run, powers, visible.double() * 2.0**-126)


def _denominator(run: Analysis, numerator: Estimate, dim: int) -> Estimate:
    """The sum, 1 for a row without anything visible (its weights are zeros)."""
    summed = total(run, numerator, dim, keepdim=True)
    empty = summed.value.detach() == 0
    return masked_fill(run, summed, empty, 1.0)


@dataclass(frozen=True)
class Scoring:
    """What `heal::sdpa` takes besides its operands; `attention.sdpa` says what the names mean."""

    attn_mask: Any = None
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False
    window: int | None = None
    softcap: float | None = None
    sinks: Estimate | None = None

    def capped(self, run: Analysis, scores: Estimate) -> Estimate:
        """`softcap * tanh(scores / softcap)`."""
        if self.softcap is None:
            return scores
        return mul(run, RULES["tanh"](run, div(run, scores, self.softcap)), self.softcap)

    def masked(self, run: Analysis, scores: Estimate) -> Estimate:
        """Minus infinity where a key is hidden, and the float mask added."""
        size = scores.value.shape[-2:]
        every = torch.ones(size, dtype=torch.bool, device=scores.value.device)
        if self.is_causal:
            scores = masked_fill(run, scores, every.triu(1), -math.inf)
        if self.window is not None:
            scores = masked_fill(run, scores, every.tril(-self.window), -math.inf)
        if self.attn_mask is None:
            return scores
        if isinstance(self.attn_mask, Tensor):  # a boolean one: the others are estimates by now
            return masked_fill(run, scores, ~self.attn_mask, -math.inf)
        return add(run, scores, operand(self.attn_mask))

    def weights(self, run: Analysis, scores: Estimate) -> Estimate:
        """Softmax over the keys, and over the sink, whose weight is left out again."""
        if self.sinks is None:
            return softmax(run, scores)
        shape = (*scores.value.shape[:-1], 1)
        sink = self.sinks.moved(lambda x: x[:, None, None].expand(shape))
        joined = Estimate(
            torch.cat([scores.value, sink.value], -1), torch.cat([scores.error, sink.error], -1)
        )
        return softmax(run, joined).moved(lambda x: x[..., :-1])


def sdpa(
    run: Analysis,
    query: Estimate,
    key: Estimate,
    value: Estimate,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    kv: str | None = None,
    seed: Any = None,
    **more: Any,
) -> Estimate:
    """Quantization, scores, softmax and weighted sum; dropout has no error rule.

    Takes the arguments of `heal::sdpa`, of which torch's are a part; `kv` None is that of the run.

    Args:
        run: Records the steps.
        query: `[..., H, L, E]`.
        key: `[..., Hkv, S, E]`.
        value: `[..., Hkv, S, Ev]`.
        attn_mask: A bool tensor (True is visible) or an estimate (added), broadcastable to
            `[..., H, L, S]`.
        dropout_p: 0; anything else has no rule.
        is_causal: Hide key s from query l where s > l.
        kv: `fp32`, `int24` or `int16`: what Q, K and V are rounded to.
        seed: Not read: it is the dropout's.
        **more: The other arguments that decide a weight, as `scale`, `window` and `softcap`.
    """
    del seed
    if dropout_p:
        raise NoRuleError("no error rule for attention with dropout: its result is random.")
    scoring = Scoring(attn_mask, is_causal, **more)
    states = [quantized(run, x, kv or run.how.kv) for x in (query, key, value)]
    if scoring.enable_gqa:
        groups = query.value.shape[-3] // key.value.shape[-3]
        states[1:] = [t.moved(lambda x: x.repeat_interleave(groups, -3)) for t in states[1:]]
    scale = 1 / math.sqrt(query.value.shape[-1]) if scoring.scale is None else scoring.scale
    scores = mul(run, matmul(run, states[0], states[1].moved(lambda x: x.mT)), scale)
    return _weighted_mean(
        run, scoring.masked(run, scoring.capped(run, scores)), states[2], scoring
    )


def quantized(run: Analysis, x: Estimate, kv: str) -> Estimate:
    """`x` as the integers of its row hold it (`int16` derives the step), dequantized in FP32.

    Args:
        run: Records the steps.
        x: `[..., E]`, one row per token and head.
        kv: `fp32`, `int24` or `int16`.
    """
    if kv == "fp32":
        return x
    largest = x.magnitude.amax(-1, keepdim=True)
    step = largest / INTEGER_FORMATS[kv].limit * (1 + 2.0**-23) + 2.0**-126
    own = step * (0.5 + 2.0**-26) + U * (largest + step)
    return run.step(x.value, x.error, own.expand_as(x.error))


def _weighted_mean(run: Analysis, scores: Estimate, value: Estimate, scoring: Scoring) -> Estimate:
    """softmax(scores) V, divided before or after the product, in blocks of keys or at once.

    A kernel that goes through blocks multiplies what it has by exp(old maximum - new maximum) at
    each: an exponential and a rounding more. A weighted mean is no larger than the largest value.
    """
    weights = scoring.weights(run, scores)
    n = scores.value.shape[-1]
    blocks = -(-n // KEY_BLOCK)
    rescaled = _also(run, weights, 2 * blocks * (ELEMENTARY + 2 * U) * weights.magnitude)
    result = matmul(run, rescaled, value)
    result = _also(run, result, U * result.magnitude)
    largest = value.magnitude.amax(-2, keepdim=True) * (1 + (4 * n + 40 * blocks) * U)
    return replace(result, error=torch.minimum(result.error, result.size + largest))


RULES |= {
    "softmax": softmax,
    "rms_norm": rms_norm,
    "layer_norm": layer_norm,
    "scaled_dot_product_attention": sdpa,
}
