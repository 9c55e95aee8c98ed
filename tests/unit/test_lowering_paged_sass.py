"""What the CUDA compiler makes of the kernels over pages: tensor cores, no spills, no slack."""

from __future__ import annotations

import re

import pytest
import triton

from healpass.lowering.cuda.tiles import SMALLEST_SHARED_MEMORY
from tests.sass import Report, disassembled
from tests.support.paged_runs import CASES, Change, binary
from tests.support.ptx import free

BY_TITLE = {case.title: case for case in CASES}
#: Instructions that spill under one Triton, where that of the pinned torch spills none.
OTHER_TRITON = {("3.6.0", "paged prefill 128", 90): 2}


def reports(title: str, capability: int, change: Change | None = None) -> dict[str, Report]:
    return {
        launch.text.template: disassembled(binary(launch, capability, change), capability)
        for launch in BY_TITLE[title].launches(capability)
    }


def assert_clean(facts: Report, exact: bool, spills: int = 0) -> None:
    assert facts.spills <= spills
    assert facts.registers > 10, "a trap stub was compiled instead of the kernel"
    assert facts.serialised == (), "ptxas runs the tensor core step by step"
    assert "tf32" not in facts.ptx
    assert "div.full" not in facts.ptx
    assert facts.shared <= SMALLEST_SHARED_MEMORY * 1024, "sm_86 and sm_89 run this tile, too"
    if exact:
        assert free(facts.ptx) == set()
    assert set(re.findall(r"\w+\.approx", facts.ptx)) <= {"ex2.approx", "lg2.approx"}


def units(facts: Report) -> set[str]:
    """Kinds of tensor-core instructions."""
    return {re.sub(r"\..*", "", name) for name in facts.mma}


EXACT = {"paged_query", "paged_write", "paged_tops", "paged_sums", "paged_settle"}
SHOWN = [("paged prefill 128", 90), ("exact paged prefill 64", 90), ("paged decode 64, all", 80)]


@pytest.mark.parametrize(
    ("title", "capability"),
    [
        *SHOWN,
        *(
            pytest.param(title, capability, marks=pytest.mark.deep)
            for title in BY_TITLE
            for capability in (80, 90, 100)
            if (title, capability) not in SHOWN
        ),
    ],
)
def test_every_kernel_is_clean(title, capability):
    few = OTHER_TRITON.get((triton.__version__, title, capability), 0)
    for name, facts in reports(title, capability).items():
        assert_clean(facts, name in EXACT, few)


@pytest.mark.parametrize(
    ("title", "name", "capability", "expected"),
    [
        ("paged prefill 128", "paged_attention", 90, {"IGMMA", "HGMMA"}),
        ("paged decode 64, all", "paged_attention", 80, {"IMMA", "HMMA"}),
        ("paged decode, layercast", "paged_attention", 90, {"IMMA"}),
        ("exact paged prefill 64", "paged_sums", 90, {"IMMA"}),
    ],
)
def test_digits_go_through_the_tensor_core(title, name, capability, expected):
    assert units(reports(title, capability)[name]) == expected


# ------------------------------------------------------------------------------ inverse tests


def test_a_hardware_exponential_is_seen():
    def change(text: str) -> str:
        return re.sub(
            r"return tl\.where\(x < limit, 0\.0, .*\)",
            "return tl.exp2(x.to(tl.float32)).to(tl.float64)", text,
        )  # fmt: skip

    facts = reports("exact paged decode 128", 90, change)["paged_sums"]
    assert any("ex2.approx" in found for found in free(facts.ptx))


def test_an_approximate_division_is_seen():
    def change(text: str) -> str:
        return text.replace("x.to(tl.float64) / scale.to(tl.float64)[:, None]",
                            "(x / scale[:, None]).to(tl.float64)")  # fmt: skip

    facts = reports("exact paged decode 128", 90, change)["paged_query"]
    assert any("div.full" in found for found in free(facts.ptx))


def test_a_tile_that_is_too_large_is_seen_to_spill():
    def change(text: str) -> str:
        return text.replace("BLOCK_N : tl.constexpr = 64", "BLOCK_N : tl.constexpr = 128")

    assert reports("paged prefill 128", 90, change)["paged_attention"].spills > 0
