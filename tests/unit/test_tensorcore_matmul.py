"""heal's matmul by pieces: number and order of products, non-finite values, batches, refusals."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from healpass.arithmetic.bounds import matmul_bound, matmul_magnitudes
from healpass.arithmetic.pieces import split_fp16
from healpass.tensorcore import Accumulation, heal_attention, heal_matmul
from healpass.tensorcore.matmul import products
from tests.support.profiles import examples

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("a", DTYPES)
@pytest.mark.parametrize("b", DTYPES)
def test_operands_decide_the_number_of_products(a, b, monkeypatch):
    counts = []

    def count(left, right, *_args, **_kwargs):
        counts.append(len(left))
        return left[0].float() @ right[0].float()

    monkeypatch.setattr("healpass.tensorcore.matmul.simulate_matmul", count)
    heal_matmul(torch.ones(2, 3, dtype=a), torch.ones(3, 2, dtype=b), "a100")
    assert counts == [1 + (a == torch.float32) + (b == torch.float32)]


def test_low_pieces_come_first_and_low_times_low_is_dropped():
    left, right = split_fp16(torch.randn(2, 3)), split_fp16(torch.randn(3, 2), 0)
    (high_a, low_a), (high_b, low_b) = left.pieces, right.pieces
    got = [(id(a), id(b)) for a, b in products(left, right)]
    want = [(high_a, low_b), (low_a, high_b), (high_a, high_b)]
    assert got == [(id(a), id(b)) for a, b in want]


SPECIAL = st.sampled_from([0.0, 1.0, -2.0, 1e-40, 3e38, -3e38, math.inf, -math.inf, math.nan])


@examples(300)
@given(
    st.lists(SPECIAL, min_size=6, max_size=6),
    st.lists(SPECIAL, min_size=6, max_size=6),
    st.sampled_from(DTYPES),
    st.sampled_from(["fp32", "v100", "a100", "h100"]),
)
def test_non_finite_operands_act_as_in_fp32(left, right, dtype, rule):
    a = torch.tensor(left).reshape(2, 3)
    b = torch.tensor(right).reshape(3, 2).to(dtype)
    y, fp32 = heal_matmul(a, b, rule), a @ b.float()
    touched = ~a.isfinite().all(1, keepdim=True) | ~b.isfinite().all(0, keepdim=True)
    assert torch.equal(y[touched].nan_to_num(1, 2, 3), fp32[touched].nan_to_num(1, 2, 3))


def test_values_near_the_largest_number_do_not_overflow():
    a = torch.tensor([[3.4028235e38, 1.0]])
    for b in (torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0], [0.0]]).bfloat16()):
        for rule in ("fp32", "a100"):
            y = heal_matmul(a, b, rule).item()
            assert abs(y - a[0, 0].item()) <= 2.0**-23 * y


def test_scales_far_apart_cancel():
    """2^100 and 2^-100: neither scale may overflow or underflow on its own."""
    a, b = torch.full((1, 2), 2.0**100), torch.full((2, 1), 2.0**-100).bfloat16()
    for left, right in ((a, b), (b.t().float(), a.t().bfloat16())):
        assert heal_matmul(left, right, "h100").item() == 2.0


@pytest.mark.parametrize("rule", ["fp32", "a100"])
def test_batches_broadcast(rule):
    """Bit for bit where we add ourselves; torch may add a batch's products in another order."""
    a, b = torch.randn(2, 1, 3, 20), torch.randn(4, 20, 5)
    y = heal_matmul(a, b, rule)
    assert y.shape == (2, 4, 3, 5)
    alone = heal_matmul(a[1, 0], b[2], rule)
    bound = matmul_bound("heal", 20, right="fp32", rule=rule)
    limit = 2 * bound.evaluate(**matmul_magnitudes(a[1, 0], b[2])) * (rule == "fp32")
    assert ((y[1, 2] - alone).abs() <= limit).all()
    assert heal_matmul(a[:0], b, rule).shape == (0, 4, 3, 5)


@pytest.mark.parametrize("rule", ["v100", "h100"])
def test_a_row_does_not_depend_on_its_neighbours(rule):
    a, b = torch.randn(33, 200), torch.randn(200, 17).bfloat16()
    assert torch.equal(heal_matmul(a, b, rule)[5:6], heal_matmul(a[5:6], b, rule))


def test_attention_ignores_hidden_keys_and_shares_heads():
    q, k, v = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 6)
    y = heal_attention(q, k, v, is_causal=True, accumulate="a100")
    shared = (states.repeat_interleave(2, 1) for states in (k, v))
    assert torch.equal(y, heal_attention(q, *shared, is_causal=True, accumulate="a100"))
    for states in (k, v):
        states[:, :, 4] = 1e30  # only the last query sees it
    later = heal_attention(q, k, v, is_causal=True, accumulate="a100")
    assert torch.equal(later[:, :, :4], y[:, :, :4])
    assert not torch.equal(later[:, :, 4], y[:, :, 4])
    hidden = torch.zeros(5, 5, dtype=torch.bool)
    assert torch.equal(heal_attention(q, k, v, hidden), torch.zeros(1, 4, 5, 6))
    far = heal_attention(q, k, v.index_fill(2, torch.tensor([4]), 1e30), is_causal=True)
    assert torch.equal(far[:, :, :4], heal_attention(q, k, v, is_causal=True)[:, :, :4])


def test_what_is_refused():
    with pytest.raises(ValueError, match="'k80' is unknown"):
        Accumulation("k80")
    with pytest.raises(TypeError, match=r"torch\.int8"):
        heal_matmul(torch.ones(2, 2), torch.ones(2, 2, dtype=torch.int8))
