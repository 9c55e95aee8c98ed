"""Exact sums and what is made of them: one value in any order, close to the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import healpass.ops  # noqa: F401
from healpass.ops.reproducible import fp64
from healpass.ops.reproducible.reduce import ACCUMULATOR_BITS, ELEMENT_BITS, element_bits
from tests.support.against_torch import flat
from tests.support.bits import assert_rounded_once, compiled, differing, ordinary

heal = torch.ops.heal
INF, NAN = float("inf"), float("nan")
#: Unit roundoffs.
U, U64 = 2.0**-24, 2.0**-53
#: From exact integers to FP64, and from there to the unit; a mean also divides.
SUM_ERROR, MEAN_ERROR = 2 * U64, 3 * U64
#: Relative to the largest term, per term: made an integer here, added in FP64 by the reference.
PER_TERM = 2.0**-ELEMENT_BITS


def heavy(*shape: int, seed: int = 0) -> torch.Tensor:
    """Numbers over sixty binary orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-30, 30, shape, generator=generator)
    return torch.randn(shape, generator=generator) * 2.0**exponents


def shuffled(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return x.index_select(dim, torch.randperm(x.shape[dim], generator=generator))


# ---------------------------------------------------------------------------------------- sums


def test_no_number_of_terms_overflows_the_accumulator():
    for terms in (1, 2, 2**22, 2**22 + 1, 2**30, 2**40):
        assert terms * 2 ** element_bits(terms) <= 2**ACCUMULATOR_BITS
    assert element_bits(1) == element_bits(2**22) == ELEMENT_BITS, "padding must not change bits"


@given(
    terms=st.integers(1, 3000),
    seed=st.integers(0, 2**16),
    scale=st.integers(-140, 90),
)
def test_a_sum_has_one_value_in_any_order_and_is_within_its_bound(terms, seed, scale):
    x = heavy(terms, seed=seed) * 2.0**scale
    found = heal.sum(x)
    assert differing(heal.sum(shuffled(x)), found) == 0
    assert differing(heal.sum(F.pad(x, (3, 40))), found) == 0
    exact = torch.tensor(math.fsum(x.tolist()), dtype=torch.float64)
    assert_rounded_once(found, exact, SUM_ERROR, terms * PER_TERM * x.double().abs().max())


def test_torchs_sum_depends_on_the_order():
    """The inverse: the same check finds the float reduction out."""
    x = heavy(3000)
    assert differing(shuffled(x).sum(), x.sum()) > 0


@pytest.mark.parametrize("dim", [None, [0], [1, 2], [-1], []], ids=str)
@pytest.mark.parametrize("keepdim", [False, True])
def test_sum_and_mean_over_any_dimensions(dim, keepdim):
    x = heavy(3, 4, 5).transpose(0, 2)
    wide = x.double()
    terms = x.numel() // max(1, wide.sum(dim, keepdim).numel())
    # The reference adds as many numbers in FP64, each sum at most `terms` times the largest.
    each = (PER_TERM + terms * U64) * wide.abs().amax(dim or (0, 1, 2), keepdim)
    exact = wide.sum(dim, keepdim)
    assert_rounded_once(heal.sum(x, dim, keepdim), exact, SUM_ERROR, terms * each)
    assert_rounded_once(heal.mean(x, dim, keepdim), exact / terms, MEAN_ERROR, each)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, INF, -3e38], INF),
        ([3e38, 3e38, -INF], -INF),
        ([INF, -INF], NAN),
        ([1.0, NAN], NAN),
        ([3e38, 3e38, -3e38], 3e38),
        ([3e38, 3e38], INF),
        ([-0.0, -0.0], 0.0),
        ([2.0**-149, 2.0**-149], 2.0**-148),
        ([], 0.0),
    ],
)
def test_special_sums(values, expected):
    for order in (values, values[::-1]):
        found = heal.sum(torch.tensor(order))
        assert differing(found, torch.tensor(expected)) == 0
    assert heal.mean(torch.tensor([])).isnan()


def test_cumulative_sums():
    x = heavy(4, 300)
    found, exact = heal.cumsum(x, 1), x.double().cumsum(1)
    each = (PER_TERM + 300 * U64) * x.double().abs().amax(1, keepdim=True)
    assert_rounded_once(found, exact, SUM_ERROR, 300 * each)
    assert differing(found[:, -1], heal.sum(x, [1])) == 0
    assert differing(compiled(lambda x: heal.cumsum(x, 1))(x), found) == 0
    endless = heal.cumsum(torch.tensor([1.0, INF, 2.0, -INF]), 0)
    assert torch.equal(endless.nan_to_num(7.0), torch.tensor([1.0, INF, INF, 7.0]).nan_to_num(7.0))


def test_variance():
    x = ordinary(600).reshape(3, 200) + 1e4
    distances = x.double() - x.double().mean(1, keepdim=True)
    largest = distances.abs().amax(1)
    # A distance is off by three roundings of x, mean and difference, its square by twice that
    # times the largest distance, and likewise the reference's; the squares are then summed.
    off = 2 * 2 * largest * 3 * U64 * x.double().abs().amax(1)
    absolute = 200 / 199 * (off + PER_TERM * largest**2)
    assert_rounded_once(heal.var(x, [1], 1.0), x.double().var(1), MEAN_ERROR, absolute)
    assert heal.var(x[:, :1], [1], 1.0).isnan().all()


# ----------------------------------------------------------------------------- norms and softmax

ROWS = ordinary(7 * 65, 3.0).reshape(7, 65)
WEIGHT, BIAS = ordinary(65, seed=1), ordinary(65, seed=2)
CASES = {
    "rms_norm": (
        lambda x: heal.rms_norm(x, [65], WEIGHT, 1e-5),
        lambda x: F.rms_norm(x, [65], WEIGHT.to(x.dtype), 1e-5),
    ),
    "layer_norm": (
        lambda x: heal.layer_norm(x, [65], WEIGHT, BIAS, 1e-5),
        lambda x: F.layer_norm(x, [65], WEIGHT.to(x.dtype), BIAS.to(x.dtype), 1e-5),
    ),
    "softmax": (lambda x: heal.softmax(x, -1), lambda x: x.softmax(-1)),
    "log_softmax": (lambda x: heal.log_softmax(x, -1), lambda x: x.log_softmax(-1)),
    "mean": (lambda x: heal.mean(x, [1], True), lambda x: x.mean(1, True)),
    "var": (lambda x: heal.var(x, [1], 1.0, True), lambda x: x.var(1, keepdim=True)),
    "cumsum": (lambda x: heal.cumsum(x, 1), lambda x: x.cumsum(1)),
}


@pytest.mark.parametrize("name", CASES)
def test_rows_are_rounded_once_and_independent_of_their_batch(name):
    ours, theirs = CASES[name]
    found, exact = ours(ROWS), theirs(ROWS.double())
    # The sum of 65 terms before the one rounding: of the result itself in a softmax, elsewhere
    # (a mean and a bias cancel) of the largest number of the row.
    summed = 65 * PER_TERM
    size = torch.maximum(ROWS.double().abs(), exact.abs()).amax(-1, keepdim=True)
    absolute = 0.0 if name == "softmax" else summed * size
    assert_rounded_once(found, exact, fp64.ERROR + summed, absolute)
    for rows in (slice(0, 1), slice(3, 5)):
        assert differing(ours(ROWS[rows]), found[rows]) == 0


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm", "softmax", "log_softmax", "mean"])
def test_compiled_code_gives_the_eager_bits(name):
    ours, _ = CASES[name]
    x = torch.cat([ROWS, heavy(6, 65), torch.full((1, 65), INF), torch.zeros(1, 65)])
    x[8, 3] = NAN
    x[9, 4] = -INF
    assert differing(compiled(ours)(x), ours(x)) == 0


@pytest.mark.deep
@pytest.mark.parametrize("simdlen", [256, 1], ids=["avx2", "scalar"])
@pytest.mark.parametrize("name", CASES)
def test_compiled_code_gives_the_eager_bits_at_other_widths(name, simdlen):
    ours, _ = CASES[name]
    assert differing(compiled(ours, **{"cpp.simdlen": simdlen})(ROWS), ours(ROWS)) == 0


def test_hidden_keys_do_not_change_a_softmax():
    """Padding with -inf on either side, by any length: the same weights."""
    for left, right in ((0, 1), (5, 0), (100, 31)):
        padded = heal.softmax(F.pad(ROWS, (left, right), value=-INF), -1)
        assert differing(padded[:, left : left + 65], heal.softmax(ROWS, -1)) == 0


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_special_rows_are_torchs(name):
    rows = torch.tensor(
        [[1.0, INF, 0.0], [NAN, 1.0, 2.0], [-INF] * 3, [-INF, 0.0, 1.0], [3e38, -3e38, 3e38]]
    )
    ours, theirs = CASES[name]
    # A logarithm of a softmax is a difference: of the largest score, and of ln 3 at most.
    scores = rows.double().abs().where(rows.isfinite(), 0.0).amax(-1, keepdim=True) + math.log(3)
    absolute = 0.0 if name == "softmax" else fp64.ERROR * scores
    assert_rounded_once(ours(rows), theirs(rows.double()), fp64.ERROR + 3 * PER_TERM, absolute)


def gradients(function, *inputs):
    inputs = [x.clone().requires_grad_() for x in inputs]
    result = function(*inputs)
    upstream = ordinary(result.numel(), seed=5).reshape(result.shape).to(result.dtype)
    return torch.autograd.grad(result, inputs, upstream)


#: Of the longest gradient, a softmax's, y (g - sum y g): y, sum, difference and product.
GRADIENT_ROUNDINGS = 4


@pytest.mark.parametrize("name", CASES)
def test_gradients(name):
    """Against FP64's: twice FP32's error, or the roundings of ours, in the maximum norm."""
    ours, theirs = CASES[name]
    (found,), (exact,) = gradients(ours, ROWS), gradients(theirs, ROWS.double())
    (single,) = gradients(theirs, ROWS)
    error = (found.double() - exact).abs().max()
    yardstick = (single.double() - exact).abs().max()
    bound = 2 * yardstick + GRADIENT_ROUNDINGS * U * exact.abs().max()
    print(f"{name}: observed/bound {float(error / bound):.3f}")
    assert error <= bound


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm"])
def test_gradients_of_weights_do_not_depend_on_the_order_of_rows(name):
    def norm(x, weight, bias):
        if name == "rms_norm":
            return heal.rms_norm(x, [65], weight, 1e-5) + 0 * bias
        return heal.layer_norm(x, [65], weight, bias, 1e-5)

    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))

    def run(rows):
        x, w, b = (t.clone().requires_grad_() for t in (ROWS[rows], WEIGHT, BIAS))
        upstream = ordinary(7 * 65, seed=5).reshape(7, 65)[rows]
        return torch.autograd.grad(norm(x, w, b), (w, b), upstream)

    if name == "layer_norm":
        assert differing(run(order), run(torch.arange(7))) == 0
    else:
        assert differing(run(order)[0], run(torch.arange(7))[0]) == 0


#: The logarithm, the target's smoothing (a product and a sum), the class weight, the product of
#: these with it, the sum over classes, the sum over positions, the division by the weights.
LOSS_ROUNDINGS = 8


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_means_what_torchs_does(reduction, weighted, smoothing):
    logits = ordinary(6 * 5 * 4, 2.0).reshape(6, 5, 4)
    weight = ordinary(5, seed=3).abs() if weighted else None
    classes = torch.randint(0, 5, (6, 4), generator=torch.Generator().manual_seed(0))
    classes[0, 0] = -100
    for target in (classes, logits.softmax(1).flip(1)):
        found = heal.cross_entropy(logits, target, weight, -100, reduction, smoothing)
        wide = None if weight is None else weight.double()
        wide_target = target.double() if target.is_floating_point() else target
        exact = F.cross_entropy(
            logits.double(), wide_target, wide, reduction=reduction, label_smoothing=smoothing
        )
        largest = logits.double().log_softmax(1).abs().max()
        heaviest = 1.0 if wide is None else max(1.0, wide.max())
        positions = classes.numel() if reduction == "sum" else 1
        bound = LOSS_ROUNDINGS * U * positions * largest * heaviest
        error = (found.double() - exact).abs().max()
        print(f"observed/bound {float(error / bound):.3f}")
        assert error <= bound
        if reduction != "none":
            assert differing(
                heal.cross_entropy(shuffled(logits, 0), shuffled(target, 0), weight, -100,
                                   reduction, smoothing),
                found,
            ) == 0  # fmt: skip


def operator_calls():
    x = ROWS.clone().requires_grad_()
    yield "sum", (x, [1], False)
    yield "mean", (x, None, False)
    yield "var", (x, [0], 0.0, True)
    yield "cumsum", (x, 0)
    yield "rms_norm", (x, [65], WEIGHT, 1e-5)
    yield "layer_norm", (x, [65], WEIGHT, BIAS, 1e-5)
    yield "softmax", (x, 1)
    yield "log_softmax", (x, 0)
    for name in ("add", "sub", "mul", "div", "pow"):
        yield name, (x.detach().abs().requires_grad_(), WEIGHT)
    yield "pow_scalar", (x, 2.0)


@pytest.mark.parametrize("call", list(operator_calls()), ids=lambda call: call[0])
def test_opcheck_is_green(call):
    name, args = call
    results = torch.library.opcheck(getattr(heal, name).default, args)
    assert set(results.values()) == {"SUCCESS"}


# -------------------------------------------------------------------------------------- binary


@pytest.mark.parametrize("name", ["add", "sub", "mul", "div"])
def test_arithmetic_is_ieee(name):
    """Against NumPy's FP32, which is the processor's; zeros and NaN canonical."""
    a, b = heavy(5000), heavy(5000, seed=1)
    function = {"add": "add", "sub": "subtract", "mul": "multiply", "div": "divide"}[name]
    expected = torch.from_numpy(getattr(np, function)(a.numpy(), b.numpy()))
    assert differing(getattr(heal, name)(a, b), expected) == 0


POWERS = [
    (2.0, 3.0), (2.0, -1.0), (-2.0, 3.0), (-2.0, 2.0), (-2.0, 0.5), (0.0, 0.0), (0.0, 2.0),
    (0.0, -2.0), (INF, 0.0), (INF, -1.0), (-INF, 3.0), (-INF, 2.0), (1.0, NAN),
    (NAN, 0.0), (NAN, 1.0), (2.0, INF), (0.5, INF), (2.0, -INF), (-1.0, INF), (1e30, 1.5),
    (1.1, 300.0), (3.0, 40.0), (-3.0, 41.0), (2.0, -149.0), (1e-30, 2.0),
]  # fmt: skip


@pytest.mark.parametrize(("base", "exponent"), POWERS)
def test_powers_have_the_special_cases_of_c(base, exponent):
    exact = torch.tensor(base).double().pow(torch.tensor(exponent).double())
    found = heal.pow(torch.tensor(base), torch.tensor(exponent))
    assert_rounded_once(found, exact, fp64.ERROR)
    assert differing(heal.pow_scalar(torch.tensor([base]), exponent)[0], found) == 0


def test_powers_are_within_their_bound():
    base, exponent = ordinary(50_000, 10.0).abs(), ordinary(50_000, 8.0, seed=1)
    exact = base.double().pow(exponent.double())
    regular = (exact > 2.0**-126) & (exact < 2.0**127)
    unit = torch.exp2(torch.floor(torch.log2(exact)) - 23)
    error = ((heal.pow(base, exponent).double() - exact).abs() / unit)[regular].max()
    print(f"pow: {float(error):.6f} ulp")
    assert error <= fp64.places(fp64.ERROR)


def test_gradients_of_broadcasting_are_exact_sums():
    a, b = heavy(40, 30), heavy(30, seed=1)
    for name in ("add", "mul", "div"):
        function = getattr(heal, name)

        def run(rows, function=function):
            x, w = a[rows].clone().requires_grad_(), b.clone().requires_grad_()
            return torch.autograd.grad(function(x, w), w, heavy(40, 30, seed=2)[rows])

        order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
        assert differing(run(order), run(torch.arange(40))) == 0
    assert all(leaf.dtype == torch.float32 for leaf in flat(run(order)))
