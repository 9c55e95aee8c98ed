"""The pass after `outline`: exact operators become what they are made of. Imports torch only.

A decomposition of one `heal::` operator is up to two hundred nodes, and a decoder of thirty layers
has hundreds of those operators. Where AOTAutograd opens them, it traces each, and all passes of
Inductor walk over the result. So they stay closed until repeated layers are one subgraph, and are
opened there once. Only where nothing is differentiated: the partitioner of a training graph has to
see the nodes, to choose what the backward computes again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg


def stays_closed(inputs: Sequence[Any]) -> bool:
    """Whether a graph with these inputs is compiled without a backward, so that AOT need not see.

    Args:
        inputs: Tensors and sizes; AOTAutograd asks the same of them.
    """
    differentiated = any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
    return not (differentiated and torch.is_grad_enabled())


def _is_ours(target: Any) -> bool:
    return isinstance(target, OpOverload) and target.namespace == "heal"


def open_operators(graph: Graph, decompositions: Mapping[Any, Callable[..., Any]]) -> None:
    """Open the `heal::` operators of an ATen graph and its subgraphs that have a decomposition.

    Args:
        graph: Changed in place. Nodes carry their values as `meta["val"]`.
        decompositions: Of every operator, ours and torch's.
    """
    owner = graph.owning_module
    bodies = [m for m in owner.modules() if isinstance(m, GraphModule)] if owner else []
    for body in dict.fromkeys((graph, *(module.graph for module in bodies))):
        for node in list(body.nodes):
            if _is_ours(node.target) and node.target in decompositions:
                _open(node, decompositions)


def _open(node: Node, decompositions: Mapping[Any, Callable[..., Any]]) -> None:
    operands = node.all_input_nodes
    traced = _traced(node, operands, decompositions)
    if any(inner.target is node.target for inner in traced.graph.nodes):
        return  # the decomposition takes no such operands: the operator runs its meaning
    graph = node.graph
    inside = dict(zip(traced.graph.find_nodes(op="placeholder"), operands, strict=True))
    with graph.inserting_before(node):
        for inner in traced.graph.nodes:
            if inner.op == "get_attr":
                inside[inner] = _constant(graph, getattr(traced, inner.target))
            elif inner.op == "call_function":
                copied = inside[inner] = graph.node_copy(inner, inside.__getitem__)
                copied.meta |= {k: v for k, v in node.meta.items() if k not in copied.meta}
    [output] = traced.graph.find_nodes(op="output")
    result = map_arg(output.args[0], inside.__getitem__)
    if isinstance(result, Node):
        node.replace_all_uses_with(result)
    else:  # several values, each taken by an `operator.getitem`
        for item in list(node.users):
            item.replace_all_uses_with(result[item.args[1]])
            graph.erase_node(item)
    graph.erase_node(node)


def _traced(
    node: Node, operands: Sequence[Node], decompositions: Mapping[Any, Callable[..., Any]]
) -> GraphModule:
    def call(*values: Any) -> Any:
        known = dict(zip(operands, values, strict=True))
        args, kwargs = map_arg((node.args, node.kwargs), known.__getitem__)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    values = [operand.meta["val"] for operand in operands]
    mode = next(v.fake_mode for v in values if isinstance(v, torch._subclasses.FakeTensor))
    with mode, torch.no_grad():
        return make_fx(call, decomposition_table=dict(decompositions))(*values)


def _constant(graph: Graph, value: Any) -> Node:
    owner: Any = graph.owning_module
    name = next(n for i in range(1 << 20) if not hasattr(owner, n := f"opened_constant_{i}"))
    owner.register_buffer(name, value, persistent=False)
    copied = graph.get_attr(name)
    copied.meta["val"] = value
    return copied
