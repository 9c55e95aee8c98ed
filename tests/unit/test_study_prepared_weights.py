"""Kept weights: the bits of `heal::linear`, and a weight that is prepared once."""

from __future__ import annotations

import pytest
import torch

from healpass.study.run import prepared_weights
from healpass.study.run.prepared_weights import KeptWeights
from tests.support.bits import differing

heal = torch.ops.heal


@pytest.mark.parametrize(
    "numerics", ["exact5", "exact8", "exact5:h100", "exact5::2", "heal", "layercast"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 40), (3, 4, 40), (0, 40)])
@pytest.mark.parametrize("special", [0.0, torch.inf, torch.nan])
def test_every_bit_is_that_of_the_operator(numerics, dtype, shape, special):
    generator = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(size, generator=generator) for size in (shape, (17, 40)))
    x.view(-1)[:1] += special
    bias, weight = torch.randn(17, generator=generator), weight.to(dtype)
    linear = KeptWeights().linear
    for given in (None, bias):
        found, wanted = (f(x, weight, given, numerics) for f in (linear, heal.linear))
        assert differing(found, wanted) == 0


def test_a_weight_that_is_not_finite_too():
    x, weight = torch.ones(2, 8), torch.ones(3, 8)
    weight[1, 1] = torch.nan
    found, wanted = (f(x, weight, None, "exact5") for f in (KeptWeights().linear, heal.linear))
    assert differing(found, wanted) == 0


def test_a_weight_is_cut_once_and_forgotten_with_its_tensor(monkeypatch):
    counted = []
    cut = prepared_weights.scaled_digits
    monkeypatch.setattr(
        prepared_weights,
        "scaled_digits",
        lambda x, *rest: counted.append(x.shape) or cut(x, *rest),
    )
    kept, weight = KeptWeights(), torch.randn(6, 8).bfloat16()
    for rows in (1, 5):
        kept.linear(torch.randn(rows, 8), weight, None, "exact5")
    assert counted.count(torch.Size([8, 6])) == 1
    del weight
    assert len(kept._kept) == 0
