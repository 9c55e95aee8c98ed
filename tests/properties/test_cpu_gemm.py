"""The C++ kernels of products with a linear layer's weight: `cpu_gemm`, `cpu_exact_gemm`."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from healpass.lowering.cpu import gemm
from tests.support.bits import any_floats, compiled, differing
from tests.support.profiles import examples
from tests.support.strategies import DTYPES, data, fill

heal = torch.ops.heal
needs_vnni = pytest.mark.skipif(not gemm.has_vnni(), reason="this processor has no VNNI")
#: K, N, the weight's dtype and a precision: odd sizes, single ones, more than a block of columns.
EXACT = [
    (333, 45, "bf16", "exact5"), (64, 130, "fp16", "exact3"), (77, 66, "fp32", "exact6"),
    (1, 1, "bf16", "exact5"), (130, 17, "bf16", "exact8"), (96, 64, "fp32", "exact5"),
    (1 << 14, 5, "bf16", "exact5"), (70, 31, "fp16", "exact5"),
]  # fmt: skip


def product(numerics: str):
    """A linear layer, compiled."""
    return compiled(lambda x, w: heal.mm(x, w.t(), numerics))


def run(function, x: Tensor, w: Tensor) -> Tensor:
    """One call; one graph serves every number of rows above one."""
    if len(x) > 1:
        torch._dynamo.mark_dynamic(x, 0)
    with torch.no_grad():
        return function(x, w)


@needs_vnni
@pytest.mark.parametrize("case", EXACT, ids=lambda case: "-".join(map(str, case)))
def test_exact_products_have_the_bits_of_the_reference(case):
    """One to many rows, any magnitudes, subnormals; NaN and infinities in rows and columns."""
    terms, columns, dtype, numerics = case
    function = product(numerics)

    @examples(25)
    @given(
        rows=st.sampled_from([1, 2, 3, 5, 8, 21]),
        how=st.tuples(data(st.integers(-30, 30)), data(st.integers(-14, 14))),
        seed=st.integers(0, 2**16),
    )
    def check(rows, how, seed):
        x = fill((rows, terms), how[0], torch.float32, seed, 1)
        w = fill((columns, terms), how[1], DTYPES[dtype], seed + 1, 1)
        assert differing(run(function, x, w), heal.mm(x, w.t(), numerics)) == 0

    check()
    kinds = any_floats(300 * terms, 1)[: 300 * terms].reshape(300, terms)
    weights = any_floats(columns * terms, 2)[: columns * terms].reshape(columns, terms)
    weights = weights.to(DTYPES[dtype])
    finite = torch.where(weights.isfinite(), weights, 1.0)
    for w in (weights, finite):
        assert differing(run(function, kinds, w), heal.mm(kinds, w.t(), numerics)) == 0


@needs_vnni
def test_exact_products_are_the_kernel_and_store_no_digits_of_a_weight():
    x, w = torch.randn(5, 576), torch.randn(64, 576).to(torch.bfloat16)
    found, code = run_and_get_code(product("exact5"), x, w)
    assert differing(found, heal.mm(x, w.t(), "exact5")) == 0
    assert "dpbusd" in code[0]
    assert "empty_strided_cpu((64, 576)" not in code[0]


@pytest.mark.parametrize("numerics", ["heal", pytest.param("exact5", marks=needs_vnni)])
@pytest.mark.parametrize("rows", [2, 9])
def test_what_makes_the_activation_may_have_another_dtype(numerics, rows):
    """Exact functions end as INT32 bits that are read as FP32; halves are widened."""
    torch.manual_seed(0)
    w = torch.randn(33, 70).to(torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(rows, 70).to(dtype)

        def layer(x, w):
            return heal.silu(heal.mm(heal.silu(x), w.t(), numerics))

        found, wanted = run(compiled(layer), x, w), layer(x, w)
        distance = (found.double() - wanted.double()).abs().max() / wanted.abs().max()
        assert distance <= (0 if numerics == "exact5" else 70 * 2.0**-22)


def test_a_long_sum_needs_no_copy_of_its_weight_either():
    """K past the budget of exact sums, which FP32 has not."""
    x, w = torch.randn(3, gemm.MOST_TERMS + 9), torch.randn(4, gemm.MOST_TERMS + 9)
    w = w.to(torch.bfloat16)
    found, code = run_and_get_code(product("heal"), x, w)
    assert "extern_kernels.mm(" not in code[0]
    size = x.double().abs() @ w.t().double().abs()
    assert ((found - x.double() @ w.t().double()).abs() <= x.shape[1] * 2.0**-24 * size).all()


@needs_vnni
def test_a_weight_that_the_graph_makes_is_the_kernels_too():
    """Inductor may lay it out as it likes: no product of an opened graph falls back in silence."""
    torch.manual_seed(0)
    x, w = torch.randn(5, 96), torch.randn(96, 40)

    def layer(x, w):
        return heal.mm(x, (w * 0.5).t().contiguous().to(torch.bfloat16).t(), "exact5")

    found, code = run_and_get_code(compiled(layer), x, w)
    assert "dpbusd" in code[0]
    assert "torch.ops.heal.mm" not in code[0]
    assert differing(found, layer(x, w)) == 0


#: What is changed, into what, and the rows of a product that shows it.
_SCALE = ("> limit) line.scale *= 2.0f", "> 2.0 * limit) line.scale *= 2.0f")
_PAIR = ("if (i + j >= CUT)\n            #pragma", "if (i + j > CUT)\n            #pragma")
BREAKS = {
    "a digit": ("_mm512_set1_epi32(0x808080)", "_mm512_set1_epi32(0x808180)", 4),
    "a pair": (*_PAIR, 4),
    "the 128": ("offsets[i + j - CUT] += 128 *", "offsets[i + j - CUT] += 127 *", 4),
    "a scale": (*_SCALE, 4),
    "a scale of one row": (*_SCALE, 1),
    "the lowest digit": ("_mm512_set1_epi32(0xFF)", "_mm512_set1_epi32(0x7F)", 1),
    "its 128": ("_mm512_set1_epi32(128), found", "_mm512_set1_epi32(127), found", 2),
}


@needs_vnni
@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_kernel_shows(name, monkeypatch):
    """The inverse; a scale one too small is seen where an element rounds up to its limit."""
    before, after, rows = BREAKS[name]
    text = gemm.source("cpu_exact_gemm")
    assert before in text
    monkeypatch.setattr(gemm, "source", lambda _: text.replace(before, after))
    torch.manual_seed(0)
    x, w = torch.randn(rows, 200), torch.randn(32, 200).to(torch.bfloat16)
    x[:, 0], w[:, 0] = 4.0 - 2.0**-22, 4.0 - 2.0**-6
    assert differing(product("exact5")(x, w), heal.mm(x, w.t(), "exact5")) > 0


@pytest.mark.parametrize(("terms", "columns"), [(576, 40), (37, 5), (1, 3), (16, 33)])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_row_has_its_bits_in_every_batch_and_the_bound_of_a_chain(terms, columns, dtype):
    """FP32: WIDTH chains and a tree are within K u of the product of magnitudes."""
    torch.manual_seed(terms)
    x, w = torch.randn(30, terms), torch.randn(columns, terms).to(DTYPES[dtype])
    x[3, 0], w[1, 0] = 1e30, 2.0**-14
    function = product("heal")
    whole = run(function, x, w)
    for rows in (2, 3, 4, 5, 6, 7, 11, 29):
        assert differing(run(function, x[:rows], w), whole[:rows]) == 0
    exact = x.double() @ w.t().double()
    budget = terms * 2.0**-24 * (x.double().abs() @ w.t().double().abs()) + 2.0**-149
    worst = float(((whole.double() - exact).abs() / budget).max())
    print(f"observed / bound: {worst:.3f}")
    assert worst <= 1


def test_special_numbers_spread_as_in_fp32():
    x, w = torch.randn(7, 50), torch.randn(9, 50).to(torch.bfloat16)
    x[2, 49], w[4, 3], x[5, 7] = math.nan, math.inf, -math.inf
    found, wanted = run(product("heal"), x, w), x @ w.t().float()
    assert torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(found.isinf(), wanted.isinf())
