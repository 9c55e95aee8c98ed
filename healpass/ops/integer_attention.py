"""Attention on integer digits: `heal::integer_attention`, its gradients. May import `tensorcore`.

Q, K and V come as `heal::quantize` makes them. The meaning, for `x = scale * integer`::

    score  = softcap(scale * (q . k)) + mask        -inf where causality, window or mask hide
    weight = exp(score - m) / (sum exp(score - m) + exp(sink - m))         FP32
    output = sum over keys of dropout(weight) * v                           FP32

`q . k` is a sum of products of integers. It is exact (INT24: within 2^-53 of the sum of
magnitudes), rounded to FP32 once, and a score past FP32's range saturates instead of becoming
infinite. A hidden key counts for nothing, even if its scale is NaN. A row that sees no key gives
zeros and the logsumexp -inf.

Error: `arithmetic.attention_bounds` with `kv=`. Queries are taken `ROWS` at a time against all
keys that they may see, so memory grows linearly with the length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from healpass.arithmetic.formats import FP32
from healpass.ops.ieee import ieee_fp32
from healpass.ops.numerics import Numerics
from healpass.ops.quantize import integers
from healpass.ops.scores import Scoring
from healpass.tensorcore.attention import weighted_digits
from healpass.tensorcore.matmul import Accumulation

#: Queries handled at once. Tuning: it decides no bit of a result's meaning.
ROWS = 128


@dataclass(frozen=True)
class Integers:
    """One operand: digits `[B, H, D, S, E]` and scale `[B, H, S]`."""

    digits: Tensor
    scale: Tensor

    def check(self, name: str) -> None:
        """Refuse what `heal::quantize` does not make."""
        torch._check(
            self.digits.dtype == torch.int8 and self.digits.dim() == 5,
            lambda: (
                f"heal::integer_attention needs INT8 {name} digits [B, H, D, S, E], got "
                f"{self.digits.dtype} of rank {self.digits.dim()}; heal::quantize makes them"
            ),
        )

    def values(self) -> Tensor:
        """FP32 `[B, H, S, E]`, 0 in the place of a row whose scale is NaN."""
        finite = self.scale.nan_to_num(0.0).unsqueeze(-1)
        product = integers(self.digits) * finite.to(torch.float64)
        return product.clamp(-FP32.largest, FP32.largest).to(torch.float32)


@dataclass(frozen=True)
class Problem:
    """One attention: operands, scoring, and whose adders add P V."""

    query: Integers
    key: Integers
    value: Integers
    scoring: Scoring
    how: Numerics

    @property
    def heads(self) -> int:
        """Key heads."""
        return self.key.digits.shape[1]

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        """Blocks of queries, each with the keys that it may see."""
        length, keys = self.query.digits.shape[-2], self.key.digits.shape[-2]
        for start in range(0, length, ROWS):
            rows = slice(start, min(start + ROWS, length))
            yield rows, self.scoring.columns(rows, keys)

    def products(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Per block `scale * (q . k)` as FP32 `[B, H, rows, columns]`, rounded once."""
        query, key = integers(self.query.digits), integers(self.key.digits)
        scale = self.query.scale.to(torch.float64) * self.scoring.scale
        key_scale = self.per_head(self.key.scale.to(torch.float64)).unsqueeze(-2)
        for rows, columns in self.blocks():
            block = fold(query[:, :, rows], self.heads) @ key[:, :, columns].flatten(0, 1).mT
            shape = (*scale.shape[:-1], rows.stop - rows.start, columns.stop - columns.start)
            scores = block.reshape(shape) * scale[..., rows, None] * key_scale[..., columns]
            yield rows, columns, scores.clamp(-FP32.largest, FP32.largest).to(torch.float32)

    def per_head(self, states: Tensor) -> Tensor:
        """`[B, Hkv, ...]` for every query head."""
        return states.repeat_interleave(self.query.digits.shape[1] // self.heads, 1)


def fold(states: Tensor, heads: int) -> Tensor:
    """`[B, H, L, E]` to `[B * heads, (H / heads) * L, E]`: query heads that share a key head."""
    batch, all_heads, length, size = states.shape
    return states.reshape(batch * heads, all_heads // heads * length, size)


#: The arguments that the operator shares with its gradients; `problem` explains them.
CALL = (
    "Tensor query_digits, Tensor query_scale, Tensor key_digits, Tensor key_scale, "
    "Tensor value_digits, Tensor value_scale, Tensor? attn_mask, Tensor? sinks, Tensor? seed, "
    "bool is_causal, float scale, SymInt? window, float? softcap, float dropout_p, str numerics"
)


def problem(
    query_digits: Tensor,
    query_scale: Tensor,
    key_digits: Tensor,
    key_scale: Tensor,
    value_digits: Tensor,
    value_scale: Tensor,
    attn_mask: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    is_causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
    dropout_p: float,
    numerics: str,
) -> Problem:
    """Read and check the arguments of one call.

    Args:
        query_digits: INT8 `[B, H, D, L, E]`; H is a multiple of Hkv.
        query_scale: FP32 `[B, H, L]`.
        key_digits: INT8 `[B, Hkv, D, S, E]`; D may differ from the query's.
        key_scale: FP32 `[B, Hkv, S]`.
        value_digits: INT8 `[B, Hkv, D, S, Ev]`.
        value_scale: FP32 `[B, Hkv, S]`.
        attn_mask: Bool (True is visible) or float (added), broadcastable to `[B, H, L, S]`.
        sinks: `[H]`, logits that only enlarge the denominator.
        seed: INT64, one element; needed where `dropout_p` is not 0.
        is_causal: Hide key s from query l where s > l, counted from the first of each.
        scale: Factor of the scores.
        window: Hide key s from query l where s <= l - window.
        softcap: Scores become `softcap * tanh(score / softcap)` before the mask.
        dropout_p: Probability of dropping a weight.
        numerics: As `heal::mm`; digit products are exact, so it decides about P V only.

    Raises:
        RuntimeError: Dtypes, ranks or sizes do not fit, or the seed is missing.
        ValueError: `numerics` is unknown.
    """
    states = {
        "query": Integers(query_digits, query_scale),
        "key": Integers(key_digits, key_scale),
        "value": Integers(value_digits, value_scale),
    }
    for name, operand in states.items():
        operand.check(name)
    torch._check(
        query_digits.shape[-1] == key_digits.shape[-1]
        and key_digits.shape[-2] == value_digits.shape[-2],
        lambda: "heal::integer_attention: head sizes of Q and K, or lengths of K and V, differ",
    )
    torch._check(
        dropout_p == 0.0 or seed is not None,
        lambda: "heal::integer_attention needs a seed (INT64, one element) where dropout_p > 0",
    )
    scoring = Scoring(scale, attn_mask, sinks, seed, is_causal, window, softcap, dropout_p)
    return Problem(**states, scoring=scoring, how=Numerics.parse(numerics))


@torch.library.custom_op(
    "heal::integer_attention", mutates_args=(), schema=f"({CALL}) -> (Tensor, Tensor)"
)
def integer_attention(*call: Any) -> tuple[Tensor, Tensor]:
    """Attention over integers, in FP32; arguments as in `problem`.

    Returns:
        FP32 `[B, H, L, Ev]` and the natural logarithm of each row's denominator, FP32 `[B, H, L]`.
    """
    asked = problem(*call)
    output, logsumexp = _results(asked)
    scoring = asked.scoring
    with ieee_fp32(output.device.type):
        for rows, columns, products in asked.products():
            scores = scoring.hide(scoring.cap(products)[0], rows, columns)
            weights, logsumexp[..., rows] = scoring.softmax(scores)
            kept = scoring.survivors(output.shape, rows, columns)
            weights = weights if kept is None else weights * kept
            output[:, :, rows] = _weighted_sum(asked, weights, scores != -torch.inf, columns)
    return output, logsumexp


@integer_attention.register_fake
def _(*call: Any) -> tuple[Tensor, Tensor]:
    return _results(problem(*call))


def _results(asked: Problem) -> tuple[Tensor, Tensor]:
    """Memory for the output and the logsumexp."""
    scale = asked.query.scale
    shape = (*scale.shape, asked.value.digits.shape[-1])
    return scale.new_empty(shape), scale.new_empty(scale.shape)


def _weighted_sum(asked: Problem, weights: Tensor, visible: Tensor, columns: slice) -> Tensor:
    """P V for one block; a row is NaN where it sees a key whose scale is NaN."""
    how, value = asked.how, asked.value
    digits, scale = value.digits[..., columns, :], value.scale[..., columns]
    rows = fold(weights, asked.heads)
    if how.simulate is not None and how.precision == "heal":
        adders = Accumulation(how.simulate, order=how.order)
        folded = scale.nan_to_num(0.0).flatten(0, 1)
        result = weighted_digits(rows, digits.flatten(0, 1), folded, adders)
    else:
        result = how.multiply(rows, Integers(digits, scale).values().flatten(0, 1))
    result = result.reshape(*weights.shape[:-1], digits.shape[-1])
    lost = asked.per_head(scale.isnan()).unsqueeze(-2) & visible
    return result.masked_fill(lost.any(-1, keepdim=True), torch.nan)
