"""The first pass: sizes that are equal become one symbol. Imports `graph.context` and `nodes`.

Dynamo gives sizes of inputs that are equal one symbol ("duck shaping"), except where it was told
that they change: each of those gets its own. What a compiled prefill returns tells so, and so the
cache of every layer is as long as a symbol of its own says, and no two layers of a decoding graph
look alike to `passes.outline`. Here such sizes are guarded to be equal, as duck shaping does. Only
sizes at the same place of tensors of equal rank are, and none that the user marked.
"""

from __future__ import annotations

from typing import Any

from torch import SymInt, Tensor
from torch.fx import GraphModule, Node

from healpass.graph.context import Context
from healpass.graph.nodes import value


def unify_sizes(graph_module: GraphModule, context: Context) -> int:
    """Guard sizes of inputs to be equal where they are; how many symbols that saves."""
    del context
    first: dict[Any, Any] = {}
    count = 0
    for node in graph_module.graph.find_nodes(op="placeholder"):
        tensor = value(node)
        if not isinstance(tensor, Tensor):
            continue
        sizes: list[Any] = list(tensor.shape)
        for dim, size in enumerate(sizes):
            if not _is_free(size) or dim in _marked(node):
                continue
            known = first.setdefault((tensor.dim(), dim, size.node.hint), size)
            if known.node.expr != size.node.expr:
                count += bool(known == size)  # asking it is what guards it
    return count


def _is_free(size: Any) -> bool:
    """Whether a size is a symbol that stands for a number which is known today."""
    return isinstance(size, SymInt) and size.node.has_hint() and size.node.expr.is_symbol


def _marked(node: Node) -> set[int]:
    """Dimensions that `torch._dynamo.mark_dynamic` promises to stand for themselves."""
    example = getattr(node.meta.get("grapharg"), "example", None)
    return getattr(example, "_dynamo_dynamic_indices", set())
