"""Which values of a graph share memory, and which memory is written. Imports `node_classes`.

The names of torch's operators do not tell: `reshape` views or copies, `to` copies or returns its
input, `select`, `positive` and a dropout that is switched off return views. The fake tensors do:
each has a storage, and what shares memory in the traced graph shares it there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.fx import Graph, Node

from healpass.graph import node_classes
from healpass.graph.node_classes import Kind
from healpass.graph.nodes import nodes_in, op_name, tensors, value


def storages(item: Any) -> set[int]:
    """The memory of an item's tensors; sparse and wrapped ones have none to compare."""
    return {tensor.untyped_storage()._cdata for tensor in tensors(item) if _has_storage(tensor)}


def _has_storage(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not torch._C._functorch.is_functorch_wrapped_tensor(
        tensor
    )


def is_handed_out(node: Node, source: Node) -> bool:
    """Whether a node or a view of it is a result of the graph in the memory of `source`."""
    if node.op == "output":
        return True
    shares = bool(storages(value(node)) & storages(value(source)))
    return shares and any(is_handed_out(user, source) for user in node.users)


class Memory:
    """What a graph writes into, as it was traced.

    Attributes:
        written: Storages that some node writes into. A cast of such a value must remain a copy.
        pinned: Storages that a node writes into which needs the traced bits: a custom operator, or
            whoever writes through `x.view(torch.int16)`. Values in them keep their traced dtype.
    """

    def __init__(self, graph: Graph) -> None:
        self.written: set[int] = set()
        self.pinned: set[int] = set()
        calls = [node for node in graph.nodes if node.op in ("call_function", "call_method")]
        for node in calls:
            needs_bits = node_classes.classify(node) in (Kind.FOREIGN, Kind.HIGHER_ORDER)
            targets = _written_by_foreign(node) if needs_bits else _written(node)
            memory = storages([value(target) for target in targets])
            self.written |= memory
            self.pinned |= memory if needs_bits else set()
        for node in calls:
            if node_classes.views_bits(node):
                self.pinned |= storages(value(node)) & self.written

    def is_written(self, *items: Any) -> bool:
        """Whether some node writes into the memory of one of the items."""
        return bool(self.written and storages(items) & self.written)

    def is_pinned(self, item: Any) -> bool:
        """Whether the item must keep its traced bits."""
        return bool(self.pinned and storages(item) & self.pinned)


def _written(node: Node) -> list[Any]:
    """What an operator of torch writes into."""
    return [node_classes.destination(node), *node_classes.running_statistics(node)]


def _written_by_foreign(node: Node) -> list[Any]:
    """The arguments that a foreign operator may write into: all of them where it has no schema."""
    if isinstance(node.target, HigherOrderOperator):
        kernel = node.target.name() == "triton_kernel_wrapper_mutation"
        return list(node.all_input_nodes) if kernel else []
    schemas = _schemas(node)
    if schemas:
        return [given for schema in schemas for given in _written_arguments(node, schema)]
    return (
        list(node.all_input_nodes) if op_name(node) is None else [node_classes.destination(node)]
    )


def _schemas(node: Node) -> list[Any]:
    if isinstance(node.target, OpOverload):
        return [node.target._schema]
    if isinstance(node.target, OpOverloadPacket):
        return [getattr(node.target, name)._schema for name in node.target.overloads()]
    return []


def _written_arguments(node: Node, schema: Any) -> list[Node]:
    written: list[Node] = []
    for position, argument in enumerate(schema.arguments):
        if argument.is_write:
            given = (node.args[position : position + 1], node.kwargs.get(argument.name))
            written += nodes_in(given)
    return written
