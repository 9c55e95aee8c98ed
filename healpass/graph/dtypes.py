"""Dtypes of nodes: what a promoted one computes, what autocast brought in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_aggregate

from healpass.graph.nodes import (
    evaluate,
    is_floating,
    is_half,
    propagating,
    tensors,
    with_gradient_of,
)

FP32 = torch.float32


def retyped(node: Node, before: Any, fake_mode: Any) -> Any:
    """The node's value on its new operands.

    An operator whose result has data-dependent sizes is not run again, since that would make new
    unbacked symbols; its traced value is cast instead.

    Args:
        node: A call node whose arguments have been changed.
        before: Its fake value, or several, before that.
        fake_mode: The mode of the graph's fake tensors.
    """
    if not has_unbacked(before):
        return with_gradient_of(before, evaluate(node, fake_mode))
    with propagating(fake_mode):
        return map_aggregate(before, _widened)


def _widened(leaf: Any) -> Any:
    return with_gradient_of(leaf, leaf.to(FP32)) if is_half(leaf) else leaf


def has_unbacked(item: Any) -> bool:
    """Whether a number in nested values, or a size of a tensor there, depends on data."""
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    sized = (Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)
    leaves = torch.utils._pytree.tree_leaves(item)
    return any(free_unbacked_symbols(leaf) for leaf in leaves if isinstance(leaf, sized))


def with_dtype(node: Node, dtype: torch.dtype) -> tuple[Any, Any]:
    """The arguments of a node with every 16-bit dtype among them replaced."""

    def swap(argument: Any) -> Any:
        is_dtype = isinstance(argument, torch.dtype) and argument.is_floating_point
        return dtype if is_dtype and argument.itemsize == 2 else argument

    return map_aggregate(node.args, swap), map_aggregate(node.kwargs, swap)


def autocast_dtype(node: Node, traced: dict[Node, Any]) -> torch.dtype | None:
    """The dtype that autocast brought in: nothing else makes 16 bits of FP32."""
    results = tensors([traced[node]])
    operands = tensors([traced.get(n) for n in node.all_input_nodes])
    if not results or not is_half(results[0]) or any(is_half(t) for t in operands):
        return None
    return results[0].dtype if any(is_floating(t) for t in operands) else None
