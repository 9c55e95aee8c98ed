"""Attention's observed error <= its bound: FP32, INT16 and INT24 inputs, masks, grouped heads."""

import dataclasses
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from healpass.arithmetic.attention_bounds import (
    AttentionShape,
    attention_bound,
    attention_magnitudes,
)
from healpass.arithmetic.int16 import INT16, INT24, IntegerFormat, dequantize, quantize
from healpass.tensorcore import heal_attention
from tests.support.profiles import examples
from tests.support.strategies import GENERATIONS

INTEGERS = {"int8": IntegerFormat("int8", torch.int8, 1), "int16": INT16, "int24": INT24}


@dataclass(frozen=True)
class Attention:
    """An attention to be checked."""

    heads: int
    groups: int
    length: int
    keys: int
    head_size: int
    value_size: int
    spread: float
    magnitude: float
    mask: str
    rule: str | None
    kv: str
    seed: int

    def tensors(self):
        generator = torch.Generator().manual_seed(self.seed)
        query = (self.heads * self.groups, self.length, self.head_size)
        shapes = (
            query,
            (self.heads, self.keys, self.head_size),
            (self.heads, self.keys, self.value_size),
        )
        q, k, v = (torch.randn(1, *shape, generator=generator) for shape in shapes)
        return q * self.spread, k, v * self.magnitude

    def attn_mask(self):
        generator = torch.Generator().manual_seed(self.seed + 1)
        scores = torch.randn(self.length, self.keys, generator=generator)
        if self.mask == "bool":
            return (scores > -0.5).index_fill(1, torch.tensor([0]), True)
        return 3 * scores if self.mask == "float" else None


attentions = st.builds(
    Attention,
    heads=st.integers(1, 2),
    groups=st.integers(1, 3),
    length=st.integers(1, 6),
    # Few lengths, because each pair of them is a formula to be derived.
    keys=st.sampled_from([1, 17, 150]),
    head_size=st.sampled_from([3, 64]),
    value_size=st.integers(1, 20),
    spread=st.sampled_from([1e-6, 0.1, 1.0, 8.0]),
    magnitude=st.sampled_from([1e-30, 1e-3, 1.0, 1e20]),
    mask=st.sampled_from(["none", "bool", "float", "causal"]),
    rule=st.sampled_from([None, *GENERATIONS]),
    kv=st.sampled_from(["fp32", "int16", "int24"]),
    seed=st.integers(0, 2**16),
)


def exact_scores(case: Attention, q, k, scale):
    scores = scale * (q.double() @ k.double().repeat_interleave(case.groups, 1).mT)
    if case.mask == "causal":
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        return scores.masked_fill(~visible, -math.inf)
    mask = case.attn_mask()
    if mask is None:
        return scores
    return scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask


def ratio_of(case: Attention, kv_of_bound: str | None = None) -> float:
    """max observed / bound."""
    return ratios_of(case, kv_of_bound).max().item()


def ratios_of(
    case: Attention, kv_of_bound: str | None = None, probable: bool = False
) -> torch.Tensor:
    """Observed / bound, or over its square-root companion, of every element."""
    q, k, v = case.tensors()
    scale = float(torch.tensor(1 / math.sqrt(case.head_size)))
    scores = exact_scores(case, q, k, scale)
    key, value = (t.repeat_interleave(case.groups, 1) for t in (k, v))
    exact = torch.softmax(scores, -1) @ value.double()
    if case.kv in INTEGERS:
        q, k, v = (dequantize(quantize(t, INTEGERS[case.kv])) for t in (q, k, v))
    # "fp32" is also what an unsimulated CPU's own matmul is bounded by, in blocks of 64.
    y = heal_attention(
        q, k, v, case.attn_mask(), is_causal=case.mask == "causal", scale=scale,
        accumulate=case.rule or "fp32",
    )  # fmt: skip
    shape = AttentionShape(
        case.head_size, case.keys, rule=case.rule or "fp32", kv=kv_of_bound or case.kv
    )
    magnitudes = attention_magnitudes(case.tensors()[0], key, value, scores, scale)
    bound = attention_bound(shape)
    evaluate = bound.evaluate_probabilistic if probable else bound.evaluate
    return (y.double() - exact).abs() / evaluate(**magnitudes)


@examples(300)
@given(attentions)
def test_attention_is_within_its_bound(case):
    ratio = ratio_of(case)
    assert ratio <= 1, f"observed / bound = {ratio:.3g}"


def typical(kv: str, size: int = 64) -> Attention:
    return Attention(2, 3, 16, 2 * size, size, 32, 1.0, 1.0, "none", "h100", kv, 0)


@pytest.mark.parametrize(("kv", "bound", "size"), [("int8", "int16", 64), ("int16", "int24", 8)])
def test_a_coarser_cache_breaks_a_finer_bound(kv, bound, size):
    assert ratio_of(typical(kv, size), bound) > 1


@pytest.mark.parametrize("kv", ["fp32", "int16", "int24"])
def test_the_bound_means_something(kv):
    """On plain data it is within three orders of magnitude of what is observed."""
    ratio = ratio_of(typical(kv))
    assert ratio > 1e-3, f"observed / bound = {ratio:.3g}"


@pytest.mark.parametrize("rule", [None, *GENERATIONS])
@pytest.mark.parametrize("kv", ["fp32", "int16", "int24"])
def test_the_companion_is_tight_on_gaussian_data(kv, rule):
    """Median observed / companion above 0.01, no element of thousands above 1."""
    case = dataclasses.replace(typical(kv), rule=rule, length=32)
    ratios = ratios_of(case, probable=True)
    print(f"{kv}, {rule}: median {ratios.median():.3f}, worst {ratios.max():.3f}")
    assert 0.01 < ratios.median() < ratios.max() <= 1
