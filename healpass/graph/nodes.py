"""Reading and writing the nodes of a Dynamo graph. May import `ops` and below.

A node carries the fake tensor Dynamo traced in `meta["example_value"]`. The passes keep it true: a
node they make gets the value that its target computes on fake inputs.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from healpass.graph.compat import of_today

HALF = (torch.float16, torch.bfloat16)
PACKAGE = str(Path(__file__).parent.parent)


def value(node: Any) -> Any:
    """The fake value of a node; anything that is not a node is its own value."""
    return node.meta.get("example_value") if isinstance(node, Node) else node


def set_value(node: Node, new: Any) -> None:
    """Record a fake value that a pass has computed; `verify` looks at such nodes."""
    node.meta["example_value"] = new
    node.meta["heal_changed"] = True


def is_changed(node: Node) -> bool:
    """Whether a pass has made this node or given it a new value."""
    return "heal_changed" in node.meta


def mark_checked(node: Node) -> None:
    """Note that the value of a changed node was found true."""
    node.meta.pop("heal_changed", None)


def is_floating(item: Any) -> bool:
    """Whether `item` is a real floating-point tensor."""
    return isinstance(item, Tensor) and item.is_floating_point()


def is_half(item: Any) -> bool:
    """Whether `item` is an FP16 or BF16 tensor."""
    return isinstance(item, Tensor) and item.dtype in HALF


def subclass_name(item: Any) -> str | None:
    """The class of a tensor with operators of its own (quantized, sharded ...), or None."""
    plain = (Tensor, torch.nn.Parameter, torch.nn.Buffer)
    fake = isinstance(item, torch._subclasses.FakeTensor)
    return (
        None
        if fake or not isinstance(item, Tensor) or type(item) in plain
        else type(item).__name__
    )


def tensors(tree: Any) -> list[Tensor]:
    """All tensors in nested lists, tuples, dicts and slices, in order."""
    found: list[Tensor] = []
    torch.fx.node.map_aggregate(
        tree, lambda leaf: found.append(leaf) if isinstance(leaf, Tensor) else None
    )
    return found


def node_inputs(node: Node) -> list[Node]:
    """The nodes among the arguments, with repetitions, in order."""
    return nodes_in((node.args, node.kwargs))


def nodes_in(tree: Any) -> list[Node]:
    """The nodes in nested arguments, with repetitions, in order."""
    found: list[Node] = []

    def note(node: Node) -> Node:
        found.append(node)
        return node

    map_arg(tree, note)
    return found


def op_name(node: Node) -> str | None:
    """The plain name of torch's operator behind a node, or None where it is not torch's.

    `torch.mm`, `Tensor.mm` and `aten.mm.default` are all "mm". Higher-order operators,
    user-defined operators and `heal::` operators have no plain name.
    """
    return of_today(_traced_name(node))


def _traced_name(node: Node) -> str | None:
    if node.op == "call_method":
        return str(node.target)
    target = node.target
    if node.op != "call_function" or isinstance(target, HigherOrderOperator):
        return None
    if isinstance(target, (OpOverload, OpOverloadPacket)):
        namespace, name = _qualified(target).split("::")
        return name if namespace in ("aten", "prims") else None
    module = getattr(target, "__module__", None) or ""
    if module.split(".")[0] in ("torch", "_operator", "operator", "math", "builtins", ""):
        return getattr(target, "__name__", None)
    return None


def _qualified(target: OpOverload | OpOverloadPacket) -> str:
    if isinstance(target, OpOverload):
        return target._schema.name
    return target._qualified_op_name


def heal_name(node: Node) -> str | None:
    """`"heal::mm"` for a node that calls `torch.ops.heal.mm`, else None."""
    if not isinstance(node.target, (OpOverload, OpOverloadPacket)):
        return None
    name = _qualified(node.target)
    return name if name.startswith("heal::") else None


def is_parameter(node: Node) -> bool:
    """Whether a node is an `nn.Parameter`, seen through views of it."""
    while node.op != "placeholder" and node.op != "get_attr":
        inputs = node.all_input_nodes
        if len(inputs) != 1 or op_name(node) not in (
            "t",
            "transpose",
            "permute",
            "view",
            "expand",
        ):
            return False
        node = inputs[0]
    return isinstance(value(node), torch.nn.Parameter)


def user_line(node: Node) -> tuple[str, str]:
    """The innermost user frame of a node's stack trace: (`file:line in function`, code)."""
    frames = re.findall(  # the wrapper that `explain` puts around the model is not the user's
        r'File "([^"]+)", line (\d+), in (\S+)\n\s*([^\n]*)', node.meta.get("stack_trace") or ""
    )
    frames = [frame for frame in frames if not frame[0].startswith(PACKAGE)]
    if not frames:
        return "unknown", ""
    path, line, function, code = frames[-1]
    return f"{path}:{line} in {function}", code.strip()


def module_path(node: Node) -> str:
    """The path of the module that called a node, as `model.layers.3.mlp.up_proj`, or ""."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    path = re.sub(r"\['?([^'\]]+)'?\]", r".\1", path.removeprefix("L")).replace("_modules.", "")
    return re.sub(r"^\.(self|model|fn|mod)(\.|$)", "", path)


def subgraphs(graph_module: GraphModule) -> Iterator[tuple[str, GraphModule]]:
    """The graph modules that a graph's higher-order operators call, each once; not theirs.

    Dynamo leaves some behind that nothing calls any more.
    """
    seen: set[int] = set()
    for node in graph_module.graph.find_nodes(op="get_attr"):
        body = getattr(graph_module, str(node.target), None)
        if isinstance(body, GraphModule) and id(body) not in seen:
            seen.add(id(body))
            yield str(node.target), body


@dataclass(frozen=True)
class Builder:
    """Makes nodes before another node, with its source line and a computed fake value.

    Attributes:
        graph: The graph under edit.
        like: The node that the new nodes stand for.
        fake_mode: The mode of the graph's fake tensors.
    """

    graph: Graph
    like: Node
    fake_mode: Any

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        """Insert `target(*args, **kwargs)` before `like`.

        Args:
            target: A function or an operator.
            *args: Nodes, constants, or nested lists of them.
            **kwargs: The same.
        """
        return self._create("call_function", target, args, kwargs)

    def method(self, name: str, *args: Any, **kwargs: Any) -> Node:
        """Insert `args[0].name(*args[1:], **kwargs)` before `like`.

        Args:
            name: Of a method of tensors.
            *args: The node of the tensor, then nodes and constants.
            **kwargs: Nodes and constants.
        """
        return self._create("call_method", name, args, kwargs)

    def sizes(self, node: Node) -> list[Any]:
        """The shape of a tensor: numbers, and nodes for sizes that are symbols."""
        shape = enumerate(value(node).shape)
        return [n if isinstance(n, int) else self.method("size", node, dim) for dim, n in shape]

    def product(self, *sizes: Any) -> Any:
        """Of sizes: a number, or a node."""

        def multiply(left: Any, right: Any) -> Any:
            symbolic = isinstance(left, Node) or isinstance(right, Node)
            return self.call(operator.mul, left, right) if symbolic else left * right

        return functools.reduce(multiply, sizes, 1)

    def cast(self, node: Node, dtype: torch.dtype) -> Node:
        """`node` in `dtype`, itself if it has it already."""
        return node if value(node).dtype == dtype else self.method("to", node, dtype)

    def _create(self, op: str, target: Any, args: tuple, kwargs: dict) -> Node:
        with self.graph.inserting_before(self.like):
            node = self.graph.create_node(op, target, args, kwargs)
        node.meta = {k: v for k, v in self.like.meta.items() if k not in ("example_value", "val")}
        possible = torch.is_grad_enabled() or any(map(_is_trained, tensors([value(self.like)])))
        operands = tensors([value(n) for n in node_inputs(node)]) if possible else []
        found = evaluate(node, self.fake_mode)
        for tensor in tensors([found]) if any(map(_is_trained, operands)) else ():
            _train(tensor)
        set_value(node, found)
        return node


def _is_trained(tensor: Tensor) -> bool:
    return tensor.requires_grad


def _train(tensor: Tensor) -> None:
    """Let a computed value require a gradient, which `evaluate` does not track."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    if tensor.is_floating_point() and not tensor.requires_grad and not wrapped:
        tensor.requires_grad_()


def with_gradient_of(traced: Any, computed: Any) -> Any:
    """What was computed, requiring gradients where the traced value does.

    torch reads it from the outputs of a subgraph, and the pass `exact` from every operand.
    """
    pairs = zip(tensors([traced]), tensors([computed]), strict=False)
    for before, now in pairs:
        if before.requires_grad:
            _train(now)
    return computed


@contextlib.contextmanager
def propagating(fake_mode: Any) -> Iterator[None]:
    """Where operators run on fake tensors as torch's own propagation runs them, gradients off.

    Several operators have a meaning for symbolic sizes in Python only (`F.pad` by a symbol,
    `masked_scatter`, `trace`); without the Python dispatcher they are the C++ kernels, which ask
    for numbers.
    """
    plain = torch._C.DisableTorchFunctionSubclass()
    with fake_mode, enable_python_dispatcher(), plain, torch.no_grad():
        yield


def evaluate(node: Node, fake_mode: Any) -> Any:
    """What a call node computes on the fake values of its arguments."""
    args, kwargs = map_arg((node.args, node.kwargs), value)
    with propagating(fake_mode):
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]
