"""The pass after `outline`: exact operators become what they are made of. Imports `graph.splice`.

A decomposition of one `heal::` operator is up to two hundred nodes, and a decoder of thirty layers
has hundreds of those operators. Where AOTAutograd decomposes them, it traces each, and all passes
of Inductor walk over the result. So they stay whole until repeated layers are one subgraph, and
are decomposed there once. Only where nothing is differentiated: the partitioner of a training
graph has to see the nodes, to choose what the backward computes again.
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

from healpass.graph.splice import replace, splice


def stays_whole(inputs: Sequence[Any]) -> bool:
    """Whether a graph with these inputs is compiled without a backward, so that AOT need not see.

    Args:
        inputs: Tensors and sizes; AOTAutograd asks the same of them.
    """
    differentiated = any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
    return not (differentiated and torch.is_grad_enabled())


def _is_ours(target: Any) -> bool:
    return isinstance(target, OpOverload) and target.namespace == "heal"


def decompose_operators(graph: Graph, decompositions: Mapping[Any, Callable[..., Any]]) -> int:
    """Decompose the `heal::` operators of an ATen graph and of its subgraphs, where they can be.

    Args:
        graph: Changed in place. Nodes carry their values as `meta["val"]`.
        decompositions: Of every operator, ours and torch's.

    Returns:
        How many were decomposed.
    """
    owner = graph.owning_module
    bodies = [m for m in owner.modules() if isinstance(m, GraphModule)] if owner else []
    found = [
        node
        for body in dict.fromkeys((graph, *(module.graph for module in bodies)))
        for node in body.nodes
        if _is_ours(node.target) and node.target in decompositions
    ]
    return sum(_decompose(node, decompositions) for node in found)


def _decompose(node: Node, decompositions: Mapping[Any, Callable[..., Any]]) -> bool:
    operands = node.all_input_nodes
    traced = _traced(node, operands, decompositions)
    if any(inner.target is node.target for inner in traced.graph.nodes):
        return False  # the decomposition takes no such operands: the operator runs its reference
    graph = node.graph

    def copy(inner: Node, copied: Callable[[Node], Any]) -> Node:
        if inner.op == "get_attr":
            return _constant(graph, getattr(traced, str(inner.target)))
        made = graph.node_copy(inner, copied)
        made.meta |= {k: v for k, v in node.meta.items() if k not in made.meta}
        return made

    with graph.inserting_before(node):
        result = splice(traced.graph, operands, copy)
    replace(node, result, lambda old, new: old.replace_all_uses_with(new))
    return True


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
    name = next(n for i in range(1 << 20) if not hasattr(owner, n := f"decomposed_constant_{i}"))
    owner.register_buffer(name, value, persistent=False)
    copied = graph.get_attr(name)
    copied.meta["val"] = value
    return copied
