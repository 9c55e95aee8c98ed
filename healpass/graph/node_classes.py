"""Which class of the promote pass a node belongs to. Imports `graph.nodes`, `operator_names`."""

from __future__ import annotations

import enum
import operator
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.fx import Node

from healpass.graph import operator_names
from healpass.graph.nodes import (
    heal_name,
    is_half,
    is_parameter,
    op_name,
    subclass_name,
    tensors,
    value,
)

SETITEM = operator.setitem


class Kind(enum.Enum):
    """The classes, as the promote pass explains them."""

    SCOPE = enum.auto()
    HIGHER_ORDER = enum.auto()
    FOREIGN = enum.auto()
    STATISTICS = enum.auto()
    IN_PLACE = enum.auto()
    CAST = enum.auto()
    FACTORY = enum.auto()
    EMBEDDING = enum.auto()
    BUFFER_WRITE = enum.auto()
    MOVE = enum.auto()
    ARITHMETIC = enum.auto()


def classify(node: Node) -> Kind:
    """The class of a call node, as listed in the promote pass."""
    name = op_name(node)
    if name in operator_names.SCOPES or is_transformed(node):
        return Kind.SCOPE if name in operator_names.SCOPES else Kind.FOREIGN
    if isinstance(node.target, HigherOrderOperator):
        return Kind.HIGHER_ORDER
    if heal_name(node) is not None:
        return Kind.ARITHMETIC
    own = views_bits(node) or _writes_elsewhere(node)
    if name is None or own or _has_own_format(node):
        return Kind.FOREIGN
    if running_statistics(node):
        return Kind.STATISTICS
    if destination(node) is not None:
        return Kind.IN_PLACE
    return next((kind for kind, members in _BY_NAME if name in members), Kind.ARITHMETIC)


_BY_NAME = (
    (Kind.CAST, operator_names.CASTS),
    (Kind.FACTORY, operator_names.FACTORIES),
    (Kind.EMBEDDING, frozenset({"embedding"})),
    (Kind.BUFFER_WRITE, operator_names.BUFFER_WRITES),
    (Kind.MOVE, operator_names.MOVES),
)


def is_transformed(node: Node) -> bool:
    """Whether a node works inside a `torch.func` transform, on values that only exist there."""
    seen = tensors([value(n) for n in node.all_input_nodes] + [value(node)])
    return any(torch._C._functorch.is_functorch_wrapped_tensor(tensor) for tensor in seen)


def views_bits(node: Node) -> bool:
    """`x.view(torch.int16)`: the bits themselves matter."""
    given = (*node.args, *node.kwargs.values())
    return op_name(node) == "view" and any(isinstance(a, torch.dtype) for a in given)


def running_statistics(node: Node) -> list[Node]:
    """The 16-bit statistics that a batch norm in training writes; none in evaluation."""
    if op_name(node) not in ("batch_norm", "instance_norm"):
        return []
    functional = getattr(node.target, "__module__", "") == torch.nn.functional.__name__
    first = 1 if functional else 3  # torch's own operator takes weight and bias before them
    named = dict(zip(("running_mean", "running_var"), node.args[first : first + 2], strict=False))
    flag = "training" if op_name(node) == "batch_norm" else "use_input_stats"
    default = op_name(node) == "instance_norm"
    writes = node.args[5] if len(node.args) > 5 else node.kwargs.get(flag, default)
    given = {**named, **node.kwargs}
    statistics = [given.get(name) for name in ("running_mean", "running_var")]
    return [s for s in statistics if isinstance(s, Node) and is_half(value(s))] if writes else []


def _has_own_format(node: Node) -> bool:
    """Quantized matmuls, tangents, tensor subclasses: they know certain dtypes only."""
    seen = tensors([value(n) for n in node.all_input_nodes] + [value(node)])
    return op_name(node) in operator_names.QUANTIZED | operator_names.DUALS or any(
        subclass_name(tensor) for tensor in seen
    )


# ----------------------------------------------------------------------------------- mutation


def destination(node: Node) -> Node | None:
    """The node that a call writes into, or None."""
    out = node.kwargs.get("out")
    if isinstance(out, Node):
        return out
    first = node.args[0] if node.args and isinstance(node.args[0], Node) else None
    name = op_name(node) or ""
    python = getattr(node.target, "__module__", "") == "_operator"  # and_ writes into nothing
    by_name = name.endswith("_") and not (
        python or name.endswith("__") or name in operator_names.MOVES
    )
    by_operator = node.target is SETITEM or name in operator_names.IN_PLACE_OPERATORS
    by_schema = bool(_written(node)) and _written(node)[0] == 0
    mutates = by_name or by_operator or by_schema or node.kwargs.get("inplace") is True
    return first if mutates and isinstance(value(first), Tensor) else None


def _written(node: Node) -> list[int]:
    """Which arguments an overload writes into, by its schema."""
    arguments = node.target._schema.arguments if isinstance(node.target, OpOverload) else ()
    return [place for place, argument in enumerate(arguments) if argument.is_write]


def _writes_elsewhere(node: Node) -> bool:
    """Whether an overload writes into an argument that is neither its first nor `out`."""
    return any(_written(node)[:1]) and "out" not in node.kwargs


def _root(node: Any) -> Node:
    """The tensor that a node views."""
    while op_name(node) in operator_names.MOVES and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def is_join(node: Node) -> bool:
    """Whether a move has several inputs that must agree in dtype."""
    return op_name(node) in operator_names.JOINS


def sums_gradients(node: Node) -> bool:
    """Whether a move repeats a 16-bit operand that gets a gradient: that gradient is a sum.

    The sum must be taken in FP32 and rounded once, hence the upcast comes before the move.
    """
    if op_name(node) not in operator_names.REPEATS or not node.all_input_nodes:
        return False
    source = node.all_input_nodes[0]
    return is_half(value(source)) and _root(source).op == "placeholder" and trained(source)


def trained(node: Node) -> bool:
    """Whether gradients are taken with respect to an operand, seen through views of it."""
    return bool(getattr(value(_root(node)), "requires_grad", False)) and backward_may_follow(node)


def backward_may_follow(node: Node) -> bool:
    """Whether gradients are on where the graph is called, or the graph itself switches them.

    The parameters of a model that is only run usually require gradients, too.
    """
    return torch.is_grad_enabled() or any(
        op_name(other) == "_set_grad_enabled" for other in node.graph.nodes
    )


def cache_destination(node: Node) -> Node | None:
    """The caller's 16-bit cache that a functional write extends and hands back, or None.

    A cache is an input that is no parameter; that the result leaves the graph tells it from an
    activation that happens to be joined with an input.
    """
    returned = any(user.op == "output" for user in node.users)
    for source in node.all_input_nodes if returned else ():
        root = _root(source)
        if root.op == "placeholder" and is_half(value(root)) and not is_parameter(root):
            return source
    return None


# ---------------------------------------------------------------------------------- the others


def embedding_table(node: Node) -> Node:
    """The weight of an embedding: second for `F.embedding`, first for `aten.embedding`."""
    if isinstance(node.target, (OpOverload, OpOverloadPacket)):
        return node.args[0]  # type: ignore[return-value]
    return node.kwargs.get("weight") or node.args[1]  # type: ignore[return-value]


def embedding_writes_table(node: Node) -> bool:
    """Whether the lookup rescales the table (`max_norm`) or wants sparse gradients."""
    named = dict(
        zip(
            ("padding_idx", "max_norm", "norm_type", "scale", "sparse"),
            node.args[2:],
            strict=False,
        )
    )
    options = {**named, **node.kwargs}
    return options.get("max_norm") is not None or bool(options.get("sparse"))


def is_autocast(node: Node) -> bool:
    """Whether a node enters or leaves an autocast region."""
    return op_name(node) in ("_enter_autocast", "_exit_autocast")
