"""Tokens drawn as a pure function of logits, seed, position and token: the same on every device.

A draw is the largest of `logit / temperature + noise` (Gumbel-max, arXiv 1611.01144, section 2.1).
The noise of a token is -log(-log(u)), u a hash of (seed, position, token): no generator with a
state, so neither the batch, nor the order of requests, nor what was drawn before can show. What
`top_k`, `min_p` and `top_p` leave is decided on one order, by falling logit and then by rising
token, and with exact sums. Everything is IEEE FP64 (`reproducible.fp64`) or integers.

u is (2 n + 1) 2^-53 for an integer n of 52 bits, so noise lies in [-3.61, 36.74]; a token whose
probability is below about 2^-52 of the largest is never drawn. Imports `errors`, `fp64`, `words`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from healpass.errors import OperandError
from healpass.ops.reproducible import fp64
from healpass.ops.reproducible.words import BITS, folded, mix

heal = torch.ops.heal
#: Bits of u, and of a probability when `top_p` adds.
_NOISE_BITS, _SUM_BITS = 52, 40


@dataclass(frozen=True)
class Draw:
    """How tokens are drawn, row by row.

    Attributes:
        temperature: FP64 `[T]`, above 0.
        top_k: INT64 `[T]`: tokens that stay; 0 or less for all.
        min_p: FP64 `[T]`: tokens stay whose probability is that share of the largest.
        top_p: FP64 `[T]`: then the fewest that have this probability together; above 0.

    Raises:
        OperandError: A temperature, `min_p` or `top_p` outside of its range.
    """

    temperature: Tensor
    top_k: Tensor
    min_p: Tensor
    top_p: Tensor

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, value, fits in (
            ("temperature", self.temperature, self.temperature > 0.0),
            ("min_p", self.min_p, (self.min_p >= 0.0) & (self.min_p <= 1.0)),
            ("top_p", self.top_p, (self.top_p > 0.0) & (self.top_p <= 1.0)),
        ):
            if not bool(fits.all()):
                raise OperandError(
                    f"{name}={value.tolist()} leaves nothing to draw from.\n"
                    "temperature and top_p are above 0, min_p is from 0 to 1, top_p at most 1. "
                    "For a temperature of 0 take the largest logit."
                )

    def kept(self, scores: Tensor) -> Tensor:
        """What may be drawn, bool `[T, V]`; at least one token of each row.

        Args:
            scores: FP64 `[T, V]`, logits over temperature.
        """
        count = scores.shape[-1]
        ordered, tokens = torch.sort(scores, dim=-1, descending=True, stable=True)
        rank = torch.arange(count, device=scores.device)
        limit = torch.where(self.top_k > 0, self.top_k, count).unsqueeze(-1)
        stays = (rank < limit) & (ordered > -math.inf)
        share = torch.where(stays, fp64.exp(ordered - ordered[..., :1]), 0.0)  # of the largest
        stays &= share >= self.min_p.unsqueeze(-1)
        units = torch.round(torch.where(stays, share, 0.0) * 2.0**_SUM_BITS).to(torch.int64)
        total = units.cumsum(-1)
        enough = self.top_p.unsqueeze(-1) * total[..., -1:].to(torch.float64)
        stays &= (total - units).to(torch.float64) < enough
        return torch.zeros_like(stays).scatter(-1, tokens, stays | (rank == 0))

    def tokens(self, logits: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
        """One token a row, INT64 `[T]`; a row with a NaN, or of nothing but -inf, gives token 0.

        Args:
            logits: FP32 `[T, V]`.
            seeds: INT64 `[T]`.
            positions: INT64 `[T]`: how many tokens the request has drawn before.
        """
        scores = logits.to(torch.float64) / self.temperature.unsqueeze(-1)
        noisy = scores + noise(seeds, positions, logits.shape[-1])
        noisy = torch.where(self.kept(scores), noisy, -math.inf)
        return heal.first_argmax(torch.where(noisy.isnan(), -math.inf, noisy), -1)


def noise(seeds: Tensor, positions: Tensor, vocabulary: int) -> Tensor:
    """Gumbel noise, FP64 `[T, V]`.

    Args:
        seeds: INT64 `[T]`.
        positions: INT64 `[T]`.
        vocabulary: V.
    """
    row = mix(folded(seeds) ^ positions).unsqueeze(-1)
    token = torch.arange(vocabulary, device=seeds.device)
    high = mix(row ^ mix(token))
    low = mix(mix(row + 1) ^ mix(token))
    bits = (high << (_NOISE_BITS - BITS)) | (low >> (2 * BITS - _NOISE_BITS))
    uniform = (2 * bits + 1).to(torch.float64) * 2.0 ** -(_NOISE_BITS + 1)
    return -fp64.log(-fp64.log(uniform))


def as_int64(seed: int) -> int:
    """A seed of any size as INT64 holds it: modulo 2^64.

    Args:
        seed: Any whole number.
    """
    return (seed + 2**63) % 2**64 - 2**63
