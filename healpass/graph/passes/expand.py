"""The pass that opens operators made of matmuls, so that the matmuls inside can be rewritten.

`einsum`, `tensordot`, `chain_matmul`, `multi_dot`, `bilinear` and `multi_head_attention_forward`
are one node each in Dynamo's graph. This pass traces each of them on its fake operands down to
torch's own definition and puts those nodes in its place; nothing is rewritten here. May import
`graph.nodes`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from healpass.graph.context import Context
from healpass.graph.eligibility import why_not, why_not_here
from healpass.graph.nodes import evaluate, node_inputs, op_name, propagating, set_value, value
from healpass.graph.operator_names import COMPOSITES
from healpass.graph.splice import replace, splice

aten = torch.ops.aten

#: Composite ATen operators that tracing would leave whole; torch's own definition opens them.
DECOMPOSED = (
    aten.einsum.default,
    aten.tensordot.default,
    aten.chain_matmul.default,
    aten.linalg_multi_dot.default,
)


def expand_composites(graph_module: GraphModule, context: Context) -> int:
    """Open every composite of one graph; return how many."""
    count = 0
    for node in list(graph_module.graph.nodes):
        name = op_name(node)
        if name not in COMPOSITES:
            continue
        operands = [value(n) for n in node_inputs(node) if isinstance(value(n), Tensor)]
        reason = why_not([operand for operand in operands if operand.dtype != torch.bool])
        reason = reason or why_not_here(node)
        if reason:
            context.keep(node, name, reason)
        else:
            _open(node, graph_module, context)
            count += 1
    return count


def _open(node: Node, graph_module: GraphModule, context: Context) -> None:
    """Replace `node` by the graph of its definition."""
    inputs = list(dict.fromkeys(node_inputs(node)))
    function = DEFINITIONS.get(op_name(node) or "", node.target)

    def call(*operands: Any) -> Any:
        given = dict(zip(inputs, operands, strict=True))
        args, kwargs = map_arg((node.args, node.kwargs), lambda argument: given[argument])
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return function(*args, **kwargs)  # type: ignore[operator]

    with propagating(context.fake_mode):
        table = {overload: overload.decompose for overload in DECOMPOSED}
        traced = make_fx(call, decomposition_table=table, pre_dispatch=True)(*map(value, inputs))
    _inline(traced, node, inputs, graph_module, context)


def _inline(
    traced: GraphModule,
    node: Node,
    inputs: list[Node],
    graph_module: GraphModule,
    context: Context,
) -> None:
    """Copy the nodes of `traced` before `node`, which then goes."""
    graph = graph_module.graph

    def copy(inner: Node, copied: Callable[[Node], Any]) -> Node:
        made = graph.node_copy(inner, copied)
        if made.target is aten.view.default:  # torch's kernel laid its input out; ours may differ
            made.target = aten.reshape.default
        made.meta = {k: v for k, v in node.meta.items() if k not in ("example_value", "val")}
        set_value(made, evaluate(made, context.fake_mode))
        return made

    with graph.inserting_before(node):
        result = splice(traced.graph, inputs, copy)
    replace(node, result, _stand_in)


def _stand_in(node: Node, other: Node) -> None:
    """Let `other` take the place of `node`, also its place in memory."""
    if other not in node_inputs(node):
        set_value(other, value(node))
    node.replace_all_uses_with(other)


def _encoder_layer(
    source: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    """What nn.TransformerEncoderLayer's fused fast path computes."""
    visible = _encoder_mask(mask, mask_type)

    def attend(states: Tensor) -> Tensor:
        packed = F.linear(states, qkv_weight, qkv_bias)
        return F.linear(_self_attention(packed, num_heads, visible), proj_weight, proj_bias)

    def feed_forward(states: Tensor) -> Tensor:
        hidden = F.linear(states, ffn_weight_1, ffn_bias_1)
        return F.linear(F.gelu(hidden) if use_gelu else F.relu(hidden), ffn_weight_2, ffn_bias_2)

    def norm_1(states: Tensor) -> Tensor:
        return F.layer_norm(states, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def norm_2(states: Tensor) -> Tensor:
        return F.layer_norm(states, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    if norm_first:
        states = source + attend(norm_1(source))
        return states + feed_forward(norm_2(states))
    states = norm_1(source + attend(source))
    return norm_2(states + feed_forward(states))


def _encoder_mask(mask: Tensor | None, mask_type: int | None) -> Tensor | None:
    """A mask of what is hidden, `[L, L]` (0), `[B, L]` (1) or both (2), as SDPA takes it."""
    if mask is None:
        return None
    shaped = mask[:, None, None, :] if mask_type == 1 else mask
    return ~shaped if shaped.dtype == torch.bool else shaped


def _self_attention(packed: Tensor, num_heads: int, visible: Tensor | None) -> Tensor:
    """Attention of Q, K and V side by side, `[B, L, 3 E]`: `[B, L, E]`."""
    batch, length, size = packed.shape[0], packed.shape[1], packed.shape[2] // 3
    packed = packed.reshape(batch, length, 3, num_heads, size // num_heads).permute(2, 0, 3, 1, 4)
    attended = F.scaled_dot_product_attention(packed[0], packed[1], packed[2], visible)
    return attended.permute(0, 2, 1, 3).reshape(batch, length, size)


def _bilinear(
    input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """`sum_ij x1[i] W[o, i, j] x2[j]` as two products: over i for every (o, j), then over j."""
    outputs, size1, size2 = weight.shape
    lead = input1.shape[:-1]
    table = weight.permute(0, 2, 1).reshape(outputs * size2, size1)
    partial = F.linear(input1, table).reshape(*lead, outputs, size2)
    result = torch.matmul(partial, input2.unsqueeze(-1)).squeeze(-1)
    return result if bias is None else result + bias


#: Kernels that torch has no definition of in terms of matmuls.
DEFINITIONS: dict[str, Callable[..., Any]] = {
    "_transformer_encoder_layer_fwd": _encoder_layer,
    "bilinear": _bilinear,
}
