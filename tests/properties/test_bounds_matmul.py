"""Observed error <= derived bound, for every format, magnitude, rule and order.

The judge is FP64; its own error, K 2^-53 S, is granted to the observation. Each guarantee has an
inverse
test: break the arithmetic on purpose and the same check must fail.
"""

import pytest
import torch
from hypothesis import assume, given
from torch import Tensor

from healpass.arithmetic.bounds import Bound, Kernel, matmul_bound, matmul_magnitudes
from healpass.arithmetic.pieces import pack_fp16, split_fp16
from healpass.tensorcore import Accumulation, Schedule, heal_matmul, simulate_matmul
from tests.support.profiles import examples
from tests.support.strategies import GENERATIONS, Data, Product, fill, products

FP32_MAX = torch.finfo(torch.float32).max


def worst_ratio(y: Tensor, a: Tensor, b: Tensor, bound: Bound) -> float:
    """max observed / bound over the elements, 0 where both are 0."""
    magnitudes = matmul_magnitudes(a, b)
    exact = a.double() @ b.double()
    judge = a.shape[-1] * 2.0**-53 * magnitudes["S"]
    error = (y.double() - exact).abs() - judge
    limit = torch.as_tensor(bound.evaluate(**magnitudes), dtype=torch.float64)
    assert limit.isfinite().all()
    return torch.where(error <= 0, 0.0, error / limit).max().item()


def bound_of(case: Product, rule: str | None) -> Bound:
    return matmul_bound(
        "heal",
        case.k,
        left=case.left,
        right=case.right,
        rule=rule,
        kernel=Kernel(case.promote_every, split_k=case.split_k),
    )


def in_range(a: Tensor, b: Tensor) -> bool:
    """No partial sum can overflow: a bound says nothing of infinities."""
    return bool((matmul_magnitudes(a, b)["S"] < FP32_MAX / 2).all())


def check_heal(case: Product) -> None:
    a, b = case.tensors()
    assume(in_range(a, b))
    how = Accumulation(case.rule, case.order, case.split_k, case.promote_every)
    ratio = worst_ratio(heal_matmul(a, b, how), a, b, bound_of(case, case.rule))
    assert ratio <= 1, f"observed / bound = {ratio:.3g} for {case}"


@examples(300)
@given(products())
def test_heal_is_within_its_bound(case):
    check_heal(case)


@examples(300)
@given(products())
def test_fp32_arithmetic_is_within_its_bound(case):
    """What CPU runs unsimulated, under `heal` and `layercast` alike."""
    a, b = case.tensors()
    assume(in_range(a, b))
    ratio = worst_ratio(a.float() @ b.float(), a, b, bound_of(case, None))
    assert ratio <= 1, f"observed / bound = {ratio:.3g}"


@examples(300)
@given(products(rules=GENERATIONS))
def test_a_simulated_fma_chain_is_within_layercast(case):
    a, b = case.tensors()
    assume(in_range(a, b))
    y = simulate_matmul(
        [a.float()], [b.float()], "sgemm", Schedule(promote_every=None, order=case.order)
    )
    ratio = worst_ratio(y, a, b, matmul_bound("layercast", case.k))
    assert ratio <= 1, f"observed / bound = {ratio:.3g}"


# ---------------------------------------------------------------------------------------- inverse

WIDE = Data(log10=0, crest=6, zeros=0.0, sign="random", heavy=True)
POSITIVE = Data(log10=0, crest=0, zeros=0.0, sign="positive", heavy=False)
PLAIN = Data(log10=0, crest=0, zeros=0.0, sign="random", heavy=False)


def linear(k: int, how: Data, seed: int = 0) -> tuple[Tensor, Tensor]:
    return (
        fill((8, k), how, torch.float32, seed, 1),
        fill((k, 8), PLAIN, torch.bfloat16, seed + 1, 0),
    )


@pytest.mark.parametrize("rule", GENERATIONS)
def test_without_the_low_piece_the_bound_breaks(rule):
    a, b = linear(576, PLAIN)
    left, right = split_fp16(a), pack_fp16(b, 0)
    y = simulate_matmul(left.pieces[:1], right.pieces, rule) * left.scale * right.scale
    assert worst_ratio(y, a, b, matmul_bound("heal", 576, rule=rule)) > 1


@pytest.mark.parametrize("rule", GENERATIONS)
def test_without_promotion_the_bound_breaks(rule):
    """One chain over K = 14336 of positive products drifts toward zero."""
    a, b = linear(14336, POSITIVE)
    b = b.abs()
    y = heal_matmul(a, b, Accumulation(rule, promote_every=None))
    ratio = worst_ratio(y, a, b, matmul_bound("heal", 14336, rule=rule))
    assert ratio > 1, f"observed / bound = {ratio:.3g}"
    with_promotion = heal_matmul(a, b, rule)
    assert worst_ratio(with_promotion, a, b, matmul_bound("heal", 14336, rule=rule)) <= 1


@pytest.mark.parametrize("magnitude", [1e-6, 1e6])
def test_without_the_row_scale_the_bound_breaks(magnitude):
    """Unscaled pieces of tiny values are subnormal in FP16, and large ones overflow."""
    a, b = linear(64, PLAIN)
    a = a * magnitude
    high = a.half()
    low = (a - high.float()).half()
    y = simulate_matmul([low, high], [b.half(), b.half()], "h100")
    ratio = worst_ratio(y, a, b, matmul_bound("heal", 64, rule="h100"))
    assert not ratio <= 1


def test_high_piece_first_is_less_accurate():
    """The order of the products is numerics: low first, while the accumulator is small."""
    a, b = linear(576, PLAIN)
    left, weight = split_fp16(a), pack_fp16(b, 0).pieces[0]
    exact = sum(p.double() for p in left.pieces) @ weight.double()
    errors = []
    for pieces in (left.pieces[::-1], left.pieces):
        y = simulate_matmul(pieces, [weight, weight], "a100").double()
        errors.append(((y - exact).norm() / exact.norm()).item())
    assert errors[0] < errors[1], errors
