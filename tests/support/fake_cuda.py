"""Inductor's code for an NVIDIA GPU, produced on a machine without one.

`generated_source` compiles a function of CUDA tensors as Inductor would, up to the point where
kernels would be loaded, and returns the wrapper's text. Everything that asks for a device is
answered by a `Device` record. Only tests import this.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch._inductor import codecache, config
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.virtualized import V

from healpass import lowering
from healpass.lowering.cuda import selfcheck


@dataclass(frozen=True)
class Device:
    """What a GPU says of itself; the defaults are an H100's."""

    capability: int = 90
    processors: int = 132

    def properties(self) -> types.SimpleNamespace:
        """As `torch.cuda.get_device_properties`."""
        return types.SimpleNamespace(
            name=f"fake sm_{self.capability}",
            major=self.capability // 10,
            minor=self.capability % 10,
            multi_processor_count=self.processors,
            total_memory=80 << 30,
            regs_per_multiprocessor=65536,
            max_threads_per_multi_processor=2048,
            max_threads_per_block=1024,
            warp_size=32,
            shared_memory_per_block=49152,
            shared_memory_per_block_optin=232448,
            shared_memory_per_multiprocessor=233472,
            gcnArchName="",
            L2_cache_size=50 << 20,
            memory_bus_width=5120,
            uuid="fake",
            pci_bus_id=0,
        )


class _Captured(Exception):  # noqa: N818  control flow, not an error
    def __init__(self, source: str) -> None:
        super().__init__("captured")
        self.source = source


def always(value: Any) -> Callable[..., Any]:
    """A function of anything with one answer."""

    def answer(*_args: Any, **_kwargs: Any) -> Any:
        return value

    return answer


def _answers(device: Device) -> dict[tuple[Any, str], Any]:
    """Every attribute to replace, and its replacement."""
    from torch._dynamo.device_interface import CudaInterface

    properties, pair = device.properties(), divmod(device.capability, 10)
    nothing, zero, one, yes = always(None), always(0), always(1), always(True)
    seed = always(torch.zeros(16, dtype=torch.uint8, device="cpu"))
    cuda = {
        "is_available": yes,
        "is_initialized": yes,
        "device_count": one,
        "current_device": zero,
        "get_device_properties": always(properties),
        "get_device_capability": always(pair),
        "get_device_name": always(properties.name),
        "synchronize": nothing,
        "set_device": nothing,
        "_lazy_init": nothing,
        "get_rng_state": seed,
        "set_rng_state": nothing,
        "_exchange_device": zero,
        "_maybe_exchange_device": zero,
    }
    # CudaInterface holds these since its class was made: patching torch.cuda does not reach it.
    interface = {
        "get_device_properties": cuda["get_device_properties"],
        "get_compute_capability": always(device.capability),
        "exchange_device": zero,
        "maybe_exchange_device": zero,
        "synchronize": nothing,
        "set_device": nothing,
        "is_triton_capable": yes,
        "raise_if_triton_unavailable": nothing,
        "get_raw_stream": zero,
        "current_device": zero,
        "is_available": yes,
        "device_count": one,
    }
    answers: dict[tuple[Any, str], Any] = {(torch.cuda, name): fn for name, fn in cuda.items()}
    answers |= {(CudaInterface, name): staticmethod(fn) for name, fn in interface.items()}
    answers[CudaInterface.Worker, "get_device_properties"] = staticmethod(
        interface["get_device_properties"]
    )
    answers[torch.version, "cuda"] = "13.0"
    answers[torch._C, "_cuda_getCurrentRawStream"] = zero
    answers[importlib.import_module("torch._subclasses.fake_tensor"), "init_gpu_context"] = nothing
    # There is no GPU on which the templates could prove themselves.
    answers[selfcheck, "verdict"] = nothing
    answers[codecache.CacheBase, "get_system"] = staticmethod(lambda: {"hash": properties.name})
    return answers


@contextlib.contextmanager
def fake_cuda(device: Device) -> Iterator[None]:
    """Make torch, Inductor and Triton believe in a GPU, for the time of a block."""
    from torch.utils import _triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    questions = (
        "has_triton",
        "triton_backend",
        "triton_hash_with_backend",
        "has_triton_tma_device",
    )
    cached = [getattr(_triton, name) for name in questions if hasattr(_triton, name)]
    cached.append(DeviceProperties.create)

    def forget() -> None:
        for function in cached:
            getattr(function, "cache_clear", lambda: None)()

    target = GPUTarget("cuda", device.capability, 32)
    fake = types.SimpleNamespace(get_current_target=lambda: target, get_current_device=lambda: 0)
    with contextlib.ExitStack() as stack:
        for (owner, name), answer in _answers(device).items():
            stack.enter_context(mock.patch.object(owner, name, answer, create=True))
        # Put back by hand: reset_active() would look for a real driver.
        stack.callback(setattr, driver, "_active", getattr(driver, "_active", None))
        driver.set_active(fake)
        forget()
        stack.callback(forget)
        yield


@contextlib.contextmanager
def _capture() -> Iterator[None]:
    def stop(self: GraphLowering) -> None:
        code = self.codegen()
        wrapper = code[0] if isinstance(code, tuple) else code
        raise _Captured(getattr(wrapper, "value", wrapper))

    with mock.patch.object(GraphLowering, "compile_to_module", stop):
        yield


def _captured(error: BaseException | None) -> _Captured | None:
    while error is not None and not isinstance(error, _Captured):
        inner = getattr(error, "inner_exception", None)
        error = inner or error.__cause__ or error.__context__
    return error


def generated_source(
    function: Callable[..., Any],
    tensors: Sequence[torch.Tensor],
    device: Device = Device(),
    *,
    dynamic: bool = False,
    **patches: Any,
) -> str:
    """Inductor's wrapper, with the Triton source of every kernel, for a function of CUDA tensors.

    Args:
        function: Takes the tensors; made of aten and `heal::` operators.
        tensors: They give shapes, strides and dtypes; on any device, also meta.
        device: The GPU to compile for.
        dynamic: Make the first size of the first tensor a symbol.
        **patches: Inductor settings.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    lowering.register()
    mode = FakeTensorMode(shape_env=ShapeEnv() if dynamic else None, allow_non_fake_inputs=True)
    settings = {"compile_threads": 1, "fx_graph_cache": False, **patches}
    with fake_cuda(device), _capture(), config.patch(settings), mode:
        inputs: list[Any] = _fake_inputs(mode, tensors, dynamic)
        decompositions = importlib.import_module(
            "torch._inductor.decomposition"
        ).select_decomp_table()
        graph = make_fx(function, decomposition_table=decompositions, tracing_mode="real")(*inputs)
        graph, inputs = _with_symbols(graph, inputs)
        context = torch._guards.TracingContext(mode)
        try:
            with V.set_fake_mode(mode), torch._guards.tracing(context):
                compile_fx_inner(graph, inputs)
        except Exception as error:
            captured = _captured(error)
            if captured is None:
                raise
            return captured.source
    raise AssertionError("Inductor compiled nothing")


def _fake_inputs(mode: Any, tensors: Sequence[torch.Tensor], dynamic: bool) -> list[torch.Tensor]:
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    inputs = []
    for position, tensor in enumerate(tensors):
        size = list(tensor.shape)
        if dynamic and position == 0:
            symbol = mode.shape_env.create_symbol(
                size[0], source=ConstantSource("rows"), dynamic_dim=DimDynamic.DYNAMIC
            )
            size[0] = mode.shape_env.create_symintnode(symbol, hint=size[0])
        inputs.append(
            torch.empty_strided(size, tensor.stride(), dtype=tensor.dtype, device="cuda")
        )
    return inputs


def _with_symbols(graph: Any, inputs: list[torch.Tensor]) -> tuple[Any, list[Any]]:
    """Give the graph an input for a symbolic size, as Dynamo does."""
    symbols = [size for size in inputs[0].shape if isinstance(size, torch.SymInt)]
    if not symbols:
        return graph, inputs
    first = next(iter(graph.graph.nodes))
    with graph.graph.inserting_before(first):
        node = graph.graph.placeholder("rows")
    node.meta["val"] = symbols[0]
    graph.recompile()
    return graph, [symbols[0], *inputs]


@dataclass(frozen=True)
class Kernel:
    """One Triton kernel of a wrapper."""

    name: str
    source: str

    @property
    def is_template(self) -> bool:
        """Whether it comes from a template (and not from Inductor's own code generation)."""
        return "triton_heuristics.template(" in self.source

    @property
    def body(self) -> str:
        """The functions alone, without imports and launch settings."""
        return self.source[self.source.index("@triton.jit") :]


_KERNEL = re.compile(r"(\w+) = async_compile\.triton\('\w+', '''(.*?)''', device_str", re.DOTALL)


def kernels(source: str) -> list[Kernel]:
    """The Triton kernels in a wrapper's text, in order."""
    return [Kernel(name, text) for name, text in _KERNEL.findall(source)]
