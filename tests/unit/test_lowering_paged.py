"""What a GPU would be asked to run for attention over pages: launches and their text."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._inductor import config
from torch._subclasses.fake_tensor import FakeTensorMode

from healpass import lowering
from healpass.errors import DeviceCheckError
from healpass.lowering import cpu
from healpass.lowering.cuda import eager, paged, selfcheck
from healpass.lowering.cuda.eager import Launch
from healpass.ops.attention.paged import Cell, PagedAttention
from tests.support.fake_cuda import Device, always, fake_cuda
from tests.support.paged_runs import Batch, PagedCase

# ------------------------------------------------------------------------------------- launches


@contextlib.contextmanager
def gpu(capability: int = 90) -> Iterator[list[str]]:
    """Tensors that claim to be on a GPU, whose values nobody can ask for; what is launched."""
    names: list[str] = []

    def run(launch: Launch) -> None:
        assert all(
            isinstance(x, int) or x.device.type == "cuda" for x in launch.arguments.values()
        )
        names.append(launch.text.template)

    with (
        fake_cuda(Device(capability)),
        FakeTensorMode(allow_non_fake_inputs=True),
        mock.patch.object(eager, "run", run),
    ):
        yield names


def moved(call: tuple[Any, ...]) -> list[Any]:
    return [
        torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
        if isinstance(x, Tensor)
        else x
        for x in call
    ]


BATCH = Batch((5, 1), (40, 300))
RUNS = {
    "exact5": ["paged_query", "paged_tops", "paged_sums", "paged_settle"],
    "heal": ["paged_query", "paged_attention", "attention_merge"],
    "layercast": ["paged_query", "paged_attention", "attention_merge"],
}


@pytest.mark.parametrize("numerics", RUNS)
def test_a_gpu_runs_kernels_and_nothing_is_read_on_the_host(numerics):
    call = BATCH.call(numerics)
    with gpu() as names:
        output = paged.attend_on_cuda(*moved(call))
        assert (output.device.type, output.dtype) == ("cuda", torch.float32)
        assert output.shape == (9, 2, 24)
    assert names == RUNS[numerics]


def test_the_reference_reads_on_the_host():
    """The inverse: these tensors notice it."""
    with gpu(), pytest.raises(Exception, match=r"_local_scalar_dense|data-dependent"):
        PagedAttention.read(*moved(BATCH.call("exact5"))).attend()


def test_tokens_are_written_by_a_kernel():
    _, key, value = BATCH.states()
    call = (BATCH.empty_pages(), key, value, BATCH.places()[1], "int16")
    with gpu() as names:
        paged.write_on_cuda(*moved(call))
        pages, *states, kv = moved(call)
        paged.write_on_cuda(pages, *(x.narrow(0, 0, 0) for x in states), kv)
    assert names == ["paged_write"]


def test_nothing_is_launched_for_nothing():
    call = list(BATCH.call("heal"))
    call[2:5] = torch.zeros(1), torch.zeros(0), torch.zeros(0, 4)
    with gpu() as names:
        assert paged.attend_on_cuda(*moved(tuple(call))).shape == (9, 2, 24)
    assert names == []


SINKS = torch.zeros(2)
ODD = Batch((3,), (9,), sizes=(16, 17))
WITHOUT = {
    "a cap": (BATCH.call("exact5", softcap=3.0), 90, "with a cap or with sinks"),
    "sinks": (BATCH.call("exact5", sinks=SINKS), 90, "with a cap or with sinks"),
    "an old GPU": (BATCH.call("heal"), 75, "compute capability 7.5 is below 8.0"),
    "an odd cell": (ODD.call("heal"), 90, "cells of 74 bytes do not hold their scales"),
    "a large head": (
        Batch((3,), (9,), sizes=(272, 16)).call("heal"), 90, r"head sizes \[272, 16\]",
    ),
    "simulated": (BATCH.call("heal:a100"), 90, None),
    "reordered": (BATCH.call("exact5::3"), 90, None),
}  # fmt: skip


@pytest.mark.parametrize("name", WITHOUT)
def test_where_there_is_no_kernel_the_reference_runs(name, monkeypatch):
    call, capability, reason = WITHOUT[name]
    monkeypatch.setattr(PagedAttention, "attend", always("the reference"))
    told = contextlib.nullcontext() if reason is None else pytest.warns(Warning, match=reason)
    with gpu(capability) as names, told:
        assert paged.attend_on_cuda(*moved(call)) == "the reference"
    assert names == []


def test_more_keys_than_int64_has_room_for_have_no_kernel(monkeypatch):
    monkeypatch.setattr(PagedAttention, "attend", always("the reference"))
    call = PagedCase("long", keys=1 << 18, kv="int24", numerics="exact5").call()
    with gpu() as names, pytest.warns(Warning, match="hold 262144 keys.*room for 131072"):
        assert paged.attend_on_cuda(*moved(call)) == "the reference"
    assert names == []
    call = PagedCase("long", keys=1 << 18, numerics="exact5").call()
    with gpu() as names:
        paged.attend_on_cuda(*moved(call))
    assert names == RUNS["exact5"]


def test_a_kernel_that_failed_its_check_does_not_run(monkeypatch):
    wrong = {"paged_sums": "3 of 40 elements", "paged_attention": "off", "paged_write": "off"}
    monkeypatch.setattr(PagedAttention, "attend", always("the reference"))
    monkeypatch.setattr(paged, "write_tokens", always(None))
    _, key, value = BATCH.states()
    verdict = mock.patch.object(selfcheck, "verdict", lambda _, template: wrong.get(template))
    with gpu() as names, verdict:
        with pytest.raises(DeviceCheckError, match="3 of 40 elements"):
            paged.attend_on_cuda(*moved(BATCH.call("exact5")))
        with pytest.warns(selfcheck.TemplateWarning, match="'paged_attention'"):
            assert paged.attend_on_cuda(*moved(BATCH.call("heal"))) == "the reference"
        call = moved((BATCH.empty_pages(), key, value, BATCH.places()[1], "int16"))
        with pytest.warns(selfcheck.TemplateWarning, match="'paged_write'"):
            paged.write_on_cuda(*call)
    assert names == []


def test_what_does_not_fit_is_left_to_the_reference_or_refused(monkeypatch):
    _, key, value = BATCH.states()
    pages, slots = BATCH.empty_pages(), BATCH.places()[1]
    refused: list[Any] = []
    monkeypatch.setattr(paged, "write_tokens", lambda *call: refused.append(call))
    monkeypatch.setattr(PagedAttention, "attend", always("the reference"))
    with gpu() as names:
        with pytest.raises(ValueError, match=r"INT8 \[P, Hkv, N, 128\]"):
            paged.write_on_cuda(*moved((pages, key, value, slots, "int24")))
        paged.write_on_cuda(*moved((pages, key.double(), value, slots, "int16")))
        query, *rest = BATCH.call("heal")
        assert paged.attend_on_cuda(*moved((query.double(), *rest))) == "the reference"
    assert len(refused) == 1
    assert names == []


def test_the_operators_have_kernels_for_cuda():
    lowering.register()
    for name in ("heal::paged_attention", "heal::paged_write"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")


def test_without_a_compiler_references_stay_and_the_reason_is_given(monkeypatch):
    """An engine that compiles no graph asks before kernels take the operators' place."""
    registered: list[str] = []
    monkeypatch.setattr(lowering, "register_kernels", registered.append)
    cpu.paged.compiled.cache_clear()
    with config.patch({"cpp.cxx": ("/nowhere/c++",)}):
        assert "InvalidCxxCompiler" in lowering.start_kernels("cpu")
    assert registered == []
    assert lowering.start_kernels("cpu") is None
    assert registered == ["cpu"]


# ----------------------------------------------------------------------------------------- text


def texts(**case: Any) -> list[eager.Text]:
    return [launch.text for launch in PagedCase("a step", **case).launches()]


#: Its text says how many chunks there are, and an engine lists as many pages at each step.
MERGE = "attention_merge"


@pytest.mark.parametrize("numerics", RUNS)
def test_a_text_serves_every_batch(numerics):
    """Neither tokens, requests nor listed pages are in it: a step compiles nothing anew."""
    wanted = texts(numerics=numerics)
    assert texts(numerics=numerics, requests=7) == wanted
    assert texts(numerics=numerics, queries=2) == wanted
    fewer = texts(numerics=numerics, keys=4096)
    pairs = [pair for pair in zip(fewer, wanted, strict=True) if pair[0].template != MERGE]
    assert all(one == other for one, other in pairs)


def test_places_past_31_bits_have_64():
    assert eager.index_dtype(1 << 31) == "tl.int64"
    assert eager.index_dtype(5, (1 << 31) - 1) == "tl.int32"
    assert eager.span(torch.empty(3, 4)[:, ::2]) == 11
    few, many = (texts(queries=n, requests=8)[-1] for n in (512, 1 << 17))
    assert "INDEX_DTYPE : tl.constexpr = tl.int32" in few.render()
    assert "INDEX_DTYPE : tl.constexpr = tl.int64" in many.render()


def test_counts_make_no_kernel_of_their_own():
    """Triton would compile once more for a single request, and for a multiple of 16."""
    (*_, launch, _) = PagedCase("a step", numerics="exact5").launches()
    function = eager.kernel(launch.text)
    fixed = {name for name, p in zip(function.arg_names, function.params, strict=True)
             if p.do_not_specialize}  # fmt: skip
    assert fixed == {"R", "STEPS", "WIDTH", "T", "SPLITS"}


def test_a_cell_is_read_whole():
    assert not paged.Pages(torch.empty(2, 1, 4, 74, dtype=torch.int8), Cell("int16", 16, 17)).fit
