"""The pass that rewrites FlexAttention where its functions allow. May import `ops` and below.

FlexAttention is a higher-order operator with two functions: one changes a score, one tells whether
a key is visible. A score function that leaves the score alone or caps it softly is an argument of
`heal::sdpa`; a mask function of elementwise operations, evaluated on all indices at once, is a
mask. Anything else is kept, and listed with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from healpass.graph.context import Context
from healpass.graph.eligibility import why_not, why_not_here
from healpass.graph.nodes import Builder, op_name, set_value, value
from healpass.graph.operator_names import words
from healpass.graph.passes.attention import bound_of_attention
from healpass.graph.splice import splice

OP = "flex_attention"
heal = torch.ops.heal

#: Operations that give the same element for broadcast indices as for one index.
ELEMENTWISE = words(
    """
    ge gt le lt eq ne and_ or_ xor invert __and__ __or__ __xor__ __invert__ logical_and
    logical_or logical_not logical_xor bitwise_and bitwise_or bitwise_not add sub mul floordiv mod
    neg abs minimum maximum where clamp remainder floor_divide
    """
)


def rewrite_flex(graph_module: GraphModule, context: Context) -> int:
    """Rewrite every FlexAttention of one graph that allows it; return how many."""
    count = 0
    for node in list(graph_module.graph.nodes):
        if str(node.target) == "flex_attention":
            reason = _why_not(node, graph_module)
            if reason:
                context.keep(node, OP, f"FlexAttention: {reason}")
            else:
                _rewrite(node, graph_module, context)
                count += 1
        elif str(node.target) == "flex_attention_backward":
            context.keep(node, OP, "FlexAttention: a backward pass of its own")
    return count


def _body(function: Any, graph_module: GraphModule) -> GraphModule:
    body = graph_module.get_submodule(str(function.target))
    assert isinstance(body, GraphModule), "Dynamo makes a graph of each function"
    return body


def _result(body: GraphModule) -> Any:
    return body.graph.output_node().args[0]


def _arguments(node: Node) -> tuple[Any, ...]:
    """Q, K, V, score_mod, block mask, scale, options, buffers of score_mod, of mask_mod."""
    return node.args


def _why_not(node: Node, graph_module: GraphModule) -> str | None:
    query, key, states, score, block_mask = _arguments(node)[:5]
    operands = [value(x) for x in (query, key, states)]
    reason = why_not(operands) or why_not_here(node)
    if reason:
        return reason
    used = [user for user in node.users if user.users]
    if any(op_name(user) != "getitem" or user.args[1] != 0 for user in used):
        return "its logsumexp is used"
    if soft_cap(_body(score, graph_module)) is None:
        return "its score_mod does more than a soft cap"
    foreign = _foreign(_body(block_mask[-1], graph_module))
    return f"its mask_mod computes {foreign}" if foreign else None


def soft_cap(body: GraphModule) -> float | None:
    """The cap of `cap * tanh(score / cap)`, infinity for an unchanged score, else None."""
    score, *_ = body.graph.nodes
    result = _result(body)
    if result is score:
        return float("inf")
    tanh, cap = _scaled(result, "mul")
    if not isinstance(tanh, Node) or op_name(tanh) != "tanh":
        return None
    inner, divisor = _scaled(tanh.args[0], "truediv", "div")
    return float(cap) if inner is score and divisor == cap and cap > 0 else None


def _scaled(node: Any, *names: str) -> tuple[Any, Any]:
    """The node and the number of a product or quotient with a number; (None, 0) for others."""
    if not isinstance(node, Node) or op_name(node) not in names:
        return None, 0
    numbers = [arg for arg in node.args if isinstance(arg, (int, float))]
    others = [arg for arg in node.args if isinstance(arg, Node)]
    in_order = op_name(node) == "mul" or node.args[0] in others
    return (others[0], numbers[0]) if len(numbers) == len(others) == 1 and in_order else (None, 0)


def _foreign(body: GraphModule) -> str | None:
    """What a mask function does that is not elementwise, or None."""
    for node in body.graph.nodes:
        name = op_name(node) if node.op in ("call_function", "call_method") else None
        if name == "new_ones" and node is _result(body):
            continue
        looked_up = name == "getitem" and all(
            isinstance(i, (Node, int))
            for i in (node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],))
        )
        if name is not None and name not in ELEMENTWISE and not looked_up:
            return f"{name}, which is not elementwise"
        if name is None and node.op not in ("placeholder", "output"):
            return str(node.target)
    return None


# ----------------------------------------------------------------------------------- rewriting


def _rewrite(node: Node, graph_module: GraphModule, context: Context) -> None:
    query, key, states, score, block_mask, scale, _, _, buffers = _arguments(node)
    builder = context.builder(graph_module, node)
    cap = soft_cap(_body(score, graph_module))
    config = context.config
    attended = builder.call(
        heal.sdpa.default,
        query,
        key,
        states,
        _mask(node, block_mask, buffers, graph_module, builder),
        scale=scale,
        enable_gqa=True,
        softcap=None if cap == float("inf") else cap,
        kv=config.attention_format,
        numerics=config.numerics,
    )
    context.rewritten(node, OP, "heal::sdpa", bound_of_attention(attended, config))
    for user in list(node.users):
        if user.users:
            result = builder.cast(attended, value(user).dtype)
            set_value(result, value(user))
            user.replace_all_uses_with(result)
        graph_module.graph.erase_node(user)
    graph_module.graph.erase_node(node)


def _mask(
    node: Node, block_mask: Any, buffers: Any, graph_module: GraphModule, builder: Builder
) -> Node | None:
    """The mask that a block mask stands for; None if every key is visible.

    A key is visible where its block is listed as full, or listed as partial and the function says
    so.
    """
    query: Any = node.args[0]
    key: Any = node.args[1]
    length, keys = value(query).shape[-2], value(key).shape[-2]
    counts, indices, full_counts, full_indices = block_mask[2:6]
    rows, columns = block_mask[-3:-1]
    body = _body(block_mask[-1], graph_module)
    everything = op_name(_result(body)) == "new_ones"
    if everything and rows >= length and columns >= keys:
        return None
    sizes = (rows, columns, builder.sizes(query)[-2], builder.sizes(key)[-2])
    visible = builder.call(heal.listed_blocks.default, counts, indices, *sizes)
    if not everything:
        indices_of = [_index(builder, query, dim) for dim in range(3)]
        indices_of.append(_index(builder, key, 2, 3))
        inside = _inline(body, [*indices_of, *buffers], builder)
        visible = builder.call(torch.logical_and, visible, inside)
    if full_counts is not None:
        full = builder.call(heal.listed_blocks.default, full_counts, full_indices, *sizes)
        visible = builder.call(torch.logical_or, visible, full)
    return visible


def _index(builder: Builder, states: Any, dim: int, place: int | None = None) -> Node:
    """The indices of a dimension, shaped to stand at `place` of `[B, H, L, S]`."""
    shape = [1, 1, 1, 1]
    shape[dim if place is None else place] = -1
    count = builder.sizes(states)[dim]
    numbers = builder.call(torch.arange, count, device=value(states).device)
    return builder.method("reshape", numbers, shape)


def _inline(body: GraphModule, operands: list[Any], builder: Builder) -> Node:
    """Copy the function's nodes before the operator, its arguments being all indices at once."""

    def copy(inner: Node, copied: Callable[[Node], Any]) -> Node:
        args, kwargs = map_arg((inner.args, inner.kwargs), copied)
        make: Callable[..., Node] = builder.call if inner.op == "call_function" else builder.method
        return make(inner.target, *args, **kwargs)

    result: Node = splice(body.graph, operands, copy)
    return result
