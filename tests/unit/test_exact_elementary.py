"""Elementary functions: as accurate as promised, defined everywhere, with one result."""

from __future__ import annotations

import math
from pathlib import Path

import mpmath
import pytest
import torch
import torch.nn.functional as F

import healpass.ops  # noqa: F401
from healpass.arithmetic import approximations
from healpass.ops.reproducible import fp64, fp64_coefficients
from healpass.ops.reproducible.elementary import FUNCTIONS
from tests.support.bits import (
    SPECIAL,
    any_floats,
    assert_rounded_once,
    compiled,
    differing,
    ordinary,
    ulp,
)

heal = torch.ops.heal
#: torch's FP64 functions, a few FP64 ulp off at most, and mpmath's, which check those.
REFERENCES = {
    "exp": (torch.exp, mpmath.exp),
    "exp2": (torch.exp2, lambda x: mpmath.power(2, x)),
    "expm1": (torch.expm1, mpmath.expm1),
    "log": (torch.log, mpmath.log),
    "log2": (torch.log2, lambda x: mpmath.log(x, 2)),
    "log10": (torch.log10, mpmath.log10),
    "log1p": (torch.log1p, mpmath.log1p),
    "sin": (torch.sin, mpmath.sin),
    "cos": (torch.cos, mpmath.cos),
    "tanh": (torch.tanh, mpmath.tanh),
    "erf": (torch.erf, mpmath.erf),
    "erfc": (torch.erfc, mpmath.erfc),
    "sigmoid": (torch.sigmoid, lambda x: 1 / (1 + mpmath.exp(-x))),
    "silu": (F.silu, lambda x: x / (1 + mpmath.exp(-x))),
    "gelu": (
        lambda x: 0.5 * x * torch.erfc(-x * math.sqrt(0.5)),
        lambda x: x * mpmath.ncdf(x),
    ),
    "gelu_tanh": (
        lambda x: x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)),
        lambda x: x / (1 + mpmath.exp(-mpmath.sqrt(8 / mpmath.pi) * (x + 0.044715 * x**3))),
    ),
    "softplus": (
        lambda x: x.clamp(min=0) + torch.log1p(torch.exp(-x.abs())),
        lambda x: mpmath.log1p(mpmath.exp(x)),
    ),
    "logsigmoid": (
        lambda x: x.clamp(max=0) - torch.log1p(torch.exp(-x.abs())),
        lambda x: -mpmath.log1p(mpmath.exp(-x)),
    ),
    "sqrt": (torch.sqrt, mpmath.sqrt),
    "rsqrt": (torch.rsqrt, lambda x: 1 / mpmath.sqrt(x)),
    "reciprocal": (torch.reciprocal, lambda x: 1 / mpmath.mpf(x)),
}
#: The relative error before the rounding to FP32, which `reproducible.fp64` derives.
ERRORS = dict.fromkeys(FUNCTIONS, fp64.ERROR) | dict.fromkeys(("sin", "cos"), fp64.SINE_ERROR)
#: Bound on the error in ulp, after it.
BOUNDS = {name: fp64.places(error) for name, error in ERRORS.items()}
#: How far a reference may be off: a quarter of what it judges.
REFERENCE_ERROR = fp64.ERROR / 4


def worst(name: str, function, x: torch.Tensor) -> float:
    """The largest error in ulp over finite results; others must be the rounded reference."""
    exact = REFERENCES[name][0](fp64.to_fp64(x))  # zeros are +0
    found = function(x)
    regular = (exact.abs() < 2.0**128 - 2.0**103) & x.isfinite()
    expected = exact.float()
    assert torch.equal(found[~regular].nan_to_num(7.0), expected[~regular].nan_to_num(7.0))
    error = ((found.double() - exact).abs() / ulp(exact))[regular]
    return float(error.max()) if error.numel() else 0.0


def sample(count: int) -> torch.Tensor:
    return torch.cat([any_floats(count), ordinary(count), ordinary(count, 10.0)])


def test_the_coefficients_are_those_that_the_generator_makes():
    assert Path(fp64_coefficients.__file__).read_text() == approximations.module()


@pytest.mark.parametrize("fit", approximations.APPROXIMATIONS, ids=lambda fit: fit.name)
def test_a_fit_leaves_three_quarters_of_the_error_to_roundings(fit):
    """Its largest error is at most a quarter of `ERROR`, of the smallest value that it takes."""
    _, error = fit.coefficients()
    steps = [fit.low + (fit.high - fit.low) * i / 64 for i in range(65)]
    with mpmath.workdps(approximations.DIGITS):
        smallest = min(float(abs(fit.function(mpmath.mpf(step)))) for step in steps)
    print(f"{fit.name}: observed/bound {error / smallest / (fp64.ERROR / 4):.3g}")
    assert error / smallest <= fp64.ERROR / 4


def test_the_constants_are_what_they_say():
    with mpmath.workdps(120):
        digits = int(mpmath.floor(2 / mpmath.pi * 2**224))
        assert digits == sum(w << (32 * i) for i, w in enumerate(reversed(fp64.TWO_OVER_PI)))
        assert abs(mpmath.log(2) - fp64.LN2_HIGH - fp64.LN2_LOW) < mpmath.mpf(2) ** -86
        root = torch.tensor(fp64.SQRT_HALF_BITS).view(torch.float64).item()
        assert root == float(mpmath.sqrt(0.5))
    assert (200 * fp64.LN2_HIGH) / fp64.LN2_HIGH == 200  # the multiple is exact


@pytest.mark.parametrize("name", FUNCTIONS)
def test_error_is_within_its_bound(name):
    error = worst(name, getattr(heal, name), sample(100_000))
    print(f"{name}: {error:.7f} ulp, observed/bound {error / BOUNDS[name]:.4f}")
    assert error <= BOUNDS[name]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_reference_is_right(name):
    """torch's FP64 functions against 40 digits: far closer than what they judge."""
    mine, truth = REFERENCES[name]
    x = torch.cat([ordinary(60, 3.0, seed=1), ordinary(60, 1e-4), any_floats(60, seed=2)])
    x = x[x.isfinite() & (x.abs() < 1e30)]
    for argument, value in zip(x.tolist(), mine(x.double()).tolist(), strict=True):
        if not math.isfinite(value) or abs(value) < 2.0**-149:
            continue
        with mpmath.workdps(60):
            exact = truth(mpmath.mpf(argument))
            assert abs(value - exact) <= abs(exact) * REFERENCE_ERROR, argument


@pytest.mark.deep
@pytest.mark.parametrize("name", FUNCTIONS)
def test_error_is_within_its_bound_for_every_fp32_number(name):
    """All 2^32 of them, through compiled code, whose bits are those of eager code."""
    function = compiled(getattr(heal, name))
    step, largest = 1 << 18, 0.0  # what fits a cache takes a fifth of the time
    for start in range(-(1 << 31), 1 << 31, step):
        bits = torch.arange(start, start + step, dtype=torch.int64).to(torch.int32)
        largest = max(largest, worst(name, function, bits.view(torch.float32)))
    print(f"{name}: {largest:.7f} ulp over FP32, observed/bound {largest / BOUNDS[name]:.4f}")
    assert largest <= BOUNDS[name]


def test_torchs_own_exp_is_not_what_is_promised():
    """The inverse: torch's FP32 exp is good to an ulp, and another at other vector widths."""
    assert differing(torch.exp(sample(100_000)), heal.exp(sample(100_000))) > 0


# ------------------------------------------------------------------------------- special values

INF, NAN = float("inf"), float("nan")
LARGEST = torch.finfo(torch.float32).max
with mpmath.workdps(60):
    SINE_OF_LARGEST = float(mpmath.sin(LARGEST))
AT_SPECIAL = {
    # at 0, 1, 2^-149, 2^-126, the largest number, +inf, -inf
    "exp": (1.0, math.e, 1.0, 1.0, INF, INF, 0.0),
    "expm1": (0.0, math.e - 1, 2.0**-149, 2.0**-126, INF, INF, -1.0),
    "log": (-INF, 0.0, -149 * math.log(2), -126 * math.log(2), math.log(LARGEST), INF, NAN),
    "log1p": (0.0, math.log(2), 2.0**-149, 2.0**-126, math.log1p(LARGEST), INF, NAN),
    "sin": (0.0, math.sin(1), 2.0**-149, 2.0**-126, SINE_OF_LARGEST, NAN, NAN),
    "tanh": (0.0, math.tanh(1), 2.0**-149, 2.0**-126, 1.0, 1.0, -1.0),
    "silu": (0.0, 1 / (1 + 1 / math.e), 2.0**-150, 2.0**-127, LARGEST, INF, NAN),
    "rsqrt": (INF, 1.0, 2.0**74.5, 2.0**63, LARGEST**-0.5, 0.0, NAN),
    "sqrt": (0.0, 1.0, 2.0**-74.5, 2.0**-63, LARGEST**0.5, INF, NAN),
}


@pytest.mark.parametrize("name", AT_SPECIAL)
def test_special_values(name):
    x = torch.tensor([0.0, 1.0, 2.0**-149, 2.0**-126, LARGEST, INF, -INF])
    exact = torch.tensor(AT_SPECIAL[name], dtype=torch.float64)
    assert_rounded_once(getattr(heal, name)(x), exact, ERRORS[name])


def test_a_result_two_ulp_away_is_not_rounded_once():
    """The inverse of the check: also where infinity is due, and in subnormals."""
    for exact in (1.0, 2.0**-140, INF, NAN):
        wrong = torch.tensor([exact + 2.0**-22 if exact == 1.0 else 2.0**-149])
        with pytest.raises(AssertionError):
            assert_rounded_once(wrong, torch.tensor([exact], dtype=torch.float64), fp64.ERROR)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_sign_of_zero_and_the_bits_of_nan_carry_nothing(name):
    function = getattr(heal, name)
    results = torch.cat([function(SPECIAL), function(any_floats(1000))]).view(torch.int32)
    assert not (results == fp64.SIGN_BIT).any()
    nan = (results & fp64.MAGNITUDE) > fp64.INFINITY
    assert (results[nan] == fp64.QUIET_NAN).all()
    zeros = function(torch.tensor([0.0, -0.0]))
    assert differing(zeros[0], zeros[1]) == 0


@pytest.mark.parametrize("name", FUNCTIONS)
def test_shapes_strides_and_dtypes(name):
    function, x = getattr(heal, name), ordinary(24).abs().reshape(2, 3, 4)
    whole = function(x)
    assert differing(function(x.transpose(0, 2)), whole.transpose(0, 2)) == 0
    assert differing(function(x[:, ::2]), whole[:, ::2]) == 0
    assert differing(function(x[0, 0, 0]), whole[0, 0, 0]) == 0
    assert function(x[:0]).shape == (0, 3, 4)
    half = x.bfloat16()
    assert differing(function(half), function(half.float())) == 0
    with pytest.raises(TypeError, match=r"got a torch\.float64 operand"):
        function(x.double())
    torch.library.opcheck(function.default, (x.requires_grad_(),))


#: FP64 roundings of a reference's slope, each of a part of at most 1 + |x|; the parts may cancel.
#: The longest formula, that of gelu_tanh, has fewer operations.
REFERENCE_ROUNDINGS = 16


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_gradient_is_the_slope(name):
    """Against torch's FP64 derivative of the FP64 reference, at points where it is regular."""
    x = ordinary(1000, 2.0).abs() + 0.01
    ours, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    (slope,) = torch.autograd.grad(getattr(heal, name)(ours).sum(), ours)
    (exact,) = torch.autograd.grad(REFERENCES[name][0](theirs).sum(), theirs)
    cancels = REFERENCE_ROUNDINGS * 2.0**-53 * (1 + theirs.abs())
    bound = ulp(exact) * BOUNDS["sin"] + cancels
    error = (slope.double() - exact).abs()
    print(f"{name}: observed/bound {float((error / bound).detach().max()):.3f}")
    assert (error <= bound).all()


# ------------------------------------------------------------------------------- the same bits


#: One of each kind: those that the others are made of.
CORE = ("exp", "log1p", "sin", "gelu", "rsqrt")
DEEP = [pytest.param(256, CORE, id="avx2"), pytest.param(1, CORE, id="scalar")]
DEEP += [pytest.param(None, tuple(FUNCTIONS), id="all functions")]


def each(names):
    return lambda x: tuple(getattr(heal, name)(x) for name in names)


@pytest.mark.parametrize(("simdlen", "names"), [
    pytest.param(None, CORE, id="widest"),
    *(pytest.param(*case.values, id=case.id, marks=pytest.mark.deep) for case in DEEP),
])  # fmt: skip
def test_compiled_code_gives_the_eager_bits(simdlen, names):
    x = torch.cat([any_floats(20_001), ordinary(5000, 5.0)])
    function = each(names)
    assert differing(compiled(function, **{"cpp.simdlen": simdlen})(x), function(x)) == 0


def test_two_threads_give_the_bits_of_one():
    x, threads = torch.cat([any_floats(50_003), ordinary(30_000)]), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = each(CORE)(x)
        torch.set_num_threads(2)
        assert differing(each(CORE)(x), one) == 0
    finally:
        torch.set_num_threads(threads)


def test_contraction_would_show():
    """The inverse: let the C++ compiler use fma, and FP64 intermediates differ."""
    x = (ordinary(20_000).abs() + 0.1).double()
    contracted = compiled(fp64.exp, **{"cpp.enable_floating_point_contract_flag": "fast"})
    assert differing(compiled(fp64.exp)(x), fp64.exp(x)) == 0
    torch._dynamo.reset()
    assert differing(contracted(x), fp64.exp(x)) > 0
