"""The guard against miscompiled templates: it passes what is right and names what is wrong."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass

import pytest
import torch

from healpass.lowering.cuda import checking, kernels, selfcheck, selfcheck_matmul


def exact(a, b, numerics):
    return selfcheck_matmul.product(a.double(), b.double()).float()


def test_right_results_pass():
    assert selfcheck_matmul.examine(exact) == {}


def test_fp32_products_pass():
    assert (
        selfcheck_matmul.examine(lambda a, b, _: selfcheck_matmul.product(a.float(), b.float()))
        == {}
    )


#: The templates of matmuls; `test_lowering_selfcheck_attention` has those of attention, and
#: `test_lowering_selfcheck_exact` the exact ones.
MATMULS = {name for name in kernels.GRIDS if not name.startswith(("attention", "exact"))}


def test_every_template_is_examined():
    assert {problem.template for problem in selfcheck_matmul.checks()} == MATMULS


@pytest.mark.parametrize("template", sorted(MATMULS))
def test_one_wrong_template_is_named(template):
    wanted = {p.template: p for p in selfcheck_matmul.checks() if p.template == template}[template]

    def wrong(a, b, numerics):
        result = exact(a, b, numerics)
        same = a.shape[-2:] == (wanted.rows, wanted.terms)
        same = same and (a.dtype, b.dtype) == (wanted.a, wanted.b)
        same = same and b.dim() == wanted.operands()[1].dim()
        if same and numerics == wanted.numerics and (a.dim() == 3) == ("batched" in template):
            result.view(-1)[0] *= 1.001
        return result

    assert template in selfcheck_matmul.examine(wrong)


def to_tf32(x):
    """Round to 11 significant bits, the best that TF32 can do."""
    return ((x.float().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def test_tf32_is_noticed_in_every_template():
    wrong = selfcheck_matmul.examine(lambda a, b, n: exact(to_tf32(a), to_tf32(b), n))
    assert set(wrong) == MATMULS


@pytest.mark.parametrize("spoil", [torch.nan, torch.inf, 0.0])
def test_rounding_to_bf16_and_lost_elements_are_noticed(spoil):
    assert set(selfcheck_matmul.examine(lambda a, b, n: exact(a, b, n).bfloat16())) == MATMULS
    assert set(selfcheck_matmul.examine(lambda a, b, n: exact(a, b, n) * spoil)) == MATMULS


# ------------------------------------------------------------------------------- a part's checks


@dataclass(frozen=True)
class Small:
    """A check that is a number."""

    templates: tuple[str, ...]
    number: int


class Part:
    """Four checks of three templates; two share theirs."""

    def __init__(self):
        self.ran = []

    def checks(self):
        numbers = {1: ("a",), 2: ("b", "c"), 3: ("b", "c"), 4: ("a", "b")}
        return iter([Small(names, number) for number, names in numbers.items()])

    def faults(self, check, found):
        return dict.fromkeys(check.templates, f"check {found}") if found == 3 else {}

    def together(self, _device):
        def run(checks):
            self.ran.append([check.number for check in checks])
            return self.ran[-1]

        return run


def test_the_checks_of_a_template_run_at_once_and_no_others():
    part = Part()
    assert checking.examined(part, "cpu", "a") == {"a": None}
    assert part.ran == [[1, 4]]


def test_a_template_without_another_check_is_answered_too():
    assert checking.examined(Part(), "cpu", "b") == {"b": "check 3", "c": "check 3"}
    assert checking.examined(Part(), "cpu", "c") == {"c": "check 3"}


def test_no_template_is_in_two_parts_and_all_are_in_one():
    names = [
        sorted({name for check in part.checks() for name in check.templates})
        for part in selfcheck.PARTS
    ]
    every = [name for part in names for name in part]
    assert len(every) == len(set(every))
    assert set(every) == set(selfcheck.every()) == {*kernels.GRIDS, *kernels.EAGER}


@pytest.mark.parametrize("template", ["paged_write", "invariant", "exact_sums", "attention_merge"])
def test_the_second_process_answers_for_what_it_is_asked(template):
    """On CPU: the checks then examine what stands for the templates there."""
    assert selfcheck.asked("cpu", template) == {template: None}


def test_what_a_check_raises_is_said():
    said = selfcheck.asked("nowhere", "decode")
    assert "nowhere" in said


# ---------------------------------------------------------------------------------- the verdicts


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


def answer(monkeypatch, found=None, code=0):
    """Let the second process answer, by template, or not; returns the list of its calls."""
    calls = []

    def run(command, **kwargs):
        calls.append(command[1:])
        stdout = f"noise\n{selfcheck.ANSWER}{json.dumps(found)}\n" if found else "noise\n"
        return subprocess.CompletedProcess(command, code, stdout, "CUDA error: misaligned\n")

    monkeypatch.setattr(selfcheck.subprocess, "run", run)
    return calls


def test_a_verdict_is_asked_for_once_per_template_and_kept(gpu, monkeypatch):
    calls = answer(monkeypatch, {"decode": "observed / bound = 9", "gemm": None})
    device = torch.device("cuda", 0)
    with pytest.warns(
        selfcheck.TemplateWarning, match=r"'decode' gives wrong results on test GPU"
    ):
        assert selfcheck.broken("decode", device)
    assert not selfcheck.broken("gemm", device), "answered beside the one that was asked for"
    selfcheck.verdict.cache_clear()
    assert selfcheck.broken("decode", device)
    assert calls == [["-m", "healpass.lowering.cuda.selfcheck", "cuda:0", "decode"]]


def test_what_is_not_used_is_not_checked(gpu, monkeypatch):
    calls = answer(monkeypatch, {"gemm": None})
    assert selfcheck.usable(["gemm"], torch.device("cuda", 0), "a matmul")
    assert [call[-1] for call in calls] == ["gemm"]


def test_a_crash_of_the_check_condemns_the_template_that_was_asked_for(gpu, monkeypatch):
    calls = answer(monkeypatch, code=1)
    device = torch.device("cuda", 0)
    said = r"the check itself failed \(CUDA error: misaligned\)"
    with pytest.warns(selfcheck.TemplateWarning, match=said):
        assert selfcheck.broken("gemm", device)
    selfcheck.verdict.cache_clear()
    assert "the check itself failed" in selfcheck.verdict(0, "gemm")
    assert [call[-1] for call in calls] == ["gemm"] * 2, "a crash is not kept: it is tried again"
    answer(monkeypatch, {"decode": None})
    assert not selfcheck.broken("decode", device), "another template is not concerned"


def test_a_check_that_runs_out_of_time_condemns_its_template(gpu, monkeypatch):
    def run(command, *, timeout, **kwargs):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(selfcheck.subprocess, "run", run)
    assert "timed out after 300 seconds" in selfcheck.verdict(0, "gemm")


def test_another_version_is_another_verdict(gpu, monkeypatch):
    key = selfcheck._key("test GPU")
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    assert selfcheck._key("test GPU") != key
    assert selfcheck._key("another GPU") != key


def test_the_check_does_not_check_itself(monkeypatch):
    monkeypatch.setattr(selfcheck, "verdict", lambda *_: pytest.fail("asked for a verdict"))
    token = selfcheck._examining.set(True)
    try:
        assert not selfcheck.broken("gemm", torch.device("cuda", 0))
    finally:
        selfcheck._examining.reset(token)
