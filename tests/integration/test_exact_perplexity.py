"""Exactness costs no accuracy: perplexity of the whole model on a text of 5,000 tokens."""

from __future__ import annotations

import pytest

from tests.support.examples import load_example

pytestmark = [pytest.mark.model, pytest.mark.deep]


def test_perplexity_is_that_of_fp32_within_a_thousandth():
    example = load_example("exact_perplexity")
    found = example.main(["--tokens", "5000"])
    for name in found:
        if name.startswith("exact"):
            change = abs(found[name] / found["FP32"] - 1)
            print(f"{name}: {change:.1e}, observed/bound {change / 1e-3:.3f}")
            assert change <= 1e-3
