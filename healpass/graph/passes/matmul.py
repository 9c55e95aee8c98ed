"""The pass that puts `heal::` operators in the place of torch's matmuls. Imports `ops`.

Each rule says in one line what a torch function means in terms of `heal::linear`, `matmul` and
`grouped_mm`. The new node is FP32; a cast back to the traced dtype follows it, so this pass alone
changes no dtype anywhere else. The promote pass removes those casts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

import healpass.ops  # noqa: F401  the operators must be registered
from healpass.graph.context import (
    Context,
    bound_of,
    check_m_invariant,
)
from healpass.graph.eligibility import why_not, why_not_here
from healpass.graph.forms import Form, bind, form
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
from healpass.graph.operator_names import MATMULS, OTHER_CONTRACTIONS, QUANTIZED

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
    given = bind(FORMS[name], node)
    if given is None or not _has_dtype(FORMS[name], given):
        context.keep(node, name, "no heal operator for these arguments")
        return False
    check_m_invariant(context.config, operands)
    builder = context.builder(graph_module, node)
    before = node.prev
    arguments = [_rounded_parameter(builder, argument) for argument in given]
    product = FORMS[name].rule(builder, context.config.numerics, *arguments)
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


def _has_dtype(form: Form, given: list[Any]) -> bool:
    """Whether `out_dtype` is one: torch's old `addmm(beta, input, a, b)` has a tensor there."""
    dtype = dict(zip(form.names, given, strict=True)).get("out_dtype")
    return dtype is None or isinstance(dtype, torch.dtype)


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


def _matmul(b: Builder, numerics: str, left: Any, right: Any, out: Any = None) -> Node:
    return _into(b, out, b.call(heal.matmul.default, left, right, numerics))


def _mm(b: Builder, numerics: str, left: Any, right: Any, out_dtype: Any, out: Any) -> Node:
    del out_dtype  # the result is FP32; the cast to the traced dtype follows every rule
    return _matmul(b, numerics, left, right, out)


def _rmatmul(b: Builder, numerics: str, right: Any, left: Any) -> Node:
    return b.call(heal.matmul.default, left, right, numerics)


def _linear(b: Builder, numerics: str, rows: Any, weight: Any, bias: Any) -> Node:
    return b.call(heal.linear.default, rows, weight, bias, numerics)


def _inner(b: Builder, numerics: str, left: Any, right: Any, out: Any) -> Node:
    a, c = value(left), value(right)
    if a.dim() == 0 or c.dim() == 0:
        return _into(b, out, b.call(torch.mul, b.cast(left, torch.float32), right))
    lead, last = b.sizes(left)[:-1], b.sizes(right)
    rows = b.method("reshape", right, (b.product(*last[:-1]), last[-1]))
    product = b.call(heal.linear.default, left, rows, None, numerics)
    return _into(b, out, b.method("reshape", product, (*lead, *last[:-1])))


def _addmm(
    b: Builder, numerics: str, term: Any, left: Any, right: Any, out_dtype: Any, *rest: Any
) -> Node:
    del out_dtype  # as in `_mm`
    beta, alpha, out = rest
    product = b.call(heal.matmul.default, left, right, numerics)
    return _into(b, out, _combined(b, term, product, beta, alpha))


def _addbmm(b: Builder, numerics: str, term: Any, left: Any, right: Any, *rest: Any) -> Node:
    """The sum over the batch is part of the contraction: one product with B * K terms."""
    (batch, count, inner), (_, _, last) = b.sizes(left), b.sizes(right)
    terms = b.product(batch, inner)
    rows = b.method("permute", left, (1, 0, 2))
    rows = b.method("reshape", rows, (count, terms))
    columns = b.method("reshape", right, (terms, last))
    return _addmm(b, numerics, term, rows, columns, *rest)


def _grouped_mm(
    b: Builder, numerics: str, left: Any, right: Any, offs: Any, bias: Any, out_dtype: Any
) -> Node:
    del out_dtype  # as in `_mm`
    if offs is None:
        product = b.call(heal.matmul.default, left, right, numerics)
    else:
        product = b.call(heal.grouped_mm.default, left, right, offs, numerics)
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
    """The rule of a method that writes its result into its first argument."""

    def apply(b: Builder, numerics: str, term: Any, *rest: Any) -> Node:
        return b.method("copy_", term, rule(b, numerics, term, *rest))

    return apply


def _sum(rule: Rule, operands: str) -> Form:
    """A product that is added to a tensor; `out_dtype` is one of its positions."""
    return form(rule, f"input {operands} out_dtype * beta alpha out", beta=1, alpha=1)


FORMS: dict[str, Form] = {
    "linear": form(_linear, "input weight bias"),
    **dict.fromkeys(
        ("matmul", "__matmul__", "linalg_matmul", "dot", "vdot"),
        form(_matmul, "input other * out"),
    ),
    **dict.fromkeys(("mm", "bmm"), form(_mm, "input mat2 out_dtype * out")),
    "mv": form(_matmul, "input vec * out"),
    "__rmatmul__": form(_rmatmul, "input other"),
    "inner": form(_inner, "input other * out"),
    "addmm": _sum(_addmm, "mat1 mat2"),
    "addmv": _sum(_addmm, "mat vec"),
    "baddbmm": _sum(_addmm, "batch1 batch2"),
    "addbmm": _sum(_addbmm, "batch1 batch2"),
    "addmm_": _sum(_in_place(_addmm), "mat1 mat2"),
    "addmv_": _sum(_in_place(_addmm), "mat vec"),
    "baddbmm_": _sum(_in_place(_addmm), "batch1 batch2"),
    "addbmm_": _sum(_in_place(_addbmm), "batch1 batch2"),
    **dict.fromkeys(
        ("_grouped_mm", "grouped_mm"), form(_grouped_mm, "input mat2 offs bias out_dtype")
    ),
}
