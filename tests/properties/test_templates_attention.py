"""The generated attention kernels keep their bound, in Triton's interpreter.

What is generated here is what a GPU would run, byte for byte; only the interpreter stands in for
the GPU. Memory that no one wrote is NaN, and so is the scale of whatever a mask hides.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from healpass.lowering import attention, attention_gradients
from healpass.lowering.tiles import AttentionTile
from hypothesis import given, settings, target
from hypothesis import strategies as st
from torch import Tensor

from healpass.ops.scores import Scoring
from tests import interpreter
from tests.fake_cuda import Device, always, generated_source
from tests.attention_cases import PLANES
from tests.gpu.attention_bounds import Digits, Exact, exact, gradients


@dataclass(frozen=True)
class Problem:
    """An attention to compute: operands in digits and how they are scored."""

    query: Digits
    key: Digits
    value: Digits
    scoring: Scoring

    def call(self) -> list[Any]:
        """Arguments of `heal::integer_attention`."""
        s = self.scoring
        states = (self.query, self.key, self.value)
        digits = [part for x in states for part in (x.planes, x.scale)]
        return [
            *digits, s.attn_mask, s.sinks, s.seed, s.is_causal, s.scale, s.window, s.softcap,
            s.dropout_p, "heal",
        ]  # fmt: skip

    def with_scoring(self, **changes: Any) -> Problem:
        return dataclasses.replace(self, scoring=dataclasses.replace(self.scoring, **changes))

    def part(self, batch: slice = slice(None), keys: slice = slice(None)) -> Problem:
        """Some of the batch and some of the keys."""
        key, value = (Digits(x.planes[batch, :, :, keys], x.scale[batch, :, keys])
                      for x in (self.key, self.value))  # fmt: skip
        mask = self.scoring.attn_mask
        mask = None if mask is None else mask[..., keys]
        query = Digits(self.query.planes[batch], self.query.scale[batch])
        return Problem(query, key, value, dataclasses.replace(self.scoring, attn_mask=mask))


Change = Callable[[str], str]


def run(
    operator: Any, call: list[Any], capability: int = 90, change: Change | None = None
) -> tuple[Tensor, ...]:
    """An operator as the generated code for a GPU computes it; `change` edits that code first."""
    tensors = [x for x in call if isinstance(x, Tensor)]

    def function(*inputs: Tensor) -> tuple[Tensor, ...]:
        rest = iter(inputs)
        return operator(*(next(rest) if isinstance(x, Tensor) else x for x in call))

    source = generated_source(function, tensors, Device(capability))
    changed = source if change is None else change(source)
    assert change is None or changed != source, "the code to be broken is not there"
    return interpreter.run(changed, *tensors)


def attend(
    problem: Problem, capability: int = 90, change: Change | None = None
) -> tuple[Tensor, ...]:
    """Output and logsumexp."""
    return run(torch.ops.heal.integer_attention, problem.call(), capability, change)


def differentiate(
    problem: Problem,
    grad: Tensor,
    capability: int = 90,
    change: Change | None = None,
    forward: Problem | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of Q, K and V, from `forward`'s output and logsumexp, right to FP32."""
    of = problem if forward is None else forward
    reference = exact(of.query, of.key, of.value, of.scoring)
    call = [grad, *problem.call(), reference.output.float(), reference.logsumexp.float()]
    return run(torch.ops.heal.integer_attention_backward, call, capability, change)


def random(shape: tuple[int, ...], seed: int, exponent: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    tail = torch.randint(-4, 5, (*shape[:-1], 1), generator=generator)
    return torch.randn(shape, generator=generator) * 2.0**tail * 2.0**exponent


def build(
    batch: int = 1, heads: int = 2, groups: int = 2, length: int = 5, keys: int = 70,
    size: int = 64, value_size: int = 64, kv: str = "int16", seed: int = 0,
    exponents: tuple[int, int] = (0, 0), drops: Tensor | None = None, **scoring: Any,
) -> Problem:  # fmt: skip
    query = random((batch, heads * groups, length, size), seed, exponents[0])
    key = random((batch, heads, keys, size), seed + 1, -exponents[0])
    value = random((batch, heads, keys, value_size), seed + 2, exponents[1])
    parts = (Digits.of(x, kv) for x in (query, key, value))
    return Problem(*parts, Scoring(**{"scale": size**-0.5, "seed": drops, **scoring}))


def assert_within_bound(problem: Problem, result: tuple[Tensor, Tensor]) -> float:
    """Check every element; the largest observed / bound."""
    reference: Exact = exact(problem.query, problem.key, problem.value, problem.scoring)
    worst = 0.0
    for found, wanted, bound in (
        (result[0], reference.output, reference.bound),
        (result[1], reference.logsumexp, reference.logsumexp_bound),
    ):
        assert not found.isnan().any(), "NaN from finite inputs"
        same = found.double() == wanted  # -inf for rows that see nothing
        ratio = torch.where(same, 0.0, (found.double() - wanted).abs() / bound)
        ratio = ratio.nan_to_num(math.inf)  # a bound that is no number bounds nothing
        worst = max(worst, ratio.max().item() if ratio.numel() else 0.0)
    assert worst <= 1, f"observed / bound = {worst:.3f}"
    return worst


def mask_of(kind: str, length: int, keys: int, seed: int) -> Tensor | None:
    """A mask with whole rows off."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(length, keys, generator=generator)
    if kind == "bool":
        return (scores > 0.3) & (torch.arange(length) % 3 != 1)[:, None]
    if kind == "float":
        off = (torch.arange(length) % 3 == 1)[:, None] | (scores > 1.5)
        return (3 * scores).masked_fill(off, -math.inf)
    return None


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
    "kv": st.sampled_from(["int16", "int24"]),
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


@settings(max_examples=30)
@given(problems, st.sampled_from([80, 90, 100]))
def test_every_attention_is_within_its_bound(arguments, capability):
    problem = drawn(arguments)
    worst = assert_within_bound(problem, attend(problem, capability))
    target(worst, label="observed / bound")


def assert_gradients_within_bound(problem: Problem, grad: Tensor, found: Any) -> float:
    """Check every element of the three gradients; the largest observed / bound."""
    worst = 0.0
    wanted = gradients(problem.query, problem.key, problem.value, problem.scoring, grad)
    for result, gradient in zip(found, wanted, strict=True):
        assert not result.isnan().any(), "NaN from finite inputs"
        ratio = (result.double() - gradient.exact).abs() / gradient.bound
        worst = max(worst, ratio.nan_to_num(math.inf).max().item())
    assert worst <= 1, f"observed / bound = {worst:.3f}"
    return worst


@settings(max_examples=20)
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

FAMILIES = {"decode": 3, "prefill": 40}


def family(name: str, **arguments: Any) -> Problem:
    """A problem of either family with more keys than a chunk has."""
    return build(**{"heads": 1, "length": FAMILIES[name], "keys": 300, "batch": 3, **arguments})


@pytest.mark.parametrize("name", FAMILIES)
def test_an_entry_does_not_depend_on_its_batch(name):
    problem = family(name, is_causal=name == "prefill")
    whole, alone = attend(problem), attend(problem.part(batch=slice(1, 2)))
    for left, right in zip(whole, alone, strict=True):
        assert torch.equal(left[1:2], right)


def poisoned(states: Digits, keys: slice) -> Digits:
    """Rows that must not matter: the largest digits, and NaN for a scale."""
    planes, scale = states.planes.clone(), states.scale.clone()
    planes[:, :, :, keys], scale[:, :, keys] = 127, math.nan
    return Digits(planes, scale)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("name", FAMILIES)
def test_right_padding_and_keys_that_nobody_sees_leave_bits_alone(name, dtype):
    problem, visible = family(name), 130
    mask = (torch.arange(300) < visible).expand(FAMILIES[name], 300)
    if dtype != torch.bool:
        mask = torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
    short = problem.part(keys=slice(0, visible))
    hidden = slice(visible, None)
    padded = dataclasses.replace(
        problem.with_scoring(attn_mask=mask),
        key=poisoned(problem.key, hidden),
        value=poisoned(problem.value, hidden),
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
        problem, key=poisoned(problem.key, later), value=poisoned(problem.value, later)
    )
    assert all(map(torch.equal, attend(problem), attend(other)))


def test_a_query_does_not_depend_on_those_behind_it():
    problem = family("prefill", is_causal=True)
    first = Digits(problem.query.planes[..., :20, :], problem.query.scale[..., :20])
    short = dataclasses.replace(problem, query=first)
    for left, right in zip(attend(problem), attend(short), strict=True):
        assert torch.equal(left[:, :, :20], right)


@pytest.mark.parametrize("kv", ["int16", "int24"])
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
        spoiled = dataclasses.replace(problem, **{name: poisoned(states, slice(20, 21))})
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

LOST = {
    "a digit product of the scores": ("leading = tl.dot(q_0, tl.trans(k_1), leading", "leading"),
    "the low piece of the weights": ("chain = tl.dot(p_low, v_high, chain", "chain"),
    "the low piece of the values": ("chain = tl.dot(p_high, v_low, chain", "chain"),
    "the scale of the values": ("weights * v_unit[None, :]", None),
    "the shrinking of the sums": ("accumulator * shrink[:, None]", None),
}


@pytest.mark.parametrize("lost", LOST)
def test_the_bound_notices_what_is_lost(lost):
    start, target_name = LOST[lost]

    def without(source: str) -> str:
        if target_name is None:
            return source.replace(start, start.split(" * ")[0])
        lines = source.splitlines(keepends=True)
        return "".join(line for line in lines if not line.strip().startswith(start))

    problem = family("prefill", batch=1)
    assert_within_bound(problem, attend(problem))
    with pytest.raises(AssertionError, match="observed / bound"):
        assert_within_bound(problem, attend(problem, change=without))


@pytest.mark.parametrize("lost", ["s_low", "p_low", "g_low"])
def test_the_bound_of_gradients_notices_a_lost_piece(lost):
    def without(source: str) -> str:
        return "".join(line for line in source.splitlines(keepends=True)
                       if not line.strip().split(" = ", 1)[-1].startswith(f"tl.dot({lost},"))  # fmt: skip

    problem, grad = family("prefill", batch=1, size=16), random((1, 2, 40, 64), 9)
    assert_gradients_within_bound(problem, grad, differentiate(problem, grad))
    with pytest.raises(AssertionError, match="observed / bound"):
        found = differentiate(problem, grad, change=without)
        assert_gradients_within_bound(problem, grad, found)


def test_hidden_nans_would_show():
    """Without the guard of hidden weights, 0 * NaN is NaN."""
    problem = build(length=40, keys=70, is_causal=True)
    problem = dataclasses.replace(problem, value=poisoned(problem.value, slice(20, 21)))
    guard = 'tl.where(scores == float("-inf"), 0.0, weights * v_unit[None, :])'
    output, _ = attend(problem, change=lambda s: s.replace(guard, "weights * v_unit[None, :]"))
    assert output[:, :, :20].isnan().any()
