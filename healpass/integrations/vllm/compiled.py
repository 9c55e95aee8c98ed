"""`CompilationConfig.backend` for vLLM: `backend="heal"` with the engine's options.

vLLM hands no options to a backend that is not Inductor. It looks the backend up by its name while
the engine's configuration is at hand, though: `backend` is an attribute that is made when it is
asked for (PEP 562). Imports `options`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.backends.registry import lookup_backend

from healpass.errors import UnavailableError
from healpass.integrations.vllm.options import EngineOptions, current

#: What a graph of vLLM's keeps beside: attention over HEAL's pages, experts, and `weight.data`.
SETTLED = {
    *("unified_attention_with_output", "moe_forward"),
    "_get_data_attr",
}


def compiler(options: EngineOptions) -> Callable[..., Any]:
    """`backend="heal"` with an engine's options; in `exact` it refuses a graph that keeps a node.

    Args:
        options: What the engine asked for.
    """
    heal: Any = lookup_backend("heal")

    def compile_whole(graph_module: Any, example_inputs: list[Any]) -> Any:
        compiled = heal(graph_module, example_inputs, options=options.config)
        if options.is_exact:
            _refuse_kept(compiled.report)
        return compiled

    compile_whole.heal_config = options.config  # type: ignore[attr-defined]  # `watch` reads it
    return compile_whole


def _refuse_kept(report: Any) -> None:
    kept = {n.op: n.reason for n in report.kept if not SETTLED & set(n.op.split("."))}
    if kept:
        lines = "\n".join(f"- {op}: {reason}" for op, reason in sorted(kept.items()))
        raise UnavailableError(
            f"precision='exact' was asked for in vLLM, and {next(iter(sorted(kept)))} of this "
            f"model's graph has no exact operator.\n{lines}\n"
            "Use precision='heal', or heal_model in transformers, which lists what it keeps."
        )


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
