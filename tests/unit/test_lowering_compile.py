"""Modes, caches and AOTInductor with the templates. Fake CUDA, no GPU; AOTInductor on CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._inductor.codecache import FxGraphCache

import healpass
from healpass import HealConfig
from healpass.backend import inductor_patches
from tests.support.fake_cuda import Device, generated_source, kernels

BF16 = torch.bfloat16
H100 = Device()


def layer(x, weight):  # without annotations: the cache does not take a graph that bears them
    return (torch.ops.heal.mm(x, weight.t(), "heal"),)


def tensors(rows: int) -> list[Tensor]:
    weight = torch.empty(2048, 4096, dtype=BF16, device="meta")
    return [torch.empty(rows, 4096, device="meta"), weight]


def generated(rows: int, device: Device = H100, **options: Any) -> str:
    """What the backend would generate under these options."""
    patches = inductor_patches(HealConfig(**options))
    return generated_source(layer, tensors(rows), device, dynamic=True, **patches)


def bodies(source: str) -> list[str]:
    return [kernel.body for kernel in kernels(source)]


@pytest.mark.parametrize("rows", [4, 2048])
def test_cuda_graphs_capture_the_same_kernels_and_nothing_of_the_cpu(rows):
    source = generated(rows, mode="reduce-overhead")
    assert bodies(source) == bodies(generated(rows))
    calls = source[source.index("def call(") :]
    for sync in (".item()", ".cpu()", "synchronize", "empty_strided_cpu", "torch.ops."):
        assert sync not in calls, f"{sync} cannot be captured"


# ------------------------------------------------------------------------------------ caches


def cache_key(rows: int, device: Device = H100, **options: Any) -> str:
    """The key under which Inductor keeps the code of a compile."""
    keys: list[str] = []
    prepare: Callable[..., Any] = FxGraphCache.prepare_key

    def record(*args: Any, **kwargs: Any) -> Any:
        result = prepare(*args, **kwargs)
        keys.append(result[0][0])
        return result

    with mock.patch.object(FxGraphCache, "prepare_key", staticmethod(record)):
        patches = inductor_patches(HealConfig(**options)) | {"fx_graph_cache": True}
        generated_source(layer, tensors(rows), device, dynamic=True, **patches)
    (key,) = keys
    return key


def test_the_cache_tells_compiles_for_cuda_apart(monkeypatch, tmp_path):
    """The same compile has the same key; another option, GPU or template has another."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    first = cache_key(512)
    assert cache_key(512) == first
    others = {
        "option": cache_key(512, strict=True),
        "order of summation": cache_key(512, m_invariant=True),
        "GPU": cache_key(512, Device(80)),
    }
    monkeypatch.setattr("healpass.cache_key.source_hash", lambda: "another text of a template")
    others["template"] = cache_key(512)
    assert first not in others.values()
    assert len(set(others.values())) == len(others)


# ------------------------------------------------------------------------------- AOTInductor


class Layer(torch.nn.Module):
    """A layer that calls the operator itself: what is exported is not rewritten any more."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(24, 16, generator=generator).to(BF16)
        self.weight = torch.nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.heal.linear(torch.relu(x), self.weight, None, "heal")


@pytest.mark.deep
def test_aot_inductor_packages_the_operators(tmp_path):
    model = Layer()
    x = torch.randn(40, 16, generator=torch.Generator().manual_seed(1))
    rows = {"x": {0: torch.export.Dim.DYNAMIC}}
    exported = torch.export.export(model, (x,), dynamic_shapes=rows)
    package = torch._inductor.aoti_compile_and_package(
        exported,
        package_path=str(tmp_path / "layer.pt2"),
        inductor_configs=healpass.inductor_options(),
    )
    loaded = torch._inductor.aoti_load_package(package)
    for count in (40, 3):
        operand = torch.relu(x[:count]).double()
        error = (loaded(x[:count]) - operand @ model.weight.double().mT).abs()
        bound = 16 * 2.0**-24 * (operand @ model.weight.double().abs().mT)
        assert (error <= bound).all()
