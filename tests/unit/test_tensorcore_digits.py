"""Products of digits are exact under every rule, in any order, up to the true budget."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from healpass.arithmetic.digits import (
    DIGIT_MAX,
    INT32_ACCUMULATOR,
    exact_terms,
    integer_digits,
    join_digits,
    split_digits,
)
from healpass.arithmetic.int16 import quantize
from healpass.tensorcore import Schedule, simulate_matmul
from tests.support.profiles import examples

GENERATIONS = ("v100", "a100", "h100", "b200")


def simulated(a: torch.Tensor, b: torch.Tensor, rule: str, order: int = 0, split_k: int = 1):
    """INT8 digits as FP16 operands, one chain without promotion: the hardest case."""
    return simulate_matmul(
        [a.half()], [b.half()], rule, Schedule(promote_every=None, order=order, split_k=split_k)
    )


def test_budgets():
    assert exact_terms(DIGIT_MAX, DIGIT_MAX) == 1024
    assert exact_terms(255, 255) == 258
    assert exact_terms(128, 255) == 514
    assert exact_terms(128, 128, INT32_ACCUMULATOR) == 131_071
    assert exact_terms(128, 255, INT32_ACCUMULATOR) == 65_793
    assert exact_terms(255, 255, INT32_ACCUMULATOR) == 33_025


@examples(300)
@given(
    rule=st.sampled_from(GENERATIONS),
    head_size=st.integers(1, 256),
    extreme=st.booleans(),
    order=st.integers(0, 100),
    split_k=st.integers(1, 4),
    seed=st.integers(0, 2**16),
)
def test_int16_scores_are_exact(rule, head_size, extreme, order, split_k, seed):
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 3, head_size, generator=generator)
    if extreme:
        q, k = q.sign(), k.sign()
    q, k = quantize(q).payload, quantize(k).payload
    parts = [
        [simulated(left, right.t(), rule, order, split_k) for right in integer_digits(k, 2)]
        for left in integer_digits(q, 2)
    ]
    total = sum(parts[i][j].long() << (8 * (i + j)) for i in range(2) for j in range(2))
    assert torch.equal(total, q.long() @ k.long().t())


@pytest.mark.parametrize("rule", GENERATIONS)
def test_the_budget_is_reached_and_not_more(rule):
    """1,024 products of -128 * -128 are exact; one of 1 * 1 more is not."""
    a = torch.full((1, 1024), -128.0)
    assert simulated(a, a.t(), rule).item() == 2**24
    past = torch.cat([a, torch.ones(1, 1)], 1)
    assert simulated(past, past.t(), rule).item() != 2**24 + 1


@pytest.mark.parametrize("rule", GENERATIONS)
@pytest.mark.parametrize("count", [2, 3])
def test_digits_of_heavy_tailed_weights_reassemble_the_product(rule, count):
    """A Student t with 1.5 degrees of freedom: crest factors of real checkpoints and far more."""
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(4, 200, generator=generator)
    chi = torch.rand(200, 4, generator=generator).clamp_min(1e-6) ** (2 / 3)
    w = (torch.randn(200, 4, generator=generator) / chi).bfloat16()
    left, right = split_digits(x, 3), split_digits(w, count, 0)
    total = torch.zeros(4, 4, dtype=torch.int64)
    for i, a in enumerate(left.digits):
        for j, b in enumerate(right.digits):
            total += simulated(a, b, rule, order=1).long() << (8 * (i + j))
    assert torch.equal(total, join_digits(left.digits) @ join_digits(right.digits))
    value = total.double() * left.scale.double() * right.scale.double()
    exact = x.double() @ w.double()
    step = left.scale.double() / 2 * w.double().abs().sum(0) + right.scale.double() / 2 * (
        x.double().abs().sum(1, keepdim=True) + 200 * left.scale.double() / 2
    )
    assert ((value - exact).abs() <= step).all()


def test_unscaled_integers_past_the_format_are_not_exact():
    """12-bit digits in FP16 pass the budget at K = 4 already."""
    assert exact_terms(2048, 2048) == 4
    a = torch.full((1, 5), 2047.0)
    assert simulated(a, a.t(), "v100").item() != 5 * 2047**2
