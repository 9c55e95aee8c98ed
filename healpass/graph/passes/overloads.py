"""The pass that names the overload behind `torch.ops.aten.slice`. May import `graph.nodes`.

`torch.ops.aten.slice` is a packet of overloads, and which one a call means follows from its
arguments, as torch resolves it at each call. With the overload in the graph every later pass knows
the schema: what an argument is called and what the call writes into. Torch's own FlexAttention
masks and `associative_scan` put packets into graphs; so may users.
"""

from __future__ import annotations

import torch
from torch._ops import OpOverloadPacket
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from healpass.graph.context import Context
from healpass.graph.nodes import value


def resolve_packets(graph_module: GraphModule, context: Context) -> int:
    """Replace packets by the overloads that torch would choose; return how many.

    A packet that torch cannot resolve from what the nodes carry stays: it runs as it did.
    """
    del context
    count = 0
    for node in graph_module.graph.nodes:
        if isinstance(node.target, OpOverloadPacket):
            count += _resolve(node, node.target)
    return count


def _resolve(node: Node, packet: OpOverloadPacket) -> bool:
    args, kwargs = map_arg((node.args, node.kwargs), value)
    try:
        name = torch._C._jit_resolve_packet(packet._qualified_op_name, *args, **kwargs)
    except RuntimeError:  # an overload made in Python, or an argument without a known value
        return False
    node.target = getattr(packet, name)
    return True
