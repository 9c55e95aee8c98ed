"""What operators that call a subgraph hand to it and expect of it. May import `graph.nodes`.

Torch traces a body once, on what the call hands in, and checks the two against each other there
and then. A pass that retypes the one must retype the other, at every call of that body; nothing in
torch looks again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.fx import GraphModule, Node

from healpass.graph.nodes import value

REGION = "invoke_subgraph"


@dataclass(frozen=True)
class Fact:
    """What must agree of a tensor on both sides of a border; anything else has no facts.

    Attributes:
        dtype: Its dtype.
        device: Its device type.
        shape: Its sizes, or None where the operator chooses how much it hands over at once.
    """

    dtype: torch.dtype
    device: str
    shape: tuple[Any, ...] | None

    def row(self) -> Fact:
        """The facts of `tensor[0]`."""
        return Fact(self.dtype, self.device, None if self.shape is None else self.shape[1:])

    def agrees(self, other: Fact) -> bool:
        """Whether the other side of the border is the same; sizes by what they stand for today."""
        if (self.dtype, self.device) != (other.dtype, other.device):
            return False
        if self.shape is None or other.shape is None:
            return True
        same = len(self.shape) == len(other.shape)
        return same and all(map(_same_size, self.shape, other.shape))

    def __str__(self) -> str:
        sizes = "" if self.shape is None else f"[{', '.join(map(str, self.shape))}]"
        return str(self.dtype).removeprefix("torch.") + sizes


def _same_size(one: Any, other: Any) -> bool:
    sizes = [
        s.node.hint if isinstance(s, SymInt) and s.node.has_hint() else s for s in (one, other)
    ]
    known = all(isinstance(size, int) for size in sizes)
    return not known or sizes[0] == sizes[1]


def fact(item: Any) -> Fact | None:
    """The facts of a node or a value; None for what is no tensor."""
    found = value(item)
    if not isinstance(found, Tensor):
        return None
    return Fact(found.dtype, found.device.type, tuple(found.shape))


@dataclass(frozen=True)
class Border:
    """One body of a call.

    Attributes:
        body: The subgraph.
        given: The facts of each input that the call hands in, or None where that is not known.
        expected: The facts of each output that the call counts on, or None.
    """

    body: GraphModule
    given: Sequence[Fact | None] | None
    expected: Sequence[Fact | None] | None


def borders(node: Node, owner: GraphModule) -> Iterator[Border]:
    """The bodies that a call of a higher-order operator runs.

    Args:
        node: The call.
        owner: The module whose attributes the bodies are.
    """
    bodies = [found for n in node.all_input_nodes if (found := body_of(n, owner)) is not None]
    results = value(node)
    results = [fact(item) for item in results] if isinstance(results, (tuple, list)) else None
    rule = _RULES.get(str(node.target))
    if rule is not None:
        yield from (Border(*parts) for parts in rule(node, bodies, results))
    elif len(bodies) == 1:
        operands = _operands(node, owner)
        fits = len(operands) == len(inputs_of(bodies[0])) and results is not None
        fits = fits and len(results_of(bodies[0])) == len(results or ())
        yield Border(bodies[0], _facts(operands) if fits else None, results if fits else None)


def body_of(node: Any, owner: GraphModule) -> GraphModule | None:
    """The subgraph behind a `get_attr` node, None for any other."""
    attribute = isinstance(node, Node) and node.op == "get_attr"
    found = getattr(owner, str(node.target), None) if attribute else None
    return found if isinstance(found, GraphModule) else None


def inputs_of(body: GraphModule) -> list[Node]:
    """The placeholders of a body, in order."""
    return list(body.graph.find_nodes(op="placeholder"))


def results_of(body: GraphModule) -> list[Any]:
    """The outputs of a body: nodes, or constants."""
    given: Any = body.graph.output_node().args[0]
    return list(given) if isinstance(given, (tuple, list)) else [given]


def _operands(node: Node, owner: GraphModule) -> list[Any]:
    """What stands behind the body: `op(..., body, x, y)`; a region's name is none of them."""
    place = next(i for i, arg in enumerate(node.args) if body_of(arg, owner) is not None)
    return [arg for arg in node.args[place + 1 :] if not isinstance(arg, str)]


def _facts(items: Any) -> list[Fact | None]:
    return [fact(item) for item in items]


def _rows(items: Any) -> list[Fact | None]:
    return [found and found.row() for found in _facts(items)]


# ------------------------------------------------------------------------- operator by operator


def _cond(node: Node, bodies: list[GraphModule], results: Any) -> Iterator[tuple[Any, ...]]:
    for body in bodies:
        yield body, _facts(node.args[3]), results


def _while_loop(node: Node, bodies: list[GraphModule], results: Any) -> Iterator[tuple[Any, ...]]:
    condition, body = bodies
    given = _facts((*node.args[2], *node.args[3]))  # type: ignore[misc]
    yield condition, given, None
    yield body, given, _facts(node.args[2])
    yield body, None, results


def _scan(node: Node, bodies: list[GraphModule], results: Any) -> Iterator[tuple[Any, ...]]:
    carried: Any = node.args[1]
    given = [*_facts(carried), *_rows(node.args[2]), *_facts(node.args[3])]
    stacked = [found and found.row() for found in results[len(carried) :]]
    yield bodies[0], given, [*_facts(carried), *stacked]
    yield bodies[0], None, [*results[: len(carried)], *stacked]


def _map(node: Node, bodies: list[GraphModule], results: Any) -> Iterator[tuple[Any, ...]]:
    given = [*_rows(node.args[1]), *_facts(node.args[2])]
    yield bodies[0], given, [found and found.row() for found in results]


def _combine(node: Node, bodies: list[GraphModule], results: Any) -> Iterator[tuple[Any, ...]]:
    """Of an associative scan; how much of a dimension it hands over at once is its own affair."""
    rows: Any = node.args[1]
    more: Any = node.args[2] if len(node.args) > 2 else ()
    given = [_any_size(x) for x in (*rows, *rows, *more)]
    if len(given) == len(inputs_of(bodies[0])):
        yield bodies[0], given, [_any_size(x) for x in results or ()]


def _any_size(item: Any) -> Fact | None:
    found = item if isinstance(item, Fact) else fact(item)
    return found and Fact(found.dtype, found.device, None)


def _autograd(node: Node, bodies: list[GraphModule], results: Any) -> Iterator[tuple[Any, ...]]:
    """A custom autograd function; its backward gets gradients, which are not in this graph."""
    del results  # they stand in a list of their own, before what is saved
    given = _facts(node.args[2:])
    if len(given) == len(inputs_of(bodies[0])):
        yield bodies[0], given, None


def _none(*_: Any) -> Iterator[tuple[Any, ...]]:
    """Kernels that hand their bodies scores and indices of their own making."""
    yield from ()


_RULES: dict[str, Any] = {
    "cond": _cond,
    "while_loop": _while_loop,
    "scan": _scan,
    "map_impl": _map,
    "associative_scan": _combine,
    "autograd_function_apply": _autograd,
    "flex_attention": _none,
    "flex_attention_backward": _none,
}
