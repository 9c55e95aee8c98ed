"""The first file to read: options -> HealConfig -> passes -> Inductor.

`torch.compile(model, backend="heal")` finds `heal_backend` by its entry point; nothing of healpass
needs to be imported by the user. May import everything below it; loads `lowering` when a graph is
compiled.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch.fx import Graph, GraphModule

from healpass import watch
from healpass.config import HealConfig
from healpass.errors import UnsupportedTorchError
from healpass.graph.passes import prepack
from healpass.graph.passes.decompose import stays_whole
from healpass.graph.pipeline import DECOMPOSE, finish, rewrite
from healpass.report import GraphReport

#: The torch releases that healpass is tested with: from the first up to, not including, the last.
SUPPORTED_TORCH = ((2, 11), (2, 16))


#: What `precision="exact"` asks of Inductor: no fma, IEEE division, nothing reassociated. For C++
#: these are the defaults; for Triton it is `emulate_precision_casts` that turns contraction off.
PINNED_SETTINGS = {
    "emulate_precision_casts": True,
    "eager_numerics.division_rounding": True,
    "cpp.enable_floating_point_contract_flag": "off",
    "cpp.enable_unsafe_math_opt_flag": False,
    # Inductor repeats a value's whole tree of operations at each use until the value has so many.
    # Bit-reproducible sequences use values often; at the default of 30, lowering takes minutes.
    "realize_opcount_threshold": 8,
}


def heal_backend(
    graph_module: GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: HealConfig | Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a Dynamo graph with reproducible numerics: the target of `backend="heal"`.

    Args:
        graph_module: The graph at torch level, SDPA one node, autograd still to come.
        example_inputs: Its inputs (fake tensors or symbols).
        mode: An Inductor mode, as `torch.compile(mode=)`.
        options: The fields of `HealConfig`, as `torch.compile(options=)`.

    Returns:
        The compiled callable, with the `report` of its graph; its backward is compiled from the
        operators' own autograd formulas.

    Raises:
        ConfigError: An option is unknown or has a wrong value.
        UnavailableError: `m_invariant` was asked for on CPU.
        UnsupportedTorchError: torch is older or newer than the supported range.
        StrictError: `strict=True` and a node cannot be rewritten.
    """
    check_torch(torch.__version__)
    config = HealConfig.read(options, mode=mode)
    report = rewrite(graph_module, config, outermost=watch.is_outermost())
    watch.note(report)
    inputs = prepack.example_inputs(graph_module, example_inputs)
    compiled = _inductor(graph_module, inputs, config, report)
    run: Any = watch.counted(prepack.with_packed_inputs(graph_module, compiled))
    run.report = report
    return run


def _inductor(
    graph_module: GraphModule, inputs: list[Any], config: HealConfig, report: GraphReport
) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx

    from healpass import lowering

    lowering.register()
    patches = inductor_patches(config, report, whole=stays_whole(inputs))
    compiled: Any = compile_fx(graph_module, inputs, config_patches=patches)
    return compiled


def _finish(config: HealConfig, report: GraphReport | None, graph: Graph) -> None:
    """The passes that run last, on the graph that Inductor is about to lower."""
    from torch._inductor.decomposition import select_decomp_table

    from healpass import lowering

    exact = config.precision == "exact"
    table = select_decomp_table() | lowering.decompositions() if exact else {}
    finish(graph, config, table, report or GraphReport())


def inductor_patches(
    config: HealConfig, report: GraphReport | None = None, *, whole: bool = False
) -> dict[str, Any]:
    """Inductor settings of one compile: mode, cache key, and nothing that reorders sums.

    Args:
        config: The options.
        report: Gets the records of the passes that run last.
        whole: Whether exact operators are decomposed after `passes.outline` instead of before.
    """
    from torch._inductor import config as inductor
    from torch._inductor import list_mode_options

    from healpass.cache_key import CacheKey  # Inductor takes two seconds to import
    from healpass.lowering.cpu.loops import SeparateLoops

    patches = dict(list_mode_options(config.mode)) if config.mode else {}
    if not config.rewrites:
        return patches
    wanted = {"batch_invariant": True, "emulate_precision_casts": False}
    patches |= {name: on for name, on in wanted.items() if hasattr(inductor, name)}
    if config.precision == "exact":
        patches |= PINNED_SETTINGS
    whole = whole and DECOMPOSE not in config.debug.disable
    first = CacheKey(config, inductor.post_grad_custom_pre_pass, whole=whole)
    patches |= {"post_grad_custom_pre_pass": first}
    patches |= {"_post_fusion_custom_pass": SeparateLoops(inductor._post_fusion_custom_pass)}
    last_passes = partial(_finish, config, report)
    last = CacheKey(config, inductor.post_grad_custom_post_pass, last_passes)
    return patches | {"post_grad_custom_post_pass": last}


def check_torch(version: str) -> None:
    """Refuse a torch outside the supported range.

    Raises:
        UnsupportedTorchError: With the range and the way out.
    """
    release = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    low, high = SUPPORTED_TORCH
    if not low <= release < high:
        newest = f"{high[0]}.{high[1] - 1}"
        raise UnsupportedTorchError(
            f"torch {version} is not supported: healpass needs torch {low[0]}.{low[1]} to "
            f"{newest}.\n"
            f"Way out: pip install 'torch>={low[0]}.{low[1]},<{high[0]}.{high[1]}'."
        )


def _reset() -> None:
    """What `torch._dynamo.reset()` calls: drop captured CUDA graphs.

    It must not import: `reset` is walking a dict of backends that the import would add to.
    """
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    if trees is not None:
        trees.reset_cudagraph_trees()


heal_backend.reset = _reset  # type: ignore[attr-defined]
