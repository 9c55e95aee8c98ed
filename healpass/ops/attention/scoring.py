"""From products of queries and keys to weights: caps, masks, windows, sinks, dropout.

May import `arithmetic`. Everything works on one block of queries against the keys it can see, so
that no score matrix of a whole sequence exists.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: Numbers that a 32-bit hash word can be.
_WORD = 1 << 32
#: What attention operators take besides their operands and `numerics`; `Scoring.read` reads it.
SCORING = (
    "Tensor? attn_mask, Tensor? sinks, Tensor? seed, bool is_causal, float scale, SymInt? window, "
    "float? softcap, float dropout_p"
)


@dataclass(frozen=True)
class Scoring:
    """All that decides a weight besides the product of query and key.

    Attributes:
        scale: Factor of the products.
        attn_mask: Bool (True is visible) or float (added), broadcastable to `[B, H, L, S]`.
        sinks: `[H]`: one more logit per head, in the denominator only.
        seed: INT64 with one element: the dropout's.
        is_causal: Hide key s from query l where s > l, counted from the first of each.
        window: Hide key s from query l where s <= l - window.
        softcap: Scores become `softcap * tanh(score / softcap)` before they are masked.
        dropout_p: Probability of dropping a weight.
    """

    scale: float
    attn_mask: Tensor | None = None
    sinks: Tensor | None = None
    seed: Tensor | None = None
    is_causal: bool = False
    window: int | None = None
    softcap: float | None = None
    dropout_p: float = 0.0

    @classmethod
    def read(
        cls,
        attn_mask: Tensor | None,
        sinks: Tensor | None,
        seed: Tensor | None,
        is_causal: bool,
        scale: float,
        window: int | None,
        softcap: float | None,
        dropout_p: float,
    ) -> Scoring:
        """Read the arguments `SCORING` of an operator.

        Args:
            attn_mask: Bool (True is visible) or float (added), broadcastable to `[B, H, L, S]`.
            sinks: `[H]`, or None.
            seed: INT64 with one element; None without dropout.
            is_causal: Hide key s from query l where s > l.
            scale: Factor of the products.
            window: In keys, or None.
            softcap: Largest magnitude of a score, or None.
            dropout_p: Probability of dropping a weight.

        Raises:
            RuntimeError: The dropout's seed is missing.
        """
        torch._check(
            dropout_p == 0.0 or seed is not None,
            lambda: "attention needs a seed (INT64, one element) where dropout_p > 0",
        )
        return cls(scale, attn_mask, sinks, seed, is_causal, window, softcap, dropout_p)

    @property
    def is_plain(self) -> bool:
        """Whether scale, mask and causality are all there is."""
        extras = (self.window, self.softcap, self.sinks)
        return self.dropout_p == 0.0 and all(extra is None for extra in extras)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The arguments `SCORING` of an operator."""
        return (
            self.attn_mask, self.sinks, self.seed, self.is_causal, self.scale, self.window,
            self.softcap, self.dropout_p,
        )  # fmt: skip

    def columns(self, rows: slice, keys: int) -> slice:
        """The keys that some query of `rows` may see, causality and window considered."""
        first = 0 if self.window is None else max(0, rows.start - self.window + 1)
        last = min(keys, rows.stop) if self.is_causal else keys
        return slice(min(first, last), last)

    def cap(self, scores: Tensor) -> tuple[Tensor, Tensor | None]:
        """Capped scores and the cap's slope; the slope is None where there is no cap."""
        if self.softcap is None:
            return scores, None
        bent = torch.tanh(scores / self.softcap)
        return self.softcap * bent, 1 - bent * bent

    def hide(self, scores: Tensor, rows: slice, columns: slice) -> Tensor:
        """Add a float mask, and put -inf where a key is hidden, whatever its score is.

        Args:
            scores: FP32 `[B, H, rows, columns]`, capped.
            rows: The queries of the block.
            columns: The keys of the block.
        """
        mask = self.mask_block(rows, columns)
        if mask is not None and mask.dtype != torch.bool:
            scores, mask = scores + mask, mask != -math.inf
        for visible in (mask, self._visible(rows, columns, scores.device)):
            if visible is not None:
                scores = scores.masked_fill(~visible, -math.inf)
        return scores

    def _visible(self, rows: slice, columns: slice, device: torch.device) -> Tensor | None:
        if not self.is_causal and self.window is None:
            return None
        query = torch.arange(rows.start, rows.stop, device=device)[:, None]
        key = torch.arange(columns.start, columns.stop, device=device)
        visible = torch.ones(query.shape[0], key.shape[0], dtype=torch.bool, device=device)
        if self.is_causal:
            visible &= key <= query
        if self.window is not None:
            visible &= key > query - self.window
        return visible

    def mask_block(self, rows: slice, columns: slice) -> Tensor | None:
        """The part of the mask for a block; a dimension of size 1 stays, it broadcasts."""
        if self.attn_mask is None:
            return None
        mask = self.attn_mask
        if mask.dim() > 1 and mask.shape[-2] > 1:
            mask = mask[..., rows, :]
        return mask[..., columns] if mask.shape[-1] > 1 else mask

    def softmax(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and the logarithm of their denominator.

        Args:
            scores: `[B, H, L, S]` in FP32, -inf where hidden.

        Returns:
            Weights as `scores`, zeros in a row that sees nothing, and `[B, H, L]`, -inf there.
        """
        logits = scores
        if self.sinks is not None:
            column = self.sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
            logits = torch.cat([scores, column], -1)
        empty = (logits == -math.inf).all(-1, keepdim=True)
        weights = torch.softmax(logits.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)
        return weights[..., : scores.shape[-1]], torch.logsumexp(logits, -1)

    def survivors(self, shape: torch.Size, rows: slice, columns: slice) -> Tensor | None:
        """The factor that dropout gives each weight of `[B, H, rows, columns]`; None without.

        Args:
            shape: Of the whole output; B and H are read.
            rows: The queries of the block.
            columns: The keys of the block.
        """
        if self.dropout_p == 0.0:
            return None
        assert self.seed is not None, "the operator checks that dropout has a seed"
        words = dropout_words(self.seed, shape, rows, columns)
        kept = words >= math.floor(self.dropout_p * _WORD)
        return kept.to(torch.float32) * (1 / (1 - self.dropout_p) if self.dropout_p < 1 else 0.0)


def dropout_words(seed: Tensor, shape: torch.Size, rows: slice, columns: slice) -> Tensor:
    """One 32-bit word per weight, a function of (seed, b, h, query, key) alone.

    `word = mix(row ^ mix(key))`, where `row` mixes the seed's low and high half, b, h and the
    query's index one after the other: `row = mix(row ^ index)`, starting at 0. Any tile of any
    device replays it. Dropped is a word below `floor(dropout_p * 2^32)`.

    Args:
        seed: INT64 with one element.
        shape: Begins with B and H.
        rows: The queries of the block, counted in the whole.
        columns: The keys of the block, counted in the whole.

    Returns:
        INT64 `[B, H, rows, columns]` with values in [0, 2^32).
    """
    batch, heads = shape[:2]
    indices = (
        torch.arange(batch, device=seed.device)[:, None, None],
        torch.arange(heads, device=seed.device)[:, None],
        torch.arange(rows.start, rows.stop, device=seed.device),
    )
    low, high = seed.reshape(()) & (_WORD - 1), (seed.reshape(()) >> 32) & (_WORD - 1)
    row = _mix(_mix(low) ^ high)
    for index in indices:
        row = _mix(row ^ index)
    key = torch.arange(columns.start, columns.stop, device=seed.device)
    return _mix(row.unsqueeze(-1) ^ _mix(key))


def _mix(word: Tensor) -> Tensor:
    """A bijection of 32-bit words in INT64, 0 not fixed: an offset, then lowbias32.

    The multipliers are the best known of their kind (C. Wellons, hash-prospector: bias 0.17).
    Products wrap modulo 2^64, which leaves their low 32 bits right.
    """
    word = (word + 0x9E3779B9) & (_WORD - 1)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        word = ((word ^ (word >> shift)) * factor) & (_WORD - 1)
    return word ^ (word >> 16)
