"""A traced graph's nodes in the place of the one node that they compute. Imports torch only."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch.fx import Graph, Node
from torch.fx.node import map_arg

#: From a node and what its arguments became, a node of the graph that is spliced into.
Copy = Callable[[Node, Callable[[Node], Any]], Node]


def splice(traced: Graph, operands: Iterable[Any], copy: Copy) -> Any:
    """Copy the nodes of a traced graph by `copy`, in order.

    Args:
        traced: The graph to copy; it stays as it is.
        operands: What its placeholders stand for, in order.
        copy: Makes each copy, and decides where it goes.

    Returns:
        The graph's result, its nodes replaced by their copies.
    """
    copies: dict[Node, Any] = {}
    given = iter(operands)
    result = None
    for inner in traced.nodes:
        if inner.op == "placeholder":
            copies[inner] = next(given)
        elif inner.op == "output":
            result = map_arg(inner.args[0], copies.__getitem__)
        else:
            copies[inner] = copy(inner, copies.__getitem__)
    return result


def replace(node: Node, result: Any, stand_in: Callable[[Node, Node], object]) -> None:
    """Erase a node for its result: one node, or several, each taken by an `operator.getitem`.

    Args:
        node: Erased, with the `getitem` nodes that use it.
        result: What it computes, as `splice` returned it.
        stand_in: Gives the users of its first argument the second.
    """
    if isinstance(result, Node):
        stand_in(node, result)
    else:
        for item in list(node.users):
            part = result[item.args[1]]
            if isinstance(part, Node):
                stand_in(item, part)
            item.graph.erase_node(item)
    node.graph.erase_node(node)
