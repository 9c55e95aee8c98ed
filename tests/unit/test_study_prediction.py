"""The predicted flip rate: by hand, against known truth, and where its assumptions are broken."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from healpass.errors import StudyError
from healpass.study.judge.flip_rate import (
    MarginDistribution,
    Margins,
    compare_logits,
    measured_flip_rate,
    predict_flip_rate,
    student_quantile,
)
from tests.support.margins import known_rate, margins

# ---- margins of logits ----


def test_margins_by_hand():
    reference = torch.tensor([[1.0, 3.0, 2.5], [4.0, 0.0, 4.0], [0.0, 2.0, 1.0]])
    other = torch.tensor([[1.0, 2.5, 2.75], [4.0, 0.0, 4.0], [9.0, 2.5, 1.0]])
    found = compare_logits(reference, other)
    assert found.gap.tolist() == [0.5, 0.0, 1.0]
    assert found.shift.tolist() == [-0.75, 0.0, 0.5]
    assert found.flipped.tolist() == [True, False, True], "the last by a third token"
    assert found.gap.dtype == found.shift.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_equal_logits_shift_by_exactly_zero(dtype):
    logits = torch.randn(50, 97, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = compare_logits(logits, logits.clone())
    assert not found.shift.any()
    assert not found.flipped.any()
    assert bool((found.gap >= 0).all())


def test_an_offset_of_all_logits_is_no_shift():
    logits = torch.randn(9, 5, generator=torch.Generator().manual_seed(0)).bfloat16().double()
    assert not compare_logits(logits, logits + 8).shift.any()


def test_no_token_gives_no_margin():
    assert compare_logits(torch.empty(0, 7), torch.empty(0, 7)).gap.shape == (0,)


@pytest.mark.parametrize(
    ("reference", "other"),
    [((3, 5), (4, 5)), ((3, 5), (3, 6)), ((5,), (5,)), ((3, 1), (3, 1))],
)
def test_logits_of_other_shapes_are_refused(reference, other):
    with pytest.raises(StudyError, match="two \\[T, V\\] tensors"):
        compare_logits(torch.zeros(reference), torch.zeros(other))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_without_a_finite_lead_are_refused(value):
    bad = torch.zeros(2, 3)
    bad[1, 2] = value
    with pytest.raises(StudyError, match="not finite"):
        compare_logits(bad, torch.zeros(2, 3))


def test_a_lead_over_nothing_is_refused():
    """With every other token masked there is no runner-up; a gap of 0 would be a false tie."""
    alone = torch.tensor([[5.0, -math.inf, -math.inf]])
    with pytest.raises(StudyError, match="not finite"):
        compare_logits(alone, alone)


def test_impossible_tokens_are_masked_by_minus_infinity():
    masked = torch.tensor([[-math.inf, 2.0, 1.0]])
    assert compare_logits(masked, masked).gap.tolist() == [1.0]


def test_margins_that_do_not_fit_are_refused():
    with pytest.raises(StudyError, match="one gap, shift and flip per token"):
        Margins(torch.zeros(2), torch.zeros(3), torch.zeros(2, dtype=torch.bool))
    with pytest.raises(StudyError, match="negative"):
        margins([-1.0], [0.0])


# ---- the distribution of gaps ----


def test_distribution_by_hand_with_ties():
    """Four gaps: k = ceil(4^(2/3) / 2) = 2, so h = 1. At h lies (1 + 1/2) / 4, at 0 1/4."""
    law = MarginDistribution.of(torch.tensor([3.0, 0.0, 2.0, 1.0]))
    assert law.window == 1
    assert law.density == 0.375
    at = torch.tensor([0.0, 0.5, 1.0, 2.0, 2.5, 9.0])
    assert law.share_below(at).tolist() == [0, 0.3125, 0.375, 0.625, 0.75, 1]


def test_a_shift_below_every_gap_follows_the_key_law():
    """The sample alone would say 0. 1000 gaps evenly in (0, 2): rho = 1/2 per nat."""
    law = MarginDistribution.of((torch.arange(1000).double() + 0.5) / 500)
    assert law.window == 49.5 / 500, "the 50th smallest"
    assert law.density == pytest.approx(0.5)
    small = law.share_below(torch.tensor([1e-5, 1e-4], dtype=torch.float64))
    assert small.tolist() == pytest.approx([0.5e-5, 0.5e-4])
    assert law.gaps[0] > 1e-4


def test_only_ties():
    law = MarginDistribution.of(torch.zeros(5))
    assert (law.window, law.density) == (0, 0)
    assert law.share_below(torch.tensor([0.0, 1e-9, 1.0])).tolist() == [0, 1, 1]


def test_more_ties_than_the_window_holds():
    law = MarginDistribution.of(torch.tensor([0.0] * 6 + [0.5, 1.0]))
    assert law.window == 0.5
    assert law.share_below(torch.tensor([0.25, 0.5])).tolist() == [0.78125, 0.8125]


def test_a_window_of_the_least_normal_number():
    law = MarginDistribution.of(torch.tensor([2.0**-1022, 1.0], dtype=torch.float64))
    assert law.window == 2.0**-1022
    at = torch.tensor([0.0, 2.0**-1022, 2.0], dtype=torch.float64)
    assert law.share_below(at).tolist() == [0, 0.25, 1]
    assert predict_flip_rate([margins([2.0**-1022, 1.0], [0.5, 0.0])] * 2).relative_error >= 0


STEPS = st.lists(st.tuples(st.integers(0, 6), st.integers(-6, 6)), min_size=1, max_size=40)


@given(STEPS, st.sampled_from([0.125, 1e-6]))
def test_both_projections_have_the_same_mean(steps, step):
    """Of phi over all pairs, whichever is averaged first; ties everywhere."""
    gap, shift = (torch.tensor(x, dtype=torch.float64) for x in zip(*steps, strict=True))
    law, sizes = MarginDistribution.of(gap), (shift * step).abs()
    a = law.expected_below(sizes.sort().values)
    b = law.share_below(sizes)
    u = 2.0**-53
    # Shares are sums of n terms in [0, 1], each rounded a few times, then averaged over n.
    assert abs(a.mean() - b.mean()) <= 4 * len(steps) * u * max(a.mean(), b.mean())
    assert bool(((a >= 0) & (a <= 1 + 4 * u) & (b >= 0) & (b <= 1 + 4 * u)).all())


@given(STEPS)
def test_the_share_below_grows_with_the_shift(steps):
    law = MarginDistribution.of(torch.tensor([g for g, _ in steps], dtype=torch.float64))
    share = law.share_below(torch.linspace(0, 7, 57))
    assert share[0] == 0
    assert share[-1] == 1
    assert bool((share.diff() >= -(2.0**-50)).all())


# ---- the rate ----


def test_rate_by_hand():
    """|shift| 0, 0, 1, 2 on the gaps above: (0 + 0 + 0.375 + 0.625) / 4 / 2."""
    rate = predict_flip_rate([margins([3, 0], [0, 0]), margins([2, 1], [1, -2])])
    assert rate.rate == 0.125
    assert (rate.prompts, rate.tokens, rate.density) == (2, 4, 0.375)
    assert rate.median_shift == 0


def test_relative_error_by_hand():
    """Projections of the same data, in the order 3, 0 | 2, 1.

    b = 0, 0 | 0.375, 0.625. a: gap 3 is above every shift, 0; gap 0 lies below two of four, 0.5;
    gap 2 lies level with one, 1/8; gap 1 (= h) below one and level with one, 3/8. 2f = 0.25.
    Sums of a + b - 4f: prompt 0: 0.5 - 1 = -0.5; prompt 1: 1.5 - 1 = 0.5. psi = -+0.5 / 8,
    over 1 - 1/2: -+1/8. se = sqrt(2) / 8, over f = 1/8.
    """
    rate = predict_flip_rate([margins([3, 0], [0, 0]), margins([2, 1], [1, -2])])
    assert rate.relative_error == math.sqrt(2)


def test_no_shift_gives_exactly_no_flips():
    prompts = [margins([0.0, 0.0, 0.5], [0, 0, 0]), margins([0.0, 1.0], [0, 0])]
    rate = predict_flip_rate(prompts)
    assert (rate.rate, rate.interval, rate.measured_interval(1000)) == (0, (0, 0), (0, 0))
    same = rate.agreement(16_000)
    assert (same.chance, same.low, same.high) == (1, 1, 1)
    assert measured_flip_rate(prompts) == 0


def test_the_least_shift_of_one_token_is_not_nothing():
    least = predict_flip_rate([margins([0.5, 1.0], [0, 0]), margins([0.5, 1.0], [1e-12, 0])])
    assert 0 < least.rate < 1e-12
    assert least.agreement(16_000).low < 1


def test_one_prompt_leaves_the_models_whole_range():
    rate = predict_flip_rate([margins([1.0, 2.0], [1.5, -0.1])])
    assert rate.rate > 0
    assert math.isinf(rate.relative_error)
    assert rate.interval == (0, 0.5)
    assert rate.measured_interval(1000)[0] == 0
    assert rate.measured_interval(1000)[1] > 0.5
    assert rate.agreement(1000).low < rate.agreement(1000).chance <= rate.agreement(1000).high == 1


def test_prompts_without_tokens_change_nothing():
    full = [margins([0.1, 2.0], [0.2, 0.0]), margins([0.3], [0.4])]
    assert predict_flip_rate([*full, margins([], [])]) == predict_flip_rate(full)


def test_no_token_at_all_is_refused():
    for prompts in ([], [margins([], [])]):
        with pytest.raises(StudyError, match="at least one prompt with a token"):
            predict_flip_rate(prompts)
        with pytest.raises(StudyError, match="at least one prompt with a token"):
            measured_flip_rate(prompts)
    with pytest.raises(StudyError, match="at least one token"):
        MarginDistribution.of(torch.empty(0))
    with pytest.raises(StudyError, match="not on 0"):
        predict_flip_rate([margins([1], [1])]).measured_interval(0)


# ---- intervals and agreement ----


def test_students_quantiles():
    """One and two degrees have closed forms; the others are from Abramowitz and Stegun's 26.10."""
    for p in (0.6, 0.9, 0.975):
        assert student_quantile(p, 1) == pytest.approx(math.tan(math.pi * (p - 0.5)))
        assert student_quantile(p, 2) == pytest.approx((2 * p - 1) / math.sqrt(2 * p * (1 - p)))
        assert student_quantile(1 - p, 7) == pytest.approx(-student_quantile(p, 7))
    table = {3: 3.182, 4: 2.776, 10: 2.228, 19: 2.093, 30: 2.042, 120: 1.980}
    assert {n: round(student_quantile(0.975, n), 3) for n in table} == table
    assert student_quantile(0.5, 5) == 0
    assert student_quantile(0.975, 10**6) == student_quantile(0.975, 300) > 1.96


def test_interval_by_hand():
    """20 prompts: t of 19 degrees is 2.093, so f exp(-+0.2093) at a relative error of 0.1."""
    low, high = known_rate(0.01, 0.1).interval
    assert round(math.log(high / 0.01) / 0.1, 3) == 2.093
    assert round(math.log(low / 0.01) / 0.1, 3) == -2.093
    assert known_rate(0.4, 1.0).interval[1] == 0.5


def test_measured_interval_of_a_known_rate_is_poissons():
    """Mean 3: P(N <= 0) = 0.050, so 0 is inside; P(N <= 6) = 0.966, P(N <= 7) = 0.988."""
    assert known_rate(0.001).measured_interval(3000) == (0, 7 / 3000)


def test_measured_interval_is_wider_where_the_rate_is_uncertain():
    sharp, blunt = (known_rate(0.01, e).measured_interval(5000) for e in (0.0, 0.2))
    assert blunt[0] < sharp[0] < 0.01 < sharp[1] < blunt[1]


def test_plain_values_for_json():
    one = predict_flip_rate([margins([1.0, 2.0], [1.5, -0.1])]).to_dict()
    assert json.loads(json.dumps(one, allow_nan=False)) == one
    assert one["relative_error"] is None
    assert [a["tokens"] for a in one["agreement"]] == [1_000, 16_000]
    assert known_rate(0.0).to_dict()["agreement"][1]["chance"] == 1


def test_agreement_by_hand():
    assert known_rate(0.5).agreement(2).chance == 0.25
    for tokens in (1_000, 16_000):
        same = known_rate(1e-4, 0.1).agreement(tokens)
        assert same.tokens == tokens
        assert same.chance == pytest.approx((1 - 1e-4) ** tokens)
        low, high = known_rate(1e-4, 0.1).interval
        assert same.low == pytest.approx((1 - high) ** tokens)
        assert same.high == pytest.approx((1 - low) ** tokens)
    assert known_rate(0.3).agreement(0).chance == 1
