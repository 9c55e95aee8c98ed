"""Exact attention as a GPU runs it: zero differing bits against its reference on CPU.

Generated code in Triton's interpreter, from FP32 Q, K and V to the output: digits, both passes,
and what Inductor makes of the steps between and behind them.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from healpass.lowering.cuda import exact_attention
from healpass.lowering.cuda.tiles import AttentionTile
from healpass.ops.attention.exact import ExactAttention
from healpass.ops.attention.exact_chunks import attend_in_chunks
from healpass.ops.attention.quantize import Integers
from healpass.ops.attention.scoring import Scoring
from healpass.ops.products.numerics import Numerics
from tests.support.bits import differing
from tests.support.exact_gpu import Scored, run, source
from tests.support.fake_cuda import always

heal = torch.ops.heal


def states(
    length: int, keys: int, group: int = 1, size: int = 16, value_size: int = 16
) -> list[Tensor]:
    """Q, K and V of two batch entries and one key head; V's tokens differ by many powers of 2."""
    generator = torch.Generator().manual_seed(length + keys)
    q = torch.randn(2, group, length, size, generator=generator) * 3
    k, v = (torch.randn(2, 1, keys, n, generator=generator) for n in (size, value_size))
    tail = torch.randint(-20, 20, (2, 1, keys, 1), generator=generator)
    return [q, k, v * 2.0**tail]


def float_mask(length: int, keys: int) -> Tensor:
    """Some keys hidden, the first query's all of them."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.randn(length, keys, generator=generator)
    mask = mask.masked_fill(mask > 1, -math.inf)
    mask[0] = -math.inf
    return mask


def bits_that_differ(tensors: list[Tensor], scored: Scored, capability: int = 90) -> int:
    return differing(run(scored, tensors, capability), scored(*tensors))


@pytest.mark.parametrize(
    ("length", "keys", "group", "scored", "capability"),
    [
        (33, 33, 1, Scored(is_causal=True), 90),
        (20, 37, 3, Scored(kv="int24", scale=-0.3), 90),
        (20, 37, 1, Scored(scale=0.0), 80),
        (33, 33, 1, Scored(is_causal=True, kv="int24"), 103),
        (1, 300, 2, Scored(), 90),
        (1, 300, 1, Scored(kv="int24"), 103),
        (1, 1, 1, Scored(is_causal=True), 90),
        (37, 37, 1, Scored(is_causal=True, window=9), 90),
    ],
)
def test_attention_has_the_bits_of_its_reference(length, keys, group, scored, capability):
    assert bits_that_differ(states(length, keys, group), scored, capability) == 0


@pytest.mark.parametrize("boolean", [False, True])
def test_masks_and_what_is_not_finite(boolean):
    """Rows that see nothing are 0; rows that see a NaN or an infinity are NaN; others see none."""
    q, k, v = states(20, 37, value_size=24)
    k[0, 0, 5, 2], v[1, 0, 7, 0] = math.nan, math.inf
    q[0, 0, 3, 1] = -math.inf
    mask = float_mask(20, 37)
    mask = mask > 0 if boolean else mask
    (wanted,) = Scored()(q, k, v, mask)
    assert wanted.isnan().any()
    assert (wanted[:, :, 0] == 0).all()
    assert bits_that_differ([q, k, v, mask], Scored()) == 0


def test_chunks_tiles_and_spans_leave_bits_alone(monkeypatch):
    window = Scored(is_causal=True, window=9)  # a tile of queries begins past whole blocks of keys
    for tensors, scored, chunk, rows, keys, span in (
        (states(20, 150), Scored(is_causal=True), 64, 16, 32, 1 << 20),
        (states(20, 150), Scored(is_causal=True), 256, 32, 64, 64),
        (states(100, 100), window, 64, 16, 32, 1 << 20),
    ):
        (wanted,) = scored(*tensors)
        monkeypatch.setattr(exact_attention, "PREFILL_CHUNK", chunk)
        monkeypatch.setattr(exact_attention, "BLOCK_N", keys)
        monkeypatch.setattr(exact_attention, "terms", always(span))
        tile = AttentionTile(rows, 4, 1)
        monkeypatch.setattr(exact_attention, "exact_attention_tiles", always([tile]))
        assert differing(run(scored, tensors)[0], wanted) == 0


@pytest.mark.parametrize("kv", ["int16", "int24"])
@pytest.mark.parametrize("chunk", [3, 7, 1000])
def test_the_parts_mean_the_whole_for_any_chunk(chunk, kv):
    q, k, v = states(5, 17, 3)
    k[0, 0, 5, 2], v[1, 0, 7, 0] = math.nan, math.inf
    mask = float_mask(5, 17)
    for scoring in (
        Scoring(0.25, is_causal=True),
        Scoring(0.25, is_causal=True, window=3),
        Scoring(0.25, mask),
        Scoring(0.25, mask > 0),
    ):
        asked = attention((q, k, v), scoring, kv)
        assert differing(attend_in_chunks(asked, chunk), asked.attend()) == 0


def attention(states, scoring: Scoring, kv: str = "int16") -> ExactAttention:
    return ExactAttention(*(Integers.of(x, kv) for x in states), scoring, Numerics.parse("exact5"))


def test_what_has_no_kernel_runs_its_reference():
    """On a GPU without the instructions the compile goes on, with one call."""
    text = source(Scored(), states(5, 9), 75)
    assert "torch.ops.heal.integer_attention.default" in text


# ------------------------------------------------------------------------------ inverse tests


def test_a_chunk_with_a_maximum_of_its_own_shows(monkeypatch):
    """A running maximum, as in flash attention, would leave its trace in fixed point."""
    asked, tops = attention(states(5, 40), Scoring(0.25)), heal.exact_tops

    def first_chunk_only(*call):
        top, scales = tops(*call)
        return top[:1], scales

    monkeypatch.setattr(heal, "exact_tops", first_chunk_only)
    assert differing(attend_in_chunks(asked, 8)[0], asked.attend()[0]) > 0
