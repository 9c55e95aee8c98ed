"""The code that quantizes on a GPU gives the operator's own bits, in Triton's interpreter."""

from __future__ import annotations

import math

import pytest
import torch

from tests.support.attention_runs import random, run


@pytest.mark.parametrize("kv", ["int16", "int24"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_digits_and_scales_are_those_of_the_operator(kv, dtype):
    x = random((2, 3, 5, 40), 0)
    x[0, 0, 1], x[0, 1, 2, 3], x[1, 2, 4, 5] = 0.0, math.nan, -math.inf
    x[1, 0] *= 2.0 ** (-130 if dtype == torch.float32 else -10)
    x = x.to(dtype)
    digits, scale = run(torch.ops.heal.quantize, [x, kv])
    wanted_digits, wanted_scale = torch.ops.heal.quantize(x, kv)
    assert torch.equal(digits, wanted_digits)
    assert torch.equal(scale.nan_to_num(-1.0), wanted_scale.nan_to_num(-1.0))
