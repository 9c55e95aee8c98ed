"""Draws as a pure function of logits, seed, position and token."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from healpass.errors import OperandError
from healpass.ops.reproducible.sampling import Draw, as_int64, noise
from tests.support.profiles import examples

FP64 = torch.float64


def draw(rows: int, temperature=1.0, top_k=0, min_p=0.0, top_p=1.0) -> Draw:
    """The same settings in every row."""
    numbers = {"temperature": temperature, "min_p": min_p, "top_p": top_p}
    made = {name: torch.full((rows,), value, dtype=FP64) for name, value in numbers.items()}
    return Draw(top_k=torch.full((rows,), top_k), **made)


def kept_one_by_one(scores: list[float], top_k: int, min_p: float, top_p: float) -> set[int]:
    """What stays, from the definition."""
    order = sorted(range(len(scores)), key=lambda token: (-scores[token], token))
    if top_k > 0:
        order = order[:top_k]
    share = {token: math.exp(scores[token] - scores[order[0]]) for token in order}
    order = [token for token in order if share[token] >= min_p and scores[token] > -math.inf]
    total, before, stays = sum(share[token] for token in order), 0.0, set()
    for token in order:
        if before < top_p * total:
            stays.add(token)
        before += share[token]
    return stays


@examples(100)
@given(
    scores=st.lists(st.integers(-6, 6), min_size=1, max_size=12),
    hidden=st.sets(st.integers(0, 11), max_size=8),
    top_k=st.integers(0, 14),
    min_p=st.sampled_from([0.0, 0.013, 0.2, 0.7, 1.0]),
    top_p=st.sampled_from([1e-9, 0.31, 0.77, 0.9999, 1.0]),
)
def test_what_stays_is_what_the_definition_says(scores, hidden, top_k, min_p, top_p):
    """Ties included; no sum of these comes within 2^-38 of a border, where roundings decide."""
    row = [-math.inf if i in hidden and i else float(x) for i, x in enumerate(scores)]
    kept = draw(1, top_k=top_k, min_p=min_p, top_p=top_p).kept(torch.tensor([row], dtype=FP64))
    assert set(kept[0].nonzero()[:, 0].tolist()) == kept_one_by_one(row, top_k, min_p, top_p)


def test_frequencies_are_the_probabilities():
    """Pearson's chi^2 of 60,000 draws, of what `top_k`, `min_p` and `top_p` leave: below the
    value that one of 10^6 right samplers passes."""
    logits, rows = torch.randn(40, generator=torch.Generator().manual_seed(0)), 60_000
    how = draw(rows, temperature=0.8, top_k=30, min_p=0.02, top_p=0.95)
    found = how.tokens(logits.expand(rows, -1), torch.full((rows,), 11), torch.arange(rows))
    scores = logits.to(FP64) / 0.8
    stays = how.kept(scores.expand(rows, -1))[0]
    weights = torch.softmax(scores, -1) * stays
    expected = rows * weights / weights.sum()
    counts = torch.bincount(found, minlength=40)
    assert not counts[~stays].any()
    chi = float(((counts - expected) ** 2 / expected)[stays].sum())
    freedom = int(stays.sum()) - 1
    # Wilson and Hilferty: chi^2 is near f (1 - 2 / 9f + z sqrt(2 / 9f))^3, here z = 4.75.
    limit = freedom * (1 - 2 / (9 * freedom) + 4.75 * math.sqrt(2 / (9 * freedom))) ** 3
    print(f"chi^2 {chi:.1f} of {freedom} degrees, observed/bound {chi / limit:.2f}")
    assert chi < limit


def test_noise_is_gumbels():
    """Mean, variance: Euler's constant and pi^2 / 6, within five standard errors; the range."""
    values = noise(torch.arange(500) * 12_345, torch.arange(500), 400)
    count = values.numel()
    error = abs(float(values.mean()) - 0.5772156649)
    assert error < 5 * math.pi / math.sqrt(6 * count)
    # The fourth central moment is 27/5 of the variance squared, so 4.4 is its variance's share.
    assert abs(float(values.var()) / (math.pi**2 / 6) - 1) < 5 * math.sqrt(4.4 / count)
    assert -3.61 < float(values.min()) < float(values.max()) < 36.75
    assert len(values.unique()) == count


def tokens(logits: Tensor, seeds: Tensor, positions: Tensor) -> list[int]:
    return draw(len(logits), 0.7, 20, 0.01, 0.9).tokens(logits, seeds, positions).tolist()


def test_a_row_is_drawn_alike_in_any_batch():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 300, generator=generator)
    seeds, positions = (torch.randint(0, 2**62, (64,), generator=generator) for _ in range(2))
    positions %= 5000
    together = tokens(logits, seeds, positions)
    alone = [tokens(*(x[i : i + 1] for x in (logits, seeds, positions)))[0] for i in range(64)]
    assert together == alone
    order = torch.randperm(64, generator=generator)
    assert tokens(logits[order], seeds[order], positions[order]) == [together[i] for i in order]


def test_seeds_and_positions_matter():
    """The inverse: another seed, in either half of its bits, and another position draw others."""
    logits = torch.zeros(1, 1000).expand(64, -1)
    seeds, positions = torch.arange(64), torch.full((64,), 3)
    first = tokens(logits, seeds, positions)
    for other in (tokens(logits, seeds + 2**40, positions), tokens(logits, seeds, positions + 1)):
        assert sum(a == b for a, b in zip(first, other, strict=True)) < 16


def test_seeds_of_any_size():
    assert [as_int64(seed) for seed in (7, -1, 2**63, 2**64 - 1, 2**64 + 7)] == [
        *(7, -1, -(2**63), -1, 7)
    ]


@pytest.mark.parametrize(("row", "expected"), [
    ([-math.inf, 0.0, -math.inf], 1),
    ([-math.inf] * 3, 0),
    ([math.nan, 1.0, 2.0], 0),
    ([1e38, -1e38, 0.0], 0),
])  # fmt: skip
def test_rows_that_leave_one_choice_or_none(row, expected):
    seeds = torch.arange(9)
    found = draw(9).tokens(torch.tensor([row]).expand(9, -1), seeds, seeds)
    assert found.tolist() == [expected] * 9


@pytest.mark.parametrize("wrong", [
    {"temperature": 0.0}, {"temperature": math.nan}, {"top_p": 0.0}, {"top_p": 1.5},
    {"min_p": -0.1}, {"min_p": 2.0},
])  # fmt: skip
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(OperandError, match=next(iter(wrong))):
        draw(2, **wrong)
