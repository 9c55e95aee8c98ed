"""What a contender of `healpass bench` says of itself, on a GPU."""

from __future__ import annotations

import pytest
import torch

from healpass.bench.products import PRODUCTS


@pytest.mark.parametrize("rows", [1, 7, 16, 128, 129, 1000])
def test_a_row_of_the_invariant_product_has_the_same_bits_in_every_batch(rows):
    generator = torch.Generator(device="cuda").manual_seed(0)
    activation, weight = (
        torch.randn(size, 1536, device="cuda", generator=generator).bfloat16()
        for size in (2048, 576)
    )
    multiply = PRODUCTS["invariant"]
    whole = multiply(activation, weight)
    assert whole.isfinite().all()
    assert whole[:rows].equal(multiply(activation[:rows], weight))
