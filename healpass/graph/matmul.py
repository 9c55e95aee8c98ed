"""The pass that puts `heal::` operators in the place of torch's matmuls. Imports `ops`.

Each rule says in one line what a torch function means in terms of `heal::linear`, `matmul` and
`grouped_mm`. The new node is FP32; a cast back to the traced dtype follows it, so this pass alone
changes no dtype anywhere else. The promote pass removes those casts.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.fx import GraphModule, Node

import healpass.ops  # noqa: F401  the operators must be registered
from healpass.graph.context import Context, bound_of, why_not, why_not_here
from healpass.graph.names import MATMULS, OTHER_CONTRACTIONS, QUANTIZED
from healpass.graph.nodes import (
    Builder,
    heal_name,
    is_floating,
    is_half,
    is_parameter,
    node_inputs,
    op_name,
    set_value,
    value,
)

heal = torch.ops.heal
Rule = Callable[..., Node]


def rewrite_matmuls(graph_module: GraphModule, context: Context) -> int:
    """Rewrite every matmul of one graph; return how many."""
    count = 0
    for node in list(graph_module.graph.nodes):
        name = op_name(node)
        if name in QUANTIZED or (name in OTHER_CONTRACTIONS and _computes(node)):
            context.keep(node, str(name), OTHER_CONTRACTIONS[str(name)])
        elif name in MATMULS:
            count += _rewrite(node, name, graph_module, context)
    return count


def _computes(node: Node) -> bool:
    return any(is_floating(value(argument)) for argument in node_inputs(node))


def _rewrite(node: Node, name: str, graph_module: GraphModule, context: Context) -> bool:
    operands = [value(n) for n in node_inputs(node) if isinstance(value(n), torch.Tensor)]
    if name in ("_grouped_mm", "grouped_mm"):
        operands = [operand for operand in operands if operand.dtype != torch.int32]
    reason = why_not(operands) or why_not_here(node) or _why_not_form(node)
    if reason:
        context.keep(node, name, reason)
        return False
    builder = context.builder(graph_module, node)
    arguments = {**bind(name, node), "numerics": context.config.numerics}
    for key, argument in arguments.items():
        arguments[key] = _rounded_parameter(builder, argument)
    before = node.prev
    product = RULES[name](builder, **arguments)
    operator = _operator_between(before, node)
    if operator is not None:
        bound = bound_of(operator, context.config)
        context.rewritten(node, name, heal_name(operator) or "", bound)
    result = builder.cast(product, value(node).dtype)
    set_value(result, value(node))  # it takes its place in memory too
    node.replace_all_uses_with(result)
    graph_module.graph.erase_node(node)
    return True


def _why_not_form(node: Node) -> str | None:
    out = node.kwargs.get("out")
    if out is not None and value(out).shape != value(node).shape:
        return "out= has another shape than the result"
    return None


def _rounded_parameter(builder: Builder, argument: Any) -> Any:
    """Under autocast an FP32 parameter enters rounded: that is the weight served."""
    traced = value(builder.like)
    if not isinstance(argument, Node) or not is_half(traced) or not is_parameter(argument):
        return argument
    return builder.cast(argument, traced.dtype) if not is_half(value(argument)) else argument


def _operator_between(before: Node, node: Node) -> Node | None:
    """The `heal::` node that a rule has just put before `node`; a product by a scalar has none."""
    made = node.prev
    while made is not before and heal_name(made) is None:
        made = made.prev
    return None if made is before else made


# ------------------------------------------------------------------------------------- the rules


def _matmul(b: Builder, input: Any, other: Any, out: Any = None, *, numerics: str) -> Node:
    return _into(b, out, b.call(heal.matmul.default, input, other, numerics))


def _rmatmul(b: Builder, input: Any, other: Any, *, numerics: str) -> Node:
    return b.call(heal.matmul.default, other, input, numerics)


def _mm(b: Builder, input: Any, mat2: Any, out: Any = None, *, numerics: str) -> Node:
    return _matmul(b, input, mat2, out, numerics=numerics)


def _mv(b: Builder, input: Any, vec: Any, out: Any = None, *, numerics: str) -> Node:
    return _matmul(b, input, vec, out, numerics=numerics)


def _linear(b: Builder, input: Any, weight: Any, bias: Any = None, *, numerics: str) -> Node:
    return b.call(heal.linear.default, input, weight, bias, numerics)


def _inner(b: Builder, input: Any, other: Any, out: Any = None, *, numerics: str) -> Node:
    left, right = value(input), value(other)
    if left.dim() == 0 or right.dim() == 0:
        return _into(b, out, b.call(torch.mul, b.cast(input, torch.float32), other))
    rows = b.method("reshape", other, (math.prod(right.shape[:-1]), right.shape[-1]))
    product = b.call(heal.linear.default, input, rows, None, numerics)
    return _into(b, out, b.method("reshape", product, (*left.shape[:-1], *right.shape[:-1])))


def _addmm(
    b: Builder,
    input: Any,
    mat1: Any,
    mat2: Any,
    beta: Any = 1,
    alpha: Any = 1,
    out: Any = None,
    *,
    numerics: str,
) -> Node:
    product = b.call(heal.matmul.default, mat1, mat2, numerics)
    return _into(b, out, _combined(b, input, product, beta, alpha))


def _addmv(
    b: Builder,
    input: Any,
    mat: Any,
    vec: Any,
    beta: Any = 1,
    alpha: Any = 1,
    out: Any = None,
    *,
    numerics: str,
) -> Node:
    return _addmm(b, input, mat, vec, beta, alpha, out, numerics=numerics)


def _baddbmm(
    b: Builder,
    input: Any,
    batch1: Any,
    batch2: Any,
    beta: Any = 1,
    alpha: Any = 1,
    out: Any = None,
    *,
    numerics: str,
) -> Node:
    return _addmm(b, input, batch1, batch2, beta, alpha, out, numerics=numerics)


def _addbmm(
    b: Builder,
    input: Any,
    batch1: Any,
    batch2: Any,
    beta: Any = 1,
    alpha: Any = 1,
    out: Any = None,
    *,
    numerics: str,
) -> Node:
    """The sum over the batch is part of the contraction: one product with B * K terms."""
    left, right = value(batch1), value(batch2)
    rows = b.method("permute", batch1, (1, 0, 2))
    rows = b.method("reshape", rows, (left.shape[1], left.shape[0] * left.shape[2]))
    columns = b.method("reshape", batch2, (right.shape[0] * right.shape[1], right.shape[2]))
    return _addmm(b, input, rows, columns, beta, alpha, out, numerics=numerics)


def _grouped_mm(
    b: Builder,
    input: Any,
    mat2: Any,
    offs: Any = None,
    bias: Any = None,
    out_dtype: Any = None,
    *,
    numerics: str,
) -> Node:
    del out_dtype  # the result is FP32; the cast to the traced dtype follows every rule
    if offs is None:
        product = b.call(heal.matmul.default, input, mat2, numerics)
    else:
        product = b.call(heal.grouped_mm.default, input, mat2, offs, numerics)
    return product if bias is None else b.call(torch.add, product, bias)


def _combined(b: Builder, term: Any, product: Node, beta: Any, alpha: Any) -> Node:
    """`beta * term + alpha * product`; with beta = 0 the term is not read, as torch promises."""
    scaled = product if alpha == 1 else b.call(torch.mul, product, alpha)
    if beta == 0:
        return scaled
    wide = b.cast(term, torch.float32)
    return b.call(torch.add, wide if beta == 1 else b.call(torch.mul, wide, beta), scaled)


def _into(b: Builder, out: Any, result: Node) -> Node:
    return result if out is None else b.method("copy_", out, result)


def _in_place(rule: Rule) -> Rule:
    def apply(b: Builder, input: Any, *args: Any, **kwargs: Any) -> Node:
        return b.method("copy_", input, rule(b, input, *args, **kwargs))

    apply.__signature__ = inspect.signature(rule)  # type: ignore[attr-defined]
    return apply


RULES: dict[str, Rule] = {
    "linear": _linear,
    **dict.fromkeys(("matmul", "__matmul__", "linalg_matmul"), _matmul),
    **dict.fromkeys(("dot", "vdot"), _matmul),
    **dict.fromkeys(("mm", "bmm"), _mm),
    "__rmatmul__": _rmatmul,
    "mv": _mv,
    "inner": _inner,
    "addmm": _addmm,
    "addmv": _addmv,
    "baddbmm": _baddbmm,
    "addbmm": _addbmm,
    "addmm_": _in_place(_addmm),
    "addmv_": _in_place(_addmv),
    "baddbmm_": _in_place(_baddbmm),
    "addbmm_": _in_place(_addbmm),
    **dict.fromkeys(("_grouped_mm", "grouped_mm"), _grouped_mm),
}

#: torch's functions disagree with each other on some argument names.
_ALIASES = {"self": "input", "tensor": "other", "mat_a": "input", "mat_b": "mat2", "a": "input"}


@cache
def _parameters(name: str) -> tuple[str, ...]:
    """The positional arguments that a rule takes, the builder left out."""
    parameters = inspect.signature(RULES[name]).parameters
    return tuple(p for p in parameters if p not in ("b", "numerics"))


def bind(name: str, node: Node) -> dict[str, Any]:
    """The arguments of a matmul node by name."""
    names = _parameters(name)
    bound = dict(zip(names, node.args, strict=False))
    for key, argument in node.kwargs.items():
        key = _ALIASES.get(key, key)
        if key == "mat2" and "mat2" not in names:
            key = "other"
        bound[key] = argument
    return bound
