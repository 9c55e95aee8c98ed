"""Promotion of a batch norm that writes 16-bit statistics. May import `node_classes` and below."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from healpass.graph import node_classes
from healpass.graph.nodes import value


def promote_norm(promotion: Any, node: Node) -> None:
    """Let the norm update FP32 copies of the statistics, and round those into the caller's.

    torch's own kernel takes one dtype for all statistics, and would compute in it.
    """
    written = node_classes.running_statistics(node)
    wide = {buffer: promotion.cast(buffer, torch.float32, node) for buffer in written}
    node.args, node.kwargs = map_arg((node.args, node.kwargs), lambda n: wide.get(n, n))
    promotion.arithmetic(node)
    for buffer, updated in wide.items():
        promotion.builder(node.next).method("copy_", buffer, updated)
        detail = f"values are rounded into {buffer.name}"
        promotion.context.boundary(node, "buffer of the caller", value(buffer).dtype, detail)
