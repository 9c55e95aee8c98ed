"""The pass that puts `heal::sdpa` in the place of SDPA. May import `ops` and below.

As in the matmul pass, the new node is FP32 and a cast back to the traced dtype follows it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

import healpass.ops  # noqa: F401  the operators must be registered
from healpass.arithmetic.attention_bounds import describe_attention
from healpass.config import HealConfig
from healpass.graph.context import Context
from healpass.graph.eligibility import why_not, why_not_here
from healpass.graph.nodes import heal_name, node_inputs, op_name, set_value, tensors, value
from healpass.graph.operator_names import SDPA
from healpass.ops.attention.exact_steps import bound_text

#: The names of SDPA's arguments, in order.
PARAMETERS = (
    "query",
    "key",
    "value",
    "attn_mask",
    "dropout_p",
    "is_causal",
    "scale",
    "enable_gqa",
)
#: How reports call it.
OP = "scaled_dot_product_attention"


def rewrite_attention(graph_module: GraphModule, context: Context) -> int:
    """Rewrite every SDPA node of one graph; return how many."""
    count = 0
    for node in list(graph_module.graph.nodes):
        if op_name(node) in SDPA:
            count += _rewrite(node, graph_module, context)
        elif heal_name(node) == "heal::sdpa":
            count += _configure(node, context)
    return count


def _rewrite(node: Node, graph_module: GraphModule, context: Context) -> bool:
    arguments: dict[str, Any] = dict(zip(PARAMETERS, node.args, strict=False)) | dict(node.kwargs)
    states = tensors([value(arguments[name]) for name in ("query", "key", "value")])
    reason = why_not(states) or why_not_here(node)
    reason = reason or _why_not_mask(value(arguments.get("attn_mask")))
    if reason:
        context.keep(node, OP, reason)
        return False
    builder = context.builder(graph_module, node)
    config = context.config
    attended = builder.call(
        torch.ops.heal.sdpa.default,
        **arguments,
        kv=config.attention_format,
        numerics=config.numerics,
    )
    context.rewritten(node, OP, "heal::sdpa", bound_of_attention(attended, config))
    result = builder.cast(attended, value(node).dtype)
    set_value(result, value(node))  # it takes its place in memory too
    node.replace_all_uses_with(result)
    graph_module.graph.erase_node(node)
    return True


def _configure(node: Node, context: Context) -> bool:
    """An operator of ours in the user's code follows the options of the compile.

    Its own format stays if it is not the default one and the options name none. Exact attention
    has no FP32 format.
    """
    asked = node.kwargs.get("kv", "fp32")
    config = context.config
    follows = asked == "int16" or (asked == "fp32" and config.precision == "exact")
    kv = config.kv or (config.attention_format if follows else asked)
    node.kwargs = {**node.kwargs, "kv": kv, "numerics": config.numerics}
    context.rewritten(node, "heal::sdpa", "heal::sdpa", bound_of_attention(node, config))
    return True


def arguments(node: Node) -> dict[str, Any]:
    """All arguments of a `heal::sdpa` node by name, defaults filled in."""
    schema = torch.ops.heal.sdpa.default._schema.arguments
    named = {a.name: a.default_value if a.has_default_value() else None for a in schema}
    return named | dict(zip(named, node.args, strict=False)) | dict(node.kwargs)


def bound_of_attention(operator: Node, config: HealConfig) -> str:
    """The worst-case error of `heal::sdpa` in one line (`arithmetic.attention_bounds`)."""
    query, key = (value(argument) for argument in node_inputs(operator)[:2])
    kv = str(operator.kwargs["kv"])
    if config.precision == "exact":
        return bound_text(kv)
    sizes = (query.shape[-1], key.shape[-2])
    return describe_attention(config.precision, *sizes, kv, config.debug.simulate)


def _why_not_mask(attn_mask: Any) -> str | None:
    if attn_mask is None or attn_mask.dtype == torch.bool:
        return None
    return why_not([attn_mask])
