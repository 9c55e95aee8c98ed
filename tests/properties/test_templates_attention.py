"""The generated attention kernels keep their bound, in Triton's interpreter.

What is generated here is what a GPU would run, byte for byte; only the interpreter stands in for
the GPU. Memory that no one wrote is NaN, and so is the scale of whatever a mask hides.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings, target
from hypothesis import strategies as st
from torch import Tensor

from healpass.arithmetic.attention_bounds import (
    AttentionShape,
    attention_bound,
    attention_magnitudes,
)
from healpass.lowering.cuda import attention, attention_gradients
from healpass.lowering.cuda.tiles import AttentionTile
from healpass.ops.attention.scoring import Scoring
from tests.support import interpreter
from tests.support.attention_bounds import Digits
from tests.support.attention_cases import PLANES
from tests.support.attention_runs import (
    FAMILIES,
    Change,
    Problem,
    assert_gradients_within_bound,
    assert_within_bound,
    attend,
    build,
    differentiate,
    family,
    mask_of,
    random,
    without_products_of,
)
from tests.support.fake_cuda import always, generated_source

FORMATS = ("int16", "int24", "fp32")
lengths = st.one_of(st.integers(1, 12), st.sampled_from([31, 33, 65]))
key_lengths = st.one_of(st.integers(1, 70), st.sampled_from([127, 129, 300]))
problems = st.fixed_dictionaries({
    "batch": st.sampled_from([1, 1, 2]),
    "heads": st.integers(1, 2),
    "groups": st.integers(1, 3),
    "length": lengths,
    "keys": key_lengths,
    "size": st.sampled_from([1, 3, 16, 64, 80]),
    "value_size": st.sampled_from([1, 5, 16, 40]),
    "kv": st.sampled_from(FORMATS),
    "seed": st.integers(0, 2**20),
    "exponents": st.sampled_from([(0, 0), (0, 0), (60, 0), (0, 60), (-60, -90), (2, 100)]),
    "mask": st.sampled_from(["none", "none", "bool", "float"]),
    "is_causal": st.booleans(),
    "window": st.sampled_from([None, None, 1, 7, 100]),
    "softcap": st.sampled_from([None, None, 5.0]),
    "sinks": st.booleans(),
    "dropout_p": st.sampled_from([0.0, 0.0, 0.0, 0.3, 1.0]),
})  # fmt: skip


def drawn(arguments: dict[str, Any]) -> Problem:
    arguments = dict(arguments)
    kind, seed = arguments.pop("mask"), arguments["seed"]
    heads = arguments["heads"] * arguments["groups"]
    sinks = random((heads,), seed + 3) if arguments.pop("sinks") else None
    mask = mask_of(kind, arguments["length"], arguments["keys"], seed + 4)
    words = torch.tensor([seed * 0x9E3779B97F4A7C1 % 2**62 - 2**61])
    drops = words if arguments["dropout_p"] else None
    return build(**arguments, sinks=sinks, attn_mask=mask, drops=drops)


@settings(max_examples=20)
@given(problems, st.sampled_from([80, 90, 100]))
def test_every_attention_is_within_its_bound(arguments, capability):
    problem = drawn(arguments)
    worst = assert_within_bound(problem, attend(problem, capability))
    target(worst, label="observed / bound")


@settings(max_examples=8)
@given(problems, st.sampled_from([80, 90, 100]))
def test_every_gradient_is_within_its_bound(arguments, capability):
    problem = drawn(arguments)
    grad = random((*problem.query.scale.shape, arguments["value_size"]), arguments["seed"] + 9)
    found = differentiate(problem, grad, capability)
    target(assert_gradients_within_bound(problem, grad, found), label="observed / bound")


@pytest.mark.deep
@settings(max_examples=1000)
@given(problems, st.sampled_from([80, 90, 100]))
def test_every_attention_is_within_its_bound_deep(arguments, capability):
    problem = drawn(arguments)
    assert_within_bound(problem, attend(problem, capability))
    grad = random((*problem.query.scale.shape, arguments["value_size"]), arguments["seed"] + 9)
    assert_gradients_within_bound(problem, grad, differentiate(problem, grad, capability))


@pytest.mark.parametrize("kv", ["int16", "int24"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_bound_that_the_package_prints_holds_for_the_kernels(name, kv):
    problem = family(name, kv=kv, batch=1)
    key, value = (x.repeated(2).values for x in (problem.key, problem.value))
    query, scale = problem.query.values, problem.scoring.scale
    scores = scale * (query @ key.mT)
    shape = AttentionShape(64, 300, rule="h100", kv="digits")
    bound = attention_bound(shape).evaluate(
        **attention_magnitudes(query, key, value, scores, scale)
    )
    error = (attend(problem)[0].double() - torch.softmax(scores, -1) @ value).abs()
    assert (error <= bound).all()


@pytest.mark.parametrize("kv", FORMATS)
@pytest.mark.parametrize("size", [128, 256])
def test_the_largest_heads_are_within_their_bound(size, kv):
    problem = build(heads=1, keys=40, size=size, value_size=size, kv=kv)
    assert_within_bound(problem, attend(problem))
    grad = random((1, 2, 5, size), 9)
    assert_gradients_within_bound(problem, grad, differentiate(problem, grad))


@pytest.mark.parametrize("kv", ["int16", "int24"])
def test_digits_at_their_limits_do_not_overflow_int32(kv):
    """Every digit product as large as can be, all of one sign, at the largest head size."""
    problem = build(heads=1, groups=1, length=20, keys=40, size=256, value_size=16, kv=kv)
    largest = [127 if plane == 0 else -128 for plane in reversed(range(PLANES[kv]))]
    for states in (problem.query, problem.key):
        states.planes[:] = torch.tensor(largest, dtype=torch.int8)[:, None, None]
        states.scale.fill_(2.0**-20)
    assert_within_bound(problem, attend(problem))


# --------------------------------------------------------------------------- bits that must agree


@pytest.mark.parametrize("kv", ["int16", "fp32"])
@pytest.mark.parametrize("name", FAMILIES)
def test_an_entry_does_not_depend_on_its_batch(name, kv):
    problem = family(name, kv=kv, is_causal=name == "prefill")
    whole, alone = attend(problem), attend(problem.part(batch=slice(1, 2)))
    for left, right in zip(whole, alone, strict=True):
        assert torch.equal(left[1:2], right)


@pytest.mark.parametrize(
    ("kv", "dtype"), [("int16", torch.bool), ("int16", torch.float32), ("fp32", torch.bool)]
)
@pytest.mark.parametrize("name", FAMILIES)
def test_right_padding_and_keys_that_nobody_sees_leave_bits_alone(name, kv, dtype):
    problem, visible = family(name, kv=kv), 130
    mask = (torch.arange(300) < visible).expand(FAMILIES[name], 300)
    if dtype != torch.bool:
        mask = torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
    short = problem.part(keys=slice(0, visible))
    hidden = slice(visible, None)
    padded = dataclasses.replace(
        problem.with_scoring(attn_mask=mask),
        key=problem.key.poisoned(hidden),
        value=problem.value.poisoned(hidden),
    )
    for left, right in zip(attend(short), attend(padded), strict=True):
        assert torch.equal(left, right)
    grad = random((3, 2, FAMILIES[name], 64), 9)
    of_query, of_key, of_value = differentiate(padded, grad, forward=short)
    expected = differentiate(short, grad)
    assert torch.equal(of_query, expected[0])
    for found, right in ((of_key, expected[1]), (of_value, expected[2])):
        assert torch.equal(found[:, :, :visible], right)
        assert not found[:, :, visible:].any(), "a gradient for a key that nobody sees"


def test_causality_hides_what_comes_later():
    problem = family("prefill", is_causal=True)
    later = slice(FAMILIES["prefill"], None)
    other = dataclasses.replace(
        problem, key=problem.key.poisoned(later), value=problem.value.poisoned(later)
    )
    assert all(map(torch.equal, attend(problem), attend(other)))


def test_a_query_does_not_depend_on_those_behind_it():
    problem = family("prefill", is_causal=True)
    first = problem.query.part(rows=slice(0, 20))
    short = dataclasses.replace(problem, query=first)
    for left, right in zip(attend(problem), attend(short), strict=True):
        assert torch.equal(left[:, :, :20], right)


@pytest.mark.parametrize(("kv", "sinks"), [("int16", torch.ones(2)), ("fp32", None)])
def test_with_m_invariant_a_row_of_prefill_has_the_bits_of_decode(kv, sinks):
    """The inverse: without it some row tells its family."""
    plain = family("prefill", kv=kv, batch=1, keys=700, sinks=sinks)
    asked = dataclasses.replace(plain, numerics="heal:::m_invariant")
    rows = FAMILIES["decode"]
    decoded = attend(dataclasses.replace(asked, query=asked.query.part(rows=slice(0, rows))))
    assert_within_bound(asked, attend(asked))
    for prefill, decode in zip(attend(asked), decoded, strict=True):
        assert torch.equal(prefill[:, :, :rows], decode)
    assert not torch.equal(attend(plain)[0][:, :, :rows], decoded[0])


@pytest.mark.parametrize("kv", FORMATS)
@pytest.mark.parametrize("name", FAMILIES)
def test_tiles_leave_bits_alone(name, kv, monkeypatch):
    problem = family(name, kv=kv, batch=1, window=200, sinks=torch.ones(2))
    grad = random((1, 2, FAMILIES[name], 64), 9)
    results = []
    for block in (16, 32, 128):
        tiles = [AttentionTile(block, 8, 2)]
        monkeypatch.setattr(attention, "attention_tiles", always(tiles))
        both = always((tiles, tiles))
        monkeypatch.setattr(attention_gradients, "attention_backward_tiles", both)
        results.append((*attend(problem), *differentiate(problem, grad)))
    for others in results[1:]:
        assert all(map(torch.equal, results[0], others))


@pytest.mark.parametrize(("name", "knob"), [("decode", "CHUNK"), ("prefill", "keys_per_block")])
def test_the_check_of_bits_notices_another_order(name, knob, monkeypatch):
    """A chunk or a block that followed the number of keys would change the sums."""
    problem = family(name)
    before = attend(problem)[0]
    monkeypatch.setattr(attention, knob, 128 if knob == "CHUNK" else always(32))
    assert not torch.equal(attend(problem)[0], before)


# ------------------------------------------------------------------------------ NaN and extremes


def test_a_visible_nan_reaches_the_rows_that_see_it_and_no_other():
    problem = build(length=40, keys=70, is_causal=True)
    for name in ("key", "value"):
        states = getattr(problem, name)
        spoiled = dataclasses.replace(problem, **{name: states.poisoned(slice(20, 21))})
        output, _ = attend(spoiled)
        assert output[:, :, 20:].isnan().all()
        assert torch.equal(output[:, :, :20], attend(problem)[0][:, :, :20])


@pytest.mark.parametrize("length", [2, 30])
def test_scores_past_the_range_of_fp32_do_not_make_nan(length):
    """Huge queries meet huge keys: the row takes its largest score, as one-hot as it can be."""
    problem = build(heads=1, groups=1, length=length, keys=40)
    for states in (problem.query, problem.key):
        states.scale.fill_(2.0**110)
    output, logsumexp = attend(problem)
    assert output.isfinite().all()
    assert logsumexp.isfinite().all()


def test_the_largest_values_do_not_overflow_on_the_way():
    problem = build(heads=1, groups=1, length=20, keys=200, scale=0.0)
    problem.value.planes[:] = 127
    problem.value.scale.fill_(torch.finfo(torch.float32).max / 32768)
    assert_within_bound(problem, attend(problem))


def test_one_number_is_an_attention_too():
    problem = build(heads=1, groups=1, length=1, keys=9, size=3, value_size=1)
    assert_within_bound(problem, attend(problem))


@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -1.0])])
def test_no_key_at_all_gives_zeros(sinks):
    problem = build(heads=1, keys=0, sinks=sinks)
    output, logsumexp = attend(problem)
    assert not output.any()
    expected = torch.full((2,), -math.inf) if sinks is None else sinks
    assert torch.equal(logsumexp, expected[:, None].expand(1, 2, 5))


def test_the_fused_tanh_is_within_its_bound():
    """`heal_tanh` through a softcap of 1: 12 units of 2^-24, and the three roundings around it."""
    problem = build(heads=1, groups=1, length=1, keys=256, size=32, value_size=16, scale=1.0)
    problem.query.planes.zero_()
    problem.query.planes[..., 0] = torch.tensor([1, 0], dtype=torch.int8)[:, None]
    problem.query.scale.fill_(1.0)
    problem = problem.with_scoring(softcap=1.0)
    assert_within_bound(problem, attend(problem))


@pytest.mark.parametrize("keys", [70, 300])
def test_symbolic_keys_are_within_their_bound(keys):
    """Keys and values grow: one compiled code for every number of them."""

    def operands(states: Tensor) -> list[Digits]:
        digits = states.permute(1, 2, 3, 0, 4)  # [2, HKV, D, S, E]
        scales = digits.select(2, 1).select(-1, 0).to(torch.float32).abs() + 1
        return [Digits(digits.narrow(0, i, 1), scales.narrow(0, i, 1)) for i in (0, 1)]

    def grown(states: Tensor, planes: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        problem = Problem(Digits(planes, scale), *operands(states), Scoring(1e-6))
        return torch.ops.heal.integer_attention(*problem.call())

    generator = torch.Generator().manual_seed(0)
    states = torch.randint(-127, 128, (200, 2, 2, 2, 64), dtype=torch.int8, generator=generator)
    query = build(heads=2).query
    inputs = (states, query.planes, query.scale)
    source = generated_source(grown, inputs, dynamic=True)
    states = torch.randint(-127, 128, (keys, 2, 2, 2, 64), dtype=torch.int8, generator=generator)
    found = interpreter.run(source, keys, states, query.planes, query.scale)
    assert_within_bound(Problem(query, *operands(states), Scoring(1e-6)), found)


# ------------------------------------------------------------------------- what the checks notice


def test_the_bound_notices_a_lost_digit_product():
    def without(source: str) -> str:
        return source.replace(
            "leading = tl.dot(q_0, tl.trans(k_1), leading,", "tl.dot(q_0, tl.trans(k_1), leading,"
        )

    assert_noticed(without)


@pytest.mark.parametrize("piece", ["p_low", "v_low"])
def test_the_bound_notices_a_lost_piece(piece):
    assert_noticed(without_products_of(piece))


@pytest.mark.parametrize(
    ("factor", "without"),
    [("weights * v_unit[None, :]", "weights"), ("accumulator * shrink[:, None]", "accumulator")],
)
def test_the_bound_notices_a_lost_scale(factor, without):
    assert_noticed(lambda source: source.replace(factor, without))


def assert_noticed(change: Change) -> None:
    """The check passes the kernel as it is and fails it as `change` makes it."""
    problem = family("prefill", batch=1)
    assert_within_bound(problem, attend(problem))
    with pytest.raises(AssertionError, match="observed / bound"):
        assert_within_bound(problem, attend(problem, change=change))


@pytest.mark.parametrize(
    ("kv", "lost"),
    [("int16", "s_low"), ("int16", "p_low"), ("int16", "g_low"), ("fp32", "q_low"),
     ("fp32", "k_low"), ("fp32", "v_low")],
)  # fmt: skip
def test_the_bound_of_gradients_notices_a_lost_piece(kv, lost):
    problem, grad = family("prefill", kv=kv, batch=1, size=16), random((1, 2, 40, 64), 9)
    assert_gradients_within_bound(problem, grad, differentiate(problem, grad))
    found = differentiate(problem, grad, change=without_products_of(lost))
    with pytest.raises(AssertionError, match="observed / bound"):
        assert_gradients_within_bound(problem, grad, found)


def test_hidden_nans_would_show():
    """Without the guard of hidden weights, 0 * NaN is NaN."""
    problem = build(length=40, keys=70, is_causal=True)
    problem = dataclasses.replace(problem, value=problem.value.poisoned(slice(20, 21)))
    guard = 'tl.where(scores == float("-inf"), 0.0, weights * v_unit[None, :])'
    output, _ = attend(problem, change=lambda s: s.replace(guard, "weights * v_unit[None, :]"))
    assert output[:, :, :20].isnan().any()
