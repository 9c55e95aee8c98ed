"""What the CUDA compiler makes of the attention kernels: tensor cores, registers, no spills."""

from __future__ import annotations

import re

import pytest

from healpass.lowering.cuda.tiles import SMALLEST_SHARED_MEMORY
from tests.sass import BLACKWELL_INTEGERS, TENSOR_MEMORY, Report, compiled
from tests.support.attention_cases import CASES, AttentionCase, Scoring
from tests.support.fake_cuda import Kernel

BY_TITLE = {case.title: case for case in CASES}
#: The backward kernels for heads of 256 spill a little whatever the tile: under Triton 3.7 on
#: sm_100, under 3.9 on sm_90 and sm_100.
FEW_SPILLS = {"backward 256": 14, "backward 256, fp32": 2}


def reports(title: str, capability: int) -> list[Report]:
    kernels = BY_TITLE[title].templates(capability)
    return [compiled(kernel, capability) for kernel in kernels]


def assert_clean(title: str, facts: Report) -> None:
    assert facts.spills <= FEW_SPILLS.get(title, 0)
    assert facts.registers > 10, "a trap stub was compiled instead of the kernel"
    assert facts.tensor_memory <= TENSOR_MEMORY
    assert facts.serialised == ()
    assert "div.full" not in facts.ptx
    # Their errors are in the bound: 2 units in the last place (PTX ISA, `ex2` and `lg2`).
    assert set(re.findall(r"\w+\.approx", facts.ptx)) <= {"ex2.approx", "lg2.approx"}
    assert "tf32" not in facts.ptx
    if facts.capability == 80:
        assert facts.shared <= SMALLEST_SHARED_MEMORY * 1024, "sm_86 and sm_89 run this tile, too"


def units(facts: Report) -> set[str]:
    """Kinds of tensor-core instructions."""
    return {re.sub(r"\..*", "", name) for name in facts.mma}


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("attention 128", {"IGMMA", "HGMMA"}),
        ("attention 128, int24", {"IGMMA", "HGMMA"}),
        ("attention 128, fp32", {"HGMMA"}),
        ("decode 128", {"IMMA", "HMMA"}),
    ],
)
def test_hopper_runs_its_tensor_core_without_spills(title, expected):
    found = reports(title, 90)
    for facts in found:
        assert_clean(title, facts)
    assert units(found[0]) == expected


@pytest.mark.parametrize("title", ["attention 128", "decode 128"])
def test_ampere_runs_mma_sync_without_spills(title):
    facts = reports(title, 80)[0]
    assert_clean(title, facts)
    assert units(facts) == {"IMMA", "HMMA"}


def test_blackwell_runs_its_tensor_core_without_spills():
    facts = reports("attention 128", 100)[0]
    assert_clean("attention 128", facts)
    assert units(facts) == {BLACKWELL_INTEGERS, "UTCHMMA"}


def test_gradients_run_on_the_tensor_core_without_spills():
    of_query, of_key = reports("backward 128", 90)
    for facts in (of_query, of_key):
        assert_clean("backward 128", facts)
    assert units(of_query) == {"IGMMA", "HGMMA"}
    assert units(of_key) == {"IMMA", "HMMA"}


def test_the_softcap_and_sinks_divide_as_ieee_does():
    case = AttentionCase("capped", 512, 512, 64, scoring=Scoring(True, softcap=50.0))
    (kernel,) = case.templates()
    assert_clean("capped", compiled(kernel, 90))


def test_a_tile_that_is_too_large_is_seen_to_spill():
    (kernel,) = BY_TITLE["attention 128"].templates()
    wide = re.sub(r"BLOCK_N : tl.constexpr = \d+", "BLOCK_N : tl.constexpr = 128", kernel.source)
    assert compiled(Kernel(kernel.name, wide), 90).spills > 0


def test_a_tile_that_sm_100_has_no_room_for_is_seen():
    """Triton 3.6 and 3.7 want more tensor memory than there is, and compile a trap; 3.9 spills."""
    (kernel,) = BY_TITLE["attention 256, fp32"].templates(100)
    wide = re.sub(r"BLOCK_M : tl.constexpr = \d+", "BLOCK_M : tl.constexpr = 64", kernel.source)
    with pytest.raises(AssertionError):
        assert_clean("attention 256, fp32", compiled(Kernel(kernel.name, wide), 100))


@pytest.mark.deep
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("title", sorted(BY_TITLE))
def test_every_case_is_clean(title, capability):
    for facts in reports(title, capability):
        assert_clean(title, facts)
