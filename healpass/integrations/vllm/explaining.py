"""What runs where in an engine of vLLM with HEAL, without generating. Imports vLLM.

    python -m healpass.integrations.vllm.explaining ASKED.json FOUND.json

`explained` starts it in a process of its own, and shows what it finds.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.platforms import current_platform

from healpass.integrations.vllm.answering import engine
from healpass.integrations.vllm.attention import HealAttention
from healpass.integrations.vllm.checking import Asked, answer_in_this_process
from healpass.integrations.vllm.compiled import SETTLED
from healpass.integrations.vllm.experts import HealExpertsMethod
from healpass.integrations.vllm.explained import Explained, Graph, Layer, Pages
from healpass.integrations.vllm.layers import Exact, HealLogitsProcessor, PinnedTables
from healpass.integrations.vllm.quant import HealEmbeddingMethod, HealLinearMethod
from healpass.watch import context_of, region_of_context


def found_in(model: Any, compiled: bool) -> list[Layer]:
    """The layers of a model that hold or do something.

    Args:
        model: vLLM's module.
        compiled: Whether its graph is.
    """
    return [
        Layer(name, type(module).__name__, weight_of(module), said_of(module, compiled))
        for name, module in model.named_modules()
        if is_layer(module)
    ]


def is_layer(module: Any) -> bool:
    """Whether a module is one for itself, and not made of others."""
    own = isinstance(module, Exact) or hasattr(module, "quant_method") or hasattr(module, "impl")
    return own or not any(module.children())


def weight_of(module: Any) -> str:
    """Dtype of a layer's weight; "" if it has none."""
    weight = getattr(module, "weight", None)
    return "" if weight is None else str(weight.dtype).removeprefix("torch.")


def said_of(module: Any, compiled: bool) -> str:
    """What a layer computes with.

    Args:
        module: The layer.
        compiled: Whether the model's graph is.
    """
    method, impl = getattr(module, "quant_method", None), getattr(module, "impl", None)
    if isinstance(method, HealLinearMethod):
        name = "heal::linear" if module.heal_group is None else "heal::row_linear over ranks"
        return f"{name}, {method.numerics}"
    if isinstance(method, HealExpertsMethod):
        return f"heal::grouped_mm, {method.numerics}"
    if isinstance(method, HealEmbeddingMethod):
        return "heal::linear" if isinstance(module, ParallelLMHead) else "rows, in FP32"
    if isinstance(impl, HealAttention):
        return _attention(impl)
    if isinstance(module, PinnedTables) and module.exact:
        return "table by heal:: functions"
    if isinstance(module, HealLogitsProcessor):
        return "cap by heal::tanh" if module.exact_cap is not None else "calls the head"
    if isinstance(module, Exact) and module.exact:
        return "heal:: functions"
    return "the graph's rewriting" if compiled else "torch, in FP32"


def _attention(impl: HealAttention) -> str:
    extras = {
        f"window of {impl.window}": impl.window is not None,
        f"cap of {impl.softcap}": impl.softcap is not None,
        "sinks": impl.sinks is not None,
        "reference implementation, for no kernel can be compiled here": not _has_kernel(),
    }
    words = ["heal::paged_attention", f"{impl.kv} pages", *(k for k, v in extras.items() if v)]
    return ", ".join(words)


def _has_kernel() -> bool:
    device = current_platform.device_type.upper()
    return torch._C._dispatch_has_kernel_for_dispatch_key("heal::paged_attention", device)


def graphs_of(model: Any) -> Iterator[Graph]:
    """What the passes did to each graph that was compiled.

    Args:
        model: vLLM's module.
    """
    for name, module in model.named_modules():
        multiply = getattr(getattr(module, "quant_method", None), "multiply", None)
        for compiled in (getattr(module, "_compiled_callable", None), multiply):
            region = region_of_context(context_of(compiled))
            for report in region.reports if region else ():
                kept = Counter((node.op, _reason(node)) for node in report.kept)
                became = Counter(str(node.heal_op) for node in report.nodes if node.rewritten)
                lines = [(op, why, count) for (op, why), count in kept.items()]
                yield Graph(name or type(model).__name__, dict(became), lines)


def _reason(node: Any) -> str:
    is_settled = SETTLED & set(node.op.split("."))
    return "vLLM's name for what HEAL's backend does" if is_settled else str(node.reason)


def pages_of(config: Any) -> list[Pages]:
    """The caches, as vLLM itself accounts them.

    Args:
        config: A `KVCacheConfig`.
    """
    return [
        Pages(
            layers=len(group.layer_names),
            heads=group.kv_cache_spec.num_kv_heads,
            head_size=group.kv_cache_spec.head_size,
            block_size=group.kv_cache_spec.block_size,
            page_bytes=group.kv_cache_spec.page_size_bytes,
            blocks=config.num_blocks,
        )
        for group in config.kv_cache_groups
    ]


def explain(given: dict[str, Any]) -> dict[str, Any]:
    """What runs where, as JSON knows it.

    Args:
        given: Fields of `Asked`; prompts are not read.
    """
    asked = Asked(**given)
    core = engine(asked).llm_engine
    layers, graphs = core.apply_model(
        lambda model: (found_in(model, asked.compiled), list(graphs_of(model)))
    )[0]
    pages = pages_of(core.engine_core.engine_core.scheduler.kv_cache_config)
    return asdict(Explained(asked.compiled, layers, pages, graphs))


if __name__ == "__main__":
    answer_in_this_process(explain, sys.argv[1:])
