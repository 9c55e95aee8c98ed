"""A fault of Inductor's C++ loops, kept out of what we compile. May import `cache_key`.

Inductor joins kernels that have their outer loops in common, and keeps what one hands to the next
in a buffer of one row (`OuterLoopFusedSchedulerNode`). Where it also vectorizes along an outer
loop, sixteen rows share that buffer and fifteen of them read the values of the last
(pytorch/pytorch#185702; torch 2.11 to 2.13 have it). `SeparateLoops` takes such kernels apart.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

from torch._inductor import custom_graph_pass
from torch._inductor.codegen.cpp import OuterLoopFusedSchedulerNode, stride_at_vec_range
from torch._inductor.dependencies import extract_read_writes

from healpass.cache_key import source_hash

# torch 2.11 has no class for passes over scheduled nodes, and asks for none.
_SchedulerPass: Any = getattr(
    custom_graph_pass, "CustomSchedulerPass", custom_graph_pass.CustomGraphPass
)


class SeparateLoops(_SchedulerPass):
    """A pass over the nodes that Inductor has fused: Inductor's `_post_fusion_custom_pass`.

    Attributes:
        chained: The user's own pass in that slot; it runs first, and its uuid counts too.
    """

    def __init__(self, chained: Any = None) -> None:
        self.chained = chained

    def __call__(self, nodes: list[Any]) -> list[Any]:
        """The nodes, joined loops in their parts where vectors would run across rows."""
        if self.chained is not None:
            nodes = self.chained(nodes)
        return [part for node in nodes for part in _parts(node)]

    def uuid(self) -> Any:
        """Our part of the caches' key, then the user's; None (no caching) if theirs has none."""
        if self.chained is None:
            return source_hash()
        theirs = self.chained.uuid() if hasattr(self.chained, "uuid") else None
        return None if theirs is None else (source_hash(), theirs)


def _parts(node: Any) -> list[Any]:
    if not isinstance(node, OuterLoopFusedSchedulerNode) or not mixes_rows(node):
        return [node]
    parts = list(node.get_outer_nodes())
    owners = node.scheduler.name_to_fused_node
    owners.update({inner.get_name(): part for part in parts for inner in part.get_nodes()})
    return parts


def mixes_rows(joined: Any) -> bool:
    """Whether vectors may run across rows of a loop that hands rows on in a buffer of one row.

    Inductor makes such buffers where all of the kernels have one loop inside of those in common.
    It vectorizes the innermost loop along which every index is contiguous or constant, and one is
    contiguous (`TilingSelect`): surely the innermost of all, where that holds for it.

    Args:
        joined: An `OuterLoopFusedSchedulerNode`.
    """
    depth = joined.outer_loop_fusion_depth
    row_strides: list[set[Any]] = []
    for part in joined.get_outer_nodes():
        row_strides.append(set())
        for node in part.get_nodes():
            accesses = extract_read_writes(node._body, *node.group[1])
            inner = list(accesses.var_ranges or ())[depth:]
            if len(inner) > 1:
                return False
            indices = (access.index for access in chain(accesses.reads, accesses.writes))
            row_strides[-1] |= {stride_at_vec_range(i, loop) for i in indices for loop in inner}
    if not all(row_strides):
        return False  # some kernel has no loop within
    return not all(1 in strides and strides <= {0, 1} for strides in row_strides)
