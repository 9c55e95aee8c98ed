"""Pieces, integers and digits: errors within their formulas, exact reassembly, odd values."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from healpass.arithmetic.bits import rounded
from healpass.arithmetic.digits import digit_limit, integer_digits, join_digits, split_digits
from healpass.arithmetic.formats import BF16, FP16
from healpass.arithmetic.int16 import INT16, INT24, dequantize, quantize, round_trip
from healpass.arithmetic.pieces import pack_fp16, reassemble, row_scale, split_bf16, split_fp16
from tests.support.profiles import examples
from tests.support.strategies import DTYPES, Data, data, fill

LOST = 2.0**-40 * (1 + 2.0**-11)
SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 1e-38, 65504.0, 65519.9, 65520.0, 3.4028235e38, -3.4028235e38]
ANY_FLOAT = st.one_of(
    st.sampled_from(SPECIAL), st.floats(width=32, allow_nan=False, allow_infinity=False)
)
ROWS = st.lists(ANY_FLOAT, min_size=1, max_size=40)
FILLED = st.tuples(st.integers(1, 6), st.integers(1, 80), data(), st.integers(0, 2**16))


def row_maximum(x, dim=-1):
    return x.double().abs().amax(dim, keepdim=True)


def fp16_limit(x, sigma, dim=-1):
    return sigma * x.double().abs() + LOST * row_maximum(x, dim) + 2.0**-151


def check_pieces(x):
    split = split_fp16(x)
    error = (reassemble(split) - x.double()).abs()
    assert (error <= fp16_limit(x, 2.0**-23)).all()
    assert split.pieces[0].isfinite().all()
    exact = sum(p.double() for p in split.pieces) * split.scale.double()
    assert torch.equal(reassemble(split), exact)
    assert (
        (reassemble(split_bf16(x, 2)) - x.double()).abs()
        <= 2.0**-17 * x.double().abs() + 2.0**-134
    ).all()
    assert ((reassemble(split_bf16(x, 3)) - x.double()).abs() <= 2.0**-134).all()


@examples(300)
@given(ROWS)
def test_pieces_of_any_values(values):
    check_pieces(torch.tensor([values]))


@examples(300)
@given(FILLED)
def test_pieces_of_any_tensor(case):
    rows, columns, how, seed = case
    check_pieces(fill((rows, columns), how, torch.float32, seed, 1))


@examples(300)
@given(FILLED, st.sampled_from(["bf16", "fp16"]))
def test_a_packed_weight_loses_only_what_is_tiny_beside_its_channel(case, dtype):
    rows, columns, how, seed = case
    weight = fill((rows, columns), how, DTYPES[dtype], seed, 0)
    packed = pack_fp16(weight, 0)
    error = (reassemble(packed) - weight.double()).abs()
    assert (error <= fp16_limit(weight, 0.0, 0)).all()
    big_enough = weight.double().abs() >= 2.0 ** (-32 if dtype == "bf16" else -29) * row_maximum(
        weight, 0
    )
    big_enough &= weight.double().abs() >= 2.0**-126
    assert (error[big_enough] == 0).all()


@examples(300)
@given(FILLED, st.sampled_from([INT16, INT24]), st.sampled_from(["plain", "power_of_two"]))
def test_integers_are_within_half_a_step(case, fmt, kind):
    rows, columns, how, seed = case
    x = fill((rows, columns), how, torch.float32, seed, 1)
    quantized = quantize(x, fmt, kind)
    scale, payload = quantized.scale.double(), quantized.payload.double()
    assert payload.abs().max() <= fmt.limit
    assert ((x.double() - scale * payload).abs() <= scale * (0.5 + 2.0**-26)).all()
    coarsest = row_maximum(x) / fmt.limit * (1 + 2.0**-23 if kind == "plain" else 2)
    assert (scale <= coarsest.clamp_min(2.0**-126)).all()
    value = dequantize(quantized).double()
    assert (
        (value - scale * payload).abs() <= 2.0**-24 * (scale * payload).abs() + 2.0**-150
    ).all()
    if kind == "power_of_two":
        assert (torch.frexp(scale).mantissa == 0.5).all()


@examples(300)
@given(FILLED, st.integers(1, 4), st.sampled_from([0, 1]))
def test_digits_reassemble_to_the_rounded_value(case, count, dim):
    rows, columns, how, seed = case
    x = fill((rows, columns), how, torch.float32, seed, dim)
    digits = split_digits(x, count, dim)
    scale = digits.scale.double()
    value = join_digits(digits.digits).double() * scale
    assert ((value - x.double()).abs() <= scale / 2).all()
    assert (scale <= (2 * row_maximum(x, dim) / digit_limit(count)).clamp_min(2.0**-126)).all()


@examples(300)
@given(
    st.integers(1, 4).flatmap(
        lambda n: st.tuples(st.just(n), st.integers(-digit_limit(n), digit_limit(n)))
    )
)
def test_integer_digits_are_exact(case):
    count, integer = case
    digits = integer_digits(torch.tensor([integer]), count)
    assert join_digits(digits).item() == integer
    assert all(digit.dtype == torch.int8 for digit in digits)


@examples(300)
@given(st.lists(st.floats(width=32), min_size=1, max_size=40), st.sampled_from([FP16, BF16]))
def test_rounding_by_bits_is_the_cast(values, fmt):
    x = torch.tensor(values)
    x = torch.where(x.abs() > fmt.largest, 1.0, x)
    assert torch.equal(rounded(x, fmt).nan_to_num(7.0), x.to(fmt.dtype).float().nan_to_num(7.0))


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "empty_rows", "empty_k"])
def test_splits_take_any_layout(layout):
    x = torch.randn(12, 20)
    x = {
        "transposed": x.t(),
        "strided": x[::3, ::2],
        "expanded": x[:1].expand(5, 20),
        "empty_rows": x[:0],
        "empty_k": x[:, :0],
    }[layout]
    dense = x.clone(memory_format=torch.contiguous_format)
    for split in (split_fp16, split_bf16, lambda t: split_digits(t, 3), quantize):
        for got, want in zip(_tensors(split(x)), _tensors(split(dense)), strict=True):
            assert torch.equal(got, want)


def _tensors(record):
    for value in vars(record).values():
        yield from [] if value is None else value if isinstance(value, tuple) else [value]


def test_non_finite_values_stay_in_the_high_piece_and_out_of_the_scale():
    x = torch.tensor([[math.inf, 1.0, -math.inf, math.nan, 3.0]])
    for split in (split_fp16(x), split_bf16(x, 3)):
        assert torch.equal(
            reassemble(split).nan_to_num(99.0, 77.0, -77.0)[0, [0, 2, 3]],
            torch.tensor([77.0, -77.0, 99.0]).double(),
        )
        assert all((low[0, [0, 2, 3]] == 0).all() for low in split.pieces[1:])
    assert torch.equal(row_scale(x), row_scale(torch.tensor([[1.0, 3.0]])))
    assert quantize(x).scale.isnan().all()


def test_the_scale_has_a_floor_and_its_inverse_is_normal():
    x = torch.tensor([[1e-45], [1e-38], [1e-30], [3.4028235e38], [0.0]])
    scale = row_scale(x)
    assert scale.min() == 2.0**-126
    assert (1 / scale).min() >= 2.0**-126
    assert torch.equal(reassemble(split_fp16(x)).float(), x)


# ---------------------------------------------------------------------------------------- inverse


def test_one_piece_breaks_the_bound_of_two():
    x = fill((8, 64), Data(0, 0, 0.0, "random", False), torch.float32, 0, 1)
    split = split_fp16(x)
    error = (split.pieces[0].double() * split.scale.double() - x.double()).abs()
    assert not (error <= fp16_limit(x, 2.0**-23)).all()


def test_a_quotient_in_fp32_breaks_the_bound_of_int24():
    x = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    scale = quantize(x, INT24).scale
    payload = (x / scale).round().double()
    assert not (
        (x.double() - scale.double() * payload).abs() <= scale.double() * (0.5 + 2.0**-26)
    ).all()


def test_a_scale_for_the_full_int16_range_overflows_the_high_digit():
    """With 32767 instead of 32639 the top digit reaches +128, which INT8 does not hold."""
    assert join_digits(integer_digits(torch.tensor([32767]), 2)).item() != 32767


# ------------------------------------------------------------------------------- compiled,
# gradients


def test_compiled_splits_give_the_same_bits():
    """Inductor drops a cast to FP16 and back; the split must not depend on it."""
    x = torch.randn(7, 96) * torch.logspace(-6, 6, 96)
    compiled = torch.compile(lambda t: split_fp16(t).pieces, fullgraph=True)(x)
    assert all(torch.equal(g, w) for g, w in zip(compiled, split_fp16(x).pieces, strict=True))


def test_round_trip_has_the_gradient_of_the_identity():
    x = torch.randn(3, 16, dtype=torch.bfloat16, requires_grad=True)
    y = round_trip(x, INT16)
    assert torch.equal(y, dequantize(quantize(x.detach(), INT16)))
    weights = torch.randn(3, 16)
    (y * weights).sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert torch.equal(x.grad, weights.bfloat16())
