"""Steps in FP32 and INT32 equal those in FP64 and the reference bit for bit, where taken."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_tensorcore_simulate import TENSOR_CORES, reference

from healpass.arithmetic.formats import FORMATS
from healpass.ops.products.exact import Adders, exact_matmul
from healpass.tensorcore import RULES, Schedule, narrow, simulate, simulate_matmul, wide
from tests.support.profiles import examples

HALF, BF16 = torch.float16, torch.bfloat16
#: Exponents of elements that both still fit, and what their sum may be at most for K <= 64.
LOWEST, HIGHEST = {HALF: -24, BF16: -55}, {HALF: 15, BF16: 58}


def same(x, y):
    """Also the signs of zeros; a NaN is a NaN."""
    return torch.equal(x.isnan(), y.isnan()) and torch.equal(
        x.nan_to_num(0).view(torch.int32), y.nan_to_num(0).view(torch.int32)
    )


def elements(shape, dtype, low, high, seed, zeros=0.15):
    """Exponents uniform in [low, high], all significands, both signs, and zeros."""
    generator = torch.Generator().manual_seed(seed)

    def uniform():
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    x = (1 + uniform()) * 2.0 ** (low + (high - low + 1) * uniform()).floor()
    x = torch.where(uniform() < 0.5, -x, x)
    largest = torch.finfo(dtype).max
    return torch.where(uniform() < zeros, 0.0, x).clamp(-largest, largest).to(dtype)


def repeated(x, dim, sign):
    """The second half of K is the first, with a sign."""
    half = x.narrow(dim, 0, x.shape[dim] // 2)
    return torch.cat((half, x.narrow(dim, 0, x.shape[dim] % 2), sign * half), dim)


@st.composite
def products(draw):
    dtype = draw(st.sampled_from([HALF, BF16]))
    lows, highs = [], []
    for _ in range(2):
        low = draw(st.integers(LOWEST[dtype], HIGHEST[dtype]))
        lows.append(low)
        highs.append(
            draw(
                st.integers(low, min(low + draw(st.sampled_from([0, 3, 12, 113])), HIGHEST[dtype]))
            )
        )
    m, k, n = draw(st.integers(1, 3)), draw(st.integers(1, 64)), draw(st.integers(1, 3))
    seed = draw(st.integers(0, 2**16))
    count = draw(st.integers(1, 2))
    zeros = draw(st.sampled_from([0.0, 0.15, 0.9]))
    a = [elements((m, k), dtype, lows[0], highs[0], seed + 2 * i, zeros) for i in range(count)]
    b = [elements((k, n), dtype, lows[1], highs[1], seed + 2 * i + 1, zeros) for i in range(count)]
    if draw(st.booleans()):
        a, b = [repeated(x, 1, -1) for x in a], [repeated(x, 0, 1) for x in b]  # sums cancel
    return a, b


SCHEDULES = st.builds(
    Schedule,
    tile_k=st.sampled_from([16, 64]),
    promote_every=st.sampled_from([16, 64, None]),
    order=st.integers(0, 3),
    split_k=st.integers(1, 3),
)


def in_fp64(a, b, rule, schedule):
    step = simulate._step(wide.truncated, RULES[rule], False)
    how = simulate.Arithmetic(step, torch.float64, wide.powers)
    return simulate._product(a, b, how, schedule)


def in_fp32(a, b, rule, schedule):
    step = simulate._step(narrow.truncated, RULES[rule], False)
    how = simulate.Arithmetic(step, torch.float32, narrow.exponents)
    return simulate._product(a, b, how, schedule)


def agree(case, rule, schedule):
    return same(in_fp32(*case, rule, schedule), in_fp64(*case, rule, schedule))


@examples(400)
@given(products(), st.sampled_from(TENSOR_CORES), SCHEDULES)
def test_narrow_steps_equal_wide_ones_and_the_reference(case, rule, schedule):
    assert narrow.fits(*case)
    assert agree(case, rule, schedule)
    assert same(in_fp32(*case, rule, schedule), reference(*case, rule, schedule))


@examples(100)
@given(
    st.sampled_from(TENSOR_CORES),
    st.sampled_from([HALF, BF16]),
    st.sampled_from([20, 60, 120]),
    st.sampled_from([None, math.inf, -math.inf, math.nan]),
    st.integers(0, 2**16),
)
def test_every_operand_is_right_wherever_it_is_computed(rule, dtype, spread, special, seed):
    a = elements((3, 40), dtype, -spread, spread, seed)
    b = elements((40, 3), dtype, -spread, spread, seed + 1)
    if special is not None:
        a[seed % 3, seed % 40] = special
    got = simulate_matmul([a], [b], rule)
    how = Schedule(promote_every=RULES[rule].promote_every)
    assert same(got, in_fp64([a], [b], rule, how))
    assert special is None or not narrow.fits([a], [b])


@pytest.mark.parametrize("rule", TENSOR_CORES)
@pytest.mark.parametrize("low", [-110, -90])
def test_groups_of_zeros_beside_a_tiny_accumulator(rule, low):
    """The smallest accumulators that fit: aligning to a larger exponent must lose nothing."""
    a = torch.zeros(4, 64, dtype=BF16)
    a[:, :3] = elements((4, 3), BF16, low // 2, low // 2, 0, zeros=0)
    b = elements((64, 4), BF16, low // 2, low // 2 + 3, 1)
    assert narrow.fits([a], [b])
    y = in_fp32([a], [b], rule, Schedule(promote_every=None))
    assert y.any()
    assert same(y, reference([a], [b], rule, Schedule(promote_every=None)))


def largest_sums(dtype, sign=1):
    """Products just below four times the power of two they are aligned to, and 16 more of them on
    an accumulator just below twice that."""
    largest = 2 - 2.0 ** (1 - FORMATS[dtype].precision)
    a, b = torch.full((2, 64), sign * largest).to(dtype), torch.full((64, 2), largest).to(dtype)
    a[1, 0], a[1, 1:16] = sign, 0
    return [a], [b]


@pytest.mark.parametrize("rule", TENSOR_CORES)
@pytest.mark.parametrize("dtype", [HALF, BF16])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_of_integers_do_not_overflow(rule, dtype, sign):
    case = largest_sums(dtype, sign)
    assert narrow.fits(*case)
    for every in (16, None):
        schedule = Schedule(promote_every=every)
        assert same(in_fp32(*case, rule, schedule), reference(*case, rule, schedule))


def one(value, dtype=BF16):
    return [torch.tensor([[value, 0.0]]).to(dtype)]


@pytest.mark.parametrize(
    ("a", "b", "taken"),
    [
        (one(65504.0, HALF), one(2.0**-24, HALF), True),
        (one(math.inf, HALF), one(1.0, HALF), False),
        (one(math.nan, HALF), one(1.0, HALF), False),
        (one(0.0), one(0.0), True),
        (one(2.0**-55), one(2.0**-55), True),
        (one(2.0**-56), one(2.0**-55), False),
        (one(2.0**-126), one(2.0**16), True),
        (one(2.0**-133), one(2.0**16), True),
        (one(2.0**-126), one(2.0**15), False),
        (one(2.0**62), one(2.0**62), True),
        (one(2.0**63), one(2.0**62), False),
        (one(math.inf), one(1.0), False),
        (one(3e38), one(0.0), True),
    ],
)
def test_which_operands_fit(a, b, taken):
    """Two terms of K: sums stay below 2 * 4 * 2^(ea + eb)."""
    b = [x.t() for x in b]
    assert narrow.fits(a, b) == taken
    for rule in TENSOR_CORES:
        how = Schedule(promote_every=RULES[rule].promote_every)
        assert same(simulate_matmul(a, b, rule), reference(a, b, rule, how))


def test_ordinary_operands_take_the_narrow_steps(monkeypatch):
    """Activations and weights of either format, and the digits of `exact`."""
    calls = {"narrow": 0, "wide": 0}
    for module in (narrow, wide):
        name, step = module.__name__.rpartition(".")[2], module.truncated

        def counted(*args, name=name, step=step, **kwargs):
            calls[name] += 1
            return step(*args, **kwargs)

        monkeypatch.setattr(module, "truncated", counted)
    x, w = torch.randn(4, 40), torch.randn(40, 4) / 50
    for dtype in (HALF, BF16):
        simulate_matmul([x.to(dtype)], [w.to(dtype)], "a100")
    assert calls == {"narrow": 6, "wide": 0}
    assert torch.equal(exact_matmul(x, w, 5, Adders("h100")), exact_matmul(x, w, 5))
    assert calls == {"narrow": 6 + 6 * 3, "wide": 0}
    simulate_matmul([x.bfloat16() * 1e30], [w.bfloat16() * 1e30], "a100")
    assert calls == {"narrow": 24, "wide": 3}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("_LOWEST_TOP", -20),
        ("_OF_ZERO", 40),
        ("LANES", 16),
        ("_chopped_sum", lambda sums: (sums[0].double() + sums[1].double()).float()),
        ("_chopped", lambda total: total.float()),
    ],
)
def test_a_broken_step_is_noticed(name, value, monkeypatch):
    rule = "a100" if name == "_chopped" else "h100"
    cases = [largest_sums(HALF)]
    for high in (-12, 0):
        a = elements((4, 64), HALF, -15, high, 0, zeros=0.5)
        b = elements((64, 4), HALF, -15, high, 1, zeros=0.5)
        cases.append(([a], [b]))
    schedule = Schedule(promote_every=None)
    assert all(agree(case, rule, schedule) for case in cases)
    monkeypatch.setattr(narrow, name, value)
    assert not all(agree(case, rule, schedule) for case in cases)


# ------------------------------------------------------------------------------ fused multiply-add


def test_what_rounds_twice_is_not_taken_for_fused():
    def in_fp32_twice(c, a, b, _a, _b):
        return c + a[:, None, :, 0, None] * b[:, :, 0, None, :]

    def in_fp64_first(c, a, b, _a, _b):
        wide_sum = c.double() + a[:, None, :, 0, None].double() * b[:, :, 0, None, :].double()
        return wide_sum.float()

    def right(c, a, b, _a, _b):
        return wide.fused(*(x.double() for x in (c, a, b, _a, _b))).float()

    assert not narrow.is_fused(in_fp32_twice)
    assert not narrow.is_fused(in_fp64_first)
    assert narrow.is_fused(right)


def test_fused_multiply_adds_equal_the_wide_ones(monkeypatch):
    """FP32 of all magnitudes, results that vanish, are subnormal, overflow or are not numbers."""
    step = simulate._fused_step()
    if step is None:
        pytest.skip("no compiled program on this machine uses fused multiply-adds")
    for seed, (low, high) in enumerate([(-2, 2), (-80, -60), (-126, 127), (50, 70), (-12, 0)]):
        a = elements((40, 70), torch.float32, low, high, seed)
        b = elements((70, 90), torch.float32, low, high, seed + 50)
        a[0, 3], a[1, 5], b[9, 2] = math.inf, math.nan, -math.inf
        fast = simulate_matmul([a, a], [b, b], "sgemm", Schedule.of("sgemm", order=1))
        with monkeypatch.context() as patch:
            patch.setattr(simulate, "_fused_step", lambda: None)
            slow = simulate_matmul(
                [a, a], [b, b], "sgemm", Schedule.of("sgemm", order=1), compiled=False
            )
        assert same(fast, slow)


# ----------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("rule", [*TENSOR_CORES, "sgemm", "exact"])
@pytest.mark.parametrize("most", [1 << 19, 2 * 40 * 5, 64])
@pytest.mark.parametrize("batch", [1, 5])
def test_a_batch_is_its_matrices(rule, most, batch, monkeypatch):
    """In passes of all matrices, of two, or of some columns of one."""
    monkeypatch.setattr(simulate, "PASS", most)
    a = [elements((batch, 5, 33), HALF, -8, 8, seed) for seed in (0, 1)]
    b = elements((batch, 33, 40), HALF, -8, 8, 2)
    together = simulate_matmul(a, [b, b], rule, compiled=False)
    for i in range(batch):
        alone = simulate_matmul([x[i] for x in a], [b[i], b[i]], rule, compiled=False)
        assert same(together[i], alone)
        how = Schedule(promote_every=RULES[rule].promote_every)
        if most == 64:
            assert same(alone, reference([x[i] for x in a], [b[i], b[i]], rule, how))


def test_no_matrices():
    a, b = torch.ones(0, 2, 3).half(), torch.ones(0, 3, 4).half()
    assert simulate_matmul([a], [b], "h100").shape == (0, 2, 4)
