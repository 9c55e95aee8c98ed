"""The pass that takes linear layers of `parallelize_module` out of DTensor. Imports `ops`.

`ColwiseParallel` and `RowwiseParallel` wrap a linear layer so:

    DTensor.from_local(x) -> linear(x, DTensor weight) -> redistribute -> to_local

A DTensor runs its own matmul, which rounds every rank's part, and its all-reduce adds rounded
parts in the order of the ranks. The chain becomes one `heal::` operator on local tensors, which
knows that its sum goes on over the ranks (`products.tensor_parallel`). All else stays as it is; a
linear layer in another arrangement is left to the matmul pass, which lists it as kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from healpass.graph.context import Context, bound_of
from healpass.graph.eligibility import why_not, why_not_here
from healpass.graph.forms import bind
from healpass.graph.nodes import Builder, op_name, set_value, value
from healpass.graph.passes.matmul import FORMS

heal = torch.ops.heal


@dataclass(frozen=True)
class ShardedLinear:
    """One linear layer of `parallelize_module`.

    Attributes:
        rows: The local input of this rank.
        weight: The DTensor weight.
        bias: The DTensor bias, or None.
        result: The node that hands out the local result.
        by_columns: Whether the weight is cut by output features.
    """

    rows: Node
    weight: Node
    bias: Node | None
    result: Node
    by_columns: bool


def localize_linears(graph_module: GraphModule, context: Context) -> int:
    """Rewrite the sharded linear layers of one graph; return how many."""
    count = 0
    for node in list(graph_module.graph.nodes):
        layer = _match(node) if op_name(node) == "linear" else None
        if layer is not None:
            count += _rewrite(node, layer, graph_module, context)
    return count


def _match(node: Node) -> ShardedLinear | None:
    given = bind(FORMS["linear"], node)
    if given is None:
        return None
    inputs, weight, bias = given
    rows, result = _local_input(inputs), _local_result(node)
    if rows is None or result is None or not _is_sharded(weight):
        return None
    last = value(inputs).dim() - 1
    how = tuple(_placement(n, last) for n in (inputs, weight, result.args[0]))
    if how == ("replicate", 0, last):
        return ShardedLinear(rows, weight, bias, result, by_columns=True)
    if how == (last, 1, "replicate"):
        return ShardedLinear(rows, weight, bias, result, by_columns=False)
    return None


def _is_sharded(node: Any) -> bool:
    """Whether a node is a DTensor on a mesh of one dimension."""
    mesh = getattr(value(node), "device_mesh", None) if isinstance(node, Node) else None
    return mesh is not None and mesh.ndim == 1


def _placement(node: Any, last: int) -> Any:
    """The dimension that a DTensor is cut along, or "replicate"; None for anything else."""
    (placement,) = value(node).placements if _is_sharded(node) else (None,)
    if placement is None or placement.is_partial():
        return None
    return "replicate" if placement.is_replicate() else placement.dim % (last + 1)


def _local_input(node: Any) -> Node | None:
    """What `from_local` was given; a `redistribute` that changes nothing may come after it."""
    if isinstance(node, Node) and op_name(node) == "redistribute":
        source = node.args[0]
        if value(source).placements == value(node).placements:
            node = source
    is_local = isinstance(node, Node) and op_name(node) == "from_local"
    return node.args[0] if is_local else None


def _local_result(node: Node) -> Node | None:
    """The `to_local` at the end of the chain, if nothing else looks inside it."""
    for name in ("redistribute", "to_local"):
        users = list(node.users)
        if len(users) != 1 or op_name(users[0]) != name:
            return None
        node = users[0]
    return node


def _rewrite(
    node: Node, layer: ShardedLinear, graph_module: GraphModule, context: Context
) -> bool:
    builder = context.builder(graph_module, layer.result)
    traced = value(layer.result)
    weight = _local(builder, layer.weight, traced.dtype)
    bias = None if layer.bias is None else _local(builder, layer.bias, traced.dtype)
    if why_not([value(layer.rows), value(weight)]) or why_not_here(node):
        return False
    operator = heal.column_linear if layer.by_columns else heal.row_linear
    group = value(layer.weight).device_mesh.get_group().group_name
    product = builder.call(
        operator.default, layer.rows, weight, bias, group, context.config.numerics
    )
    bound = bound_of(node, context.config)  # of the whole K, which the DTensors show
    context.rewritten(node, "linear", operator.default.name(), bound)
    result = builder.cast(product, traced.dtype)
    set_value(result, traced)
    layer.result.replace_all_uses_with(result)
    _erase(layer.result)
    return True


def _local(builder: Builder, parameter: Node, dtype: torch.dtype) -> Node:
    """This rank's part of a parameter; rounded as autocast would, for that is what is served."""
    local = builder.method("to_local", parameter)
    return builder.cast(local, dtype) if dtype.itemsize < value(local).dtype.itemsize else local


def _erase(node: Node) -> None:
    """Drop a chain of nodes that nothing uses any more."""
    while not node.users and node.op != "placeholder":
        source: Any = node.args[0]
        node.graph.erase_node(node)
        node = source
