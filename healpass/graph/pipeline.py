"""The passes in the order they run. May import `graph` and below.

Per pass: an off switch by name, its time, how many nodes it changed, the graph before and after as
structured trace artifacts (tlparse), and a check of the result. Two stages: `PASSES` run on
Dynamo's graph, `LATE_PASSES` on the ATen graphs, forward and backward, that Inductor lowers.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Graph, GraphModule

from healpass.config import HealConfig
from healpass.errors import ConfigError, StrictError, suggestion
from healpass.graph.context import Context
from healpass.graph.eligibility import device_reason
from healpass.graph.nodes import is_half, subgraphs, tensors, value
from healpass.graph.passes.attention import rewrite_attention
from healpass.graph.passes.autocast import shield_from_autocast
from healpass.graph.passes.cache_reads import fold_cache_reads
from healpass.graph.passes.decompose import decompose_operators
from healpass.graph.passes.exact import make_exact
from healpass.graph.passes.expand import expand_composites
from healpass.graph.passes.flex import rewrite_flex
from healpass.graph.passes.matmul import rewrite_matmuls
from healpass.graph.passes.outline import outline_repeats
from healpass.graph.passes.overloads import resolve_packets
from healpass.graph.passes.prepack import prepack
from healpass.graph.passes.promote import promote
from healpass.graph.passes.sizes import unify_sizes
from healpass.graph.passes.tensor_parallel import localize_linears
from healpass.graph.verify import calls_without_value, verify, verify_late
from healpass.report import GraphReport

log = logging.getLogger(__name__)

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

Pass = Callable[[GraphModule, Context], int]


def everywhere(local: Pass) -> Pass:
    """Let a pass that looks at one graph run on the subgraphs too."""

    def walk(graph_module: GraphModule, context: Context, seen: set[int]) -> int:
        count = local(graph_module, context)
        for name, body in subgraphs(graph_module):
            if id(body) not in seen:  # several graphs may call one
                seen.add(id(body))
                inside = graph_module.meta.get("heal_subgraph", "")
                body.meta["heal_subgraph"] = f"{inside}.{name}" if inside else name
                count += walk(body, context, seen)
                body.recompile()
        return count

    return lambda graph_module, context: walk(graph_module, context, set())


#: The passes, in order. `promote` follows the calls of subgraphs itself.
PASSES: dict[str, Pass] = {
    "sizes": unify_sizes,
    "overloads": everywhere(resolve_packets),
    "expand": everywhere(expand_composites),
    "tensor_parallel": everywhere(localize_linears),
    "matmul": everywhere(rewrite_matmuls),
    "attention": everywhere(rewrite_attention),
    "flex": everywhere(rewrite_flex),
    "prepack": prepack,
    "promote": promote,
    "exact": everywhere(make_exact),
    "cache_reads": everywhere(fold_cache_reads),
    "autocast": shield_from_autocast,
}
OUTLINE, DECOMPOSE = "outline", "decompose"
Decompositions = Mapping[Any, Callable[..., Any]]
#: The passes on the graph that Inductor is about to lower, forward or backward, in order.
LATE_PASSES: dict[str, Callable[[Graph, Decompositions], int]] = {
    OUTLINE: lambda graph, _: outline_repeats(graph),
    DECOMPOSE: decompose_operators,
}


def rewrite(
    graph_module: GraphModule, config: HealConfig, *, outermost: bool = True
) -> GraphReport:
    """Run the passes on Dynamo's graph, in place.

    Args:
        graph_module: A graph at torch level, as Dynamo hands it to a backend.
        config: The options; a baseline precision changes nothing.
        outermost: Whether the caller of the compiled function gets the graph's results. What
            stands between two graphs expects the traced dtypes, whatever `config.outputs` says.

    Returns:
        What was rewritten, what was kept, and where 16 bits remain.

    Raises:
        ConfigError: `config.debug.disable` names no pass, or something is 16-bit in another dtype
            than `precision="fp32"`, `"fp16"` or `"bf16"` names.
        UnavailableError: `config.m_invariant` is set, and a matmul is on CPU.
        StrictError: A node had to be kept, and `config.strict` is set.
        GraphCheckError: A pass broke the graph (a bug of healpass).
    """
    _check_names(config.debug.disable)
    context = Context(config, _fake_mode(graph_module), outermost)
    if not config.rewrites:
        _check_dtype(graph_module, config.precision)
    if not config.rewrites or context.fake_mode is None:
        return context.report
    skipped = (*config.debug.disable, *_unsafe_passes(graph_module, config.debug.disable))
    chosen = {name: run for name, run in PASSES.items() if name not in skipped}
    for name, run in chosen.items():
        _run(name, run, graph_module, context, complete=name == "promote")
    log.info("%s: %s", config.precision, context.report.summary())
    if config.strict and context.report.kept:
        what = "nodes" if config.precision == "exact" else "matmul and SDPA nodes"
        raise StrictError(_kept_message(context.report, what))
    return context.report


def finish(
    graph: Graph, config: HealConfig, decompositions: Decompositions, report: GraphReport
) -> None:
    """Run the late passes on an ATen graph, in place.

    Args:
        graph: What Inductor is about to lower.
        config: The options; only `precision="exact"` has something to decompose.
        decompositions: Of every operator, ours and torch's.
        report: Gets a record per pass.

    Raises:
        GraphCheckError: A pass broke the graph (a bug of healpass).
    """
    skipped = {*config.debug.disable, *(() if config.precision == "exact" else (DECOMPOSE,))}
    for name, run in LATE_PASSES.items():
        if name not in skipped:
            _artifact(f"heal_before_{name}", graph)
            start, unknown = time.perf_counter(), calls_without_value(graph)
            count = run(graph, decompositions)
            verify_late(graph, name, unknown)
            _record(name, count, start, report)
            _artifact(f"heal_after_{name}", graph)


def _check_dtype(graph_module: GraphModule, precision: str) -> None:
    """Refuse what is 16-bit in another dtype than an untouched precision names."""
    wanted = _DTYPES.get(precision)
    for node in graph_module.graph.nodes if wanted else ():
        found = [t.dtype for t in tensors([value(node)]) if is_half(t) and t.dtype != wanted]
        if found:
            raise ConfigError(
                f"precision={precision!r} was asked for, but {node.name!r} is "
                f"{str(found[0]).removeprefix('torch.')}, and healpass casts no model.\n"
                f"Cast it, model.to({wanted}), and leave autocast, or use precision='traced' for "
                "the dtype it has; 'layercast' is FP32 arithmetic on 16-bit weights."
            )


def _unsafe_passes(graph_module: GraphModule, disabled: tuple[str, ...]) -> tuple[str, ...]:
    """On an unsupported device nothing is promoted: matmuls are listed as kept, nothing else.

    Without promotion autocast stays in charge, so the pass that shields from it goes with it.
    """
    devices = {t.device.type for n in graph_module.graph.nodes for t in tensors([value(n)])}
    supported = all(device_reason(device, torch.version.hip) is None for device in devices)
    promoted = supported and "promote" not in disabled
    return () if promoted else ("promote", "exact", "autocast")


def _run(
    name: str, run: Pass, graph_module: GraphModule, context: Context, complete: bool
) -> None:
    _artifact(f"heal_before_{name}", graph_module)
    start = time.perf_counter()
    count = run(graph_module, context)
    if count:
        graph_module.recompile()
        whole = complete and not set(context.config.debug.disable) & PASSES.keys()
        verify(graph_module, context, name, whole)
    _record(name, count, start, context.report)
    _artifact(f"heal_after_{name}", graph_module)


def _record(name: str, count: int, start: float, report: GraphReport) -> None:
    seconds = time.perf_counter() - start
    report.passes.append({"name": name, "changed": count, "seconds": seconds})
    log.debug("pass %s changed %d nodes in %.3f s", name, count, seconds)


def _fake_mode(graph_module: GraphModule) -> Any:
    """The fake mode of the traced values; None for a graph without tensors."""
    for node in graph_module.graph.nodes:
        mode = getattr(value(node), "fake_mode", None)
        if mode is not None:
            return mode
    return None


def _artifact(name: str, graph: GraphModule | Graph) -> None:
    def text() -> str:
        owner = graph.owning_module if isinstance(graph, Graph) else graph
        return str(graph) if owner is None else owner.print_readable(print_output=False)

    torch._logging.trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": "string"},
        payload_fn=text,
    )


def _check_names(disabled: tuple[str, ...]) -> None:
    known = (*PASSES, *LATE_PASSES)
    for name in disabled:
        if name not in known:
            raise ConfigError(
                f"disable={name!r} names no pass; passes: {', '.join(known)}."
                + suggestion(name, known)
            )


def _kept_message(report: GraphReport, what: str) -> str:
    lines = "\n".join(f"  {n.op} at {n.line}: {n.reason}" for n in report.kept)
    return (
        f"strict=True, but {len(report.kept)} of {len(report.nodes)} {what} cannot "
        f"be rewritten:\n{lines}\n"
        "Leave strict out to run them as torch has them, or change the model there."
    )
