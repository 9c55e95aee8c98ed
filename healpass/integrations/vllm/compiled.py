"""`CompilationConfig.backend` for vLLM: `backend="heal"` with the engine's options.

vLLM hands no options to a backend that is not Inductor. It looks the backend up by its name while
the engine's configuration is at hand, though: `backend` is an attribute that is made when it is
asked for (PEP 562). Imports `options`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch._dynamo.backends.registry import lookup_backend

from healpass.errors import UnavailableError
from healpass.integrations.vllm.options import EngineOptions, current


def compiler(options: EngineOptions) -> Callable[..., Any]:
    """`backend="heal"` with an engine's options.

    Args:
        options: What the engine asked for.
    """
    heal: Any = lookup_backend("heal")
    return partial(heal, options=options.config)


def multiplier(options: EngineOptions, compiled: bool) -> Callable[..., torch.Tensor]:
    """`heal::linear`; compiled for a head, which vLLM calls outside of the model's graph.

    Args:
        options: What the engine asked for.
        compiled: Whether the engine compiles.
    """
    numerics = options.numerics

    def multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return torch.ops.heal.linear(x, weight, bias, numerics)

    if not compiled:
        return multiply
    return torch.compile(multiply, backend=compiler(options), dynamic=True, fullgraph=True)


def __getattr__(name: str) -> Any:
    if name != "backend":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    options = current()
    if options is None:
        raise UnavailableError(
            f"{__name__}.backend compiles for engines with quantization='heal', and this one has "
            "another.\nUse healpass.integrations.vllm.engine_args, or backend='heal' and its "
            "defaults."
        )
    return compiler(options)
