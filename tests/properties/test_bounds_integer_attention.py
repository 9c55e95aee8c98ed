"""Attention in every format and its gradients lie within their bounds, and quantization too.

The reference is FP64 attention on the operands: states as stored, or exactly what the integers
stand for.
"""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import healpass.ops  # noqa: F401
from healpass.arithmetic.attention_bounds import (
    AttentionShape,
    attention_bound,
    attention_magnitudes,
    score_bound,
)
from healpass.arithmetic.attention_gradients import AttentionValues, gradient_bounds
from healpass.ops.attention.quantize import FORMATS, integers
from healpass.ops.attention.scoring import dropout_words
from tests.support.rewriting import worst_ratio
from tests.support.strategies import GENERATIONS, data, fill

heal = torch.ops.heal


@dataclass(frozen=True)
class Case:
    """One attention."""

    kv: str
    heads: int
    groups: int
    length: int
    keys: int
    head_size: int
    value_size: int
    spread: float
    magnitude: float
    mask: str
    window: int | None
    softcap: float | None
    sinks: bool
    dropout_p: float
    rule: str | None
    seed: int

    @property
    def operator(self):
        """The format's operator."""
        return heal.attention if self.kv == "fp32" else heal.integer_attention

    @property
    def backward(self):
        """And that of its gradients."""
        floats = self.kv == "fp32"
        return heal.attention_backward if floats else heal.integer_attention_backward

    def operands(self):
        """What the operator takes."""
        states = self.states()
        if self.kv == "fp32":
            return states
        return tuple(part for x in states for part in heal.quantize(x, self.kv))

    def states(self):
        """Q, K, V in FP32, grouped heads in K and V."""
        generator = torch.Generator().manual_seed(self.seed)
        heads = self.heads * self.groups
        query = torch.randn(2, heads, self.length, self.head_size, generator=generator)
        key = torch.randn(2, self.heads, self.keys, self.head_size, generator=generator)
        value = torch.randn(2, self.heads, self.keys, self.value_size, generator=generator)
        return query * self.spread, key, value * self.magnitude

    def arguments(self):
        """What follows the digits in the operator's call."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        mask = torch.randn(2, 1, self.length, self.keys, generator=generator)
        masks = {"bool": mask > 0.5, "float": 3 * mask, "off": (mask > 0) & (mask > 9)}
        heads = self.heads * self.groups
        sinks = torch.randn(heads, generator=generator) if self.sinks else None
        numerics = "heal" if self.rule is None else f"heal:{self.rule}"
        return (
            masks.get(self.mask), sinks, torch.tensor([self.seed]), self.mask == "causal",
            float(torch.tensor(self.head_size**-0.5)), self.window, self.softcap, self.dropout_p,
            numerics,
        )  # fmt: skip


cases = st.builds(
    Case,
    kv=st.sampled_from(["int16", "int24", "fp32"]),
    heads=st.integers(1, 2),
    groups=st.integers(1, 3),
    length=st.sampled_from([1, 2, 7, 130]),
    keys=st.sampled_from([1, 17, 150]),
    head_size=st.sampled_from([1, 64]),
    value_size=st.sampled_from([1, 5]),
    spread=st.sampled_from([1e-6, 0.1, 1.0, 8.0]),
    magnitude=st.sampled_from([1e-30, 1e-3, 1.0, 1e20]),
    mask=st.sampled_from(["none", "bool", "float", "causal", "off"]),
    window=st.sampled_from([None, 1, 5]),
    softcap=st.sampled_from([None, 2.0, 50.0]),
    sinks=st.booleans(),
    dropout_p=st.sampled_from([0.0, 0.0, 0.3, 1.0]),
    rule=st.sampled_from([None, None, *GENERATIONS]),
    seed=st.integers(0, 2**40),
)


def exact_values(digits, scale):
    return integers(digits) * scale.double().unsqueeze(-1)


def exact(case: Case, operands, arguments, grad) -> AttentionValues:
    """The same attention in FP64, written independently of the operator."""
    mask, sinks, seed, is_causal, scale, window, softcap, dropout_p, _ = arguments
    query, key, value = (
        (x.double() for x in operands)
        if case.kv == "fp32"
        else (exact_values(*operands[i : i + 2]) for i in (0, 2, 4))
    )
    key, value = (x.repeat_interleave(case.groups, 1) for x in (key, value))
    products = scale * query @ key.mT
    scores = products if softcap is None else softcap * torch.tanh(products / softcap)
    slope = torch.ones_like(scores) if softcap is None else 1 - (scores / softcap) ** 2
    if mask is not None:
        added = torch.where(mask, 0.0, -math.inf) if mask.dtype == torch.bool else mask
        scores = scores + added
    gap = torch.arange(case.length)[:, None] - torch.arange(case.keys)
    if is_causal:
        scores = scores.masked_fill(gap < 0, -math.inf)
    if window is not None:
        scores = scores.masked_fill(gap >= window, -math.inf)
    column = torch.full((1, 1, 1), -math.inf) if sinks is None else sinks[:, None, None]
    logits = torch.cat([column.double().expand(*scores.shape[:-1], 1), scores], -1)
    weights = torch.softmax(logits, -1)[..., 1:].nan_to_num(0.0)
    kept = torch.ones_like(weights)
    if dropout_p:
        words = dropout_words(seed, weights.shape, slice(0, case.length), slice(0, case.keys))
        kept = (words >= math.floor(dropout_p * 2**32)).double()
        kept = kept / (1 - dropout_p) if dropout_p < 1 else kept * 0
    lse = torch.logsumexp(logits, -1, keepdim=True)
    return AttentionValues(
        query, key, value, grad.double(), scores, weights, lse, kept, scale, slope, softcap
    )


def forward_bound(case: Case, truth: AttentionValues, arguments):
    """The bound of the output, and that of a score."""
    kv = "fp32" if case.kv == "fp32" else "digits"
    shape = AttentionShape(
        case.head_size, case.keys + case.sinks, "heal" if case.rule else "layercast", case.rule, kv
    )
    sinks = None if arguments[1] is None else arguments[1][:, None, None]
    magnitudes = attention_magnitudes(
        truth.query, truth.key, truth.value, truth.scores, truth.scale, truth.softcap, sinks
    )
    factor = 1 / (1 - case.dropout_p) if case.dropout_p < 1 else 1.0
    delta = score_bound(shape).evaluate(
        **{n: magnitudes[n] for n in ("QK_S", "QK_A", "QK_B", "QK_SA", "QK_SB", "SCALE", "MASK")}
        if case.rule
        else {n: magnitudes[n] for n in ("QK_S", "SCALE", "MASK")}
    )
    bound = attention_bound(shape).evaluate(**magnitudes)
    # Dropout's factor is rounded and multiplies a weight: two roundings more.
    return factor * (1 + 2.0**-22) * bound + 2.0**-22 * factor * truth.output.abs(), delta


@given(case=cases)
def test_the_output_is_within_its_bound_of_fp64_on_the_quantized_inputs(case):
    operands, arguments = case.operands(), case.arguments()
    output, logsumexp = case.operator(*operands, *arguments)
    assert_output_within_bound(case, operands, arguments, output, logsumexp)


def assert_output_within_bound(case, operands, arguments, output, logsumexp):
    truth = exact(case, operands, arguments, torch.zeros_like(output))
    bound, _ = forward_bound(case, truth, arguments)
    ratio = worst_ratio(output, truth.output, bound)
    print(f"observed/bound {ratio:.3f}")
    assert ratio <= 1
    hidden = truth.scores.isinf().all(-1)
    assert (output[hidden] == 0).all()
    if arguments[1] is None:
        assert torch.equal(logsumexp == -math.inf, hidden)


@given(case=cases.filter(lambda case: case.rule is None))
def test_the_gradients_are_within_their_bounds(case):
    operands, arguments = case.operands(), case.arguments()
    output, logsumexp = case.operator(*operands, *arguments)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(case.seed + 2))
    found = case.backward(grad, *operands, *arguments, output, logsumexp)
    assert_gradients_within_bound(case, operands, arguments, grad, found)


def assert_gradients_within_bound(case, operands, arguments, grad, found):
    truth = exact(case, operands, arguments, grad)
    bound, delta = forward_bound(case, truth, arguments)
    bounds = gradient_bounds(truth, delta, bound)
    for name, ours, wanted, budget in zip("QKV", found, truth.gradients(), bounds, strict=True):
        groups = 1 if name == "Q" else case.groups
        wanted, budget = (x.unflatten(1, (-1, groups)).sum(2) for x in (wanted, budget))
        size = wanted.abs().amax()
        if not 2.0**-100 < size < 2.0**120:
            continue  # FP32 itself underflows or overflows in the products of such a gradient
        ratio = worst_ratio(ours, wanted, budget + 2.0**-126 * case.length * case.keys)
        print(f"d{name} observed/bound {ratio:.3f}")
        assert ratio <= 1


@pytest.mark.parametrize("kv", ["int24", "fp32"])
def test_the_bounds_mean_something(kv):
    """On plain data they are within three orders of magnitude of what is observed."""
    case = Case(kv, 2, 2, 130, 150, 64, 5, 1.0, 1.0, "none", None, None, False, 0.0, None, 3)
    operands, arguments = case.operands(), case.arguments()
    output, logsumexp = case.operator(*operands, *arguments)
    grad = torch.randn(output.shape)
    truth = exact(case, operands, arguments, grad)
    bound, delta = forward_bound(case, truth, arguments)
    assert worst_ratio(output, truth.output, bound) > 1e-3
    found = case.backward(grad, *operands, *arguments, output, logsumexp)
    for ours, wanted, budget in zip(
        found, truth.gradients(), gradient_bounds(truth, delta, bound), strict=True
    ):
        groups = wanted.shape[1] // ours.shape[1]
        wanted, budget = (x.unflatten(1, (-1, groups)).sum(2) for x in (wanted, budget))
        ratio = worst_ratio(ours, wanted, budget)
        print(f"observed/bound {ratio:.4f}")
        assert ratio > 1e-4


@pytest.mark.parametrize("kv", FORMATS)
def test_a_coarser_format_breaks_the_bound(kv):
    """The inverse: values of 8 bits are found."""
    case = Case(kv, 1, 1, 7, 17, 64, 5, 1.0, 1.0, "none", None, None, False, 0.0, None, 3)
    digits, arguments = case.operands(), case.arguments()
    truth = exact(case, digits, arguments, torch.zeros(2, 1, 7, 5))
    bound, _ = forward_bound(case, truth, arguments)
    poorer = list(digits)
    poorer[4] = digits[4].clone()
    poorer[4][:, :, :-1] = 0
    output, _ = heal.integer_attention(*poorer, *arguments)
    assert worst_ratio(output, truth.output, bound) > 1


@pytest.mark.parametrize("kv", FORMATS)
@given(how=data(st.integers(-44, 37)), rows=st.integers(0, 4), size=st.integers(1, 70))
def test_each_element_is_quantized_within_half_a_step(kv, how, rows, size):
    """|x - value| <= scale (1/2 + 2^-26), scale <= (1 + 2^-23) max|x| / limit or 2^-126."""
    x = fill((2, rows, size), how, torch.float32, rows + size, 2)
    digits, scale = heal.quantize(x, kv)
    step = scale.double().unsqueeze(-1)
    error = (x.double() - exact_values(digits, scale)).abs()
    assert (error <= step * (0.5 + 2.0**-26)).all()
    largest = x.double().abs().amax(-1, keepdim=True) / FORMATS[kv].limit * (1 + 2.0**-23)
    assert (step <= largest.clamp_min(2.0**-126)).all()
    back = heal.dequantize(digits, scale)
    dequantized = (back.double() - exact_values(digits, scale)).abs()
    assert (dequantized <= 2.0**-24 * back.double().abs() + 2.0**-150).all()
