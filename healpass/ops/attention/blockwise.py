"""Attention by blocks of queries: what every format of Q, K and V shares. May import `scoring`.

The reference implementation, in FP32::

    score  = softcap(scale * (q . k)) + mask        -inf where causality, window or mask hide
    weight = exp(score - m) / (sum exp(score - m) + exp(sink - m))
    output = sum over keys of dropout(weight) * v

A row that sees no key gives zeros and the logsumexp -inf. Queries are taken `ROWS` at a time
against all keys that they may see, so memory grows linearly with the length. How q . k and the sum
over keys are computed is the format's: `attention.floats` has it for states as stored,
`attention.integers` for digits.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from healpass.ops.attention.scoring import Scoring
from healpass.ops.products.ieee import ieee_fp32
from healpass.ops.products.numerics import Numerics

#: Queries handled at once. Tuning: no result depends on it by more than FP32's rounding.
ROWS = 128


class Operand(Protocol):
    """Q, K or V in some format."""

    @property
    def shape(self) -> tuple[int, ...]:
        """B, H, S, E."""

    @property
    def device(self) -> torch.device:
        """Where it is."""

    def values(self) -> Tensor:
        """`[B, H, S, E]` in a floating-point format that FP32 holds."""


class Attends(Protocol):
    """What an operator makes of the arguments of one call, and asks for its results."""

    @property
    def query(self) -> Operand:
        """Q."""

    @property
    def key(self) -> Operand:
        """K."""

    @property
    def value(self) -> Operand:
        """V."""

    @property
    def scoring(self) -> Scoring:
        """All else that decides a weight."""

    def results(self) -> tuple[Tensor, Tensor]:
        """Memory for the output and the logsumexp."""

    def attend(self) -> tuple[Tensor, Tensor]:
        """Output and logsumexp."""

    def gradients(self, grad: Tensor, output: Tensor, logsumexp: Tensor) -> tuple[Tensor, ...]:
        """Those of Q, K and V, in FP32.

        Args:
            grad: FP32 `[B, H, L, Ev]`.
            output: FP32 `[B, H, L, Ev]`, of the forward pass.
            logsumexp: FP32 `[B, H, L]`, of the forward pass.
        """

    def mask_gradient(self, grad: Tensor, output: Tensor, logsumexp: Tensor) -> Tensor:
        """That of a float mask, in FP32 and in its shape.

        Args:
            grad: FP32 `[B, H, L, Ev]`.
            output: FP32 `[B, H, L, Ev]`, of the forward pass.
            logsumexp: FP32 `[B, H, L]`, of the forward pass.
        """


@dataclass(frozen=True)
class Attention(ABC):
    """One attention: operands, scoring, and whose adders add."""

    query: Operand
    key: Operand
    value: Operand
    scoring: Scoring
    how: Numerics

    @abstractmethod
    def products(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Per block of queries `scale * (q . k)` as FP32 `[B, H, rows, columns]`."""

    @abstractmethod
    def weighted_sum(self, weights: Tensor, visible: Tensor, columns: slice) -> Tensor:
        """P V for one block: FP32 `[B, H, rows, Ev]` from two `[B, H, rows, columns]`.

        Args:
            weights: FP32, after softmax and dropout.
            visible: Bool; False where a key is hidden.
            columns: The keys of the block.
        """

    @property
    def heads(self) -> int:
        """Key heads."""
        return self.key.shape[1]

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        """Blocks of queries, each with the keys that it may see."""
        length, keys = self.query.shape[2], self.key.shape[2]
        for start in range(0, length, ROWS):
            rows = slice(start, min(start + ROWS, length))
            yield rows, self.scoring.columns(rows, keys)

    def results(self) -> tuple[Tensor, Tensor]:
        """Memory for the output and the logsumexp."""
        return results(self.query, self.value)

    def attend(self) -> tuple[Tensor, Tensor]:
        """Output and the natural logarithm of each row's denominator."""
        output, logsumexp = self.results()
        scoring = self.scoring
        with ieee_fp32(output.device.type):
            for rows, columns, products in self.products():
                scores = scoring.hide(scoring.cap(products)[0], rows, columns)
                weights, logsumexp[..., rows] = scoring.softmax(scores)
                kept = scoring.survivors(output.shape, rows, columns)
                weights = weights if kept is None else weights * kept
                output[:, :, rows] = self.weighted_sum(weights, scores != -torch.inf, columns)
        return output, logsumexp


def results(query: Operand, value: Operand) -> tuple[Tensor, Tensor]:
    """Memory for the output `[B, H, L, Ev]` and the logsumexp `[B, H, L]`, in FP32."""
    *lead, _ = query.shape
    new = functools.partial(torch.empty, dtype=torch.float32, device=query.device)
    return new((*lead, value.shape[-1])), new(lead)


def fold(states: Tensor, heads: int) -> Tensor:
    """`[B, H, L, E]` to `[B * heads, (H / heads) * L, E]`: query heads that share a key head."""
    batch, all_heads, length, size = states.shape
    return states.reshape(batch * heads, all_heads // heads * length, size)
