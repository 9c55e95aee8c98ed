"""The pass that leaves no operator whose bits depend on who runs it. May import `ops` and below.

It runs on the promoted graph, in which matmuls are `heal::` operators already. Each node that
computes floating-point numbers is one of these:

* a `heal::` product, or `heal::sdpa`: exact by its `numerics`, but for an attention's dropout; the
  product of a softmax becomes `heal::weighted_sum`, so that keys of weight 0 do not show;
* an operator with a rule (`passes.exact_rules`): a bit-reproducible `heal::` operator takes its
  place;
* a trained read of one element in several places (`passes.exact_reads`): its gradient is a sum;
* a single IEEE operation, a choice, a comparison, or data that moves: it stays;
* anything else: it stays, the report lists it with the reason, and `strict=True` refuses.

What the graph hands out has canonical zeros and NaN.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from healpass.errors import UnavailableError
from healpass.graph import node_classes, operator_names
from healpass.graph.aliases import Memory
from healpass.graph.context import Context
from healpass.graph.forms import bind
from healpass.graph.node_classes import Kind
from healpass.graph.nodes import (
    heal_name,
    is_floating,
    is_half,
    node_inputs,
    op_name,
    set_value,
    tensors,
    value,
)
from healpass.graph.passes.attention import arguments
from healpass.graph.passes.exact_reads import READS, reads_by_index
from healpass.graph.passes.exact_rules import (
    EXPANDING,
    FORMS,
    REPRODUCIBLE,
    SCATTERED,
    TIES,
    TRAINED,
)

heal = torch.ops.heal
#: What puts values into a `torch.func` transform and takes them out again.
BATCHING = operator_names.words(
    """
    _add_batch_dim _remove_batch_dim _unwrap_for_grad _unwrap_batched _wrap_for_grad
    _create_differentiable _set_tensor_requires_grad _autograd_grad
    """
)
#: torch's own check of a scan's gradient refuses it, but does not look through our operators.
SCAN_GRADIENT = (
    "precision='exact' was asked for, but the graph holds a scan that is trained: Inductor's "
    "gradient of it is wrong (seen in torch 2.13, which refuses it with other precisions).\n"
    "Write the loop in Python, or call the compiled function under torch.no_grad()."
)
UNTOUCHED = (Kind.SCOPE, Kind.HIGHER_ORDER, Kind.CAST, Kind.EMBEDDING, Kind.MOVE)


def make_exact(graph_module: GraphModule, context: Context) -> int:
    """Rewrite one graph; return how many nodes changed. Other precisions pass through."""
    if context.config.precision != "exact":
        return 0
    count = 0
    for node in list(graph_module.graph.nodes):
        if node.op in ("call_function", "call_method"):
            count += _visit(node, graph_module, context)
    return count + _canonical_outputs(graph_module, context)


def _visit(node: Node, graph_module: GraphModule, context: Context) -> bool:
    name = op_name(node)
    if str(node.target) == "scan" and _is_trained(node):
        raise UnavailableError(SCAN_GRADIENT)
    if heal_name(node) == "heal::sdpa" and arguments(node)["dropout_p"]:
        context.keep(node, "scaled_dot_product_attention", "dropout draws random numbers")
        return False
    if heal_name(node) == "heal::matmul" and _weighs(node):
        return _weighted_sum(node, graph_module, context)
    if heal_name(node) is not None or not (_computes(node) or name in TIES):
        return False
    if node_classes.is_transformed(node):
        return _keep_transformed(node, name, context)
    if name in EXPANDING and _is_trained(node):
        return _exact_expand(node, graph_module, context)
    if _is_read(node, name) and _is_trained(node) and _exact_read(node, graph_module, context):
        return True
    reason = _why_not(node, name)
    if reason is None and name in FORMS:
        if name in TRAINED and not _is_trained(node):
            return False
        return _rewrite(node, str(name), graph_module, context)
    if reason is not None:
        context.keep(node, name or str(node.target), reason)
    return False


def _keep_transformed(node: Node, name: str | None, context: Context) -> bool:
    """Inside vmap and grad torch runs what was traced: our operators have no rules for either."""
    settled = (
        name
        in operator_names.SCOPES
        | operator_names.MOVES
        | operator_names.CASTS
        | operator_names.FACTORIES
        | REPRODUCIBLE
        | BATCHING
    )
    if not settled:
        reason = "inside a torch.func transform (vmap, grad): it rounds as torch does"
        context.keep(node, name or str(node.target), reason)
    return False


def _computes(node: Node) -> bool:
    """Whether floating-point numbers come out; `to_local` hands out a DTensor's part as it is."""
    return op_name(node) != "to_local" and any(map(is_floating, tensors([value(node)])))


def _why_not(node: Node, name: str | None) -> str | None:
    """Why a node's bits are not settled; None if they are, or if a rule settles them."""
    kind = node_classes.classify(node)
    if name in operator_names.RANDOM:
        return "random numbers: their stream differs between devices"
    if name in SCATTERED or _accumulates(node):
        return "a sum over repeated indices, added in the order of the device"
    if _is_read(node, name) and _is_trained(node):
        return "its gradient adds what was read more than once in the order of the device"
    if name in FORMS or kind in UNTOUCHED or (kind is Kind.FACTORY and not _spaced(name)):
        return None
    if kind is Kind.BUFFER_WRITE or name in REPRODUCIBLE or name in operator_names.MOVES:
        return None
    if kind is Kind.FOREIGN:
        return "an operator of the caller's: its arithmetic is its own"
    return "no exact operator for it: it rounds as torch or the device does"


def _is_read(node: Node, name: str | None) -> bool:
    """Whether a node may read an element more than once, so that its gradient is a sum."""
    return reads_by_index(node) if name == "getitem" else name in operator_names.REPEATS


def _is_trained(node: Node) -> bool:
    """Whether an operand gets a gradient."""
    wanted = any(getattr(t, "requires_grad", False) for t in _floats(node))
    return wanted and node_classes.backward_may_follow(node)


def _floats(node: Node) -> list[torch.Tensor]:
    return [t for t in tensors([value(n) for n in node_inputs(node)]) if is_floating(t)]


def _accumulates(node: Node) -> bool:
    accumulate = node.kwargs.get("accumulate") or (len(node.args) > 3 and node.args[3])
    return op_name(node) in ("index_put", "index_put_") and bool(accumulate)


def _spaced(name: str | None) -> bool:
    return name in ("linspace", "logspace")


def _rewrite(node: Node, name: str, graph_module: GraphModule, context: Context) -> bool:
    operands = tensors([value(n) for n in node_inputs(node)])
    if any(tensor.dtype in (torch.float64, torch.complex64) for tensor in operands):
        context.keep(node, name, "float64 or complex operands: exact operators are FP32")
        return False
    arguments = bind(FORMS[name], node)
    builder = context.builder(graph_module, node)
    result = None if arguments is None else FORMS[name].rule(builder, *arguments)
    if result is None:
        context.keep(node, name, "no exact operator for these arguments")
        return False
    replacement = result
    if not isinstance(value(node), (tuple, list)) and is_floating(value(node)):
        replacement = builder.cast(result, value(node).dtype)
    _take_place(node, replacement)
    return True


def _exact_expand(node: Node, graph_module: GraphModule, context: Context) -> bool:
    """Zeros of the expanded shape, added: the gradient of that is an exact sum."""
    builder = context.builder(graph_module, node.next)
    zeros = builder.call(torch.zeros_like, node)
    total = builder.call(heal.add.default, node.args[0], zeros)
    result = builder.cast(total, value(node).dtype)
    set_value(result, value(node))
    node.replace_all_uses_with(result, delete_user_cb=lambda user: user is not zeros)
    return True


def _exact_read(node: Node, graph_module: GraphModule, context: Context) -> bool:
    rule, builder = READS.get(str(op_name(node))), context.builder(graph_module, node)
    result = None if rule is None else rule(builder, *node.args, **node.kwargs)
    if result is not None:
        _take_place(node, builder.cast(result, value(node).dtype))
    return result is not None


def _weighs(node: Node) -> bool:
    """Whether a product's left operand is a softmax over what the product sums."""
    left: Any = node.args[0]
    right: Any = node.args[1]
    same_lead = value(left).shape[:-2] == value(right).shape[:-2]
    while same_lead and isinstance(left, Node) and heal_name(left) is None:
        passes = op_name(left) in operator_names.CASTS | {"contiguous", "clone", "dropout"}
        if not passes or not isinstance(left.args[0], Node):
            return False
        left = left.args[0]
    if not same_lead or heal_name(left) != "heal::softmax":
        return False
    return bool(left.args[1] in (-1, value(left).dim() - 1))


def _weighted_sum(node: Node, graph_module: GraphModule, context: Context) -> bool:
    """A hand-written P V: hidden keys must not show in the scale of V."""
    builder = context.builder(graph_module, node)
    _take_place(node, builder.call(heal.weighted_sum.default, *node.args))
    return True


def _take_place(node: Node, replacement: Node) -> None:
    if replacement not in node_inputs(node):
        set_value(replacement, value(node) if _same(replacement, node) else value(replacement))
    node.replace_all_uses_with(replacement)
    node.graph.erase_node(node)


def _same(a: Node, b: Node) -> bool:
    """Whether two nodes have values of one dtype and shape, so that one can be the other's."""
    ours, theirs = tensors([value(a)]), tensors([value(b)])
    return [(t.dtype, t.shape) for t in ours] == [(t.dtype, t.shape) for t in theirs]


# --------------------------------------------------------------------------------------- outputs


def _canonical_outputs(graph_module: GraphModule, context: Context) -> int:
    """Zeros of one sign and NaN of one kind in what leaves the graph."""
    graph = graph_module.graph
    memory, output = Memory(graph), next(n for n in graph.nodes if n.op == "output")
    roots = dict.fromkeys(root for n in output.all_input_nodes if (root := _root(n)) is not None)
    count = 0
    for root in roots:
        if memory.is_written(value(root)):
            continue  # the caller's own memory: a copy would not be it
        builder = context.builder(graph_module, root.next)
        clean = builder.call(heal.canonical.default, root)
        root.replace_all_uses_with(clean)
        clean.args = (root,)
        count += 1
    return count


def _root(node: Node) -> Node | None:
    """The FP32 computation behind an output, seen through moves and casts to 16 bits."""
    while True:
        moves = node_classes.classify(node) is Kind.MOVE if node.op.startswith("call") else False
        cast = op_name(node) in operator_names.CASTS and is_half(value(node))
        if not (moves or cast) or len(node.all_input_nodes) != 1:
            break
        node = node.all_input_nodes[0]
    computed = node.op.startswith("call") and heal_name(node) is None
    result: Any = value(node)
    plain = isinstance(result, torch.Tensor) and result.dtype == torch.float32
    plain = plain and result.layout == torch.strided
    return node if computed and plain and node_classes.classify(node) is Kind.ARITHMETIC else None
