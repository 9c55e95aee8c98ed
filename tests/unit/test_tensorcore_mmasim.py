"""Our simulated tensor cores against MMA-Sim's, an independent model: every bit is the same.

What asks MMA-Sim itself is skipped where it is not installed (`make test-mmasim`); what compares
with its answers on record always runs.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_tensorcore_simulate import TENSOR_CORES, reference

from healpass.arithmetic.formats import BF16, FP16, FP32, FloatFormat
from healpass.tensorcore import (
    RULES,
    AccumulationRule,
    Schedule,
    simulate,
    simulate_matmul,
    wide,
)
from tests.support import mmasim
from tests.support.mmasim import GENERATIONS, Operands, disagreements, special, tiny
from tests.support.profiles import examples

#: One accumulator over all of K, as instructions that follow one another have it.
CHAIN = Schedule(promote_every=None)
FLOATS = (FP16, BF16)


@pytest.fixture(scope="module")
def asked():
    """MMA-Sim's models, each built once: `asked(rule, format)`."""
    pytest.importorskip("mmasim.nv_ptx.sim", reason="installed by `make test-mmasim`")
    built = {}

    def models(rule, fmt):
        if (rule, fmt) not in built:
            built[rule, fmt] = mmasim.models(rule, fmt)
        return built[rule, fmt]

    return models


def ours(rule: AccumulationRule | str, operands: Operands) -> torch.Tensor:
    a, b = operands.tensors()
    return simulate_matmul([a], [b], rule, CHAIN)


@st.composite
def drawn(draw, formats: tuple[FloatFormat, ...], unit: int = 1) -> Operands:
    """Special values, any bits, and numbers with tiny products, in one pool; K in `unit`s."""
    fmt = draw(st.sampled_from(formats))
    half = 1 << (8 * fmt.dtype.itemsize - 1)
    any_bits = st.integers(-half, half - 1).map(
        lambda i: torch.tensor([i], dtype=mmasim.integers(fmt)).view(fmt.dtype).double().item()
    )
    scale = st.integers(max(-80, fmt.min_exponent), max(-58, fmt.min_exponent + 4))
    small = st.builds(math.ldexp, st.floats(-2, 2), scale)
    finite = [value for value in special(fmt) if math.isfinite(value)]
    values = draw(
        st.sampled_from(
            [
                small,
                st.one_of(small, st.sampled_from(finite)),
                st.one_of(any_bits, st.sampled_from(special(fmt))),
            ]
        )
    )
    pool = draw(st.lists(values, min_size=1, max_size=8))
    shape = (draw(st.integers(1, 6)), unit * draw(st.integers(1, 80 // unit)), 6)
    zeros = draw(st.sampled_from([0.0, 0.3, 0.8]))
    return Operands(fmt, tuple(pool), shape, zeros, draw(st.integers(0, 2**16)))


@examples(200, deep=3000)
@given(st.sampled_from(list(GENERATIONS)), drawn(FLOATS))
def test_every_generation_adds_as_mmasim_says(asked, rule, operands):
    got = ours(rule, operands)
    for name, model in asked(rule, operands.fmt).items():
        assert disagreements(got, model(*operands.tensors())) == 0, name


@examples(60, deep=1000)
@given(drawn((FP32,), unit=16))
def test_sgemm_adds_as_a_chain_of_fused_multiply_adds_does(asked, operands):
    for model in asked("sgemm", FP32).values():
        assert disagreements(ours("sgemm", operands), model(*operands.tensors())) == 0


def tiny_products(fmt: FloatFormat) -> Operands:
    """Mostly zeros, and products around 2^-140 where the format has such."""
    return Operands(fmt, tiny(fmt, 0), (40, 80, 40), 0.7, 0)


@pytest.mark.parametrize("fmt", FLOATS, ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("rule", GENERATIONS)
def test_tiny_products_among_zeros(asked, rule, fmt):
    """Where the exponent of zero decides: sums below FP32's normal range."""
    a, b = tiny_products(fmt).tensors()
    got = simulate_matmul([a], [b], rule, CHAIN, compiled=False)
    assert got.any()
    for name, model in asked(rule, fmt).items():
        assert disagreements(got, model(a, b)) == 0, name


def test_tiny_products_among_zeros_compiled():
    """To C++, which has to keep the zeros apart; there is no need to ask anybody."""
    a, b = tiny_products(BF16).tensors()
    got = simulate_matmul([a], [b], "h100", CHAIN, compiled=True)
    assert not disagreements(got, simulate_matmul([a], [b], "h100", CHAIN, compiled=False))


@pytest.mark.parametrize("rule", GENERATIONS)
def test_a_missing_floor_is_noticed(asked, rule):
    """Zero with the exponent that FP32's subnormals have."""
    broken = replace(RULES[rule], zero_exponent=FP32.min_exponent)
    got, pair = ours(broken, tiny_products(BF16)), tiny_products(BF16).tensors()
    for name, model in asked(rule, BF16).items():
        differ = disagreements(got, model(*pair))
        print(f"{rule}, {name}: {differ} of {got.numel()} differ without the exponent of zero")
        assert differ


@pytest.mark.parametrize("part", ["group", "fraction_bits"])
def test_another_rule_is_noticed(asked, part):
    operands = Operands(FP16, tuple(torch.randn(99).tolist()), (8, 64, 8), 0.0, 0)
    wrong = replace(RULES["h100"], **{part: getattr(RULES["a100"], part)})
    (model, *_) = asked("h100", FP16).values()
    assert disagreements(ours(wrong, operands), model(*operands.tensors()))
    assert not disagreements(ours("h100", operands), model(*operands.tensors()))


# ------------------------------------------------------------------------------- results on record


def test_the_record_is_what_mmasim_answers(asked):
    for case in mmasim.recorded():
        for model in asked(case.rule, case.fmt).values():
            assert disagreements(model(case.a, case.b), case.answer) == 0


def test_we_answer_as_the_record_does():
    """Fast and by the specification."""
    cases = mmasim.recorded()
    assert len(cases) == 4 * (2 * mmasim.RECORDED + len(mmasim.EDGES))
    for case in cases:
        got = simulate_matmul([case.a], [case.b], case.rule, CHAIN)
        assert disagreements(got, case.answer) == 0
        assert disagreements(reference([case.a], [case.b], case.rule, CHAIN), case.answer) == 0


@pytest.mark.parametrize("change", [-1, 1, "none"])
@pytest.mark.parametrize("rule", TENSOR_CORES)
def test_the_record_notices_another_exponent_of_zero(rule, change):
    """One less or more, and none of its own but that of FP32's subnormals."""
    right = RULES[rule]
    other = FP32.min_exponent if change == "none" else right.zero_exponent + change
    differ = {fmt.name: 0 for fmt in FLOATS}
    for case in mmasim.recorded():
        if case.rule == rule:
            got = simulate_matmul([case.a], [case.b], replace(right, zero_exponent=other), CHAIN)
            differ[case.fmt.name] += disagreements(got, case.answer)
    print(f"{rule} with 2^{other} for zero: {differ} differ")
    assert differ["bf16"]
    assert not differ["fp16"], "no product of FP16 is that small"


@pytest.mark.parametrize("rule", TENSOR_CORES)
def test_the_last_bit_that_is_kept_beside_zeros(rule):
    last = RULES[rule].zero_exponent - RULES[rule].fraction_bits
    found = {}
    for quantum in mmasim.EDGES:
        a, b = mmasim.edge(quantum)
        found[quantum] = simulate_matmul([a], [b], rule, CHAIN).item()
    assert found == {q: FP32.smallest_subnormal if q >= last else 0.0 for q in found}


# ------------------------------------------------------------------------------- what may not move


def in_fp64(rule: AccumulationRule, operands: Operands) -> torch.Tensor:
    """By the steps that read the exponent of zero; those in FP32 and INT32 have no use for it."""
    a, b = operands.tensors()
    how = simulate.Arithmetic(partial(wide.truncated, rule=rule), torch.float64, wide.powers)
    return simulate._product([a], [b], how, CHAIN)


@pytest.mark.parametrize(("fmt", "highest"), [(FP16, 2 * FP16.min_exponent), (BF16, 0)])
@given(st.data(), st.sampled_from(TENSOR_CORES))
def test_neither_fp16_nor_digits_depend_on_the_exponent_of_zero(fmt, highest, data, rule):
    """It decides only where every product is smaller: FP16's reach 2^-28, those of digits 1."""
    operands = data.draw(drawn((fmt,)))
    if fmt is BF16:
        digits = data.draw(st.lists(st.integers(-128, 128), min_size=1, max_size=8))
        operands = replace(operands, pool=tuple(map(float, digits)))
    right = RULES[rule]
    want = in_fp64(right, operands)
    assert not disagreements(want, ours(rule, operands))
    for exponent in (right.zero_exponent - 9, FP32.min_exponent, highest):
        assert not disagreements(in_fp64(replace(right, zero_exponent=exponent), operands), want)


def test_a_higher_exponent_of_zero_would_move_digits():
    operands = Operands(BF16, (1.0, 3.0, -5.0), (8, 32, 8), 0.5, 0)
    right = RULES["h100"]
    moved = in_fp64(replace(right, zero_exponent=right.fraction_bits + 2), operands)
    assert disagreements(moved, in_fp64(right, operands))
