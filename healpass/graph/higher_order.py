"""Promotion through operators that call a subgraph. May import `graph.nodes` and below.

`checkpoint`, `wrap` and `invoke_subgraph` run their body once and pass values through: FP32
activations go in and come out. The branches of `cond` must agree, so both hand out FP32. All
others (`scan`, `while_loop`, custom autograd functions) keep their traced dtypes at the border: a
loop must hand on what it takes in. Inside them matmuls are rewritten all the same. FlexAttention's
bodies are left alone: its kernel hands them FP32 scores whatever dtype was traced.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from healpass.graph.nodes import Builder, is_floating, is_half, nodes_in, set_value, value

TRANSPARENT = (
    "tag_activation_checkpoint",
    "wrap",
    "invoke_subgraph",
    "wrap_activation_checkpoint",
)


def promote_call(promotion: Any, node: Node) -> None:
    """Promote a higher-order operator and the subgraphs it calls."""
    name = str(node.target)
    bodies = [
        n for n in node.all_input_nodes if n.op == "get_attr" and _body(promotion, n) is not None
    ]
    if name in TRANSPARENT and len(bodies) == 1:
        _through(promotion, node, bodies, nodes_in(node.args[node.args.index(bodies[0]) + 1 :]))
    elif name == "cond" and len(bodies) == 2:
        _through(promotion, node, bodies, nodes_in(node.args[3]))
    else:
        promotion._foreign(node)
        for body in bodies if "flex_attention" not in name else ():
            _promote_body(promotion, _body(promotion, body), None)


def _body(promotion: Any, node: Node) -> GraphModule | None:
    found = getattr(promotion.graph_module, str(node.target), None)
    return found if isinstance(found, GraphModule) else None


def _through(promotion: Any, node: Node, bodies: list[Node], operands: list[Node]) -> None:
    """Hand promoted operands in and promoted results out, FP32 wherever one body makes FP32."""
    results = [
        _promote_body(promotion, _body(promotion, body), [value(operand) for operand in operands])
        for body in bodies
    ]
    wide = [any(_is_fp32(values[i]) for values in results) for i in range(len(results[0]))]
    for body in bodies:
        _widen_outputs(promotion, _body(promotion, body), wide)
    traced = value(node)
    with promotion.context.fake_mode:
        parts = [
            part.to(torch.float32) if is_half(part) and widen else part
            for part, widen in zip(traced, wide, strict=True)
        ]
    set_value(node, type(traced)(parts))
    promotion.changed += 1


def _is_fp32(item: Any) -> bool:
    return is_floating(item) and item.dtype == torch.float32


def _promote_body(promotion: Any, body: Any, operands: list[Any] | None) -> list[Any]:
    """Promote a subgraph; `operands` are its inputs' new values, None leaves them as traced.

    A body with given operands hands out what it computes; otherwise its outputs keep their dtypes.
    """
    border = "traced" if operands is None else "promoted"
    inner = type(promotion)(body, promotion.context, border)
    placeholders = [n for n in body.graph.nodes if n.op == "placeholder"]
    for placeholder, operand in zip(placeholders, operands or (), strict=False):
        inner.traced[placeholder] = value(placeholder)
        set_value(placeholder, operand)
    inner.run()
    body.recompile()
    return [value(result) for result in nodes_in(_output(body).args[0])]


def _output(body: GraphModule) -> Node:
    return next(n for n in reversed(body.graph.nodes) if n.op == "output")


def _widen_outputs(promotion: Any, body: Any, wide: list[bool]) -> None:
    output = _output(body)
    flags = iter(wide)

    def widen(argument: Node) -> Node:
        builder = Builder(body.graph, output, promotion.context.fake_mode)
        return builder.cast(argument, torch.float32) if next(flags) else argument

    output.args = (map_arg(output.args[0], widen),)
    body.recompile()
