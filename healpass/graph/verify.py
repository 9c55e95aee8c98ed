"""The check after every pass. May import `graph.nodes` and below.

A pass is believed only when each node, run again on fake tensors, gives the shape and dtype that
the node claims, when each subgraph takes what its callers hand in and gives what they expect, and
when no matmul or SDPA is left but those the report lists as kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq

from healpass.errors import GraphCheckError
from healpass.graph import node_classes, operator_names
from healpass.graph.borders import REGION, body_of, borders, fact, inputs_of, results_of
from healpass.graph.context import Context, qualified_name
from healpass.graph.dtypes import has_unbacked
from healpass.graph.node_classes import Kind
from healpass.graph.nodes import (
    evaluate,
    is_changed,
    mark_checked,
    op_name,
    subgraphs,
    tensors,
    user_line,
    value,
)


def verify(graph_module: GraphModule, context: Context, after: str, complete: bool) -> None:
    """Check one graph and its subgraphs after the pass `after`.

    Args:
        graph_module: The graph under edit.
        context: Its context; `context.kept` names the matmuls that may remain.
        after: The pass that ran last, for the message.
        complete: Whether matmuls and SDPA must all be gone by now.

    Raises:
        GraphCheckError: A node's value is not what it claims, a subgraph is called with other
            dtypes or shapes than it was traced for, or a matmul was forgotten.
    """
    _verify(graph_module, context, after, complete, {})


def verify_late(graph: Graph, after: str, unknown: set[Node]) -> None:
    """Sort and check an ATen graph after a late pass: it is well formed, new values are known.

    Inductor sorts it after the last pass; a pass may leave a call before its last operand.

    Args:
        graph: What Inductor is about to lower.
        after: The pass that ran last, for the message.
        unknown: The calls without a value before it ran (`calls_without_value`).

    Raises:
        GraphCheckError: A node that the pass made has no value.
    """
    from torch._inductor.pattern_matcher import stable_topological_sort

    stable_topological_sort(graph)
    graph.lint()
    for node in calls_without_value(graph) - unknown:
        raise _error(node, after, "it has no value, so Inductor cannot lower it")


def calls_without_value(graph: Graph) -> set[Node]:
    """The calls of an ATen graph whose value nobody has noted: assertions, for one."""
    return {n for n in graph.nodes if n.op == "call_function" and "val" not in n.meta}


def _verify(
    graph_module: GraphModule,
    context: Context,
    after: str,
    complete: bool,
    regions: dict[Any, GraphModule],
) -> None:
    graph_module.graph.lint()
    for node in graph_module.graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        if complete and _is_matmul(node) and node not in context.kept:
            raise _error(node, after, f"{op_name(node)} was neither rewritten nor listed as kept")
        if is_changed(node) and _can_run(node):
            _check_value(node, after, context)
            mark_checked(node)
        if isinstance(node.target, HigherOrderOperator):
            _check_call(node, graph_module, after)
            _check_region(node, graph_module, after, regions)
    for _, body in subgraphs(graph_module):
        _verify(body, context, after, complete, regions)


def _check_call(node: Node, owner: GraphModule, after: str) -> None:
    """Each body of a call takes what the call hands in, and gives what the call claims."""
    for border in borders(node, owner):
        sides = (
            ("takes", border.given, inputs_of(border.body)),
            ("gives", border.expected, results_of(border.body)),
        )
        for verb, outside, inside in sides:
            for index, (call, own) in enumerate(zip(outside or (), inside, strict=False)):
                known = fact(own)
                if call is not None and known is not None and not call.agrees(known):
                    what = f"its body {verb} {known} where the call has {call}, at {index}"
                    raise _error(node, after, what)


def _check_region(
    node: Node, owner: GraphModule, after: str, regions: dict[Any, GraphModule]
) -> None:
    """Torch takes regions of one name for one region, and compiles the first that it meets."""
    body = body_of(node.args[0], owner) if str(node.target) == REGION else None
    if body is not None and regions.setdefault(node.args[1], body) is not body:
        raise _error(node, after, f"two subgraphs have the name {node.args[1]!r}")


def _is_matmul(node: Node) -> bool:
    return (
        op_name(node) in operator_names.MATMULS | operator_names.SDPA | operator_names.COMPOSITES
    )


def _can_run(node: Node) -> bool:
    """Whether running the node on fake tensors has no effect but its result."""
    kind = node_classes.classify(node)
    results = tensors([value(node)])
    return (
        kind not in (Kind.SCOPE, Kind.HIGHER_ORDER, Kind.FOREIGN, Kind.IN_PLACE)
        and bool(results)
        and not has_unbacked(value(node))
    )


def _check_value(node: Node, after: str, context: Context) -> None:
    try:
        found = tensors([evaluate(node, context.fake_mode)])
    except (RuntimeError, TypeError, ValueError) as error:
        raise _error(node, after, f"it no longer runs: {error}") from error
    for claimed, real in zip(tensors([value(node)]), found, strict=True):
        if not _agree(claimed, real):
            raise _error(node, after, f"it claims {_facts(claimed)} but computes {_facts(real)}")


def _agree(claimed: Tensor, real: Tensor) -> bool:
    """Whether dtype, device and sizes are the same; symbols may be written in two ways."""
    if _facts(claimed) == _facts(real):
        return True
    kind = (claimed.dtype, claimed.device.type, claimed.dim())
    return kind == (real.dtype, real.device.type, real.dim()) and all(
        statically_known_true(sym_eq(mine, theirs))
        for mine, theirs in zip(claimed.shape, real.shape, strict=True)
    )


def _facts(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tuple(map(str, tensor.shape)), tensor.device.type


def _error(node: Node, after: str, problem: str) -> GraphCheckError:
    line, code = user_line(node)
    return GraphCheckError(
        f"the graph is wrong after pass {after!r} at node {qualified_name(node)!r}: {problem}\n"
        f"  user code: {line}: {code}\n"
        f"  torch {torch.__version__}. This is a bug of healpass; "
        f"options={{'debug': {{'disable': ({after!r},)}}}} leaves the pass out."
    )
