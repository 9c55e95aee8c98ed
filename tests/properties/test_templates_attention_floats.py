"""The attention kernels on states as stored, FP32 and 16 bits, keep the package's own bound."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings, target
from hypothesis import strategies as st
from torch import Tensor

from healpass.arithmetic.attention_bounds import (
    AttentionShape,
    attention_bound,
    attention_magnitudes,
)
from healpass.ops.attention.scoring import Scoring
from tests.support.attention_runs import Change, mask_of, random, run, without_products_of


@dataclass(frozen=True)
class Floats:
    """An attention over floating-point states."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    is_causal: bool

    @property
    def scale(self) -> float:
        return float(torch.tensor(self.query.shape[-1] ** -0.5))

    def attend(self, capability: int = 90, change: Change | None = None) -> Tensor:
        scoring = Scoring(self.scale, self.mask, is_causal=self.is_causal)
        call = [self.query, self.key, self.value, *scoring.arguments, "heal"]
        return run(torch.ops.heal.attention, call, capability, change)[0]

    def assert_within_bound(self, output: Tensor) -> float:
        """Against FP64 and the bound that the package prints for FP32 states."""
        groups = self.query.shape[1] // self.key.shape[1]
        key, value = (x.float().repeat_interleave(groups, 1) for x in (self.key, self.value))
        scores = self.scale * (self.query.double() @ key.double().mT)
        everything = slice(0, scores.shape[-2]), slice(0, scores.shape[-1])
        scores = Scoring(1.0, self.mask, is_causal=self.is_causal).hide(scores, *everything)
        wanted = torch.softmax(scores, -1).nan_to_num(0.0) @ value.double()
        shape = AttentionShape(key.shape[-1], key.shape[-2], rule="h100")
        sizes = attention_magnitudes(self.query, key, value, scores, self.scale)
        sizes = {name: torch.as_tensor(x).nan_to_num(0.0) for name, x in sizes.items()}
        ratio = (output.double() - wanted).abs() / attention_bound(shape).evaluate(**sizes)
        worst = ratio.nan_to_num(math.inf).max().item()
        assert worst <= 1, f"observed / bound = {worst:.3f}"
        return worst


@settings(max_examples=15)
@given(
    st.integers(0, 2**20),
    st.sampled_from([1, 5, 40]),
    # Few lengths, because each is a formula to be derived.
    st.sampled_from([1, 70, 300]),
    st.just(80),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from(["none", "bool", "float", "causal"]),
    st.sampled_from([80, 90, 100]),
)
def test_every_attention_over_floats_is_within_its_bound(
    seed, length, keys, size, dtype, kind, capability
):
    query = random((2, 4, length, size), seed)
    key, value = random((2, 2, keys, size), seed + 1), random((2, 2, keys, 24), seed + 2)
    mask = mask_of(kind, length, keys, seed)
    problem = Floats(query, key.to(dtype), value.to(dtype), mask, kind == "causal")
    worst = problem.assert_within_bound(problem.attend(capability))
    target(worst, label="observed / bound")


def floats(length: int = 40, keys: int = 70) -> Floats:
    states = [random((1, 2, rows, 32), seed) for seed, rows in enumerate((length, keys, keys))]
    return Floats(*states, None, is_causal=True)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_float_that_is_not_finite_reaches_the_rows_that_see_it_and_no_other(value):
    problem = floats()
    for name in ("key", "value"):
        states = getattr(problem, name).clone()
        states[:, :, 20] = value
        output = dataclasses.replace(problem, **{name: states}).attend()
        assert output[:, :, 20:].isnan().all()
        assert torch.equal(output[:, :, :20], problem.attend()[:, :, :20])


@pytest.mark.parametrize("piece", ["q_low", "k_low", "p_low", "v_low"])
def test_the_bound_notices_a_lost_piece_of_a_float(piece):
    problem = floats()
    problem.assert_within_bound(problem.attend())
    with pytest.raises(AssertionError, match="observed / bound"):
        problem.assert_within_bound(problem.attend(change=without_products_of(piece)))
