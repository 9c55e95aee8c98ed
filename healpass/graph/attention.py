"""The pass that puts `heal::sdpa` in the place of SDPA. May import `ops` and below.

As in the matmul pass, the new node is FP32 and a cast back to the traced dtype follows it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

import healpass.ops  # noqa: F401  the operators must be registered
from healpass.graph.context import Context, why_not, why_not_here
from healpass.graph.names import SDPA
from healpass.graph.nodes import op_name, set_value, tensors, value

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


def rewrite_attention(graph_module: GraphModule, context: Context) -> int:
    """Rewrite every SDPA node of one graph; return how many."""
    count = 0
    for node in list(graph_module.graph.nodes):
        if op_name(node) in SDPA:
            count += _rewrite(node, graph_module, context)
        elif str(node.target) in ("flex_attention", "flex_attention_backward"):
            context.keep(node, "flex_attention", "FlexAttention: not rewritten in this version")
    return count


def _rewrite(node: Node, graph_module: GraphModule, context: Context) -> bool:
    arguments: dict[str, Any] = dict(zip(PARAMETERS, node.args, strict=False)) | dict(node.kwargs)
    states = tensors([value(arguments[name]) for name in ("query", "key", "value")])
    reason = why_not(states) or why_not_here(node)
    reason = reason or _why_not_mask(value(arguments.get("attn_mask")))
    if reason:
        context.keep(node, "scaled_dot_product_attention", reason)
        return False
    builder = context.builder(graph_module, node)
    attended = builder.call(
        torch.ops.heal.sdpa.default, **arguments, numerics=context.config.numerics
    )
    context.rewritten(node, "scaled_dot_product_attention", "heal::sdpa", "not derived")
    result = builder.cast(attended, value(node).dtype)
    set_value(result, value(node))  # it takes its place in memory too
    node.replace_all_uses_with(result)
    graph_module.graph.erase_node(node)
    return True


def _why_not_mask(attn_mask: Any) -> str | None:
    if attn_mask is None or attn_mask.dtype == torch.bool:
        return None
    return why_not([attn_mask])
