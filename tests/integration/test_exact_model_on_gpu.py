"""A whole model under `precision="exact"` as a GPU runs it: the CPU's bits, and no free rounding.

Norms, RoPE, projections, attention, SiLU and residuals of a tiny Llama, through the rewrite and
Inductor's code generation for CUDA. What a GPU would run, byte for byte, runs in Triton's
interpreter, and its PTX is read.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
import transformers as hf

from tests.support import interpreter
from tests.support.bits import differing
from tests.support.exact_gpu import Traced
from tests.support.fake_cuda import Kernel, kernels
from tests.support.families import text
from tests.support.ptx import free, ptx

BF16 = torch.bfloat16


@cache
def llama() -> Traced:
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    model = hf.LlamaForCausalLM._from_config(config, dtype=BF16).eval()
    return Traced.of(model, **text(BF16))


@cache
def source(capability: int) -> str:
    return llama().source(capability)


def test_the_logits_have_the_bits_of_the_cpu():
    results = interpreter.run(source(90), *llama().inputs)
    assert [differing(a, b) for a, b in zip(results, llama().outputs, strict=True)] == [0] * len(
        results
    )


def test_every_product_and_attention_is_a_template():
    found = source(90)
    assert "torch.ops.heal." not in found[found.index("def call(") :]
    assert sum(kernel.is_template for kernel in kernels(found)) > 2


@pytest.mark.parametrize(
    "capability",
    [90, pytest.param(80, marks=pytest.mark.deep), pytest.param(100, marks=pytest.mark.deep)],
)
def test_no_kernel_contracts_approximates_or_flushes(capability):
    found = {kernel.name: free(ptx(kernel, capability)) for kernel in kernels(source(capability))}
    assert {name: instructions for name, instructions in found.items() if instructions} == {}


def test_contraction_would_be_seen():
    """The inverse: the same kernels, allowed to contract."""
    found: set[str] = set()
    for kernel in kernels(source(90)):
        loose = kernel.source.replace("'enable_fp_fusion': False", "'enable_fp_fusion': True")
        found |= set(free(ptx(Kernel(kernel.name, loose))))
        if any(instruction.startswith("fma") for instruction in found):
            break
    assert any(instruction.startswith("fma") for instruction in found), "RoPE has multiply-adds"
