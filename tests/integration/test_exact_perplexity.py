"""Exactness costs no accuracy: perplexity of the whole model on a text of 5,000 tokens."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.model, pytest.mark.deep]
EXAMPLE = Path(__file__).parents[2] / "examples" / "exact_perplexity.py"


def test_perplexity_is_that_of_fp32_within_a_thousandth():
    spec = importlib.util.spec_from_file_location("exact_perplexity", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    sys.modules["exact_perplexity"] = example
    spec.loader.exec_module(example)
    found = example.main(["--tokens", "5000"])
    for name in found:
        if name.startswith("exact"):
            change = abs(found[name] / found["FP32"] - 1)
            print(f"{name}: {change:.1e}, observed/bound {change / 1e-3:.3f}")
            assert change <= 1e-3
