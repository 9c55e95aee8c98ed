"""The guard of the exact templates: one wrong bit is named, and a named template is refused."""

from __future__ import annotations

import pytest
import torch

from healpass.errors import DeviceCheckError
from healpass.lowering.cuda import kernels, selfcheck, selfcheck_exact
from tests.support.exact_gpu import source
from tests.support.fake_cuda import always

EXACT = {name for name in kernels.GRIDS if name.startswith("exact")}


def on_cpu(check):
    return check(*check.operands())


def test_the_right_bits_pass_and_every_exact_template_is_examined():
    assert selfcheck_exact.examine(on_cpu) == {}
    assert {name for check in selfcheck_exact.checks() for name in check.templates} == EXACT


@pytest.mark.parametrize("template", sorted(EXACT))
def test_one_wrong_bit_is_named(template):
    (first, *_) = (check for check in selfcheck_exact.checks() if template in check.templates)

    def wrong(check):
        result = on_cpu(check)
        if check == first:
            result.view(torch.int32).view(-1)[-1] ^= 1
        return result

    other = next(check for check in selfcheck_exact.checks() if template not in check.templates)
    found = selfcheck_exact.examine(wrong, [first, other])
    assert set(found) == set(first.templates)
    assert "1 of" in found[template]


def test_a_template_that_failed_is_refused_and_nothing_runs_in_its_place(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", always("a GPU"))
    found = {"exact_gemm": "3 of 40 elements"}
    monkeypatch.setattr(selfcheck, "verdict", lambda _, template: found.get(template))
    device = torch.device("cuda", 0)
    selfcheck.require("exact_gemm_batched", device)
    with pytest.raises(DeviceCheckError, match=r"precision='exact' cannot run on a GPU") as caught:
        selfcheck.require("exact_gemm", device)
    assert "3 of 40 elements" in str(caught.value)


def test_a_compile_meets_the_refusal(monkeypatch):
    def refuse(name, device):
        raise DeviceCheckError(f"{name} on {device.type}")

    monkeypatch.setattr(selfcheck, "require", refuse)
    x = torch.empty(20, 40, device="meta")
    with pytest.raises(Exception, match="exact_gemm on cuda"):
        source(lambda a: (torch.ops.heal.mm(a, a.t(), "exact5"),), [x])


def test_the_check_does_not_check_itself(monkeypatch):
    monkeypatch.setattr(selfcheck, "verdict", lambda *_: pytest.fail("asked for a verdict"))
    token = selfcheck._examining.set(True)
    try:
        selfcheck.require("exact_gemm", torch.device("cuda", 0))
    finally:
        selfcheck._examining.reset(token)
