"""The predicted flip rate on made-up studies: intervals hold the truth as often as they say."""

import math

import pytest
import torch

from healpass.study.judge.flip_rate import (
    MarginDistribution,
    compare_logits,
    measured_flip_rate,
    predict_flip_rate,
)
from tests.support.margins import known_rate, margins

REPETITIONS = 200


def exponential(shape, generator):
    return -torch.log1p(-torch.rand(shape, generator=generator, dtype=torch.float64))


def study(generator, noise, spread, prompts=20, tokens=64):
    """Gaps and sizes of shifts are exponential; a prompt's means are 1 or `spread` times that."""

    def scale():
        coin = torch.randint(0, 2, (prompts, 1), generator=generator)
        return torch.where(coin == 1, spread, 1.0).double()

    gap = exponential((prompts, tokens), generator) * scale()
    sign = torch.randint(0, 2, gap.shape, generator=generator) * 2 - 1
    shift = exponential(gap.shape, generator) * scale() * noise * sign
    return [margins(g, s) for g, s in zip(gap, shift, strict=True)]


def truth(noise, spread):
    """P(gap < |shift|) is s / (s + g) for exponentials of means g and s; half of its mean."""
    cases = [noise * s / (noise * s + g) for s in (1, spread) for g in (1, spread)]
    return sum(cases) / len(cases) / 2


def repeated(noise, spread):
    generator = torch.Generator().manual_seed(7)
    return [study(generator, noise, spread) for _ in range(REPETITIONS)]


def holds(rate, true):
    low, high = rate.interval
    return low <= true <= high


def holds_the_count(rate, prompts):
    low, high = rate.measured_interval(rate.tokens)
    return low <= measured_flip_rate(prompts) <= high


#: The number of hits of a 95% interval is binomial; three standard deviations below its mean.
FEWEST = REPETITIONS * 0.95 - 3 * math.sqrt(REPETITIONS * 0.95 * 0.05)


@pytest.mark.parametrize("noise", [0.08, 1e-5])
@pytest.mark.parametrize("spread", [1.0, 3.0])
def test_the_interval_holds_the_truth_as_often_as_it_says(noise, spread):
    predictions = [(predict_flip_rate(prompts), prompts) for prompts in repeated(noise, spread)]
    rates = sum(holds(rate, truth(noise, spread)) for rate, _ in predictions)
    counts = sum(holds_the_count(rate, prompts) for rate, prompts in predictions)
    print(f"noise {noise}, spread {spread}: rate {rates}, count {counts} of {REPETITIONS}")
    assert rates >= FEWEST
    assert counts >= FEWEST


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_count_on_rounded_noisy_logits_is_predicted(dtype):
    """From logits on: best tokens chosen by the noise itself, third tokens, ties of the format."""
    generator = torch.Generator().manual_seed(5)
    prompts = []
    for _ in range(20):
        logits = 4 * torch.randn(128, 200, generator=generator)
        noise = 0.05 * torch.randn(2, *logits.shape, generator=generator)
        prompts.append(compare_logits(*(logits + noise).to(dtype)))
    rate, measured = predict_flip_rate(prompts), measured_flip_rate(prompts)
    low, high = rate.measured_interval(rate.tokens)
    print(
        f"{dtype}: predicted {rate.rate:.4f}, measured {measured:.4f} in {low:.4f} ... {high:.4f}"
    )
    assert low <= measured <= high


def test_taking_tokens_for_independent_makes_it_too_narrow():
    """Inverse: every four tokens a prompt of their own."""

    def pieces(prompts):
        gaps = [gap for p in prompts for gap in p.gap.split(4)]
        shifts = [shift for p in prompts for shift in p.shift.split(4)]
        return [margins(*pair) for pair in zip(gaps, shifts, strict=True)]

    studies, true = repeated(0.08, 3.0), truth(0.08, 3.0)
    rates = sum(holds(predict_flip_rate(pieces(prompts)), true) for prompts in studies)
    print(f"{rates} of {REPETITIONS}")
    assert rates < FEWEST


def test_a_rate_off_by_two_would_be_found():
    """Inverse: without the half of the model, counts leave the interval."""
    prompts = study(torch.Generator().manual_seed(1), 0.08, 1.0, tokens=256)
    doubled = predict_flip_rate(prompts)
    doubled = known_rate(2 * doubled.rate, doubled.relative_error, doubled.prompts)
    low, high = doubled.measured_interval(20 * 256)
    assert not low <= measured_flip_rate(prompts) <= high


@pytest.mark.parametrize("broken", ["one-sided", "grows with the gap"])
def test_where_the_models_assumptions_fail_the_count_shows_it(broken):
    """Inverse: shifts that never turn a lead round. The prediction cannot know; the count does."""
    sound = study(torch.Generator().manual_seed(2), 0.3, 1.0, tokens=256)
    if broken == "one-sided":
        prompts = [margins(p.gap, p.shift.abs()) for p in sound]
    else:
        prompts = [margins(p.gap, -p.gap / 2) for p in sound]
    low, _ = predict_flip_rate(prompts).measured_interval(20 * 256)
    assert measured_flip_rate(prompts) == 0 < low


def test_ten_times_less_noise_gives_ten_times_fewer_flips():
    """The key law, from the same 1280 tokens: exact in the window, where the law is a line."""
    generator = torch.Generator().manual_seed(3)
    prompts = study(generator, 1e-4, 1.0)
    less = [margins(p.gap, p.shift / 10) for p in prompts]
    assert (
        max(p.shift.abs().max() for p in prompts)
        < MarginDistribution.of(torch.cat([p.gap for p in prompts])).window
    )
    ratio = predict_flip_rate(prompts).rate / predict_flip_rate(less).rate
    assert abs(ratio / 10 - 1) <= 1280 * 2.0**-52


def test_predicting_twice_gives_the_same_bits_in_any_order_of_tokens():
    prompts = study(torch.Generator().manual_seed(4), 0.08, 3.0)
    assert predict_flip_rate(prompts) == predict_flip_rate(prompts)
    turned = [margins(p.gap.flip(0), p.shift.flip(0)) for p in prompts]
    first, second = predict_flip_rate(prompts), predict_flip_rate(turned)
    assert abs(first.rate / second.rate - 1) <= 1280 * 2.0**-53
