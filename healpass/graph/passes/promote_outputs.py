"""Dtypes of what a promoted graph hands out, and which of it is state: read by the next call.

Keys and values of a cache that the caller owns, and recurrent states, must keep their dtype: code
that was written for it joins them with new ones. Logits, hidden states and losses are read by the
caller only. May import `graph.nodes` and below.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, Node
from torch.fx.node import map_arg

from healpass.graph import operator_names
from healpass.graph.aliases import Memory, storages
from healpass.graph.node_classes import cache_destination
from healpass.graph.nodes import heal_name, is_parameter, op_name, value
from healpass.report import GRAPH_BREAK

#: How the names of `heal::` operators begin that attend, or multiply two activations.
ATTENTION = ("heal::sdpa", "heal::attention", "heal::integer_attention")
PRODUCTS = ("heal::mm", "heal::bmm", "heal::matmul")


def narrow_outputs(promotion: Any, node: Node) -> None:
    """Give the results that the output `node` hands out the dtypes that were traced.

    With `outputs="fp32"` what the caller of the compiled function gets stays FP32, whoever else
    reads it; but what the next call reads again, and what other code goes on with after a graph
    break, was written for the traced dtype.
    """
    if promotion.border == "promoted":
        return
    context, traced = promotion.context, promotion.traced
    model = promotion.border == "model"
    wide = model and context.outermost and context.config.outputs == "fp32"
    kept = handed_on(promotion.graph, traced, promotion.memory) if wide else set()
    kind, detail = ("graph output", "handed out in the dtype the caller expects")
    if model and not context.outermost:
        kind, detail = GRAPH_BREAK, "handed to code outside the graph, written for this dtype"

    def restore(argument: Node) -> Node:
        if not promotion.was_promoted(argument) or (wide and argument not in kept):
            return argument
        dtype = traced[argument].dtype
        narrow: Node = promotion.cast(argument, dtype, place_of_cast(argument, node))
        context.boundary(argument, kind, dtype, detail)
        return narrow

    node.args = map_arg(node.args, restore)


def handed_on(graph: Graph, traced: dict[Node, Any], memory: Memory) -> set[Node]:
    """The results that are state.

    Args:
        graph: A graph whose attention and products are `heal::` operators, where they can be.
        traced: The values that Dynamo saw.
        memory: What the traced graph writes into.

    Returns:
        Among the nodes that the graph hands out: what attention reads as keys and values, seen
        through moves; what lies in memory that is written in place, if it is read here as well;
        caches of the caller that were extended.
    """
    results = set(graph.output_node().all_input_nodes)
    read = [source for node in graph.nodes for source in _keys_and_values(node)]
    stored = storages([traced.get(node) for node in read])
    reached = _through_moves(read)
    return {
        node
        for node in results
        if node in reached
        or storages(traced.get(node)) & stored
        or (len(node.users) > 1 and memory.is_written(traced.get(node)))
        or any(_extends_cache(part) for part in _through_moves([node]))
    }


def place_of_cast(result: Node, output: Node) -> Node:
    """Where a result is cast: at the end, but before gradients are switched off or on after it.

    There the cast of a result that has a gradient would have none.
    """
    node = result.next
    while node is not output and op_name(node) != "_set_grad_enabled":
        node = node.next
    return node


def _extends_cache(node: Node) -> bool:
    return op_name(node) in operator_names.BUFFER_WRITES and cache_destination(node) is not None


def _keys_and_values(node: Node) -> list[Node]:
    """What attention reads again at the next step; of attention written out, by its products."""
    name, heal = op_name(node), heal_name(node) or ""
    if name in operator_names.SDPA or heal.startswith(ATTENTION):
        given = [*node.args[1:3], node.kwargs.get("key"), node.kwargs.get("value")]
        return [item for item in given if isinstance(item, Node)]
    product = heal.startswith(PRODUCTS) or name in operator_names.MATMULS
    right = node.args[1] if product and len(node.args) > 1 else None
    batched = isinstance(right, Node) and getattr(value(right), "ndim", 0) >= 3
    return [right] if batched and isinstance(right, Node) and not is_parameter(right) else []


def _through_moves(nodes: list[Node]) -> set[Node]:
    """The nodes, and what they were moved, joined, cast or repeated from."""
    found: set[Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node in found:
            continue
        found.add(node)
        if op_name(node) in operator_names.MOVES | operator_names.CASTS:
            joined = op_name(node) in operator_names.JOINS
            pending += node.all_input_nodes if joined else node.all_input_nodes[:1]
    return found
