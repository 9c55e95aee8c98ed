"""P V written by hand: keys without weight have no influence, and digits lose what they may."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from healpass.config import HealConfig
from healpass.graph.nodes import heal_name
from tests.support.bits import differing
from tests.support.rewriting import Rewritten

heal = torch.ops.heal
INF = float("inf")


def operands(right=torch.float32):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 3, 5, 20, generator=generator) * 3
    values = torch.randn(2, 3, 20, 8, generator=generator)
    values = values * 2.0 ** torch.randint(-4, 5, (2, 3, 20, 1), generator=generator)
    return scores.softmax(-1), values.to(right)


@pytest.mark.parametrize("right", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("products", [3, 5, 6, 8])
def test_error_and_equality_of_generations(products, right):
    weights, values = operands(right)
    first = heal.weighted_sum(weights, values, f"exact{products}")
    for rule in ("v100", "a100", "h100:1", "b200"):
        assert differing(heal.weighted_sum(weights, values, f"exact{products}:{rule}"), first) == 0
    exact = weights.double() @ values.double()
    left_digits = 2 if products == 3 else 3
    right_digits = 3 if products > 5 or (products == 5 and right == torch.float32) else 2
    rows = values.double().abs().amax(-1, keepdim=True)
    largest = (weights.double() * rows.mT).amax(-1, keepdim=True)
    # Rounded P times V, P times rounded V, and dropped pairs: less than four units of the
    # second-lowest digit each.
    dropped = 2.0 ** (24 - 8 * (left_digits + right_digits)) * (256 if products in (5, 6) else 1)
    bound = largest * (20 * (2.0 ** (2 - 8 * left_digits) + 4 * dropped))
    bound = bound + (weights.double() @ rows) * 2.0 ** (2 - 8 * right_digits) + exact.abs() / 2**24
    ratio = ((first.double() - exact).abs() / bound).max()
    print(f"{products} products: observed/bound {float(ratio):.3f}")
    assert ratio <= 1


@pytest.mark.parametrize("filler", [0.0, 1e30])
def test_keys_without_weight_do_not_show(filler):
    weights, values = operands()
    first = heal.weighted_sum(weights, values, "exact5")
    wide = F.pad(values, (0, 0, 3, 4), value=filler)
    assert differing(heal.weighted_sum(F.pad(weights, (3, 4)), wide, "exact5"), first) == 0


def test_a_plain_product_does_let_them_show():
    """The inverse: columns scaled over all keys."""
    weights, values = operands()
    wide = F.pad(values, (0, 0, 3, 4), value=1e30)
    plain = heal.matmul(weights, values, "exact5")
    assert differing(heal.matmul(F.pad(weights, (3, 4)), wide, "exact5"), plain) > 0


def test_special_values_and_empty_operands():
    weights, values = operands()
    values[0, 0, 3, 2] = INF
    values[0, 1, 0, 0] = float("nan")
    found, expected = heal.weighted_sum(weights, values, "exact5"), weights @ values
    special = ~expected.isfinite()
    assert torch.equal(found[special].nan_to_num(7.0), expected[special].nan_to_num(7.0))
    assert found[~special].isfinite().all()
    assert heal.weighted_sum(weights[:, :, :0], values, "exact5").shape == (2, 3, 0, 8)
    empty = heal.weighted_sum(weights[..., :0], values[:, :, :0], "exact5")
    assert differing(empty, torch.zeros(2, 3, 5, 8)) == 0
    tiny = heal.weighted_sum(weights, values.nan_to_num(1.0, 1.0) * 2.0**-130, "exact5")
    assert tiny.isfinite().all()


@pytest.mark.parametrize("dropout", [False, True])
def test_the_pass_finds_attention_that_is_written_by_hand(dropout):
    def attention(q, k, v):
        weights = torch.softmax(q @ k.mT / 3.0, -1, dtype=torch.float32).to(q.dtype)
        weights = F.dropout(weights, 0.1, training=False) if dropout else weights
        return weights @ v

    _, states = operands(torch.bfloat16)
    rewritten = Rewritten(attention, HealConfig(precision="exact", outputs="fp32"))
    found = rewritten(states, states, states)
    names = [heal_name(n) for g in rewritten.graphs for n in g.graph.nodes]
    assert names.count("heal::weighted_sum") == names.count("heal::matmul") == 1
    exact = attention(*[states.double()] * 3)
    assert (found.double() - exact).norm() <= 2.0**-8 * exact.norm()  # softmax is cast to FP32


def test_gradients_and_opcheck():
    weights, values = (t.requires_grad_() for t in operands())
    torch.library.opcheck(heal.weighted_sum.default, (weights, values, "exact5"))
    upstream = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(1))
    result = heal.weighted_sum(weights, values, "exact8")
    found = torch.autograd.grad(result, (weights, values), upstream)
    wide = upstream.double()
    exact = wide @ values.double().mT, weights.double().mT @ wide
    for ours, truth in zip(found, exact, strict=True):
        assert (ours.double() - truth).norm() <= 2.0**-20 * truth.norm()
