"""vLLM's own tests of determinism, from its source archive, judge `exact`; plain vLLM fails them.

Left out: files about single kernels of vLLM's (matrix products, norms, FP8, FP4, LoRA), which HEAL
does not call; parameters that choose among such kernels (`vllm_c`, blocks of FlexAttention), which
would repeat a run; images; and the file over HTTP, which needs all of vLLM's tests
(`test_server.py` does the same).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from healpass.integrations import smollm2

pytestmark = pytest.mark.model
ROOT = Path(__file__).parents[2]
#: Unpacked by `make test-vllm`.
FILE = ROOT / "build/vllm-0.32.0/tests/v1/determinism/test_batch_invariance.py"
#: Their sizes are for accelerators; they read smaller ones from here.
SIZES = {
    "VLLM_NEEDLE_TRIALS": "2",
    "VLLM_NEEDLE_BATCH_SIZE": "8",
    "VLLM_NEEDLE_MAX_TOKENS": "24",
    "VLLM_MIN_PROMPT": "100",  # words
    "VLLM_MAX_PROMPT": "400",
    "VLLM_DECODE_PREFILL_NUM_PROMPTS": "2",
}
BY_BATCH = "test_logprobs_bitwise_batch_invariance_bs1_vs_bsN[16-16-here]"
THEIRS = [
    "test_v1_generation_is_deterministic_across_batch_sizes_with_needle[default-here]",
    BY_BATCH,
    "test_logprobs_bitwise_batch_invariance_ragged_chunked_prefill[here]",
    "test_simple_generation[here]",
    "test_decode_logprobs_match_prefill_logprobs[FLASH_ATTN]",
]


@pytest.fixture(scope="module")
def smollm2_short(tmp_path_factory):
    """Three layers of SmolLM2: real weights and a tokenizer."""
    folder = tmp_path_factory.mktemp("smollm2")
    for part in smollm2.load(layers=3):
        part.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def judge(smollm2_short, tmp_path):
    """What one of their tests says, in a process of its own: nothing where it passes."""

    def judged(name: str, arithmetic: str) -> str:
        report = tmp_path / "report.xml"
        command = [sys.executable, "-m", "pytest", "-c", "/dev/null", f"--junitxml={report}"]
        command += ["-p", "tests.support.determinism", "--arithmetic", arithmetic]
        environment = os.environ | SIZES | {"VLLM_TEST_MODEL": smollm2_short}
        done = subprocess.run(
            [*command, f"{FILE}::{name}"],
            cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert report.exists(), done.stdout[-4000:] + done.stderr[-4000:]
        (case,) = ElementTree.parse(report).iter("testcase")
        return "".join(f"{found.tag}: {found.get('message')}" for found in case)

    assert FILE.exists(), f"there is no {FILE}; `make test-vllm` fetches it"
    return judged


@pytest.mark.parametrize("name", THEIRS)
def test_theirs_pass_in_exact(judge, name):
    assert judge(name, "exact") == ""


def test_plain_vllm_fails_theirs(judge):
    assert "Batch invariance violated" in judge(BY_BATCH, "plain")


def test_their_inverse_finds_plain_vllm_different(judge):
    """It passes where answers differ."""
    assert judge("test_logprobs_without_batch_invariance_should_fail[here]", "plain") == ""
