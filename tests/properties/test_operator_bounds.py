"""`heal::` products hold their bound for any shape, layout, dtype and magnitude, NaN and inf
included."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import healpass.ops  # noqa: F401
from tests.support.profiles import examples
from tests.support.rewriting import worst_ratio
from tests.support.strategies import DTYPES, Data, data, fill

heal = torch.ops.heal
U = 2.0**-24
#: What FP32 rounds to zero or to a subnormal: one such loss per product and per sum.
UNDERFLOW = 2.0**-149
LAYOUTS = ("contiguous", "transposed", "every other", "expanded", "reversed rows")


@dataclass(frozen=True)
class Case:
    """One product: sizes, dtypes, layouts and fillings of both operands."""

    m: int
    k: int
    n: int
    left: str
    right: str
    left_layout: str
    right_layout: str
    a: Data
    b: Data
    seed: int

    def operands(self) -> tuple[Tensor, Tensor]:
        a = fill((self.m, self.k), self.a, DTYPES[self.left], self.seed, 1)
        b = fill((self.k, self.n), self.b, DTYPES[self.right], self.seed + 1, 0)
        return laid_out(a, self.left_layout), laid_out(b, self.right_layout)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same matrix (for "expanded": its first row repeated) in another memory layout."""
    if layout == "transposed":
        return x.t().contiguous().t()
    if layout == "every other":
        room = torch.full((x.shape[0], 2 * x.shape[1]), float("nan"), dtype=x.dtype)
        room[:, ::2] = x
        return room[:, ::2]
    if layout == "expanded" and x.shape[0] > 0:
        return x[:1].expand(x.shape)
    if layout == "reversed rows":
        return x[torch.arange(x.shape[0] - 1, -1, -1)]
    return x


cases = st.builds(
    Case,
    m=st.integers(0, 9),
    k=st.integers(0, 70),
    n=st.integers(0, 9),
    left=st.sampled_from(sorted(DTYPES)),
    right=st.sampled_from(sorted(DTYPES)),
    left_layout=st.sampled_from(LAYOUTS),
    right_layout=st.sampled_from(LAYOUTS),
    a=data(st.integers(-20, 18)),
    b=data(st.integers(-20, 18)),
    seed=st.integers(0, 2**16),
)


def budget(a: Tensor, b: Tensor) -> Tensor:
    """K * u * (|a| @ |b|), its second order, and what may underflow."""
    k = a.shape[-1]
    gamma = k * U / (1 - k * U)
    return gamma * (a.double().abs() @ b.double().abs()) + 2 * k * UNDERFLOW


@examples(300)
@given(cases)
def test_a_product_is_within_its_bound(case: Case):
    a, b = case.operands()
    exact = a.double() @ b.double()
    result = heal.mm(a, b)
    assert result.dtype == torch.float32
    assert result.shape == (case.m, case.n)
    fits = (a.double().abs() @ b.double().abs()) < 2.0**127
    assert worst_ratio(result[fits], exact[fits], budget(a, b)[fits]) <= 1


@examples(300)
@given(cases, st.integers(1, 3))
def test_batched_products_are_those_of_their_matrices(case: Case, batch: int):
    a, b = case.operands()
    result = heal.bmm(a.expand(batch, *a.shape), b.expand(batch, *b.shape))
    exact = (a.double() @ b.double()).expand(batch, case.m, case.n)
    fits = ((a.double().abs() @ b.double().abs()) < 2.0**127).expand_as(exact)
    assert worst_ratio(result[fits], exact[fits], budget(a, b).expand_as(exact)[fits]) <= 1


@examples(300)
@given(cases, st.sampled_from([float("inf"), float("-inf"), float("nan")]), st.data())
def test_special_values_go_where_an_fp32_product_puts_them(case: Case, special: float, draw):
    a, b = (x.clone(memory_format=torch.contiguous_format) for x in case.operands())
    assume(bool(((a.double().abs() @ b.double().abs()) < 2.0**127).all()))
    target = a if draw.draw(st.booleans()) else b
    if target.numel():
        target.view(-1)[draw.draw(st.integers(0, target.numel() - 1))] = special
    result, expected = heal.mm(a, b), a.float() @ b.float()
    assert torch.equal(result.isnan(), expected.isnan())
    assert torch.equal(result.isposinf(), expected.isposinf())
    assert torch.equal(result.isneginf(), expected.isneginf())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_bound_is_tight_enough_to_see_a_16_bit_accumulation(dtype):
    """The inverse: round the result to 16 bits and the same property fails."""
    a, b = torch.randn(8, 64).to(dtype), torch.randn(64, 8).to(dtype)
    rounded = heal.mm(a, b).to(dtype)
    assert worst_ratio(rounded, a.double() @ b.double(), budget(a, b)) > 1
