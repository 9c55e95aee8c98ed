"""SmolLM2-135M's logits with Q, K and V in each format, teacher-forced, against FP64.

The limits follow from the formats. A row of 64 elements with the RMS r has a maximum of at most
sqrt(64) r, so INT16 (32,639 steps to the maximum) errs by at most 8 / (32639 sqrt(12)) r in the
RMS, and BF16, whose step is at least 2^-8 of an element, by at least 2^-8 / sqrt(12) r. Errors of
either size reach the logits the same way; INT16 rounds the queries, too, which adds at most as
much as the keys. INT24's steps are 256 times finer.
"""

import math

import pytest

from healpass.arithmetic.int16 import INT16, INT24
from tests.support.against_torch import chance
from tests.support.examples import load_example

pytestmark = pytest.mark.model

HEAD = 64
#: INT16's error over that of a BF16 cache, at most.
OF_BF16 = math.sqrt(2) * math.sqrt(HEAD) / INT16.limit * 2**8
FINER = INT24.limit / INT16.limit


@pytest.fixture(scope="module")
def table():
    return load_example("attention_accuracy")


def fp32_and_its_step(found, tokens):
    """The FP32 model's error and what INT24 adds to it, which is independent of it."""
    return chance(tokens) * math.hypot(found["FP32 model"], found["INT16"] / FINER)


@pytest.mark.parametrize("tokens", [192, pytest.param(2048, marks=pytest.mark.deep)])
def test_int16_is_coarse_int24_is_fp32_and_a_bf16_cache_is_worse_than_either(table, tokens):
    """Tokens are what is independent: the logits of one share their states."""
    ids = table.text(tokens)
    found = table.errors(ids, table.EAGER)
    print({name: f"{error:.2e}" for name, error in found.items()})
    assert ids.shape == (1, tokens)
    limits = {"INT16": OF_BF16 * found["BF16 cache"], "INT24": fp32_and_its_step(found, tokens)}
    for name, limit in limits.items():
        print(f"{name}: observed/bound {found[name] / limit:.3f}")
        assert found[name] <= limit
    assert found["INT16"] > limits["INT24"], "the inverse"


@pytest.mark.deep
def test_the_compiled_model_meets_the_same_limits(table):
    """On CPU, BF16 weights, `backend="heal"`, over 2,048 tokens.

    Compiled kernels add in another order than torch's: FP32's own error and theirs are two
    evaluations, of which one may be twice as far as the other (`tests.support.against_torch`).
    """
    names = ("BF16 cache", "FP32 model", "INT16", *table.COMPILED)
    runs = {name: (table.EAGER | table.COMPILED)[name] for name in names}
    found = table.errors(table.text(2048), runs)
    print({name: f"{error:.2e}" for name, error in found.items()})
    assert found["INT16, compiled"] <= OF_BF16 * found["BF16 cache"]
    assert found["INT24, compiled"] <= 2 * fp32_and_its_step(found, 2048)
    assert found["FP32, compiled"] <= 2 * found["FP32 model"]
    assert found["INT16, compiled"] > 2 * fp32_and_its_step(found, 2048), "the inverse"
