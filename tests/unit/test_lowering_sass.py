"""What the CUDA compiler makes of the templates: tensor-core instructions, registers, no spills.

`python -m tests.sass` prints the whole table; here each claim has a test, and each check one that
shows it failing.
"""

from __future__ import annotations

import dataclasses
import re
from functools import cache

import pytest
import torch
import torch.nn.functional as F
import triton

from tests.sass import CASES, TENSOR_MEMORY, Case, Report, compiled
from tests.support import interpreter
from tests.support.fake_cuda import Device, Kernel, generated_source, kernels

BY_TITLE = {case.title: case for case in CASES}
#: Dots in the code of a case: those of a K tile of 64, and the one of the loop for NaN results.
DOTS = {"prefill, planes": 3, "FP32 by FP32": 4, "16-bit by 16-bit": 1, "decode, BF16 weight": 3}

#: Instructions that spill under one Triton, where that of the pinned torch spills none.
FEW_SPILLS = {("3.6.0", "invariant, FP16 weight", 80): 6}


@cache
def report(title: str, capability: int) -> Report:
    return compiled(BY_TITLE[title].template(capability), capability)


def assert_clean(facts: Report) -> None:
    assert facts.spills == 0
    assert facts.stack == 0
    assert facts.registers > 10, "a trap stub was compiled instead of the kernel"
    assert facts.tensor_memory <= TENSOR_MEMORY
    assert facts.serialised == (), "ptxas runs the tensor core step by step"
    assert_ieee(facts)


def assert_ieee(facts: Report) -> None:
    """No approximate division, root or exponential, and no TF32."""
    assert "div.full" not in facts.ptx
    assert ".approx" not in facts.ptx
    assert "tf32" not in facts.ptx


def changed(title: str, old: str, new: str) -> Kernel:
    """The kernel of a case with its text changed: something a check has to notice."""
    kernel = BY_TITLE[title].template()
    assert re.search(old, kernel.source)
    return Kernel(kernel.name, re.sub(old, new, kernel.source))


@pytest.mark.parametrize("title", sorted(DOTS))
def test_hopper_runs_wgmma_without_spills(title):
    facts = report(title, 90)
    assert_clean(facts)
    assert all(name.startswith("HGMMA") for name in facts.mma)
    assert sum(facts.mma.values()) == 4 * DOTS[title], "four steps of 16 per dot and K tile"


@pytest.mark.parametrize("title", ["prefill, planes", "decode, BF16 weight"])
def test_two_products_wait_at_most_twice(title):
    """More waits than one per chain mean that the compiler ran the chain step by step."""
    facts = report(title, 90)
    loops = 2 if title.startswith("prefill") else 1
    chains = {"prefill, planes": 2, "decode, BF16 weight": 3}[title]
    assert facts.count("WARPGROUP.DEPBAR") <= chains * loops


@pytest.mark.parametrize("title", ["prefill, planes", "decode, BF16 weight"])
def test_ampere_runs_mma_sync_without_spills(title):
    facts = report(title, 80)
    assert_clean(facts)
    assert {name[:10] for name in facts.mma} == {"HMMA.16816"}


def test_blackwell_runs_its_tensor_core_without_spills():
    facts = report("prefill, planes", 100)
    assert_clean(facts)
    assert set(facts.mma) == {"UTCHMMA"}


def test_layercast_runs_fused_multiply_adds_and_no_tensor_core():
    facts = report("layercast", 90)
    assert_clean(facts)
    assert facts.mma == {}
    # Tile 128 x 64, 8 deep, 256 threads: 256 multiply-adds each.
    assert facts.count("FFMA") >= 256
    assert facts.count("FMUL") == 0


@pytest.mark.parametrize("title", ["prefill, planes", "16-bit by 16-bit"])
def test_chains_are_promoted_into_fp32_registers(title):
    """Tile 128 x 128 on 256 threads: 64 elements each, added once per K tile."""
    assert report(title, 90).count("FADD", "FFMA") >= 64


@pytest.mark.parametrize("title", ["prefill, planes", "16-bit by 16-bit"])
def test_ampere_promotes_two_chains_per_tile(title):
    """Tile 128 x 64 on 256 threads: 32 elements each, both chains of a K tile in FP32."""
    assert report(title, 80).count("FADD", "FFMA") >= 2 * 32


def test_a_plain_add_after_one_dot_loses_the_promotion():
    """Why the template writes an fma: without it the check above fails."""
    plain = changed(
        "16-bit by 16-bit", r"tl\.fma\(chain, ones, accumulator\)", "accumulator + chain"
    )
    assert compiled(plain, 90).count("FADD", "FFMA") < 64


def test_a_tile_that_is_too_large_is_seen_to_spill():
    wide = changed(
        "prefill, planes", r"BLOCK_N : tl.constexpr = \d+", "BLOCK_N : tl.constexpr = 256"
    )
    facts = compiled(wide, 90)
    assert facts.spills > 0
    assert facts.stack > 0


def test_tf32_is_seen():
    fast = changed("layercast", 'input_precision="ieee"', 'input_precision="tf32"')
    with pytest.raises(AssertionError, match="tf32"):
        assert_ieee(compiled(fast, 90))


def test_an_approximate_division_is_seen():
    divided = changed(
        "layercast", r"(    idx_m = rm\[:, None\]\n)", r"    accumulator = accumulator / M\n\1"
    )
    with pytest.raises(AssertionError, match="div"):
        assert_ieee(compiled(divided, 90))


def test_a_third_wait_in_a_tile_is_seen():
    extra = "chain = tl.dot(a_low, b_high, 3 * chain)"
    again = extra + "\n        chain = tl.dot(a_high, b_high, 3 * chain,"
    broken = changed("prefill, planes", r"chain = tl\.dot\(a_high, b_high, chain,", again)
    assert compiled(broken, 90).count("WARPGROUP.DEPBAR") > 4


@pytest.mark.parametrize("title", ["prefill, planes", "weight gradient"])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_planes_are_fetched_by_the_copy_engine_where_there_is_one(title, capability):
    """UTMALDG from sm_90 on, asynchronous copies (LDGSTS) before."""
    facts = report(title, capability)
    assert bool(facts.count("UTMALDG")) == (capability >= 90)
    assert bool(facts.count("LDGSTS")) == (capability < 90)


def test_one_order_for_all_rows_costs_a_third_accumulator_and_a_product():
    """What `m_invariant` costs in prefill with BF16 weights, in instructions and registers."""
    invariant, plain = report("invariant, BF16 weight", 90), report("prefill, planes", 90)
    per_tile = sum(invariant.mma.values()) // 4, DOTS["prefill, planes"] - 1
    assert per_tile == (3, 2), "dots of a K tile"
    assert invariant.registers > plain.registers


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("title", sorted(BY_TITLE))
def test_every_case_is_clean(title, capability):
    facts = report(title, capability)
    if found := FEW_SPILLS.get((triton.__version__, title, capability)):
        assert facts.spills <= found
        facts = dataclasses.replace(facts, spills=0, stack=0)
    assert_clean(facts)


def test_the_interpreter_leaves_triton_able_to_compile():
    case = Case("small", 20, 40, 64)
    source = generated_source(case, case.tensors())
    interpreter.run(source, torch.ones(20, 64), torch.ones(40, 64, dtype=torch.bfloat16))
    (kernel,) = (kernel for kernel in kernels(source) if kernel.is_template)
    assert compiled(kernel, 90).mma


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_a_fused_epilogue_does_not_spill(capability):
    """Bias, GELU and a residual need registers beside the accumulator of the product."""

    def layer(x, weight, bias, residual):
        return (F.gelu(torch.ops.heal.linear(x, weight, bias, "heal")) + residual,)

    shapes = ((2048, 4096), (4096, 4096), (4096,), (2048, 4096))
    dtypes = (torch.float32, torch.bfloat16, torch.bfloat16, torch.float32)
    tensors = [
        torch.empty(shape, dtype=dtype, device="meta")
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]
    found = kernels(generated_source(layer, tensors, Device(capability)))
    facts = compiled(found[-1], capability)
    assert facts.spills == 0
    assert facts.mma
