"""Autocast around a promoted graph and inside it: neither may retype anything.

With `with torch.autocast(...): compiled(x)` the region is not in the graph: it is on while the
graph is traced on and while it runs. Promoted operators already have the dtypes they shall have,
so the graph switches autocast off for itself. May import `graph.nodes` and below.
"""

from __future__ import annotations

import torch
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx import GraphModule

from healpass.graph.context import Context
from healpass.graph.node_classes import is_autocast
from healpass.graph.nodes import set_value, tensors, value


def shield_from_autocast(graph_module: GraphModule, context: Context) -> int:
    """Put the graph into regions with autocast off, one per device type that has it on."""
    del context
    graph = graph_module.graph
    nodes = list(graph.nodes)
    devices = {t.device.type for node in nodes for t in tensors([value(node)])}
    active = sorted(d for d in devices if d in ("cpu", "cuda") and torch.is_autocast_enabled(d))
    first = next(node for node in nodes if node.op != "placeholder")
    for device in active:
        with graph.inserting_before(first):
            region = graph.call_function(_enter_autocast, (device, None, False, None))
        with graph.inserting_before(nodes[-1]):
            leave = graph.call_function(_exit_autocast, (region,))
        for node in (region, leave):
            set_value(node, None)
    return len(active)


def dissolve_autocast(graph: torch.fx.Graph) -> None:
    """Take autocast regions away: every operator now has the dtype it shall have."""
    for node in reversed(list(graph.nodes)):
        if is_autocast(node):
            graph.erase_node(node)
