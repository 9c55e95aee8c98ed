"""Digit products: one result on every route, in any order and sharding, within a derived bound."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import healpass.ops  # noqa: F401
from healpass.arithmetic.digits import DIGIT_MAX, INT32_ACCUMULATOR
from healpass.ops.products import exact as em
from healpass.ops.products.exact import (
    SCHEMES,
    Adders,
    error_bound,
    error_deviation,
    exact_matmul,
    int8_mm,
)
from healpass.ops.products.numerics import Numerics
from tests.support.bits import compiled, differing
from tests.support.strategies import DTYPES, GENERATIONS, Data, data, fill

heal = torch.ops.heal
NUMERICS = [f"exact{products}" for products in SCHEMES]
ROUTES = ("int8", "fp64", "int32")


def operands(m: int, k: int, n: int, right=torch.bfloat16, seed: int = 0):
    """Heavy-tailed rows, a huge and a tiny one among them; weights as nn.Linear keeps them."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(m, k, generator=generator) / torch.rand(m, k, generator=generator) ** 0.6
    a = a * torch.tensor([1.0, 1e30, 1e-30])[torch.arange(m) % 3, None]
    return a, torch.randn(n, k, generator=generator).to(right).t()


def test_budgets():
    """The largest totals stay inside their types, with every digit at its extreme."""
    assert em.INT32_TERMS * DIGIT_MAX**2 <= INT32_ACCUMULATOR
    for plan in SCHEMES.values():
        for i in range(plan.left):
            joined = sum(
                DIGIT_MAX * 256 ** (j - max(plan.cut - i, 0))
                for j in range(max(plan.cut - i, 0), plan.right)
            )
            assert em.FP64_TERMS * DIGIT_MAX * joined <= 2**53
        per_term = sum(DIGIT_MAX**2 * 256 ** (i + j - plan.cut) for i, j in plan.pairs)
        assert em.MOST_TERMS * per_term < 2**63
    assert {p: len(plan.pairs) for p, plan in SCHEMES.items()} == {3: 3, 5: 5, 6: 6, 8: 8}


@pytest.mark.parametrize("products", SCHEMES)
@pytest.mark.parametrize("shape", [(1, 576, 40), (7, 300, 33), (3, 1, 2), (2, 1100, 1)])
@pytest.mark.parametrize("right", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_routes_generations_and_orders_agree(products, shape, right):
    a, b = operands(*shape, right)
    first = exact_matmul(a, b, products)
    for route in ROUTES:
        assert differing(exact_matmul(a, b, products, Adders(route)), first) == 0
    for seed, rule in enumerate(GENERATIONS):
        adders = Adders(rule, order=seed, split_k=1 + seed % 3)
        assert differing(exact_matmul(a, b, products, adders), first) == 0
    assert differing(Numerics.parse(f"exact{products}::5").multiply(a, b), first) == 0


@settings(max_examples=60)
@given(
    m=st.integers(1, 4),
    k=st.integers(1, 300),
    n=st.integers(1, 4),
    left=st.sampled_from(["fp32", "bf16", "fp16"]),
    right=st.sampled_from(["bf16", "fp16", "fp32"]),
    how=st.tuples(data(st.integers(-30, 30)), data(st.integers(-30, 30))),
    products=st.sampled_from(list(SCHEMES)),
    seed=st.integers(0, 2**16),
)
def test_error_is_within_its_bound(m, k, n, left, right, how, products, seed):
    a = fill((m, k), how[0], DTYPES[left], seed, 1)
    b = fill((k, n), how[1], DTYPES[right], seed + 1, 0)
    found, exact = exact_matmul(a, b, products), a.double() @ b.double()
    bound = error_bound(a, b, products) + 2.0**-50 * (a.double().abs() @ b.double().abs())
    regular = exact.abs() + bound < 2.0**127
    error = (found.double() - exact).abs()[regular]
    assert (error <= bound[regular]).all(), float((error / bound[regular]).max())


def test_error_of_a_linear_layer():
    """Observed against the bound, and relative in the Frobenius norm, on normal data."""
    for products, right, worst in (
        (3, torch.bfloat16, 2.0**-11),
        (5, torch.bfloat16, 2.0**-16),
        (6, torch.float32, 2.0**-16),
        (8, torch.float32, 2.0**-20),
    ):
        generator = torch.Generator().manual_seed(0)
        a = torch.randn(64, 576, generator=generator)
        b = torch.randn(64, 576, generator=generator).to(right).t()
        error = exact_matmul(a, b, products).double() - a.double() @ b.double()
        relative = float(error.norm() / (a.double() @ b.double()).norm())
        ratio = float((error.abs() / error_bound(a, b, products)).max())
        print(f"{products} products: relative {relative:.1e}, observed/bound {ratio:.3f}")
        assert ratio <= 1
        assert relative <= worst  # digits below the maximum, less a crest factor of 2^4


@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("right", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("products", list(SCHEMES))
def test_the_norm_of_the_error_is_that_of_its_deviation(products, right, heavy):
    """Within the factor of two that the gate of `healpass bench` allows, to either side."""
    a, b = (
        fill(shape, Data(0, 0, 0.0, "random", heavy), torch.float32, seed, dim)
        for seed, (shape, dim) in enumerate((((48, 576), 1), ((576, 48), 0)))
    )
    b = b.to(right)
    error = exact_matmul(a, b, products).double() - a.double() @ b.double()
    ratio = float(error.norm() / error_deviation(a, b, products).norm())
    print(f"{products} products, {right}: observed/deviation {ratio:.3f}")
    assert 0.5 <= ratio <= 2


def test_five_products_of_fp32_weights_are_six():
    a, b = operands(3, 70, 5, torch.float32)
    assert differing(exact_matmul(a, b, 5), exact_matmul(a, b, 6)) == 0


@pytest.mark.parametrize("numerics", NUMERICS)
def test_a_row_does_not_depend_on_its_batch(numerics):
    a, b = operands(17, 200, 24)
    whole = heal.mm(a, b, numerics)
    for rows in (slice(0, 1), slice(5, 8), slice(16, 17)):
        assert differing(heal.mm(a[rows], b, numerics), whole[rows]) == 0
    batched = heal.matmul(a.expand(2, 17, 200), b.expand(2, 200, 24), numerics)
    assert differing(batched[1], whole) == 0
    assert differing(heal.mm(a.t().contiguous().t(), b.contiguous(), numerics), whole) == 0


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_compiled_is_eager_at_every_number_of_rows(rows):
    """M = 1 is where `torch._int_mm` has its fault; digits come out of fused code here."""
    a, b = operands(rows, 576, 64)

    def layer(x, w):
        return heal.mm(heal.silu(x), w, "exact5")

    assert differing(compiled(layer)(a, b), layer(a, b)) == 0


@pytest.mark.parametrize("stride", [0, 1, 3, 576, 1728])
def test_a_row_with_any_stride(stride):
    """torch's fault itself: the wrapper is right where `torch._int_mm` may be wrong."""
    generator = torch.Generator().manual_seed(0)
    digits = torch.randint(-128, 128, (3, 1, 576), dtype=torch.int8, generator=generator)
    w = torch.randint(-128, 128, (64, 576), dtype=torch.int8, generator=generator).t()
    row = digits.as_strided((1, 576), (stride, 1), 576)
    assert torch.equal(int8_mm(row, w).long(), digits[1].long() @ w.long())
    assert torch.equal(int8_mm(w.t(), row.t()).long(), w.t().long() @ digits[1].t().long())
    if stride < 576:
        right = torch.equal(torch._int_mm(row, w).long(), digits[1].long() @ w.long())
        print(f"torch alone is {'right' if right else 'wrong'} at stride {stride}")


def test_a_saturating_int8_product_fails_its_self_test():
    """The inverse: pairs of products clamped to INT16, as oneDNN without VNNI."""

    def saturating(x, y):
        pairs = x.int()[:, :, None] * y.int()[None]
        pairs = pairs[:, : x.shape[1] // 2 * 2].reshape(x.shape[0], -1, 2, y.shape[1]).sum(2)
        return pairs.clamp(-(2**15), 2**15 - 1).sum(1)

    assert em.int8_mm_is_exact()
    assert not em.int8_mm_is_exact(saturating)


def test_one_term_past_the_budget_is_wrong():
    """The inverse: an INT32 sum of 131,073 products of -128 wraps; the operator splits K."""
    k = em.INT32_TERMS + 2
    digits = torch.full((1, k), -128, dtype=torch.int8)
    assert torch._int_mm(digits, digits.t()).item() < 0
    x = torch.full((1, k), -1.0)
    for route in ROUTES:
        assert exact_matmul(x, x.t(), 5, Adders(route)).item() == k


def test_too_many_terms_are_refused():
    x = torch.zeros(1, 1).expand(1, em.MOST_TERMS + 1)
    with pytest.raises(ValueError, match="may overflow INT64"):
        exact_matmul(x, x.t())


def test_a_dropped_digit_shows():
    """The inverse: with the top digit of one element changed by one, the bits differ."""
    a, b = operands(2, 64, 3)
    changed = a.clone()
    changed[0, 5] += a[0].abs().max() / 2**8
    assert differing(exact_matmul(changed, b), exact_matmul(a, b)) > 0


def test_floating_point_sums_do_not_agree_between_generations():
    """The inverse: the same check on `heal` finds differing bits."""
    a, b = operands(5, 300, 20, torch.float32)
    results = [Numerics.parse(f"heal:{rule}").multiply(a, b) for rule in GENERATIONS]
    assert differing(results[1], results[2]) > 0


# -------------------------------------------------------------------------------- special values

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("numerics", NUMERICS)
def test_inf_and_nan_go_through_as_in_an_fp32_product(numerics):
    a = torch.tensor([[1.0, INF], [NAN, 1.0], [0.0, 2.0], [INF, -INF], [3e38, 3e38], [0.0, -0.0]])
    b = torch.tensor([[1.0, 0.0, 5.0], [1.0, -1.0, 1.0]])
    for x, y in ((a, b), (b.t(), a.t())):
        found, expected = heal.mm(x, y, numerics), torch.mm(x, y)
        special = ~expected.isfinite()
        assert torch.equal(found[special].nan_to_num(7.0), expected[special].nan_to_num(7.0))
        assert found[~special].isfinite().all()
        assert not (found.view(torch.int32) == -(1 << 31)).any()


def test_subnormal_and_huge_rows():
    a = torch.tensor([[2.0**-149, 2.0**-140], [3.4e38, -3.4e38]])
    b = torch.tensor([[1.0], [0.5]])
    bound = error_bound(a, b, 8)
    assert ((heal.mm(a, b, "exact8").double() - a.double() @ b.double()).abs() <= bound).all()


@pytest.mark.parametrize("shapes", [((0, 4), (4, 3)), ((2, 0), (0, 3)), ((2, 4), (4, 0))])
def test_empty_operands(shapes):
    result = heal.mm(torch.randn(shapes[0]), torch.randn(shapes[1]), "exact5")
    assert result.shape == (shapes[0][0], shapes[1][1])
    assert (result == 0).all()


# ---------------------------------------------------------------------------- shards, gradients


@pytest.mark.parametrize("products", SCHEMES)
@pytest.mark.parametrize("right", [torch.bfloat16, torch.float32], ids=str)
def test_one_two_and_four_shards_have_the_same_bits(products, right):
    a, b = operands(5, 240, 12, right)
    products = 6 if products == 5 and right == torch.float32 else products
    whole = exact_matmul(a, b, products)
    for ranks in (1, 2, 4):
        shards = list(zip(a.chunk(ranks, 1), b.chunk(ranks, 0), strict=True))
        scales = [heal.exact_scales(x, y, products) for x, y in shards]
        a_scale = torch.stack([s[0] for s in scales]).amax(0)
        b_scale = torch.stack([s[1] for s in scales]).amax(0)
        parts = [heal.mm_partial(x, y, a_scale, b_scale, products) for x, y in shards]
        total = sum(reversed(parts))
        assert differing(heal.mm_total(total, a_scale, b_scale, products), whole) == 0


def test_summing_rounded_shards_would_show():
    """The inverse: the float sum of two finished halves is another number."""
    a, b = operands(5, 240, 12)
    halves = [exact_matmul(x, y) for x, y in zip(a.chunk(2, 1), b.chunk(2, 0), strict=True)]
    assert differing(halves[0] + halves[1], exact_matmul(a, b)) > 0


def test_a_shard_that_is_not_finite_makes_its_row_nan():
    a, b = operands(3, 8, 2)
    a[1, 3] = INF
    scales = heal.exact_scales(a, b, 5)
    total = heal.mm_total(heal.mm_partial(a, b, *scales, 5), *scales, 5)
    assert total.isnan().all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("right", [torch.bfloat16, torch.float32], ids=str)
def test_gradients_have_the_same_bits_under_every_rule(right):
    """dX reduces over the weight's channels: each operand is split anew along what is summed."""
    a, b = operands(6, 90, 20, right)
    upstream = torch.randn(6, 20, generator=torch.Generator().manual_seed(1))

    def gradients(numerics):
        x, w = a.clone().requires_grad_(), b.clone().requires_grad_()
        return torch.autograd.grad(heal.mm(x, w, numerics), (x, w), upstream)

    first = gradients("exact5")
    for numerics in ("exact5::3", "exact5:v100", "exact5:a100:2", "exact5:h100", "exact5:b200"):
        assert differing(gradients(numerics), first) == 0
    bound = error_bound(upstream, b.t(), 5)
    assert ((first[0].double() - upstream.double() @ b.t().double()).abs() <= bound).all()


def test_opcheck_is_green():
    a, b = operands(3, 8, 2)
    scales = heal.exact_scales(a, b, 5)
    partial = heal.mm_partial(a, b, *scales, 5)
    torch.library.opcheck(heal.exact_scales.default, (a, b, 5))
    torch.library.opcheck(heal.mm_partial.default, (a, b, *scales, 5))
    torch.library.opcheck(heal.mm_total.default, (partial, *scales, 5))
