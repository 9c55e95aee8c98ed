"""Exact products of groups, and partial products, as a GPU runs them: zero differing bits.

The right bits are those of the operators' reference implementation on CPU; the generated code runs
in Triton's interpreter. Padding is NaN, so a read past the end shows.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from healpass.backend import PINNED_SETTINGS
from healpass.lowering.cuda import exact_matmul
from healpass.ops.products.digits import groups_by_digits
from tests.support import interpreter
from tests.support.bits import differing
from tests.support.exact_gpu import laid, run, source
from tests.support.fake_cuda import always, generated_source
from tests.support.strategies import data, fill

heal = torch.ops.heal
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
#: What is ragged: rows, terms of the sum, columns.
FORMS = ("rows", "terms", "columns")


def shapes(form: str, groups: int, ragged: int, k: int, n: int) -> tuple[tuple[int, ...], ...]:
    """Of both operands, `ragged` being the size of the dimension that is in groups."""
    return {
        "rows": ((ragged, k), (groups, k, n)),
        "terms": ((k, ragged), (ragged, n)),
        "columns": ((groups, n, k), (k, ragged)),
    }[form]


def offsets(*ends: int) -> Tensor:
    return torch.tensor(ends, dtype=torch.int32)


def grouped(
    a: Tensor, b: Tensor, offs: Tensor, numerics: str = "exact5", capability: int = 90
) -> Tensor:
    """As the generated code for a GPU computes it."""
    (found,) = run(lambda *x: (heal.grouped_mm(*x, numerics),), [a, b, offs], capability)
    return found


def differ(
    a: Tensor, b: Tensor, offs: Tensor, numerics: str = "exact5", capability: int = 90
) -> int:
    """How many elements differ in a bit from the operator's reference implementation."""
    return differing(
        grouped(a, b, offs, numerics, capability), heal.grouped_mm(a, b, offs, numerics)
    )


def operands(
    form: str, ragged: int, k: int, n: int, groups: int = 3, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Rows and columns of the ragged dimension differ in magnitude."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(size, generator=generator) for size in shapes(form, groups, ragged, k, n))
    return a * 2.0 ** torch.arange(a.shape[-2]).remainder(9).unsqueeze(-1), b


layouts = st.tuples(
    st.sampled_from([FP32, BF16, FP16]), data(), st.booleans(), st.sampled_from([0, 1, 16])
)


@settings(max_examples=12)
@given(
    st.sampled_from(FORMS),
    st.lists(st.integers(0, 40), min_size=1, max_size=4),
    st.integers(0, 9),
    st.integers(1, 90),
    st.integers(2, 40),
    layouts,
    layouts,
    st.sampled_from(["exact5", "exact5", "exact3", "exact6", "exact8"]),
    st.sampled_from([80, 90, 103]),
)
def test_groups_have_the_bits_of_their_reference(
    form, counts, rest, k, n, left, right, how, capability
):
    """Groups of any size, empty ones too; `rest` rows (columns, terms) belong to none."""
    ends = torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    tensors = []
    sizes = shapes(form, len(counts), int(ends[-1]) + rest, k, n)
    for size, (dtype, values, transposed, padding), dim in zip(
        sizes, (left, right), (-1, -2), strict=True
    ):
        filled = fill(size, values, dtype, 0, dim)
        tensors.append(laid(filled, transposed=transposed, padding=padding))
    assert differ(*tensors, ends, how, capability) == 0


@pytest.mark.parametrize("form", FORMS)
def test_the_graph_means_the_operator(form):
    """By the operators' reference implementation on CPU, without a compiler."""
    a, b = operands(form, 50, 33, 7)
    b.view(-1)[5], a.view(-1)[9] = torch.inf, torch.nan
    offs = offsets(11, 11, 46)
    found = groups_by_digits(a, b.to(BF16), offs, 5)
    assert differing(found, heal.grouped_mm(a, b.to(BF16), offs, "exact5")) == 0


@pytest.mark.parametrize("form", FORMS)
def test_what_is_not_finite_stays_in_its_group(form):
    a, b = operands(form, 70, 40, 20)
    a.view(-1)[7], b.view(-1)[3], b.view(-1)[-1] = torch.nan, torch.inf, -torch.inf
    assert differ(a, b, offsets(30, 31, 64)) == 0


@pytest.mark.parametrize("form", FORMS)
def test_sums_that_are_split_have_the_same_bits(form, monkeypatch):
    a, b = operands(form, 300, 300, 20)
    offs = offsets(10, 290, 300)
    monkeypatch.setattr(exact_matmul, "terms", always(64))
    assert differ(a, b, offs) == 0


@pytest.mark.parametrize("few_rows", [0, 999])
@pytest.mark.parametrize("capability", [90, 103])
def test_weights_that_are_cut_as_they_are_read_have_the_same_bits(
    few_rows, capability, monkeypatch
):
    monkeypatch.setattr(exact_matmul, "FEW_ROWS", few_rows)
    a, b = operands("rows", 40, 70, 33)
    assert differ(a, b.to(BF16), offsets(3, 20, 38), capability=capability) == 0


def test_the_copy_engine_fetches_the_matrices_of_groups():
    a, b = operands("rows", 200, 128, 64)
    offs = offsets(70, 75, 190)
    text = source(lambda *x: (heal.grouped_mm(*x, "exact5"),), [a, b, offs])
    assert "make_tensor_descriptor" in text
    assert differ(a, b, offs) == 0


def test_a_symbolic_number_of_rows_has_the_same_bits():
    a, b = operands("rows", 70, 40, 33)
    text = generated_source(
        lambda *x: (heal.grouped_mm(*x, "exact5"),),
        [a, b, offsets(10, 40, 70)],
        dynamic=True,
        **PINNED_SETTINGS,
    )
    assert "def triton_tem" in text
    for rows in (70, 41):
        offs = offsets(1, 30, rows)
        sizes = [rows] if "arg0_1 = args" not in text else []
        (found,) = interpreter.run(text, *sizes, a[:rows], b, offs)
        assert differing(found, heal.grouped_mm(a[:rows], b, offs, "exact5")) == 0


def test_one_column_runs_its_reference():
    """A result of one element is stored without a mask, and tiles of no group would write it."""
    a, b = operands("rows", 5, 40, 1)
    text = source(lambda *x: (heal.grouped_mm(*x, "exact5"),), [a, b, offsets(1, 2, 5)])
    assert "torch.ops.heal.digit_grouped_mm.default" in text


def test_a_boundary_that_is_off_by_one_shows(monkeypatch):
    """The inverse: one row in the wrong group."""
    a, b = operands("rows", 40, 40, 20)
    wanted = heal.grouped_mm(a, b, offsets(10, 21, 40), "exact5")
    assert differing(grouped(a, b, offsets(10, 20, 40)), wanted) > 0


# ------------------------------------------------------------------------------------- partial


@pytest.mark.parametrize("products", [3, 5, 6, 8])
def test_partial_products_are_those_of_the_reference(products):
    a, b = operands("terms", 130, 40, 20)
    a[3, 5] = torch.nan
    scales = heal.exact_scales(a, b, products)
    tensors = [a, b, *scales]
    (found,) = run(lambda *x: (heal.mm_partial(*x, products),), tensors)
    assert torch.equal(found, heal.mm_partial(*tensors, products))
    text = source(lambda *x: (heal.mm_partial(*x, products),), tensors)
    assert "heal.mm_partial" not in text
    assert "triton_tem" in text


def test_without_a_kernel_the_meanings_run():
    a, b = operands("terms", 130, 40, 20)
    tensors = [a, b, *heal.exact_scales(a, b, 5)]
    text = source(lambda *x: (heal.mm_partial(*x, 5),), tensors, 75)
    assert "torch.ops.heal.mm_partial.default" in text
    text = source(lambda *x: (heal.grouped_mm(*x, "exact5:h100"),), [a, b, offsets(9, 99)])
    assert "torch.ops.heal.grouped_mm.default" in text
