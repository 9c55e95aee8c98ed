"""From products of queries and keys to weights: caps, masks, windows, sinks, dropout.

Imports `reproducible.words`. Everything works on one block of queries against the keys it can
see, so that no score matrix of a whole sequence exists.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from healpass.ops.reproducible.words import COUNT, folded, mix

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
        offset: Keys before the first query's own; causality and the window count from there.
    """

    scale: float
    attn_mask: Tensor | None = None
    sinks: Tensor | None = None
    seed: Tensor | None = None
    is_causal: bool = False
    window: int | None = None
    softcap: float | None = None
    dropout_p: float = 0.0
    offset: int = 0

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
        assert self.offset == 0, "operators count from the first query and the first key"
        return (
            self.attn_mask, self.sinks, self.seed, self.is_causal, self.scale, self.window,
            self.softcap, self.dropout_p,
        )  # fmt: skip

    def at(self, offset: int) -> Scoring:
        """The same for queries that begin at another key."""
        return replace(self, offset=offset)

    def check_mask(self, query: Sequence[int], key: Sequence[int]) -> None:
        """Refuse a mask that does not broadcast to `[B, H, L, S]`; sizes that vary pass.

        Args:
            query: B, H, L, E.
            key: B, Hkv, S, E.

        Raises:
            RuntimeError: It does not.
        """
        if self.attn_mask is None:
            return
        given, sizes = self.attn_mask.shape, (*query[:3], key[2])
        pairs = list(zip(reversed(given), reversed(sizes), strict=False))
        fixed = [pair for pair in pairs if all(isinstance(size, int) for size in pair)]
        torch._check(
            len(given) <= len(sizes) and all(have in (1, wanted) for have, wanted in fixed),
            lambda: (
                f"attn_mask {list(given)} does not broadcast to [B, H, L, S] = {list(sizes)}: "
                "each size must be 1 or that one"
            ),
        )

    def columns(self, rows: slice, keys: int) -> slice:
        """The keys that some query of `rows` may see, causality and window considered."""
        start, stop = rows.start + self.offset, rows.stop + self.offset
        first = 0 if self.window is None else max(0, start - self.window + 1)
        last = min(keys, stop) if self.is_causal else keys
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
        scores, visible = self.masked(scores, rows, columns)
        return scores if visible is None else scores.masked_fill(~visible, -math.inf)

    def masked(self, scores: Tensor, rows: slice, columns: slice) -> tuple[Tensor, Tensor | None]:
        """The scores with a float mask added, and which keys are visible.

        Args:
            scores: `[B, H, rows, columns]`, capped.
            rows: The queries of the block.
            columns: The keys of the block.

        Returns:
            The scores, and a bool tensor that broadcasts to them; None where every key is visible.
        """
        mask, near = self.mask_block(rows, columns), self.near(rows, columns, scores.device)
        if mask is not None and mask.dtype != torch.bool:
            scores, mask = scores + mask, mask != -math.inf
        if mask is None or near is None:
            return scores, near if mask is None else mask
        return scores, mask & near

    def near(self, rows: slice, columns: slice, device: torch.device) -> Tensor | None:
        """What causality and the window let a query see, bool `[rows, columns]`; None is all.

        Args:
            rows: The queries of the block.
            columns: The keys of the block.
            device: Of the result.
        """
        if not self.is_causal and self.window is None:
            return None
        query = torch.arange(rows.start, rows.stop, device=device).unsqueeze(1) + self.offset
        key = torch.arange(columns.start, columns.stop, device=device)
        visible = key <= query if self.is_causal else (key >= 0).expand(query.shape[0], -1)
        return visible if self.window is None else visible & (key > query - self.window)

    def mask_block(self, rows: slice, columns: slice) -> Tensor | None:
        """The part of the mask for a block; a dimension of size 1 stays, it broadcasts.

        Args:
            rows: The queries of the block.
            columns: The keys of the block.
        """
        mask = self.attn_mask
        if mask is None:
            return None
        for dim, span in ((-2, rows), (-1, columns)):
            if mask.dim() >= -dim and mask.shape[dim] != 1:
                mask = part(mask, dim, span)
        return mask

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
        kept = words >= math.floor(self.dropout_p * COUNT)
        return kept.to(torch.float32) * (1 / (1 - self.dropout_p) if self.dropout_p < 1 else 0.0)


def part(x: Tensor, dim: int, span: slice) -> Tensor:
    """`x` narrowed along one dimension; itself where the span is all of it.

    Args:
        x: Any tensor.
        dim: Of `x`.
        span: Where it begins and ends.
    """
    count = span.stop - span.start
    whole = isinstance(span.start, int) and span.start == 0 and x.shape[dim] == count
    return x if whole else x.narrow(dim, span.start, count)


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
    row = folded(seed.reshape(()))
    for index in indices:
        row = mix(row ^ index)
    key = torch.arange(columns.start, columns.stop, device=seed.device)
    return mix(row.unsqueeze(-1) ^ mix(key))
