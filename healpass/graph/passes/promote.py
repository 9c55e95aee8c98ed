"""The pass that keeps activations in FP32 between kernels. May import `graph.nodes` and below.

HEAL's finding is that the downcast at a kernel's border is what makes results diverge (arXiv
2606.21023, section 2.3). So a 16-bit activation becomes FP32 from the first operator on, and the
casts back to 16 bits go. Weights, caches and everything else that the caller owns keep their 16
bits.

Each node falls into one class, tried in this order; the class decides the dtypes of its result:

====================  ==========================================================================
scope                 functorch and autocast bookkeeping: untouched; autocast regions are dissolved
higher order          `checkpoint` and the like: promoted inside; others at their traced dtypes
foreign               somebody's custom operator: it gets the dtypes that it was traced with
statistics            a batch norm in training: its 16-bit statistics are updated from FP32 ones
in place              the destination keeps its dtype, the source is cast to it
cast                  casts of activations to 16 bits go, casts of parameters stay
factory               makes FP32 instead of 16 bits
embedding             looks up 16-bit rows, hands out FP32
buffer write          a functional write into the caller's 16-bit cache stays 16-bit
move                  moves data without touching it: the dtype of the input
arithmetic            everything else: 16-bit operands are upcast, results are FP32
====================  ==========================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate, map_arg

from healpass.graph import node_classes
from healpass.graph.aliases import Memory, is_handed_out, storages
from healpass.graph.context import Context
from healpass.graph.dtypes import autocast_dtype, retyped, with_dtype
from healpass.graph.node_classes import Kind
from healpass.graph.nodes import (
    Builder,
    evaluate,
    heal_name,
    is_floating,
    is_half,
    is_parameter,
    op_name,
    set_value,
    tensors,
    value,
)
from healpass.graph.passes import promote_calls, promote_outputs, promote_statistics
from healpass.graph.passes.autocast import dissolve_autocast

FP32 = torch.float32


def promote(graph_module: GraphModule, context: Context) -> int:
    """Promote one graph and the subgraphs it calls; return how many nodes changed."""
    return Promotion(graph_module, context).run()


class Promotion:
    """The walk over one graph.

    Attributes:
        traced: The values that Dynamo saw, before anything was promoted.
        border: What the graph hands out: "model" follows the option `outputs`, "traced" keeps the
            traced dtypes, "promoted" hands out what was computed.
        memory: What the traced graph writes into: there aliases and copies stay what they were.
        bodies: The subgraphs that the graph refers to, as they were traced.
        regions: Where the `torch.func` transforms around the current node begin, outermost first.
    """

    def __init__(self, graph_module: GraphModule, context: Context, border: str = "model") -> None:
        self.graph_module = graph_module
        self.graph = graph_module.graph
        self.context = context
        self.border = border
        self.traced: dict[Node, Any] = {}
        self.memory = Memory(self.graph)
        self.bodies = promote_calls.bodies_of(graph_module)
        self.regions: list[Node] = []
        self.changed = 0

    def run(self) -> int:
        """Visit every node once, in order."""
        traced = list(self.graph.nodes)
        self._share_trained_operands()
        for node in traced:
            self.traced.setdefault(node, value(node))
            self._follow_regions(node)
            if node.op == "output":
                promote_outputs.narrow_outputs(self, node)
            elif node.op in ("call_function", "call_method"):
                self._visit(node)
        dissolve_autocast(self.graph)
        return self.changed

    def _share_trained_operands(self) -> None:
        """Upcast a 16-bit operand that gets a gradient once if it is used more than once.

        A weight tied to the embedding gets a gradient from each use, and so does what enters a
        block with a residual. Rounded one by one to 16 bits and then added, they are worse than
        the sum rounded once; one common upcast makes them meet in FP32. It costs an FP32 copy of
        that operand while training.
        """
        nodes = list(self.graph.nodes)
        first = next(node for node in nodes if node.op != "placeholder")
        for node in nodes:
            shared = node.op == "placeholder" and len(node.users) > 1 and is_half(value(node))
            if not shared or not node_classes.trained(node):
                continue
            if self.memory.is_written(value(node)):
                continue  # a copy would not see what is written
            wide = self.cast(node, FP32, first)
            self.traced[wide] = value(node)
            own = {wide, *(user for user in node.users if is_handed_out(user, node))}
            node.replace_all_uses_with(wide, delete_user_cb=lambda user, own=own: user not in own)

    # ------------------------------------------------------------------------------ dispatch

    def _visit(self, node: Node) -> None:
        kind = self._kind(node)
        if kind is Kind.SCOPE:
            return
        if kind in UNTYPED or tensors([value(n) for n in node.all_input_nodes] + [value(node)]):
            HANDLERS[kind](self, node)
        if self.memory.is_pinned(self.traced[node]):
            self._narrow(node)

    def _follow_regions(self, node: Node) -> None:
        name = op_name(node) or ""
        if name.endswith("_increment_nesting"):
            self.regions.append(node)
        elif name.endswith("_decrement_nesting"):
            self.regions.pop()

    def _outside(self, argument: Node, node: Node) -> Node:
        """Where to cast what `node` takes: not inside a transform, which would see it."""
        return self.regions[0] if self.regions and argument < self.regions[0] else node

    def _kind(self, node: Node) -> Kind:
        kind = node_classes.classify(node)
        if kind is Kind.ARITHMETIC and self._is_view(node):
            return Kind.MOVE
        rounds = kind in (Kind.CAST, Kind.EMBEDDING)
        return Kind.FOREIGN if rounds and self.memory.is_pinned(self.traced[node]) else kind

    def _is_view(self, node: Node) -> bool:
        """Whether the operator returned memory of its operands, whatever its name."""
        memory = storages(self.traced[node])
        return bool(memory) and memory <= storages(
            [self.traced.get(n) for n in node.all_input_nodes]
        )

    def _narrow(self, node: Node) -> None:
        """Give a value its traced dtype: someone writes into it who needs those bits."""
        traced = self.traced[node]
        if not self.was_promoted(node):
            return
        narrow = self.builder(node.next).cast(node, traced.dtype)
        node.replace_all_uses_with(narrow, delete_user_cb=lambda user: user is not narrow)
        self.traced[narrow] = traced

    def builder(self, like: Node) -> Builder:
        """A builder of nodes before `like`."""
        return self.context.builder(self.graph_module, like)

    def cast(self, node: Node, dtype: torch.dtype, before: Node) -> Node:
        """A node that holds `node` in `dtype`.

        Args:
            node: Its value is a floating-point tensor.
            dtype: The dtype to cast to.
            before: The node in front of which the cast is put.
        """
        return self.builder(before).cast(node, dtype)

    def was_promoted(self, node: Node) -> bool:
        """Whether a value that was traced in 16 bits is wider now."""
        traced: Any = self.traced.get(node)
        now = value(node)
        return is_half(traced) and is_floating(now) and now.dtype != traced.dtype

    def refresh(self, node: Node) -> None:
        """Recompute the value of a node if its operands are not those that Dynamo traced."""
        if any(value(n) is not self.traced.get(n) for n in node.all_input_nodes):
            self._recompute(node)

    def _recompute(self, node: Node) -> None:
        set_value(node, retyped(node, value(node), self.context.fake_mode))
        self.changed += 1

    # ------------------------------------------------------------------------------- classes

    def foreign(self, node: Node) -> None:
        """Give back the traced dtypes; the rounding shows in the report."""
        rounded: list[torch.dtype] = []

        def restore(argument: Node) -> Node:
            traced: Any = self.traced.get(argument)
            if not self.was_promoted(argument):
                return argument
            rounded.append(traced.dtype)
            return self.cast(argument, traced.dtype, self._outside(argument, node))

        node.args, node.kwargs = map_arg((node.args, node.kwargs), restore)
        rounded += [t.dtype for t in tensors([self.traced[node]]) if is_half(t)]
        if rounded:
            detail = f"{node.target} runs at the dtypes it was traced with"
            self.context.boundary(node, "foreign operator", rounded[-1], detail)

    def _in_place(self, node: Node) -> None:
        destination = node_classes.destination(node)
        assert destination is not None, "the class of the node says that it writes"
        dtype = value(destination).dtype

        def match(argument: Node) -> Node:
            if argument is destination or not is_floating(value(argument)):
                return argument
            return self.cast(argument, dtype, node)

        wide = any(value(n).dtype == FP32 for n in node.all_input_nodes if is_floating(value(n)))
        if is_floating(value(destination)):
            node.args, node.kwargs = map_arg((node.args, node.kwargs), match)
        if is_half(value(destination)) and wide:
            self.context.boundary(
                node, "buffer of the caller", dtype, f"values are rounded into {destination.name}"
            )
        if node.target is not node_classes.SETITEM and value(node) is not None:
            set_value(node, value(destination))

    def _cast(self, node: Node) -> None:
        source, traced = node.args[0], self.traced[node]
        if not isinstance(source, Node):
            self.refresh(node)
        elif storages(traced) & storages(self.traced.get(source)):
            self._substitute(node, source)  # torch returned the input itself
        elif not is_half(traced):
            self.refresh(node)
            if storages(value(node)) & storages(value(source)):
                self._substitute(node, self._copied(node, source))
        elif not (is_parameter(source) and is_floating(value(source))):
            # (a rounded parameter stays: it is the weight that is served)
            self._substitute(node, self._copied(node, self._wide(node, source)))

    def _wide(self, node: Node, source: Node) -> Node:
        """FP32 in the place of a cast to 16 bits, on the device that the cast moved to."""
        builder = self.builder(node)
        if value(source).device != self.traced[node].device:
            source = builder.method("to", source, self.traced[node].device)
        return builder.cast(source, FP32)

    def _copied(self, node: Node, wide: Node) -> Node:
        """A cast that lost its work goes, unless somebody writes into it or its source."""
        source = node.args[0]
        if wide is source and self.memory.is_written(self.traced[node], self.traced.get(source)):
            return self.builder(node).method("clone", wide)
        return wide

    def _factory(self, node: Node) -> None:
        traced = self.traced[node]
        if not is_half(traced):
            self.refresh(node)
            return
        node.args, node.kwargs = with_dtype(node, FP32)
        set_value(node, evaluate(node, self.context.fake_mode))
        if is_half(value(node)):  # no dtype was named, and the model tensor is a 16-bit parameter
            node.kwargs = {**node.kwargs, "dtype": FP32}
            set_value(node, evaluate(node, self.context.fake_mode))
        self.changed += 1

    def _embedding(self, node: Node) -> None:
        """Upcast the rows, or, where the table is trained, the table.

        With a trained table the gradients of equal tokens must add up in FP32, so the upcast comes
        first; Inductor fuses it into the lookup and no FP32 table is ever stored.
        """
        table = node_classes.embedding_table(node)
        if not is_half(value(table)) or not is_half(self.traced[node]):
            self.arithmetic(node)
            return
        if node_classes.trained(table) and not node_classes.embedding_writes_table(node):
            self.arithmetic(node)
            return
        with self.graph.inserting_after(node):
            wide = self.graph.call_method("to", (node, FP32))
        wide.meta = dict(node.meta)
        set_value(wide, evaluate(wide, self.context.fake_mode))
        self.traced[wide] = self.traced[node]
        node.replace_all_uses_with(wide, delete_user_cb=lambda user: user is not wide)
        self.changed += 1

    def _buffer_write(self, node: Node) -> None:
        """A 16-bit cache that the caller gave and gets back keeps its format."""
        destination = node_classes.cache_destination(node)
        if destination is None:
            self._move(node) if node_classes.is_join(node) else self.arithmetic(node)
            return
        dtype = value(destination).dtype
        sources = [
            n for n in node.all_input_nodes if is_floating(value(n)) and n is not destination
        ]
        narrow = {n: self.cast(n, dtype, node) for n in sources}
        node.args, node.kwargs = map_arg((node.args, node.kwargs), lambda n: narrow.get(n, n))
        self.refresh(node)
        self.context.boundary(
            node, "cache of the caller", dtype, f"new values are rounded into {destination.name}"
        )

    def _move(self, node: Node) -> None:
        dtypes = {value(n).dtype for n in node.all_input_nodes if is_floating(value(n))}
        source = node.all_input_nodes[0] if node.all_input_nodes else node
        sums = node_classes.sums_gradients(node) and not is_handed_out(node, source)
        if (len(dtypes) > 1 and node_classes.is_join(node)) or sums:
            self.arithmetic(node)
            return
        self._relax_view(node)
        self.refresh(node)

    def _relax_view(self, node: Node) -> None:
        """A promoted operand may lie in memory in an order that `view` would copy."""
        source = node.all_input_nodes[0]
        moved = value(source) is not self.traced.get(source)
        if op_name(node) == "view" and moved and not self.memory.is_written(self.traced[node]):
            node.target = "reshape" if node.op == "call_method" else torch.ops.aten.reshape.default

    def arithmetic(self, node: Node) -> None:
        """Upcast 16-bit operands; the result is FP32."""
        if not self._touches_half(node):
            return
        if heal_name(node) is not None:
            return  # takes any mixture of dtypes and gives FP32
        self._upcast_operands(node)
        self._recompute(node)  # a dtype argument or autocast may change, and no operand

    def _touches_half(self, node: Node) -> bool:
        before = [self.traced.get(n) for n in node.all_input_nodes] + [self.traced[node]]
        now = [value(n) for n in node.all_input_nodes]
        return any(is_half(item) for item in tensors(before) + tensors(now))

    def _upcast_operands(self, node: Node) -> None:
        autocast = autocast_dtype(node, self.traced)

        def widen(argument: Any) -> Any:
            if isinstance(argument, torch.dtype) and argument in (torch.float16, torch.bfloat16):
                return FP32
            if not isinstance(argument, Node) or not is_floating(value(argument)):
                return argument
            if autocast is not None and is_parameter(argument):
                argument = self.cast(argument, autocast, node)
            return self.cast(argument, FP32, node) if is_half(value(argument)) else argument

        node.args = map_aggregate(node.args, widen)
        node.kwargs = map_aggregate(node.kwargs, widen)

    def _substitute(self, node: Node, other: Node) -> None:
        """Let `other` stand for `node`, also for those who need the traced dtype of `node`."""
        known, traced = self.traced.get(other), self.traced[node]
        if known is not None and known.dtype != traced.dtype and len(other.users) > 1:
            # its own users need another dtype
            other = self.builder(node).method("to", other, FP32)
        if known is None or known.dtype != traced.dtype:
            self.traced[other] = traced
        node.replace_all_uses_with(other)
        self.graph.erase_node(node)
        self.changed += 1


#: Classes with something to do where no tensor comes in or goes out.
UNTYPED = (Kind.HIGHER_ORDER, Kind.FOREIGN, Kind.STATISTICS)
#: What each class does; bookkeeping stays as it is.
HANDLERS: dict[Kind, Callable[[Promotion, Node], None]] = {
    Kind.HIGHER_ORDER: promote_calls.promote_call,
    Kind.FOREIGN: Promotion.foreign,
    Kind.STATISTICS: promote_statistics.promote_norm,
    Kind.IN_PLACE: Promotion._in_place,
    Kind.CAST: Promotion._cast,
    Kind.FACTORY: Promotion._factory,
    Kind.EMBEDDING: Promotion._embedding,
    Kind.BUFFER_WRITE: Promotion._buffer_write,
    Kind.MOVE: Promotion._move,
    Kind.ARITHMETIC: Promotion.arithmetic,
}
