"""The forward error of attention as a formula. Layer `arithmetic`: imports `bounds`.

For one output element o = sum_j w_j v_j with w = softmax(s) over n keys, in five steps:

1. Scores. With q and k in an integer format, each differs from its operand by a step rho max|x|
   (and u |x| for the dequantization), so the score moves by rho (A SB + B SA) + E rho^2 A B + 2u S
   to first order, all included below. The product itself errs by the matmul bound; scaling and
   masking round three times. Together |s' - s| <= Delta.
2. Exponentials. exp(s' - m') is computed from a difference rounded once, off by u D' with D' the
   spread of the visible scores plus 2 Delta, by a function that is within `EXP_ULPS` units in the
   last place. Numerator and denominator of a weight each move by a factor within
   exp(+-(Delta + u D')) of their own.
3. The denominator is a sum of n positive numbers (gamma_n), then one division.
4. Hence w'_j = w_j (1 + theta_j) with |theta_j| <= Theta, and a weight that underflows loses
   2^-126.
5. P V is a matmul with the weights as its left operand, which are at most 1 and sum to at most
   1 + Theta.

The score's bound of step 1 enters the exponent: attention is as sensitive to the scores as softmax
is (its condition number in the maximum norm is at most 2).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Literal

import sympy
import torch
from sympy import Expr, Integer, Rational, Symbol
from torch import Tensor

from healpass.arithmetic.bounds import HARDWARE, Kernel, matmul_bound
from healpass.arithmetic.int16 import INT16, INT24
from healpass.arithmetic.pieces import row_scale
from healpass.arithmetic.symbols import (
    LAMBDA,
    SA,
    SB,
    A,
    B,
    Bound,
    Q,
    S,
    Term,
    U,
    describe,
    gamma,
)
from healpass.errors import NoRuleError

#: Units in the last place within which an FP32 exp is computed: SLEEF's is 1, CUDA's expf 2.
EXP_ULPS = 2

#: Magnitudes of the scores: of `q k^T` before the scale, maxima over the keys.
QK_S, QK_A, QK_B, QK_SA, QK_SB = sympy.symbols("QK_S QK_A QK_B QK_SA QK_SB", nonnegative=True)
#: |scale|, the largest finite |mask|, and the spread of the visible scores of a row.
SCALE, MASK, SPREAD = sympy.symbols("SCALE MASK SPREAD", nonnegative=True)
#: For the square-root companion: maxima over the keys of sqrt(sum (q k)^2) and of what the steps
#: of q and k are relative to, sqrt(|q|^2 max k^2 + |k|^2 max q^2); then sqrt(sum (w v)^2), with o
#: the output sqrt(sum w^2 (v - o)^2), and sqrt(sum w^2).
QK_Q, QK_N, V_Q, V_D, W_N = sympy.symbols("QK_Q QK_N V_Q V_D W_N", nonnegative=True)
#: sum_j w_j |v_j|; max and sum of w_j t_j; sum of |v_j| / t_j over visible keys; the largest |v|.
V_S, W_MAX, W_SUM, V_SB, V_MAX = sympy.symbols("V_S W_MAX W_SUM V_SB V_MAX", nonnegative=True)

_FORMATS = {"int16": INT16, "int24": INT24}
#: Operands whose integers are given: nothing is quantized, the exact result is theirs.
DIGITS = "digits"


@dataclass(frozen=True)
class AttentionShape:
    """What the bound of an attention depends on besides magnitudes.

    Attributes:
        head_size: E, the length of a score's sum.
        keys: S, the number of keys.
        precision: `heal` or `layercast`, as in `matmul_bound`.
        rule: Who adds, as in `matmul_bound`.
        kv: `fp32`; an integer format that Q, K and V are rounded to; or `digits`, where the
            integers are the operands. Caps and sinks enter through `attention_magnitudes`, a sink
            as one more key.
    """

    head_size: int
    keys: int
    precision: str = "heal"
    rule: str | None = None
    kv: str = "fp32"


@functools.cache
def attention_bound(shape: AttentionShape) -> Bound:
    """Forward error of one element of `heal::attention` with FP32 operands.

    Raises:
        NoRuleError: The precision, rule or format has no bound here.
    """
    known = ("fp32", DIGITS, *_FORMATS)
    if shape.kv not in known:
        raise NoRuleError(f"no attention bound for kv={shape.kv!r}; known: {', '.join(known)}.")
    delta = _score_error(shape)
    theta = _weight_error(delta, shape.keys)
    product = _product_bound(shape).expression.subs(
        {
            S: (1 + theta) * V_S,
            A: (1 + theta) * W_MAX,
            SA: (1 + theta) * W_SUM,
            B: Integer(2**16),
            SB: V_SB,
        },
        simultaneous=True,
    )
    terms = [
        Term("softmax", theta * V_S),
        Term("underflow", shape.keys * (Rational(1, 2**126) * V_MAX + Rational(1, 2**145))),
        Term("split", product),
    ]
    if shape.kv != "fp32":
        step = _step(shape.kv)
        terms.append(Term("quantize", (1 + theta) * (step * V_MAX + U * (V_S + step * V_MAX))))
    return Bound(f"attention, {shape}", tuple(terms), _companion(shape))


def _companion(shape: AttentionShape) -> Expr:
    """LAMBDA standard deviations, roundings being independent and uniform (Higham and Mary 2019).

    To first order the error d_j of the logarithm of a weight moves the output by w_j (v_j - o)
    d_j, so those of all keys together have the deviation V_D times one's. An error of the
    denominator moves it by its own share of the output, which is at most V_S.
    """
    product = _raw_scores_bound(shape).probabilistic
    values = _product_bound(shape).probabilistic
    assert product is not None
    assert values is not None
    step = Integer(0) if shape.kv == "fp32" else _step(shape.kv)
    qk = {Q: QK_Q, A: QK_A, B: QK_B, SA: QK_SA, SB: QK_SB, LAMBDA: Integer(1)}
    score = SCALE**2 * (
        product.subs(qk, simultaneous=True) ** 2 + (step * QK_N) ** 2 / 3 + 4 * (U * QK_Q) ** 2 / 3
    )
    logarithm = score + U**2 / 3 * ((MASK + SPREAD) ** 2 + EXP_ULPS**2)
    common = U**2 * Rational(shape.keys + 5, 6) * V_S**2
    rounded = (step * V_MAX * W_N) ** 2 / 3 + (U * V_Q) ** 2 / 3
    weights = {Q: V_Q, A: W_MAX, B: Integer(2**16), SA: W_SUM, SB: V_SB}
    deviation = sympy.sqrt(V_D**2 * logarithm + common + rounded)
    lost = shape.keys * Rational(1, 2**126) * V_MAX
    return LAMBDA * deviation + values.subs(weights, simultaneous=True) + lost


@functools.cache
def score_bound(shape: AttentionShape) -> Bound:
    """Error of one scaled, capped and masked score: Delta of step 1."""
    return Bound(f"score, {shape}", (Term("scores", _score_error(shape)),))


def _raw_scores_bound(shape: AttentionShape) -> Bound:
    """Of `q k^T`. The kernels, which start with A100, add a score in one chain, whatever its head.

    A head that is longer than the reference implementation's chain is padded to a power of two, as
    the kernels do: on H100 at most 0.625 u a term, below the u of FP32, and on A100 twice that.
    The power of two covers the reference implementation, too: shorter chains, and the few FP32
    additions that join them.
    """
    terms = shape.head_size
    every: Literal["rule"] | None = "rule"
    if shape.rule in ("a100", "h100", "b200") and terms > HARDWARE[shape.rule].promote_every:
        terms, every = 1 << (terms - 1).bit_length(), None
    return matmul_bound(
        shape.precision,
        terms,
        left="fp32",
        right="fp32",
        rule=shape.rule,
        kernel=Kernel(promote_every=every),
    )


def _product_bound(shape: AttentionShape) -> Bound:
    return matmul_bound(shape.precision, shape.keys, left="fp32", right="fp32", rule=shape.rule)


def _step(kv: str) -> Expr:
    """Half a step of the integer format relative to the row's maximum, as `int16` computes it."""
    if kv == DIGITS:
        return Integer(0)
    half = Rational(1, 2) + Rational(1, 2**26)
    return half * (1 + Rational(1, 2**23)) / _FORMATS[kv].limit


def _score_error(shape: AttentionShape) -> Expr:
    """Delta: the largest error of a scaled and masked score."""
    qk = {S: QK_S, A: QK_A, B: QK_B, SA: QK_SA, SB: QK_SB}
    product = _raw_scores_bound(shape)
    error = product.expression.subs(qk, simultaneous=True)
    if shape.kv != "fp32":
        error = _quantized_scores(shape, error)
    rounded = (1 + 4 * U) * error + 4 * U * QK_S
    return SCALE * rounded + U * (MASK + SCALE * (QK_S + rounded))


def _quantized_scores(shape: AttentionShape, error: Expr) -> Expr:
    """The quantization moves the operands, and the product's own error sees the moved ones."""
    step, e = _step(shape.kv), shape.head_size
    moved = (1 + U) * step
    shift = (
        moved * (QK_A * QK_SB + QK_B * QK_SA) * (1 + U)
        + e * moved**2 * QK_A * QK_B
        + (2 * U + U**2) * QK_S
    )
    grown: dict[Symbol, Expr] = {
        QK_S: QK_S + shift,
        QK_A: (1 + U) * (1 + step) * QK_A,
        QK_B: (1 + U) * (1 + step) * QK_B,
        QK_SA: (1 + U) * (QK_SA + e * step * QK_A),
        QK_SB: (1 + U) * (QK_SB + e * step * QK_B),
    }
    return shift + error.subs(grown, simultaneous=True)


def _weight_error(delta: Expr, keys: int) -> Expr:
    """Theta: the largest relative error of a softmax weight."""
    exponent = 2 * (delta + U * (SPREAD + 2 * delta))
    ulp = 2 * EXP_ULPS * U
    functions = (1 + ulp) / (1 - ulp)
    sum_and_division = (1 + U) / (1 - gamma(keys))
    return sympy.exp(exponent) * functions * sum_and_division - Integer(1)


def describe_attention(
    precision: str, head_size: object, keys: object, kv: str, rule: str | None = None
) -> str:
    """The bound in one line, to first order in everything but the scores' error d.

    S, A, B, SA, SB are those of q k^T, V = sum w |v|. A size that is known only at run time keeps
    its name.

    Args:
        precision: As in `AttentionShape`, and so the other arguments.
        head_size: E, a number or a symbol.
        keys: S, a number or a symbol.
        kv: Format of Q, K and V.
        rule: Who adds.
    """
    shape = AttentionShape(int(head_size) if isinstance(head_size, int) else 0, 0, precision, rule)
    shape = dataclasses.replace(shape, kv=kv)
    scores = _describe_scores(shape)
    if not isinstance(head_size, int):
        scores = f"{head_size} u S" if kv == "fp32" else f"{head_size} u S + {scores}"
    constant = _softmax_roundings()
    step = "" if kv == "fp32" else f" + 2^{math.ceil(10 * math.log2(_step(kv))) / 10:.1f} max|v|"
    sums = f"{2 * keys + constant:.1f}u" if isinstance(keys, int) else f"(2 {keys} + {constant})u"
    return f"(e^2d - 1 + {sums}) V{step}, d = scale ({scores})"


@functools.cache
def _describe_scores(shape: AttentionShape) -> str:
    """The error of the scores in one line; every layer of a model asks for the same."""
    plain = {QK_S: S, QK_A: A, QK_B: B, QK_SA: SA, QK_SB: SB, SCALE: Integer(1), MASK: Integer(0)}
    return describe(_score_error(shape).subs(plain, simultaneous=True))


@functools.cache
def _softmax_roundings() -> float:
    """What a softmax's functions and its division lose, in units of u."""
    return math.ceil(10 * float(_weight_error(Integer(0), 0).subs(SPREAD, 0) / U)) / 10


def attention_magnitudes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> dict[str, Tensor | float]:
    """The magnitudes of `attention_bound` in FP64, each broadcastable to `[..., L, Ev]`.

    The cap `c tanh(x / c)` does not enlarge the error of x; its own roundings (a division, tanh
    within `EXP_ULPS`, a product) are below 6 u c, and count as a mask of that size.

    Args:
        query: `[..., L, E]`.
        key: `[..., S, E]`, as many heads as `query`.
        value: `[..., S, Ev]`.
        scores: `[..., L, S]` in FP64: exact, scaled, capped and masked; -inf hides a key.
        scale: The factor of the scores.
        softcap: The cap of the scores.
        sinks: `[..., 1, 1]`: a logit of the denominator alone.
    """
    q, k, v = (t.to(torch.float64).abs() for t in (query, key, value))
    visible = scores.isfinite()
    product = (q @ k.mT).masked_fill(~visible, 0.0)
    exact = scale * (query.to(torch.float64) @ key.to(torch.float64).mT)
    capped = exact if softcap is None else softcap * torch.tanh(exact / softcap)
    mask = (scores - capped).abs().masked_fill(~visible, 0.0).amax(-1, keepdim=True)
    column = scores.new_full((1,), -math.inf) if sinks is None else sinks.to(torch.float64)
    logits = torch.cat([column.expand(*scores.shape[:-1], 1), scores], -1)
    top = logits.amax(-1, keepdim=True)
    spread = torch.where(logits.isfinite(), top - logits, 0.0).amax(-1, keepdim=True)
    weights = torch.softmax(logits, -1)[..., 1:].nan_to_num(0.0)
    token_scale = row_scale(value).to(torch.float64)
    folded = weights * token_scale.mT
    return _deviations(q, k, visible, weights, value.to(torch.float64)) | {
        "QK_S": product.amax(-1, keepdim=True),
        "QK_A": q.amax(-1, keepdim=True),
        "QK_B": k.amax((-2, -1), keepdim=True),
        "QK_SA": q.sum(-1, keepdim=True),
        "QK_SB": k.sum(-1).amax(-1)[..., None, None],
        "SCALE": abs(scale),
        "MASK": mask + 6 * (softcap or 0.0),
        "SPREAD": spread,
        "V_S": weights @ v,
        "W_MAX": folded.amax(-1, keepdim=True),
        "W_SUM": folded.sum(-1, keepdim=True),
        "V_SB": visible.to(torch.float64) @ (v / token_scale),
        "V_MAX": v.amax((-2, -1), keepdim=True),
    }


def _deviations(
    q: Tensor, k: Tensor, visible: Tensor, weights: Tensor, value: Tensor
) -> dict[str, Tensor | float]:
    """The magnitudes of the square-root companion; `q` and `k` are absolute values."""
    squares = (q.square() @ k.square().mT).masked_fill(~visible, 0.0)
    norms = q.square().sum(-1, keepdim=True) * k.amax((-2, -1), keepdim=True).square()
    norms = (
        norms + q.amax(-1, keepdim=True).square() * k.square().sum(-1).amax(-1)[..., None, None]
    )
    output, squared = weights @ value, weights.square()
    total = squared.sum(-1, keepdim=True)
    around = squared @ value.square() - 2 * output * (squared @ value) + output.square() * total
    return {
        "QK_Q": squares.amax(-1, keepdim=True).sqrt(),
        "QK_N": norms.sqrt(),
        "V_Q": (squared @ value.square()).sqrt(),
        "V_D": around.clamp_min(0.0).sqrt(),
        "W_N": total.sqrt(),
    }
