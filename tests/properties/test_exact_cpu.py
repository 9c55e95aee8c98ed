"""Compiled code on CPU under `precision="exact"`: the bits of the reference implementation."""

from __future__ import annotations

import math
import re
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from healpass.arithmetic.digits import DIGIT_MAX
from healpass.lowering.cpu import exact, gemm
from healpass.ops.attention.exact_steps import P_BITS
from healpass.ops.attention.quantize import FORMATS
from healpass.ops.attention.scoring import Scoring
from healpass.ops.products.exact import SCHEMES
from tests.support.bits import any_floats, compiled, differing
from tests.support.exact_gpu import integer_states
from tests.support.profiles import examples
from tests.support.strategies import DTYPES, data, fill

heal = torch.ops.heal
NUMERICS = [f"exact{products}" for products in SCHEMES]
BF16 = torch.bfloat16


@pytest.fixture
def without_vnni(monkeypatch):
    """As on a processor whose products are torch's: with VNNI `cpu.gemm` has a kernel."""
    monkeypatch.setattr(gemm, "has_vnni", lambda: False)


def test_budgets():
    """The largest totals stay below 2^53, with every digit at its extreme."""
    for plan in SCHEMES.values():
        per_term = sum(DIGIT_MAX**2 * 256 ** (i + j - plan.cut) for i, j in plan.pairs)
        assert exact.MOST_TERMS * per_term < 2**53
    for fmt in FORMATS.values():
        largest = max(x for x in (fmt.limit, 1 << 15) if x <= 1 << 15)
        assert exact._largest_part(fmt) >= min(fmt.limit, (fmt.limit + 128) >> 8)
        assert largest << P_BITS < 2**53


@examples(60)
@given(
    m=st.integers(1, 4),
    k=st.integers(2, 300),
    n=st.integers(2, 5),
    left=st.sampled_from(["fp32", "bf16", "fp16"]),
    right=st.sampled_from(["bf16", "fp16", "fp32"]),
    how=st.tuples(data(st.integers(-30, 30)), data(st.integers(-30, 30))),
    numerics=st.sampled_from(NUMERICS),
    seed=st.integers(0, 2**16),
)
def test_products_have_the_bits_of_the_reference(m, k, n, left, right, how, numerics, seed):
    a = fill((m, k), how[0], DTYPES[left], seed, 1)
    b = fill((k, n), how[1], DTYPES[right], seed + 1, 0)
    assert differing(exact.mm(a, b, numerics), heal.mm(a, b, numerics)) == 0


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.usefixtures("without_vnni")
def test_numbers_of_every_kind(rows):
    """Every exponent, NaN and infinities, in rows, in columns, and in both."""
    a, b = (
        any_floats(count * 37 - 13, seed).reshape(count, 37) for count, seed in ((rows, 1), (6, 2))
    )
    finite = a.isfinite() & (a.abs() < 1e30)
    for left in (a, torch.where(finite, a, 1.0)):
        for right in (b, torch.where(b.isfinite(), b, 1.0)):
            found = exact.mm(left, right.t(), "exact6")
            assert differing(found, heal.mm(left, right.t(), "exact6")) == 0


@pytest.mark.parametrize(
    ("m", "k", "n"), [(0, 4, 4), (2, 0, 4), (2, 4, 0), (2, 4, 1), (2, 1, 4), (2, 20000, 2)]
)
def test_what_does_not_fit_keeps_its_reference(m, k, n):
    assert exact.mm(torch.ones(m, k), torch.ones(k, n), "exact5") is NotImplemented


@pytest.mark.parametrize("numerics", ["heal", "layercast", "exact5:a100", "exact5::2"])
def test_other_arithmetic_keeps_its_reference(numerics):
    assert exact.mm(torch.ones(2, 4), torch.ones(4, 3), numerics) is NotImplemented


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("numerics", ["exact5", "exact8"])
@pytest.mark.usefixtures("without_vnni")
def test_compiled_products_too(rows, numerics):
    """Inductor's loops: odd sizes, so that vectors have a rest; a producer that is fused in."""
    torch.manual_seed(0)
    x, w = torch.randn(rows, 333), torch.randn(45, 333).to(BF16)

    def layer(x, w):
        return heal.mm(heal.silu(x), w.t(), numerics)

    found, code = run_and_get_code(compiled(layer), x, w)
    assert differing(found, layer(x, w)) == 0
    # What is stored in the weight's size: nothing for one row, else its digits.
    stored = re.findall(r"empty_strided_cpu\(\(45, 333\), \([^)]*\), torch\.(\w+)\)", code[0])
    assert set(stored) == (set() if rows == 1 else {"int8"})


def test_a_wrong_digit_is_noticed(monkeypatch):
    """The inverse: the pair of lowest digits, which five products drop, is multiplied too."""
    torch.manual_seed(0)
    a, b = torch.randn(3, 200), torch.randn(200, 7).to(BF16)
    truth = heal.mm(a, b, "exact5")
    every = {5: exact.Scheme(3, 2, 0)}
    monkeypatch.setattr(exact, "scheme", lambda products, _: every[products])
    assert differing(exact.mm(a, b, "exact5"), truth) > 0


# ------------------------------------------------------------------------------------- attention


def states(batch, heads, kv_heads, length, keys, size, value_size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((heads, length, size), (kv_heads, keys, size), (kv_heads, keys, value_size))
    return [torch.randn(batch, *shape, generator=generator) * 3 for shape in shapes]


@examples(40)
@given(
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 2),
    groups=st.integers(1, 3),
    length=st.integers(1, 4),
    keys=st.integers(1, 40),
    size=st.sampled_from([1, 3, 16, 64]),
    kv=st.sampled_from(list(FORMATS)),
    mask=st.sampled_from([None, "causal", "bool", "float"]),
    special=st.sampled_from([None, math.nan, math.inf]),
    seed=st.integers(0, 2**16),
)
def test_attention_has_the_bits_of_the_reference(
    batch, kv_heads, groups, length, keys, size, kv, mask, special, seed
):
    q, k, v = states(batch, kv_heads * groups, kv_heads, length, keys, size, size + 1, seed)
    generator = torch.Generator().manual_seed(seed)
    if special is not None:
        x = (q, k, v)[seed % 3]
        x.view(-1)[seed % x.numel()] = special
    given_mask = None
    if mask == "bool":
        given_mask = torch.rand(batch, 1, length, keys, generator=generator) < 0.6
    elif mask == "float":
        given_mask = torch.randn(length, keys, generator=generator)
    scoring = Scoring(size**-0.5, given_mask, is_causal=mask == "causal")
    arguments = arguments_of((q, k, v), scoring, kv)
    assert differing(exact.attend(*arguments), heal.integer_attention(*arguments)) == 0


def arguments_of(states, scoring: Scoring, kv: str = "int16") -> tuple:
    return (*integer_states(*states, kv=kv), *scoring.arguments, "exact5")


def mask_of(kind: str, length: int, keys: int) -> Tensor | None:
    """Of every shape that broadcasts to `[B, H, L, S]`."""
    if kind == "none":
        return None
    if kind == "bool":
        return torch.arange(length * keys).reshape(length, keys) % 5 > 0
    if kind == "keys":
        return torch.arange(keys) % 7 != 2
    if kind == "rows":
        return torch.linspace(-1, 1, length).reshape(1, 1, length, 1)
    return torch.zeros(1, 1, 1, keys, dtype=torch.bool)


@examples(40)
@given(
    length=st.integers(1, 20),
    keys=st.integers(1, 20),
    fewest=st.integers(1, 7),
    most=st.integers(1, 5),
    window=st.none() | st.integers(1, 25),
    causal=st.booleans(),
    mask=st.sampled_from(["none", "bool", "keys", "rows", "hidden"]),
    kv=st.sampled_from(list(FORMATS)),
    special=st.sampled_from([None, math.nan, math.inf]),
)
def test_blocks_of_causal_rows_have_the_bits_of_the_whole(
    length, keys, fewest, most, window, causal, mask, kv, special
):
    q, k, v = states(2, 4, 2, length, keys, 8, 5, seed=length + 20 * keys)
    if special is not None:
        k[0, 0, -1, 0] = v[1, 1, -1, 0] = special  # the last key is seen by the last rows only
    scoring = Scoring(0.3, mask_of(mask, length, keys), is_causal=causal, window=window)
    arguments = arguments_of((q, k, v), scoring, kv)
    with mock.patch.multiple(exact, FEWEST_ROWS=fewest, MOST_BLOCKS=most):
        parts = exact.visible_blocks(length, keys, scoring)
        assert len(parts) <= most
        assert sum(rows.stop - rows.start for rows, _ in parts) == length
        found = exact.attend(*arguments)
    assert differing(found, heal.integer_attention(*arguments)) == 0


def test_a_block_that_misses_a_key_shows(monkeypatch):
    """The inverse."""
    arguments = arguments_of(states(1, 2, 1, 130, 130, 16, 16), Scoring(0.25, is_causal=True))
    parts = exact.visible_blocks

    def without_the_last(*sizes):
        return [(rows, slice(0, columns.stop - 1)) for rows, columns in parts(*sizes)]

    wanted = heal.integer_attention(*arguments)
    assert differing(exact.attend(*arguments), wanted) == 0
    monkeypatch.setattr(exact, "visible_blocks", without_the_last)
    assert differing(exact.attend(*arguments), wanted) > 0


def test_attention_past_a_budget_keeps_its_reference():
    q, k, v = states(1, 1, 1, 1, 2, 200, 2)
    for kv, fits in (("int24", False), ("int16", True)):
        found = exact.attend(*arguments_of((q, k, v), Scoring(1.0), kv))
        assert (found is not NotImplemented) == fits
    none = arguments_of((q, k[:, :, :0], v[:, :, :0]), Scoring(1.0))
    assert exact.attend(*none) is NotImplemented


@pytest.mark.parametrize("length", [1, 5])
def test_compiled_attention_too(length):
    q, k, v = states(1, 4, 2, length, 19, 16, 16)
    mask = torch.ones(length, 19, dtype=torch.bool).tril(19 - length)

    def attention(q, k, v):
        return heal.sdpa(q, k, v, mask, enable_gqa=True, kv="int16", numerics="exact5")

    assert differing(compiled(attention)(q, k, v), attention(q, k, v)) == 0


def test_compiled_blocks_too():
    q, k, v = states(1, 4, 2, 140, 140, 16, 16)

    def attention(q, k, v):
        options = {"kv": "int16", "numerics": "exact5", "window": 50}
        return heal.sdpa(q, k, v, is_causal=True, enable_gqa=True, **options)

    assert differing(compiled(attention)(q, k, v), attention(q, k, v)) == 0
