"""What the CUDA compiler makes of the exact kernels: integers on the tensor core, nothing free.

`test_exact_model_on_gpu` reads the PTX of a whole model.
"""

from __future__ import annotations

import math
import re
import struct
from functools import cache

import pytest
import torch
import triton

from healpass.ops.reproducible import fp64_coefficients
from tests.sass import BLACKWELL_INTEGERS, TENSOR_MEMORY, TOO_NEW, Report, compiled
from tests.support.exact_cases import CASES
from tests.support.exact_gpu import Attended, source
from tests.support.fake_cuda import Kernel, kernels
from tests.support.ptx import free, ptx

BY_TITLE = {case.title: case for case in CASES}
#: Instructions that spill, where every tile does: three digits by three in FP16.
FEW_SPILLS = {("exact attention 128, int24", 103): 20}
#: The same under one Triton, where that of the pinned torch spills none.
OTHER_TRITON = {("3.9.0", "exact prefill", 103): 22}


@cache
def reports(title: str, capability: int) -> list[Report]:
    if capability in TOO_NEW:
        pytest.skip(f"Triton {triton.__version__} does not compile for sm_{capability}")
    return [compiled(kernel, capability) for kernel in BY_TITLE[title].templates(capability)]


def units(facts: Report) -> set[str]:
    """Kinds of tensor-core instructions."""
    return {re.sub(r"\..*", "", name) for name in facts.mma}


@pytest.mark.parametrize(
    ("title", "capability"),
    [
        *((case.title, 90) for case in CASES),
        *(
            pytest.param(case.title, capability, marks=pytest.mark.deep)
            for case in CASES
            for capability in (80, 100, 103)
        ),
    ],
)
def test_no_kernel_contracts_approximates_flushes_or_spills(title, capability):
    for facts in reports(title, capability):
        assert free(facts.ptx) == set()
        few = OTHER_TRITON.get((triton.__version__, title, capability), 0)
        assert facts.spills <= FEW_SPILLS.get((title, capability), few)
        assert facts.registers > 10, "a trap stub was compiled instead of the kernel"
        assert facts.tensor_memory <= TENSOR_MEMORY
        assert facts.serialised == (), "ptxas runs the tensor core step by step"
        assert "tf32" not in facts.ptx


@pytest.mark.parametrize(
    ("title", "capability", "expected"),
    [
        ("exact prefill", 80, {"IMMA", "HMMA"}),
        ("exact prefill", 90, {"IGMMA", "HGMMA"}),
        ("exact prefill", 100, {BLACKWELL_INTEGERS, "UTCHMMA"}),
        ("exact prefill", 103, {"UTCHMMA"}),
        ("exact decode", 90, {"IGMMA", "HGMMA"}),
        ("exact scores 128", 80, {"IMMA"}),
        ("exact scores 128", 90, {"IGMMA"}),
    ],
)
def test_digits_go_through_the_tensor_core(title, capability, expected):
    """HMMA beside IMMA is the loop over signs, for operands that are not finite."""
    (facts,) = reports(title, capability)
    assert units(facts) == expected


def test_the_exponential_has_its_constants_in_fp64():
    """Triton may take a Python float for an FP32 number."""
    _, sums = reports("exact attention 64", 90)
    for constant in (1 / math.log(2), *fp64_coefficients.EXPM1):
        assert f"0d{struct.pack('>d', constant).hex().upper()}" in sums.ptx


def weigh(weights: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor]:
    return (torch.ops.heal.weighted_sum(weights, values, "exact5"),)


#: Functions, the shapes of their operands, and how many kernels are templates.
OPENED = {
    "attention's gradient": (Attended(is_causal=True), [(1, 4, 64, 32)] * 4, 4),  # two are one
    "a weighted sum": (weigh, [(1, 4, 64, 80), (1, 4, 80, 32)], 1),
}


@pytest.mark.deep
@pytest.mark.parametrize("name", OPENED)
def test_the_steps_between_products_are_pinned(name):
    """Inductor's own kernels too: they divide, exponentiate and add."""
    function, shapes, templates = OPENED[name]
    found = kernels(source(function, [torch.empty(*shape, device="meta") for shape in shapes]))
    assert sum(kernel.is_template for kernel in found) == templates
    assert {instruction for kernel in found for instruction in free(ptx(kernel))} == set()


# ------------------------------------------------------------------------------ inverse tests


def changed(title: str, old: str, new: str) -> Report:
    """The last kernel of a case with its text changed: something a check has to notice."""
    kernel = BY_TITLE[title].templates(90)[-1]
    assert re.search(old, kernel.source)
    return compiled(Kernel(kernel.name, re.sub(old, new, kernel.source)), 90)


def test_contraction_is_seen():
    facts = changed("exact attention 64", "'enable_fp_fusion': False", "'enable_fp_fusion': True")
    assert any(found.startswith("fma.rn.f64") for found in free(facts.ptx))


def test_a_hardware_exponential_is_seen():
    facts = changed(
        "exact attention 64",
        r"return tl\.where\(x < limit, 0\.0, .*\)",
        "return tl.exp2(x.to(tl.float32)).to(tl.float64)",
    )
    assert any("ex2.approx" in found for found in free(facts.ptx))


def test_a_tile_that_is_too_large_is_seen_to_spill():
    facts = changed(
        "exact prefill", r"BLOCK_N : tl.constexpr = \d+", "BLOCK_N : tl.constexpr = 128"
    )
    assert facts.spills > 0
