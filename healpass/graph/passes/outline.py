"""The pass that runs last: repeated layers become calls of one subgraph. Imports torch only.

A decoder of thirty layers traces to thirty copies of one sequence of nodes, and Inductor lowers,
schedules and writes code for each. Here the copies become calls of one subgraph
(`torch.ops.higher_order.invoke_subgraph`), which Inductor compiles once. No node changes; only
what would have been fused across the border of two layers is not. Bits of `exact` do not depend on
that; those of the others may, where Inductor vectorizes a float sum otherwise in another kernel.

The pass gets ATen nodes, of the forward or the backward, when Inductor's own passes are done but
for those that put results into their inputs' memory. What those may change stays outside.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import SymInt, Tensor
from torch._ops import OpOverload
from torch._prims_common import is_non_overlapping_and_dense_or_false as is_dense
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import free_symbols
from torch.utils import _pytree as pytree

from healpass.graph.passes.outline_repeats import Run, longest_run

#: Fewer nodes than this are not worth a call: what they would be fused with is worth more.
SMALLEST = 24
#: Bytes at which kernels on a GPU expect their operands to begin, or a multiple.
ALIGNMENT = 16
#: Results share memory with the first argument although the schema does not say so.
SHARING = ("aten::reshape", "aten::_unsafe_view", "aten::detach", "aten::lift_fresh_copy")
#: Inductor may write these into the memory of an input, or return an input as their result.
WRITING = ("scatter", "index_put", "index_copy", "index_fill", "index_add", "copy", "copy_")


def outline_repeats(graph: Graph) -> int:
    """Turn repeated stretches of an ATen graph into calls of subgraphs, in place.

    Returns:
        How many calls there are now.
    """
    from torch._inductor import config

    if config.cpp_wrapper or graph.owning_module is None:
        return 0  # that wrapper has no code for a call of a subgraph
    calls = 0
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    labels = [_label(node) for node in nodes]
    for run in _runs(labels):
        stretch = nodes[run.start : run.stop]
        run = run.shifted(_narrowest(stretch, run))
        for copies in _segments(nodes, run):
            calls += _outline(graph, copies)
    return calls


def _runs(labels: Sequence[Any]) -> Iterator[Run]:
    """The longest run, then those before and after it."""
    pending = [(0, len(labels))]
    while pending:
        low, high = pending.pop()
        found = longest_run(labels[low:high], SMALLEST)
        if found is not None:
            run = Run(low + found.start, found.period, found.count, found.rest)
            yield run
            pending += [(low, run.start), (run.stop, high)]


# --------------------------------------------------------------------------- what is equal


def _label(node: Node) -> Any:
    """What a node computes, but for which nodes it reads."""
    return node.target, _form((node.args, node.kwargs)), _kind(node.meta.get("val"))


def _form(arg: Any) -> Any:
    """An argument with every node in it replaced by the class of nodes."""
    if isinstance(arg, Node):
        return Node
    if isinstance(arg, (list, tuple)):
        return tuple(map(_form, arg))
    if isinstance(arg, dict):
        return tuple((key, _form(item)) for key, item in arg.items())
    return type(arg), repr(arg)  # True is not 1, and -0.0 is not 0.0


def _kind(val: Any) -> Any:
    """Dtype, device and layout of a value."""
    if isinstance(val, Tensor):
        sizes = (*val.shape, *val.stride(), val.storage_offset())
        return val.dtype, val.device, len(val.shape), tuple(map(_number, sizes))
    if isinstance(val, (list, tuple)):
        return tuple(map(_kind, val))
    return type(val), str(val)


def _number(size: Any) -> Any:
    return size if isinstance(size, int) else str(size)


# --------------------------------------------------------------------------- where to cut


def _narrowest(stretch: Sequence[Node], run: Run) -> int:
    """The phase at which the fewest values pass from one copy to the next, and no tuple does.

    Counted at the border of the first two copies; where it does not matter the first phase wins,
    and one that loses a copy only where it must.
    """
    index = {node: position for position, node in enumerate(stretch)}
    period = run.period
    begins = [0] * (len(stretch) + 1)  # what is made before a border and read behind it, as steps
    for position, node in enumerate(stretch[: 2 * period]):
        last = max((index[user] for user in node.users if user in index), default=position)
        weight = len(stretch) if not isinstance(node.meta.get("val"), Tensor) else _cost(node)
        begins[position + 1] += weight
        begins[last + 1] -= weight
    crossing = list(accumulate(begins))
    return min(range(period), key=lambda phase: (crossing[period + phase], phase > run.rest))


def _cost(node: Node) -> int:
    """What it takes to hand a tensor from one copy to the next: 1, or 2 if it is copied first.

    A subgraph's result must begin where its memory does: code that reads it adds the offset again
    (seen in torch 2.13). Those of ATen's own operators do, views excepted, which are not results.
    """
    own = isinstance(node.target, OpOverload) and node.target.namespace in ("aten", "prims")
    return 1 if own else 2


def _segments(nodes: Sequence[Node], run: Run) -> Iterator[list[list[Node]]]:
    """Per stretch of a copy that may be outlined: the nodes of every copy there."""
    starts = range(run.start, run.start + run.count * run.period, run.period)
    first = 0
    for offset in range(run.period + 1):
        if offset < run.period and not _stays(nodes[run.start + offset]):
            continue
        if offset > first:
            yield [list(nodes[start + first : start + offset]) for start in starts]
        first = offset + 1


def _stays(node: Node) -> bool:
    """Whether a node has to stay in the outer graph.

    That is what writes or may be made to write, what talks to other ranks or draws random
    numbers, calls of subgraphs, and sizes.
    """
    target = node.target
    if target is operator.getitem:
        return _stays(node.all_input_nodes[0])
    if not isinstance(target, OpOverload) or not isinstance(node.meta.get("val"), (Tensor, tuple)):
        return True
    name = target._schema.name.split("::")
    seeded = torch.Tag.nondeterministic_seeded in target.tags
    writes = target._schema.is_mutable or any(name[1].strip("_").endswith(w) for w in WRITING)
    return seeded or writes or name[0] not in ("aten", "prims", "heal")


def _shares_memory(node: Node) -> bool:
    """Whether a node's result may lie in the memory of its first argument."""
    schema = node.target._schema if isinstance(node.target, OpOverload) else None
    if schema is None:
        return False
    returned = schema.returns[0].alias_info if schema.returns else None
    converts = schema.name in ("prims::convert_element_type", "aten::_to_copy")
    same = converts and node.meta["val"].dtype == node.all_input_nodes[0].meta["val"].dtype
    return returned is not None or schema.name in SHARING or same


# --------------------------------------------------------------------------- the edit


@dataclass(frozen=True)
class Copy:
    """One copy of a repeated segment.

    Attributes:
        nodes: Its nodes, in order.
        operands: The nodes outside that it reads, each once, in the order of their first use.
        wiring: Which position or operand each argument is; equal for copies that are the same.
    """

    nodes: list[Node]
    operands: list[Node]
    wiring: Any


def _copy(nodes: list[Node]) -> Copy:
    position = {node: index for index, node in enumerate(nodes)}
    slots: dict[Node, int] = {}

    def name(node: Node) -> Any:
        return position[node] if node in position else (slots.setdefault(node, len(slots)),)

    wiring = [tuple(name(arg) for arg in pytree.arg_tree_leaves(*n.args, **n.kwargs)
                    if isinstance(arg, Node)) for n in nodes]  # fmt: skip
    kinds = [_kind(node.meta.get("val")) for node in slots]
    return Copy(nodes, [*slots, *_symbols(nodes, list(slots))], (tuple(wiring), tuple(kinds)))


def _symbols(nodes: list[Node], operands: list[Node]) -> list[Node]:
    """Inputs of the graph that are sizes, which the subgraph needs and no operand gives."""
    vals = [node.meta["val"] for node in (*nodes, *operands)]
    needed = set().union(*(free_symbols(v) for val in vals for v in pytree.tree_leaves(val)))
    given = {node.meta["val"].node.expr for node in operands if _is_size(node)}
    inputs = nodes[0].graph.find_nodes(op="placeholder") if needed - given else []
    of_symbol = {n.meta["val"].node.expr: n for n in reversed(inputs) if _is_size(n)}
    return [of_symbol[s] for s in sorted(needed - given, key=str) if s in of_symbol]


def _is_size(node: Node) -> bool:
    return isinstance(node.meta.get("val"), SymInt)


def _outline(graph: Graph, segments: list[list[Node]]) -> int:
    """Replace the copies that are wired alike by calls of one subgraph; return how many."""
    copies = [_copy(nodes) for nodes in segments]
    [(wiring, count)] = Counter(copy.wiring for copy in copies).most_common(1)
    copies = [copy for copy in copies if copy.wiring == wiring]
    returned = sorted({index for copy in copies for index in _returned(copy)})
    small = count == 1 or len(copies[0].nodes) < SMALLEST
    if small or not returned or not _can_pass(copies, returned):
        return 0
    for size in {node for copy in copies for node in copy.operands if _is_size(node)}:
        size.meta["val"] = _canonical(size.meta["val"])
    owner: Any = graph.owning_module
    name = next(n for i in range(len(graph.nodes)) if not hasattr(owner, n := f"repeated_{i}"))
    owner.add_submodule(name, _body(copies[0], returned))
    for copy in copies:  # read anew: its operands may have been results of the copy before
        _call(graph, name, _copy(copy.nodes), returned)
    return len(copies)


def _canonical(size: SymInt) -> Any:
    """The size by the symbol that stands for all that equal it, as the subgraph's values do.

    Inductor would declare in the subgraph what the size was called before that was known.
    """
    number = size.node
    return number.shape_env.create_symintnode(number.expr, hint=number.hint)


def _returned(copy: Copy) -> set[int]:
    """Positions that are read outside. Of what is a view, the value that it is a view of."""
    position = {node: index for index, node in enumerate(copy.nodes)}
    found = set()
    for node in copy.nodes:
        if any(user not in position for user in node.users):
            while node in position and _shares_memory(node):
                node = node.all_input_nodes[0]
            if node in position:
                found.add(position[node])
    return found


def _can_pass(copies: list[Copy], returned: list[int]) -> bool:
    """Whether operands and results are tensors of one device, laid out as kernels expect."""
    results = [copies[0].nodes[index] for index in returned]
    passed = [node.meta.get("val") for c in copies for node in (*c.operands, *results)]
    if not all(isinstance(val, (Tensor, SymInt)) for val in passed):
        return False
    tensors = [val for val in passed if isinstance(val, Tensor)]
    devices = {val.device for val in tensors}
    dense = all(is_dense(node.meta["val"]) for node in results)
    return dense and len(devices) == 1 and all(_is_aligned(val) for val in tensors)


def _is_aligned(val: Tensor) -> bool:
    offset = val.storage_offset()
    known = isinstance(offset, int) and offset * val.element_size() % ALIGNMENT == 0
    return known or val.device.type == "cpu"


def _body(copy: Copy, returned: list[int]) -> GraphModule:
    """The subgraph: a copy's nodes with its operands as inputs."""
    body = Graph()
    inside: dict[Node, Node] = {}
    for slot, operand in enumerate(copy.operands):
        inside[operand] = body.placeholder(f"operand_{slot}")
        inside[operand].meta = {"val": operand.meta["val"]}
    for node in copy.nodes:
        inside[node] = body.node_copy(node, inside.__getitem__)
    results = [_result(body, inside[copy.nodes[index]]) for index in returned]
    output = body.output(tuple(results))
    # The outer graph was traced with these strides, so Inductor must not choose others.
    output.meta["user_visible_output_idxs"] = list(range(len(results)))
    output.meta["original_output_strides"] = [node.meta["val"].stride() for node in results]
    body.eliminate_dead_code()
    return GraphModule(torch.nn.Module(), body)


def _result(body: Graph, node: Node) -> Node:
    if _cost(node) == 1:
        return node
    clone = body.call_function(torch.ops.aten.clone.default, (node,))
    clone.meta = dict(node.meta)
    return clone


def _call(graph: Graph, name: str, copy: Copy, returned: list[int]) -> None:
    """Call the subgraph in place of a copy; views that are read outside are taken there."""
    inside, kept = set(copy.nodes), _views_read_outside(copy)
    with graph.inserting_before(copy.nodes[0]):
        body = graph.get_attr(name)
        call = graph.call_function(
            torch.ops.higher_order.invoke_subgraph, (body, name, *copy.operands)
        )
        results = [copy.nodes[index] for index in returned]
        call.meta["val"] = tuple(node.meta["val"] for node in results)
        for index, node in enumerate(results):
            item = graph.call_function(operator.getitem, (call, index))
            item.meta = dict(node.meta)
            node.replace_all_uses_with(
                item, delete_user_cb=lambda user: user not in inside or user in kept
            )
    for node in reversed(copy.nodes):
        if not node.users:
            graph.erase_node(node)


def _views_read_outside(copy: Copy) -> set[Node]:
    """Views in a copy that are read outside, and the views that those are taken of."""
    inside, found = set(copy.nodes), set[Node]()
    for node in reversed(copy.nodes):
        read = any(user not in inside or user in found for user in node.users)
        if read and _shares_memory(node):
            found.add(node)
    return found
