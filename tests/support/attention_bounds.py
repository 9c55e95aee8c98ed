"""Error bounds of the attention kernels against FP64 attention on the same digits.

With u = 2^-24, n visible keys in blocks of N, b blocks, c chunks, and per key j:

* score s_j = softcap(scale (q . k_j)) + mask_j, natural units. Sums of one weight are exact; the
  two highest weights are rounded to FP32 once and added to the rest once: 2u of the product and
  3u of the largest possible sum of the lower weights, `LOW`. Scales round three times: 5u in all.
  A softcap adds 16u of the capped score (its argument 2u, `heal_tanh` 12u, its factor 2u), a float
  mask u of the sum and of itself. The factor log2(e) costs 1.5u more;
* weight w_j = 2^(s_j - top): the difference rounds (u times the distance to the largest score, and
  to the next integer), exp2 is within 2 units in the last place, 4u (PTX: `ex2.approx`, 2^-22);
* total: every weight is summed within 2^-30 of 1, where the largest is above 1/2; a block joins
  with two roundings, a chunk with one, a sink with one and its own exponential;
* P V: folding V's scale u, cutting the weight 2^-22 and 2^-39 of the block's largest, the dropped
  product of low pieces 2^-22, one chain of N terms per block on A100's tensor core (9 addends
  aligned to 24 fraction bits, chopped to FP32: arXiv 2511.10909) N (2^-24 + 2^-23 / 8), with the
  low products on top of it (H100's chains are twice as long and lose half per term); one rounding
  per block and chunk; 1 / total and its product, 2u.

Of operands as stored, q . k is one such chain over the padded head size: each of q and k is cut
within 2^-22 and 2^-39 of its row's largest element, and the product of the low pieces is dropped.

The factors multiply as they stand; nothing is linearised.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from healpass.lowering.cuda.attention import CHUNK, DECODE_ROWS, SMALLEST_E, keys_per_block
from healpass.lowering.cuda.matmul import chain_k
from healpass.ops.attention.quantize import integers
from healpass.ops.attention.scoring import Scoring

UNIT = 2.0**-24
#: 2 low products of at most 2^-11 (1 + 2^-11) of the high one run before it in a chain.
LOW_PRODUCTS = 1 + 2 * 3 * 2.0**-11


@dataclass(frozen=True)
class Digits:
    """One operand of the kernels: INT8 `[B, H, D, S, E]`, FP32 `[B, H, S]`."""

    planes: Tensor
    scale: Tensor

    @classmethod
    def of(cls, x: Tensor, kv: str) -> Digits:
        """`x` quantized."""
        return cls(*torch.ops.heal.quantize(x, kv))

    @property
    def values(self) -> Tensor:
        """FP64 `[B, H, S, E]`, exact."""
        return integers(self.planes) * self.scale.double()[..., None]

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        """What the operator takes."""
        return self.planes, self.scale

    @property
    def digits(self) -> int:
        """Their number."""
        return self.planes.shape[2]

    def part(self, batch: slice = slice(None), rows: slice = slice(None)) -> Digits:
        """Some of the batch and some of the rows."""
        return Digits(self.planes[batch, :, :, rows], self.scale[batch, :, rows])

    def repeated(self, groups: int) -> Digits:
        """One per query head."""
        return Digits(*(x.repeat_interleave(groups, 1) for x in (self.planes, self.scale)))

    def poisoned(self, rows: slice) -> Digits:
        """Rows that must not matter: the largest digits, and NaN for a scale."""
        planes, scale = self.planes.clone(), self.scale.clone()
        planes[:, :, :, rows], scale[:, :, rows] = 127, math.nan
        return Digits(planes, scale)


@dataclass(frozen=True)
class Floats:
    """One operand of the kernels as stored: `[B, H, S, E]` in FP32 or 16 bits."""

    states: Tensor

    #: No digits.
    digits = 0

    @property
    def values(self) -> Tensor:
        """FP64 `[B, H, S, E]`, exact."""
        return self.states.double()

    @property
    def scale(self) -> Tensor:
        """What a row's pieces are in units of, at most: 2^-14 of its largest element."""
        return (self.states.float().abs().amax(-1) * 2.0**-14).clamp_min(2.0**-126)

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        """What the operator takes."""
        return (self.states,)

    def part(self, batch: slice = slice(None), rows: slice = slice(None)) -> Floats:
        """Some of the batch and some of the rows."""
        return Floats(self.states[batch, :, rows])

    def repeated(self, groups: int) -> Floats:
        """One per query head."""
        return Floats(self.states.repeat_interleave(groups, 1))

    def poisoned(self, rows: slice) -> Floats:
        """Rows that must not matter: NaN."""
        states = self.states.clone()
        states[:, :, rows] = math.nan
        return Floats(states)


Operand = Digits | Floats


@dataclass(frozen=True)
class Exact:
    """What FP64 makes of one attention, and how far a kernel may be from it.

    Attributes:
        output: `[B, H, L, Ev]`.
        logsumexp: `[B, H, L]`.
        weights: `[B, H, L, S]`, before dropout.
        bound: Of the output.
        logsumexp_bound: Of the logsumexp.
    """

    output: Tensor
    logsumexp: Tensor
    weights: Tensor
    bound: Tensor
    logsumexp_bound: Tensor


def low_weights(head_size: int, left: int, right: int) -> float:
    """The largest sum of digit products below the two highest weights."""
    top = left + right - 2
    pairs = [sum(0 <= weight - i < right for i in range(left)) for weight in range(top - 1)]
    return head_size * 2.0**14 * sum(count * 256**w for w, count in enumerate(pairs))


def product_error(query: Operand, key: Operand) -> Tensor:
    """Error of q . k before the scales round, `[B, H, L, S]`."""
    if query.digits:
        low = low_weights(query.planes.shape[-1], query.digits, key.digits)
        return 3 * UNIT * low * query.scale.double()[..., None] * key.scale.double()[..., None, :]
    left, right = query.values.abs(), key.values.abs()
    sums = left.sum(-1, keepdim=True) * right.amax(-1)[..., None, :]
    sums = sums + left.amax(-1, keepdim=True) * right.sum(-1)[..., None, :]
    depth = max(SMALLEST_E, padded(left, right))
    # Below FP32's normal range pieces have the fixed unit 2^-126.
    tiny = 2.0**-149 * depth * (left.amax((-2, -1)) + right.amax((-2, -1)))[..., None, None]
    return (3 * 2.0**-22 + chain_error(depth)) * (left @ right.mT) + 2.0**-38 * sums + tiny


def scores_and_errors(query: Operand, key: Operand, scoring: Scoring) -> tuple[Tensor, Tensor]:
    """Exact scores `[B, H, L, S]`, -inf where hidden, and the kernels' error of each."""
    product = scoring.scale * (query.values @ key.values.mT)
    error = 5 * UNIT * product.abs() + abs(scoring.scale) * product_error(query, key)
    if scoring.softcap is not None:
        product = scoring.softcap * torch.tanh(product / scoring.softcap)
        error = error + 16 * UNIT * product.abs()
    rows, columns = slice(0, product.shape[-2]), slice(0, product.shape[-1])
    mask = scoring.mask_block(rows, columns)
    if mask is not None and mask.dtype != torch.bool:
        finite = torch.where(mask.isinf(), 0.0, mask.double())
        error = error + UNIT * (finite.abs() + (product + finite).abs())
    scores = scoring.hide(product, rows, columns)
    error = error + 1.5 * UNIT * torch.where(scores.isfinite(), scores.abs(), 0.0)
    return scores, error * (1 + 2.0**-10)  # the errors of erroneous numbers


def exact(
    query: Operand, key: Operand, value: Operand, scoring: Scoring, *, joined: bool = False
) -> Exact:
    """Attention in FP64, and the bound of the kernels.

    Args:
        query: `[B, H, L, E]`.
        key: `[B, Hkv, S, E]`.
        value: `[B, Hkv, S, Ev]`.
        scoring: All else that decides a weight.
        joined: Rows have chunks however many they are.
    """
    groups = query.scale.shape[1] // key.scale.shape[1]
    rows = groups * query.scale.shape[-1]
    key, value = key.repeated(groups), value.repeated(groups)
    scores, error = scores_and_errors(query, key, scoring)
    sink = torch.full((1,), -math.inf) if scoring.sinks is None else scoring.sinks
    sink = sink.double()[:, None, None].expand(*scores.shape[:-1], 1)
    logsumexp = torch.logsumexp(torch.cat([scores, sink], -1), -1)
    visible = scores != -math.inf
    weights = torch.exp(scores - logsumexp[..., None]).masked_fill(~visible, 0.0)
    used = weights * dropout_factor(scores.shape, scoring)

    largest = torch.maximum(scores.amax(-1, keepdim=True), sink)
    distance = torch.where(visible, largest - scores, 0.0)
    eta = torch.exp(error + UNIT * (distance + 1)) * (1 + 4 * UNIT) - 1
    head_block = padded(query.values, value.values)
    block = keys_per_block(head_block, key.digits, chain_k(80))
    blocks = -(-scores.shape[-1] // block)
    chunks = -(-scores.shape[-1] // CHUNK) if joined or rows <= DECODE_ROWS else 0
    steps = (2 * blocks + chunks + 4) * UNIT
    sink_error = torch.exp(UNIT * (4 * sink.abs().nan_to_num(0.0, 0.0) + 1)) * (1 + 4 * UNIT) - 1
    count = visible.sum(-1, keepdim=True)
    moved = (weights * eta).sum(-1, keepdim=True) + sink_error
    tau = moved + count * 2.0**-29 + steps

    delta = 5 * UNIT + 2 * 2.0**-22 + chain_error(block) + (blocks + chunks) * UNIT
    relative = (1 + eta) * (1 + delta) / (1 - tau) - 1
    magnitude = value.values.abs()
    # Nothing is promised, and NaN is right, where a visible key is NaN.
    bound = (used * relative) @ magnitude
    folded = (used * value.scale.double()[..., None, :]).amax(-1, keepdim=True)
    cut = visible.double() @ (magnitude / value.scale.double()[..., None])
    bound = bound + 2.0**-38 * folded * cut
    floor = (count + 2 * blocks) * (2.0**-125 * magnitude.amax((-2, -1), keepdim=True) + 2.0**-128)
    log_error = tau / (1 - tau) + UNIT * (4 * logsumexp.abs()[..., None].nan_to_num(0.0, 0.0, 0.0))
    log_error = log_error + 4 * UNIT * (1 + count.clamp_min(1).log())
    return Exact(used @ value.values, logsumexp, weights, bound + floor, log_error.squeeze(-1))


def dropout_factor(shape: torch.Size, scoring: Scoring) -> Tensor:
    """What dropout multiplies each weight with, in FP64."""
    kept = scoring.survivors(shape, slice(0, shape[-2]), slice(0, shape[-1]))
    if kept is None or scoring.dropout_p == 1.0:
        return torch.full((), float(kept is None), dtype=torch.float64)
    return (kept > 0).double() / (1 - scoring.dropout_p)


def padded(query: Tensor, value: Tensor) -> int:
    """The larger head size, padded to a power of two."""
    return 1 << (max(query.shape[-1], value.shape[-1]) - 1).bit_length()


# ------------------------------------------------------------------------------------- gradients
#
# The backward kernels get the output and the logsumexp rounded to FP32 and compute, per row and
# key,
#
# * the weight again, p = e^(score - logsumexp): the exponent errs as the score does, by 3u of the
#   logsumexp (its own rounding, log2(e)) and u of the difference; exp2 by 4u;
# * dP = G V^T, one chain over the padded head size: G is cut within 2^-22 and 2^-39 of its row's
#   largest, the low product is dropped (2^-22), scales and dropout round four times;
# * delta = rowsum(G * O): a product and two sums round, and each term is summed within 2^-29 of
#   the largest; O errs by u;
# * dS = p (dP - delta) slope: four roundings, and the slope 1 - tanh^2 within 30u and what the
#   score's error moves it by;
# * products of dS with K and Q, and of p with G, over blocks: as P V in the forward pass.


@dataclass(frozen=True)
class Gradient:
    """One gradient in FP64, and how far a kernel may be from it."""

    exact: Tensor
    bound: Tensor


@dataclass(frozen=True)
class _Row:
    """What the backward pass knows of each row and key, `[B, H, L, S]`, and its error."""

    weights: Tensor
    weights_error: Tensor
    grad_scores: Tensor
    grad_scores_error: Tensor


def chain_error(terms: int) -> float:
    """One chain of three products on A100's tensor core, relative to the sum of magnitudes.

    Its 9 addends keep 24 bits; H100's 17 keep 25, so that a term costs half of this.
    """
    return terms * (2.0**-24 + 2.0**-23 / 8) * LOW_PRODUCTS


def gradients(
    query: Operand, key: Operand, value: Operand, scoring: Scoring, grad: Tensor
) -> tuple[Gradient, Gradient, Gradient]:
    """Gradients of Q, K and V in FP64, and the bounds of the kernels."""
    groups = query.scale.shape[1] // key.scale.shape[1]
    scale = abs(scoring.scale)
    rows = _rows(query, key.repeated(groups), value.repeated(groups), scoring, grad)
    many, wide = rows.grad_scores, rows.grad_scores_error
    of_query = _product(many * scoring.scale, wide * scale, key.repeated(groups))
    of_key = _product(many.mT * scoring.scale, wide.mT * scale, query)
    # G in place of an operand in digits: its unit is 2^-14 of each row's largest element or more.
    unit = grad.abs().amax(-1).clamp_min(2.0**-126) * 2.0**-14
    pieces = _Values(grad.double(), unit.double())
    of_value = _product(rows.weights.mT, rows.weights_error.mT, pieces)
    lost = rows.weights.mT @ (2.0**-39 * grad.double().abs().amax(-1, keepdim=True))
    of_value = Gradient(of_value.exact, of_value.bound + lost + 2.0**-22 * (
        rows.weights.mT @ grad.double().abs()))  # fmt: skip

    def grouped(x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, groups)).sum(2)

    return (
        of_query,
        Gradient(grouped(of_key.exact), grouped(of_key.bound)),
        Gradient(grouped(of_value.exact), grouped(of_value.bound)),
    )


@dataclass(frozen=True)
class _Values:
    """FP64 `[B, H, S, E]` and the unit of each row, `[B, H, S]`."""

    values: Tensor
    scale: Tensor


def _product(left: Tensor, error: Tensor, right: Operand | _Values) -> Gradient:
    """`left [.., M, K] @ right [.., K, N]` by blocks of pieces, `left` being off by `error`."""
    values, terms = right.values.abs(), left.shape[-1]
    grown = left.abs() + error
    # Blocks of 16 are the most, chains of 32 the longest; heads of a group share one sum.
    relative = 4 * UNIT + 2 * 2.0**-22 + chain_error(32) + (terms / 16 + 8) * 4 * UNIT
    bound = error @ values + relative * (grown @ values)
    unit = right.scale.double()[..., None]
    largest = (grown * unit.mT).amax(-1, keepdim=True)
    bound = bound + 2.0**-38 * largest * ((left != 0).double() @ (values / unit).nan_to_num(0.0))
    tiny = terms * (2.0**-125 * (1 + values.amax((-2, -1), keepdim=True)) + 2.0**-130)
    return Gradient(left @ right.values, bound + tiny)


def _rows(query: Operand, key: Operand, value: Operand, scoring: Scoring, grad: Tensor) -> _Row:
    reference = exact(query, key, value, scoring)
    scores, error = scores_and_errors(query, key, scoring)
    finite = torch.where(reference.logsumexp.isfinite(), reference.logsumexp, 0.0)[..., None]
    gap = torch.where(scores.isfinite(), scores - finite, 0.0).abs()
    eta = torch.exp(error + 3 * UNIT * finite.abs() + UNIT * gap) * (1 + 4 * UNIT) - 1
    weights = reference.weights
    factor = dropout_factor(scores.shape, scoring)

    wide, magnitude = grad.double(), value.values.abs()
    grad_weights = factor * (wide @ value.values.mT)
    largest = wide.abs().amax(-1, keepdim=True)
    relative = 2 * 2.0**-22 + chain_error(1 << (wide.shape[-1] - 1).bit_length()) + 5 * UNIT
    moved = factor * (
        relative * (wide.abs() @ magnitude.mT)
        + 2.0**-38 * largest * magnitude.sum(-1)[..., None, :]
    )
    terms = wide * reference.output
    delta = terms.sum(-1, keepdim=True)
    moved = moved + 2 * UNIT * terms.abs().sum(-1, keepdim=True) + 2 * UNIT * delta.abs()
    moved = moved + wide.shape[-1] * 2.0**-29 * terms.abs().amax(-1, keepdim=True)
    difference = grad_weights - delta
    grad_scores = weights * difference
    # A weight below 2^-126 may be flushed to zero.
    flushed = 2.0**-126 * (scores != -math.inf)
    change = grad_scores.abs() * (eta + 4 * UNIT) + flushed * difference.abs()
    change = change + (weights * (1 + eta) + flushed) * moved
    if scoring.softcap is not None:
        product = scoring.scale * (query.values @ key.values.mT)
        slope = 1 - torch.tanh(product / scoring.softcap).square()
        bent = 30 * UNIT + error / scoring.softcap
        change = change * slope + (grad_scores.abs() + change) * bent
        grad_scores = grad_scores * slope
    used = weights * factor
    error = used * (eta + 2 * UNIT) + factor * flushed
    return _Row(used, error, grad_scores, change)
