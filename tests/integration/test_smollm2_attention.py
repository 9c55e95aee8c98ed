"""SmolLM2-135M's logits with Q, K and V in each format, teacher-forced, against FP64."""

import pytest

from tests.support.examples import load_example

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def table():
    return load_example("attention_accuracy")


@pytest.mark.parametrize("tokens", [192, pytest.param(2048, marks=pytest.mark.deep)])
def test_int16_is_coarse_int24_is_fp32_and_a_bf16_cache_is_worse_than_either(table, tokens):
    """Over 2,000 tokens INT16 stays below 1.6e-4; the first few hundred are noisier.

    INT24 stays within 1.15 times the FP32 model's error. The inverse is the BF16 cache, which
    meets neither.
    """
    ids = table.text(tokens)
    found = table.errors(ids, table.EAGER)
    print({name: f"{error:.2e}" for name, error in found.items()})
    assert ids.shape == (1, tokens)
    limit = 1.6e-4 if tokens > 2000 else found["BF16 cache"] / 16
    assert found["INT16"] <= limit
    assert found["INT24"] <= 1.15 * found["FP32 model"]
    assert found["BF16 cache"] > limit
    assert found["INT16"] > 1.15 * found["FP32 model"]


@pytest.mark.deep
def test_the_compiled_model_meets_the_same_limits(table):
    """On CPU, BF16 weights, `backend="heal"`, over 2,048 tokens."""
    names = ("BF16 cache", "FP32 model", *table.COMPILED)
    runs = {name: (table.EAGER | table.COMPILED)[name] for name in names}
    found = table.errors(table.text(2048), runs)
    print({name: f"{error:.2e}" for name, error in found.items()})
    assert found["INT16, compiled"] <= 1.6e-4 < found["BF16 cache"]
    assert found["INT24, compiled"] <= 1.15 * found["FP32 model"]
    assert found["FP32, compiled"] <= 1.15 * found["FP32 model"]
