"""The guard against miscompiled templates: it passes what is right and names what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from healpass.lowering.cuda import kernels, selfcheck


def exact(a, b, numerics):
    return selfcheck.product(a.double(), b.double()).float()


def test_right_results_pass():
    assert selfcheck.examine(exact) == {}


def test_fp32_products_pass():
    assert selfcheck.examine(lambda a, b, _: selfcheck.product(a.float(), b.float())) == {}


#: The templates of matmuls; `test_lowering_selfcheck_attention` has those of attention, and
#: `test_lowering_selfcheck_exact` the exact ones.
MATMULS = {name for name in kernels.GRIDS if not name.startswith(("attention", "exact"))}


def test_every_template_is_examined():
    assert {problem.template for problem in selfcheck.problems()} == MATMULS


@pytest.mark.parametrize("template", sorted(MATMULS))
def test_one_wrong_template_is_named(template):
    wanted = {p.template: p for p in selfcheck.problems() if p.template == template}[template]

    def wrong(a, b, numerics):
        result = exact(a, b, numerics)
        same = a.shape[-2:] == (wanted.rows, wanted.terms)
        same = same and (a.dtype, b.dtype) == (wanted.a, wanted.b)
        same = same and b.dim() == wanted.operands()[1].dim()
        if same and numerics == wanted.numerics and (a.dim() == 3) == ("batched" in template):
            result.view(-1)[0] *= 1.001
        return result

    assert template in selfcheck.examine(wrong)


def to_tf32(x):
    """Round to 11 significant bits, the best that TF32 can do."""
    return ((x.float().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def test_tf32_is_noticed_in_every_template():
    wrong = selfcheck.examine(lambda a, b, n: exact(to_tf32(a), to_tf32(b), n))
    assert set(wrong) == MATMULS


@pytest.mark.parametrize("spoil", [torch.nan, torch.inf, 0.0])
def test_rounding_to_bf16_and_lost_elements_are_noticed(spoil):
    assert set(selfcheck.examine(lambda a, b, n: exact(a, b, n).bfloat16())) == MATMULS
    assert set(selfcheck.examine(lambda a, b, n: exact(a, b, n) * spoil)) == MATMULS


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """One GPU by name, a cache folder of its own, and no memory of earlier verdicts."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "test GPU")
    selfcheck.verdict.cache_clear()
    selfcheck._warn_once.cache_clear()
    yield
    selfcheck.verdict.cache_clear()
    selfcheck._warn_once.cache_clear()


def answer(monkeypatch, stdout, code=0):
    """Let the second process print something; returns the list of its calls."""
    calls = []

    def run(command, **kwargs):
        calls.append(command)
        if code:
            raise subprocess.CalledProcessError(code, command, stderr="CUDA error: misaligned")
        return subprocess.CompletedProcess(command, 0, stdout=stdout)

    monkeypatch.setattr(selfcheck.subprocess, "run", run)
    return calls


def test_the_verdict_is_asked_for_once_and_kept(gpu, monkeypatch):
    calls = answer(monkeypatch, "noise\n" + json.dumps({"decode": "observed / bound = 9"}) + "\n")
    device = torch.device("cuda", 0)
    with pytest.warns(
        selfcheck.TemplateWarning, match=r"'decode' gives wrong results on test GPU"
    ):
        assert selfcheck.broken("decode", device)
    assert not selfcheck.broken("gemm", device)
    selfcheck.verdict.cache_clear()
    assert selfcheck.broken("decode", device)
    assert calls == [[sys.executable, "-m", "healpass.lowering.cuda.selfcheck", "0"]]


def test_a_crash_of_the_check_condemns_every_template(gpu, monkeypatch):
    calls = answer(monkeypatch, "", code=1)
    with pytest.warns(selfcheck.TemplateWarning, match="the check itself failed"):
        assert selfcheck.broken("gemm", torch.device("cuda", 0))
    selfcheck.verdict.cache_clear()
    assert set(selfcheck.verdict(0)) == {*kernels.GRIDS, *kernels.EAGER}
    assert len(calls) == 2, "a crash is not kept: the next process tries again"


def test_another_version_is_another_verdict(gpu, monkeypatch):
    key = selfcheck._key("test GPU")
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    assert selfcheck._key("test GPU") != key
    assert selfcheck._key("another GPU") != key


def test_the_check_does_not_check_itself(monkeypatch):
    monkeypatch.setattr(selfcheck, "verdict", lambda _: pytest.fail("asked for a verdict"))
    token = selfcheck._examining.set(True)
    try:
        assert not selfcheck.broken("gemm", torch.device("cuda", 0))
    finally:
        selfcheck._examining.reset(token)
