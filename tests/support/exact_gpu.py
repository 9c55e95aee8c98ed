"""Exact operators as Inductor compiles them for a GPU, run in Triton's interpreter on CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from healpass import HealConfig
from healpass.backend import PINNED_SETTINGS
from healpass.graph.pipeline import rewrite
from healpass.ops.attention.scoring import Scoring
from tests.support import interpreter
from tests.support.fake_cuda import Device, generated_source


def source(
    function: Callable[..., Any], tensors: Sequence[Tensor], capability: int = 90, **settings: Any
) -> str:
    """Inductor's wrapper for a GPU, under the settings of `precision="exact"`."""
    device = Device(capability)
    return generated_source(function, tensors, device, **{**PINNED_SETTINGS, **settings})


def run(
    function: Callable[..., Any], tensors: Sequence[Tensor], capability: int = 90
) -> tuple[Tensor, ...]:
    """What the generated code gives, kernel by kernel in the interpreter."""
    return interpreter.run(source(function, tensors, capability), *tensors)


def multiply(a: Tensor, b: Tensor, numerics: str = "exact5", capability: int = 90) -> Tensor:
    """`a @ b` as the generated code for a GPU computes it."""
    op = torch.ops.heal.mm if a.dim() == 2 else torch.ops.heal.bmm
    (result,) = run(lambda x, y: (op(x, y, numerics),), [a, b], capability)
    return result


@dataclass
class Traced:
    """A model as `precision="exact"` rewrites it, in ATen and `heal::` operators, and one call.

    Attributes:
        graph: Composite operators opened, primitive ones not yet; factories make CUDA tensors.
        inputs: What the graph takes, on CPU.
        outputs: What it gives there, each operator by its reference implementation.
    """

    graph: torch.fx.GraphModule
    inputs: list[Tensor]
    outputs: list[Tensor]

    @classmethod
    @torch.no_grad()
    def of(cls, model: torch.nn.Module, **inputs: Tensor) -> Traced:
        """Call a model once, and keep what Dynamo captured; it must be one graph."""
        calls: list[Traced] = []

        def backend(graph: torch.fx.GraphModule, _example: list[Any]) -> Callable[..., Any]:
            rewrite(graph, HealConfig(precision="exact", outputs="fp32"))

            def run(*args: Tensor) -> Any:
                traced = make_fx(graph, tracing_mode="real")(*args)
                calls.append(cls(_for_cuda(traced), list(args), graph(*args)))
                return calls[-1].outputs

            return run

        torch.compile(model, backend=backend, fullgraph=True, dynamic=False)(**inputs)
        (call,) = calls
        return call

    @torch.no_grad()
    def source(self, capability: int = 90) -> str:
        """Inductor's wrapper for a GPU."""
        return source(self.graph, self.inputs, capability)


def _for_cuda(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    for node in graph.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda")}
    graph.recompile()
    return graph


def integer_states(*states: Tensor, kv: str) -> list[Tensor]:
    """Digits and scales of Q, K and V, as `heal::integer_attention` takes them."""
    return [part for x in states for part in torch.ops.heal.quantize(x, kv)]


def attend_exactly(
    states: Sequence[Tensor], scoring: Scoring, kv: str = "int16", numerics: str = "exact5"
) -> Tensor:
    """The output of exact attention of Q, K and V, rounded to `kv` first."""
    digits = integer_states(*states, kv=kv)
    output, _ = torch.ops.heal.integer_attention(*digits, *scoring.arguments, numerics)
    return output


@dataclass(frozen=True)
class Scored:
    """How an exact attention scores: everything but its tensors."""

    is_causal: bool = False
    scale: float = 0.25
    kv: str = "int16"
    window: int | None = None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *mask: Tensor) -> tuple[Tensor]:
        """Attention, with a mask if there is one."""
        given = mask[0] if mask else None
        scoring = Scoring(self.scale, given, is_causal=self.is_causal, window=self.window)
        return (attend_exactly((query, key, value), scoring, self.kv),)


@dataclass(frozen=True)
class Attended:
    """The gradient of an exact attention: everything but its tensors."""

    is_causal: bool = False
    scale: float = 0.25
    kv: str = "int16"
    numerics: str = "exact5"
    window: int | None = None

    def __call__(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *mask: Tensor
    ) -> tuple[Tensor, ...]:
        """Of Q, K and V, with a mask if there is one."""
        given = mask[0] if mask else None
        scoring = Scoring(self.scale, given, is_causal=self.is_causal, window=self.window)
        call = (*integer_states(query, key, value, kv=self.kv), *scoring.arguments, self.numerics)
        results = (grad, grad.select(-1, 0))  # exact gradients do not read them
        return torch.ops.heal.integer_attention_backward(grad, *call, *results)


def laid(matrix: Tensor, *, transposed: bool, padding: int) -> Tensor:
    """The same values, stored transposed and with NaN between rows."""
    stored = matrix.mT if transposed else matrix
    room = torch.full((*stored.shape[:-1], stored.shape[-1] + padding), torch.nan)
    view = room.to(matrix.dtype)[..., : stored.shape[-1]].copy_(stored)
    return view.mT if transposed else view
