"""Graphs of one operator, as Dynamo could hand them out, for every operator that torch lists.

`torch.testing` keeps a list of its operators with sample operands (`op_db`). From a sample this
makes a graph: inputs, an activation (an input times 1, which keeps its bits and which promotion
widens), the operator in one of its forms. Nothing is compiled and nothing traced, so a program
takes milliseconds.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)
from torch.utils import _pytree as pytree

from healpass.config import HealConfig
from healpass.graph.nodes import evaluate
from healpass.graph.pipeline import rewrite

BF16 = torch.bfloat16
#: The dtype of samples: the first of these that an operator knows.
DTYPES = (BF16, torch.float32, torch.int64, torch.bool, torch.complex64)


class UntraceableError(Exception):
    """torch itself cannot put this call into a graph, or does not know it in this form."""


@dataclass(frozen=True)
class Program:
    """One operator in one form on one sample.

    Attributes:
        name: For messages.
        target: What the node calls: a function, a packet, an overload, or a method's name.
        args: Positional arguments, tensors in BF16 where they are floating-point.
        kwargs: Named arguments.
    """

    name: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, dtype: torch.dtype) -> list[Tensor]:
        """What plain torch makes of the operands in another dtype."""
        args, kwargs = _to((self.args, self.kwargs), dtype)
        if isinstance(self.target, str):
            result = getattr(args[0], self.target)(*args[1:], **kwargs)
        else:
            result = self.target(*args, **kwargs)
        return tensors_of(result)

    def rewritten(
        self, config: HealConfig, *, dynamic: bool = False, trained: bool = False
    ) -> tuple[list[Tensor], bool]:
        """The graph of the program, rewritten and run by plain torch.

        Returns:
            The results, and whether the report says that the operator runs as traced.
        """
        module, inputs = self.graph(dynamic, trained)
        report = rewrite(module, config)
        as_traced = any(b.kind == "foreign operator" for b in report.boundaries)
        with torch.no_grad():  # not the code of the graph, which cannot name torch's lambdas
            results = Interpreter(module).run(*(tensor.clone() for tensor in inputs))
        return tensors_of(results), as_traced

    def graph(self, dynamic: bool, trained: bool = False) -> tuple[GraphModule, list[Tensor]]:
        """The graph and its inputs; `trained` if these are to get gradients.

        Raises:
            UntraceableError: torch cannot run the call on fake tensors.
        """
        mode = FakeTensorMode(shape_env=ShapeEnv() if dynamic else None)
        leaves, spec = pytree.tree_flatten((self.args, self.kwargs))
        graph = Graph()
        inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        nodes = iter([_placeholder(graph, mode, t, i, dynamic) for i, t in enumerate(inputs)])
        for index, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                node = next(nodes)
                active = leaf.is_floating_point() or leaf.is_complex()
                leaves[index] = _valued(graph, mode, torch.mul, (node, 1), {}) if active else node
        for node in graph.nodes:
            fake = node.meta["example_value"]
            fake.requires_grad_(trained and fake.is_floating_point())
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        node = _valued(graph, mode, self.target, args, kwargs)
        graph.output(_parts(graph, mode, node))
        try:
            return GraphModule(torch.nn.Module(), graph), inputs
        except (AttributeError, SyntaxError) as error:  # a call that torch cannot write as code
            raise UntraceableError(str(error)) from error


def _placeholder(graph: Graph, mode: Any, tensor: Tensor, index: int, dynamic: bool) -> Node:
    node = graph.placeholder(f"input_{index}")
    sizes = StatelessSymbolicContext([DimDynamic.DYNAMIC] * tensor.dim())
    options = {"symbolic_context": sizes, "source": ConstantSource(node.name)} if dynamic else {}
    node.meta["example_value"] = mode.from_tensor(tensor.detach(), **options)
    return node


def _valued(graph: Graph, mode: Any, target: Any, args: Any, kwargs: Any) -> Node:
    op = "call_method" if isinstance(target, str) else "call_function"
    try:
        node = graph.create_node(op, target, tuple(args), dict(kwargs))
        node.meta["example_value"] = evaluate(node, mode)
    except Exception as error:  # torch's own refusals have no common class
        raise UntraceableError(str(error)) from error
    return node


def _parts(graph: Graph, mode: Any, node: Node) -> Any:
    """The tensors that a node hands out, each by a `getitem`, as Dynamo takes them."""
    found = node.meta["example_value"]
    if isinstance(found, Tensor):
        return (node,)
    if not isinstance(found, (tuple, list)):
        raise UntraceableError("hands out no tensor")
    parts: list[Node] = []
    for index in range(len(found)):
        part = _valued(graph, mode, operator.getitem, (node, index), {})
        inner = part.meta["example_value"]
        if isinstance(inner, Tensor):
            parts.append(part)
        elif isinstance(inner, (tuple, list)):
            parts += _parts(graph, mode, part)
    return tuple(parts)


def programs(info: Any, samples: int) -> Iterator[Program]:
    """An operator of `op_db` in all its forms.

    Args:
        info: The `OpInfo`.
        samples: How many samples of operands to take.
    """
    known = info.supported_dtypes("cpu")
    dtype = next((dtype for dtype in (*DTYPES, *known) if dtype in known), None)
    found = () if dtype is None else info.sample_inputs("cpu", dtype)
    for number, sample in enumerate(itertools.islice(found, samples)):
        args, kwargs = (sample.input, *sample.args), dict(sample.kwargs)
        packet = getattr(torch.ops.aten, info.aten_name, None)
        targets = {
            "function": info.op,
            "packet": packet,
            "overload": _overload(packet, args, kwargs),
            "method": _name(info.method_variant, args),
            "in_place": _name(info.inplace_variant, args),
        }
        for form, target in targets.items():
            if target is not None:
                name = f"{info.formatted_name}[{number}] as {form}"
                yield Program(name, target, args, kwargs)


def _overload(packet: Any, args: Any, kwargs: Any) -> Any:
    """The overload that torch would choose, None where the operands fit none."""
    if packet is None:
        return None
    try:
        name = torch._C._jit_resolve_packet(packet._qualified_op_name, *args, **kwargs)
    except RuntimeError:
        return None
    return getattr(packet, name)


def _name(method: Any, args: Any) -> str | None:
    name = getattr(method, "__name__", None)
    return name if isinstance(args[0], Tensor) and hasattr(Tensor, str(name)) else None


def _to(tree: Any, dtype: torch.dtype) -> Any:
    """A copy: floating-point tensors, and dtypes that were asked for, in another dtype."""

    def convert(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.detach().to(dtype if leaf.is_floating_point() else leaf.dtype, copy=True)
        return dtype if leaf in (BF16, torch.float32) and isinstance(leaf, torch.dtype) else leaf

    return pytree.tree_map(convert, tree)


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors of a result, in order."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
