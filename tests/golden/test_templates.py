"""The Triton source that comes out of each of our templates, as text to be read and compared.

After a change that is meant: `EXPECTTEST_ACCEPT=1 python -m pytest tests/golden/test_templates.py`
writes the `.expected` files anew. They are those of the pinned torch; where another puts other
strides into a template, it has a file of its own, `.torch-2.15.expected`.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from healpass.backend import PINNED_SETTINGS
from tests.sass import Case
from tests.support.attention_cases import AttentionCase, Scoring
from tests.support.exact_cases import ExactAttentionCase, ExactCase, ExactGroupsCase, ExactSumsCase
from tests.support.fake_cuda import Device, generated_source, kernels
from tests.support.paged_runs import PagedCase

FP32, FP16 = torch.float32, torch.float16

#: Llama-3-8B's down projection and attention in prefill and decode, SmolLM2's gate.
CASES = {
    "gemm_planes": Case("planes", 2048, 4096, 14336),
    "gemm_ampere": Case("two chains per tile", 2048, 4096, 14336),
    "gemm_cut": Case("cut in registers", 100, 192, 576),
    "gemm_batched": Case("batched", 512, 512, 64, b=FP32, batch=9),
    "grouped": Case("routed rows", 512, 192, 576, groups=4),
    "decode": Case("decode", 1, 4096, 14336),
    "decode_fp16": Case("decode", 8, 1536, 576, b=FP16),
    "layercast": Case("layercast", 512, 1536, 576, numerics="layercast"),
    "attention_prefill": AttentionCase(
        "causal", 2048, 2048, scoring=Scoring(is_causal=True, scale=128**-0.5)
    ),
    "attention_decode": AttentionCase("decode", 1, 8192, kv="int24", mask=torch.bool),
    "attention_floats": AttentionCase("floats", 512, 512, 64, kv="fp32"),
    "attention_backward": AttentionCase(
        "window, softcap", 512, 512, 80,
        scoring=Scoring(is_causal=True, window=256, softcap=50.0), backward=True,
    ),
    "exact_prefill": ExactCase("exact prefill", 2048, 4096, 14336),
    "exact_half": ExactCase("exact prefill", 2048, 4096, 14336, numerics="exact8"),
    "exact_batched": ExactCase("exact batched", 512, 512, 64, b=FP32, batch=9),
    "exact_decode": ExactCase("exact decode", 1, 4096, 14336),
    "exact_grouped": ExactGroupsCase("exact routed rows", 4096, 4096, 2048),
    "exact_grouped_sum": ExactGroupsCase("exact routed gradient", 4096, 4096, 2048, ragged=True),
    "exact_sums": ExactSumsCase("exact scores", 8192, 2048, 128),
    "exact_attention": ExactAttentionCase("exact attention", 2048, 2048, 128),
    "exact_attention_decode": ExactAttentionCase("exact decode", 1, 8192, 64, "int24"),
}  # fmt: skip
#: Serving engines' steps, whose kernels no graph holds.
PAGED = {
    "paged_decode": PagedCase("decode", sinks=True, window=1024),
    "paged_prefill": PagedCase("prefill", 512, kv="int24", numerics="layercast"),
    "paged_exact": PagedCase("exact decode", kv="int24", numerics="exact5"),
}
#: Compute capability where it is not Hopper's.
DEVICES = {"gemm_ampere": Device(80), "exact_half": Device(103)}


@pytest.mark.parametrize("name", CASES)
def test_generated_kernels_are_as_expected(name):
    case = CASES[name]
    settings = PINNED_SETTINGS if name.startswith("exact") else {}
    device = DEVICES.get(name, Device())
    found = kernels(generated_source(case, case.tensors(), device, **settings))
    # The others are Inductor's own.
    compare(name, [(kernel.name, kernel.body) for kernel in found if kernel.is_template])


@pytest.mark.parametrize("name", PAGED)
def test_kernels_over_pages_are_as_expected(name):
    found = [launch.text for launch in PAGED[name].launches()]
    compare(name, [(text.name, text.render()) for text in found])


def compare(name: str, found: list[tuple[str, str]]) -> None:
    """With the file of this name, or this torch's own where its text differs: kernels by name."""
    text = "\n".join(f"# {kernel}\n{body.rstrip()}\n" for kernel, body in found)
    text = "\n".join(line.rstrip() for line in text.splitlines()) + "\n"
    path = Path(__file__).with_name(f"test_templates.{name}.expected")
    own = path.with_suffix(f".torch-{'.'.join(torch.__version__.split('.')[:2])}.expected")
    path = own if own.exists() else path
    if os.environ.get("EXPECTTEST_ACCEPT"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8"), f"{path.name} differs; read the module's head"
