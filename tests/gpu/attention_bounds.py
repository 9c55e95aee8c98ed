"""Error bounds of the attention kernels against FP64 attention on the same digits.

With u = 2^-24, n visible keys in blocks of N, b blocks, c chunks, and per key j:

* score s_j = softcap(scale (q . k_j)) + mask_j, natural units. Digit sums of one weight are exact;
  the two highest weights are rounded to FP32 once and added to the rest once: 2u of the product and
  3u of the largest possible sum of the lower weights, `LOW`. Scales round three times: 5u in all.
  A softcap adds 16u of the capped score (its argument 2u, `heal_tanh` 12u, its factor 2u), a float
  mask u of the sum and of itself. The factor log2(e) costs 1.5u more;
* weight w_j = 2^(s_j - top): the difference rounds (u times the distance to the largest score, and
  to the next integer), exp2 is within 2 units in the last place, 4u (PTX: `ex2.approx`, 2^-22);
* total: every weight is summed within 2^-30 of 1, where the largest is above 1/2; a block joins
  with two roundings, a chunk with one, a sink with one and its own exponential;
* P V: folding V's scale u, cutting the weight 2^-22 and 2^-39 of the block's largest, the dropped
  product of low pieces 2^-22, one chain of N terms per block on H100's tensor core (17 addends
  aligned to 25 fraction bits, chopped to FP32: arXiv 2511.10909) N (2^-25 + 2^-23 / 16), with the
  low products on top of it; one rounding per block and chunk; 1 / total and its product, 2u.

The factors multiply as they stand; nothing is linearised.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from healpass.lowering.attention import CHUNK, DECODE_ROWS, keys_per_block
from torch import Tensor

from healpass.ops.quantize import integers
from healpass.ops.scores import Scoring

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

    def repeated(self, groups: int) -> Digits:
        """One per query head."""
        return Digits(*(x.repeat_interleave(groups, 1) for x in (self.planes, self.scale)))


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


def scores_and_errors(query: Digits, key: Digits, scoring: Scoring) -> tuple[Tensor, Tensor]:
    """Exact scores `[B, H, L, S]`, -inf where hidden, and the kernels' error of each."""
    product = scoring.scale * (query.values @ key.values.mT)
    low = low_weights(query.planes.shape[-1], query.planes.shape[2], key.planes.shape[2])
    scales = query.scale.double()[..., None] * key.scale.double()[..., None, :]
    error = 5 * UNIT * product.abs() + 3 * UNIT * low * abs(scoring.scale) * scales
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


def exact(query: Digits, key: Digits, value: Digits, scoring: Scoring) -> Exact:
    """Attention in FP64, and the bound of the kernels."""
    groups = query.planes.shape[1] // key.planes.shape[1]
    rows = groups * query.planes.shape[-2]
    key, value = key.repeated(groups), value.repeated(groups)
    scores, error = scores_and_errors(query, key, scoring)
    sink = torch.full((1,), -math.inf) if scoring.sinks is None else scoring.sinks
    sink = sink.double()[:, None, None].expand(*scores.shape[:-1], 1)
    logsumexp = torch.logsumexp(torch.cat([scores, sink], -1), -1)
    visible = scores != -math.inf
    weights = torch.exp(scores - logsumexp[..., None]).masked_fill(~visible, 0.0)
    kept = scoring.survivors(scores.shape, slice(0, scores.shape[-2]), slice(0, scores.shape[-1]))
    used = weights if kept is None else weights * (kept > 0) / (1 - scoring.dropout_p)

    largest = torch.maximum(scores.amax(-1, keepdim=True), sink)
    distance = torch.where(visible, largest - scores, 0.0)
    eta = torch.exp(error + UNIT * (distance + 1)) * (1 + 4 * UNIT) - 1
    block = keys_per_block(padded(query.planes, value.planes), key.planes.shape[2])
    blocks = -(-scores.shape[-1] // block)
    chunks = -(-scores.shape[-1] // CHUNK) if rows <= DECODE_ROWS else 0
    steps = (2 * blocks + chunks + 4) * UNIT
    sink_error = torch.exp(UNIT * (4 * sink.abs().nan_to_num(0.0, 0.0) + 1)) * (1 + 4 * UNIT) - 1
    count = visible.sum(-1, keepdim=True)
    moved = (weights * eta).sum(-1, keepdim=True) + sink_error
    tau = moved + count * 2.0**-29 + steps

    chain = block * (2.0**-25 + 2.0**-23 / 16) * LOW_PRODUCTS
    delta = 5 * UNIT + 2 * 2.0**-22 + chain + (blocks + chunks) * UNIT
    relative = (1 + eta) * (1 + delta) / (1 - tau) - 1
    magnitude = value.values.abs()
    # Nothing is promised, and NaN is right, where a visible key is NaN.
    bound = (used * relative) @ magnitude
    folded = (used * value.scale.double()[..., None, :]).amax(-1, keepdim=True)
    cut = visible.double() @ integers(value.planes).abs()
    bound = bound + 2.0**-38 * folded * cut
    floor = (count + 2 * blocks) * (2.0**-125 * magnitude.amax((-2, -1), keepdim=True) + 2.0**-128)
    log_error = tau / (1 - tau) + UNIT * (4 * logsumexp.abs()[..., None].nan_to_num(0.0, 0.0, 0.0))
    log_error = log_error + 4 * UNIT * (1 + count.clamp_min(1).log())
    return Exact(used @ value.values, logsumexp, weights, bound + floor, log_error.squeeze(-1))


def padded(query: Tensor, value: Tensor) -> int:
    """The larger head size, padded to a power of two."""
    return 1 << (max(query.shape[-1], value.shape[-1]) - 1).bit_length()
