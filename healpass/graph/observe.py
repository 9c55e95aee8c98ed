"""Observed errors beside their bounds, on given inputs. May import `arithmetic` and `graph.nodes`.

`observe` runs a rewritten graph twice: as it is, where `heal::` operators are compared with FP64
on the operands they got; and in FP64 with propagated errors, which bounds the graph's outputs.
What has no rule (a subgraph, an operator that writes in place, 16-bit arithmetic) gets no number.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from healpass.arithmetic.compound_rules import sdpa
from healpass.arithmetic.digits import join_digits
from healpass.arithmetic.estimate import lifted
from healpass.arithmetic.propagate import Analysis, Arithmetic, Estimate, exact, propagate
from healpass.config import HealConfig
from healpass.errors import NoRuleError
from healpass.graph.node_classes import Kind, classify
from healpass.graph.nodes import heal_name, is_floating, is_half, op_name, tensors, value
from healpass.graph.operator_names import RANDOM
from healpass.report import GraphReport, OutputRecord

#: The torch function that each operator computes. `propagate` takes our operators' arguments for
#: them, `numerics` left out.
REFERENCE: dict[str, Callable[..., Any]] = {
    "heal::linear": F.linear,
    "heal::matmul": torch.matmul,
    "heal::sdpa": F.scaled_dot_product_attention,
}
#: Attention on a cache's integers, which are exact operands here.
INTEGERS = "heal::integer_attention"
#: Up to here (elements of all steps) an output's bound is rigorous; above, it is of first order.
RIGOROUS = 1 << 16
#: How many elements of an output are bounded to first order: those with the largest errors.
CHOSEN = 8


def observe(graph_module: GraphModule, config: HealConfig, report: GraphReport, *args: Any) -> Any:
    """Run a rewritten graph, and note in its report how its errors compare with their bounds.

    Args:
        graph_module: The graph, after `rewrite`.
        config: What it was rewritten with.
        report: What `rewrite` returned; records get `observed`, outputs are added.
        *args: The graph's inputs.

    Returns:
        What the graph returns.
    """
    # What a graph as traced computes in FP32 has the bound of FP32 sums.
    precision = config.precision if config.rewrites else "fp32"
    arithmetic = Arithmetic(precision, config.debug.simulate)
    with torch.no_grad():
        measured = Measured(graph_module, arithmetic)
        result = measured.run(*args)
    report.nodes = [
        replace(
            record,
            observed=measured.ratios.get(record.name),
            unobserved=measured.unknown.get(record.name),
        )
        for record in report.nodes
    ]
    with torch.inference_mode(False), torch.enable_grad():  # whatever the caller is in
        report.outputs += _outputs(graph_module, arithmetic, args, result)
    return result


class Measured(Interpreter):
    """Runs a graph; of each rewritten node `ratios` holds the worst observed / bound.

    `unknown` holds the reason where there is no rule to compare with.
    """

    def __init__(self, graph_module: GraphModule, arithmetic: Arithmetic) -> None:
        super().__init__(graph_module)
        self.arithmetic = arithmetic
        self.ratios: dict[str, float] = {}
        self.unknown: dict[str, str] = {}

    def run_node(self, n: Node) -> Any:
        """Run one node, and compare it if it is an operator of ours."""
        result = super().run_node(n)
        name, record = heal_name(n), n.meta.get("heal_record")
        if record is not None and (name in REFERENCE or name == INTEGERS):
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            try:
                ideal = self.ideal(n, args, kwargs)
            except NoRuleError as error:
                self.unknown[record] = first_words(error)
                return result
            computed = result[0] if name == INTEGERS else result
            self.ratios[record] = worst_ratio(computed, ideal.value.detach(), ideal.error)
        return result

    def ideal(self, n: Node, args: Any, kwargs: Any) -> Estimate:
        """What exact arithmetic makes of the operands that a node got, and its bound.

        Args:
            n: A node that calls a `heal::` operator.
            args: Its positional arguments in this run: tensors and constants.
            kwargs: Its keyword arguments.
        """
        run, name = Analysis(self.arithmetic), heal_name(n)
        if name == INTEGERS:
            return sdpa(run, **_dequantized(n, args, kwargs), kv="fp32", enable_gqa=True)
        result: Estimate = propagate(REFERENCE[str(name)], run, *_meant(args), **_meant(kwargs))
        return result


class Propagated(Interpreter):
    """Runs a graph on estimates."""

    def __init__(self, graph_module: GraphModule, analysis: Analysis) -> None:
        super().__init__(graph_module)
        self.analysis = analysis

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        """An input is what it is."""
        return lifted(super().placeholder(target, args, kwargs))

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """So is a constant."""
        return lifted(super().get_attr(target, args, kwargs))

    def run_node(self, n: Node) -> Any:
        """Integers and masks are computed, everything else is propagated."""
        if n.op not in ("call_function", "call_method"):
            return super().run_node(n)
        kind = classify(n)
        if kind is Kind.SCOPE:
            return None  # autograd and autocast are settled here
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        floating = [x for x in _leaves(args, kwargs) if isinstance(x, Estimate) or is_floating(x)]
        if not floating:
            return self.made(n, kind)
        function = REFERENCE.get(heal_name(n) or "")
        if function is not None:
            return propagate(function, self.analysis, *_meant(args), **_meant(kwargs))
        if is_half(value(n)) and kind not in (Kind.CAST, Kind.MOVE, Kind.EMBEDDING):
            raise NoRuleError(f"{n.target} runs in 16 bits: its roundings have no rule.")
        target: Any = getattr(Tensor, str(n.target)) if n.op == "call_method" else n.target
        return propagate(target, self.analysis, *args, **kwargs)

    def made(self, n: Node, kind: Kind) -> Any:
        """A tensor made of integers or of nothing: exact, if nothing was rounded or drawn."""
        result = super().run_node(n)
        if op_name(n) in RANDOM or (
            is_floating(result) and kind not in (Kind.CAST, Kind.FACTORY, Kind.MOVE)
        ):
            raise NoRuleError(f"no error rule for {op_name(n)!r} of integers, or at random.")
        return lifted(result)


def _outputs(
    graph_module: GraphModule, arithmetic: Arithmetic, args: tuple[Any, ...], result: Any
) -> list[OutputRecord]:
    """The graph's floating-point outputs with their propagated bounds."""
    sizes = [t.numel() for n in graph_module.graph.nodes for t in tensors([value(n)])
             if n.op.startswith("call") and is_floating(t)]  # fmt: skip
    analysis = Analysis(arithmetic, first_order=sum(map(int, sizes)) > RIGOROUS)
    computed = _leaves(result)
    try:
        ideal = _leaves(Propagated(graph_module, analysis).run(*args))
        pairs = [(y, lifted(e)) for y, e in zip(computed, ideal, strict=True) if is_floating(y)]
        return [_output(i, *pair, analysis) for i, pair in enumerate(pairs)]
    except NoRuleError as error:  # a function without a rule
        reason = first_words(error)
        shapes = [str(list(y.shape)) for y in computed if is_floating(y)]
        return [OutputRecord(i, shape, None, None, None, False, reason)
                for i, shape in enumerate(shapes)]  # fmt: skip


def _output(index: int, y: Tensor, ideal: Estimate, analysis: Analysis) -> OutputRecord:
    exact_value = ideal.value.detach().reshape(-1)
    error = (y.detach().double().reshape(-1) - exact_value).abs()
    if analysis.first_order:
        chosen = error.topk(min(CHOSEN, error.numel())).indices
        ideal = Estimate(ideal.value.reshape(-1)[chosen], ideal.error.reshape(-1)[chosen])
        y, exact_value = y.reshape(-1)[chosen], exact_value[chosen]
    bound = analysis.bound(ideal) if analysis.first_order else analysis.refined(ideal).error
    bound, expected = bound.detach().reshape(-1), 4 * analysis.deviation(ideal)
    return OutputRecord(
        index,
        str(list(ideal.value.shape)),
        _largest(bound),
        worst_ratio(y.detach().reshape(-1), exact_value, bound),
        _largest(expected),
        analysis.first_order,
    )


def first_words(error: NoRuleError) -> str:
    """The reason without its list of known functions."""
    return re.split(r"[:\n]", str(error))[0]


def worst_ratio(y: Tensor, exact_value: Tensor, bound: Tensor) -> float:
    """The largest observed / bound; 0 where nothing is wrong or nothing is promised.

    A NaN that exact arithmetic does not give is an infinite error.

    Args:
        y: What was computed.
        exact_value: FP64, of the same shape.
        bound: FP64, of the same shape: the largest |y - exact_value| that is promised.
    """
    y, bound = y.double(), bound.detach()
    fine = (y == exact_value) | (y.isnan() & exact_value.isnan()) | bound.isinf()
    ratio = ((y - exact_value).abs() / bound).nan_to_num(nan=torch.inf, posinf=torch.inf)
    return _largest(torch.where(fine, 0.0, ratio))


def _largest(x: Tensor) -> float:
    return float(x.detach().max()) if x.numel() else 0.0


def _meant(arguments: Any) -> Any:
    """Arguments of an operator without `numerics`, which is the one text among them."""
    if isinstance(arguments, dict):
        return {key: argument for key, argument in arguments.items() if key != "numerics"}
    return tuple(argument for argument in arguments if not isinstance(argument, str))


def _dequantized(n: Node, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of an attention on integers, its operands' values without any rounding."""
    names = [argument.name for argument in n.target._schema.arguments]  # type: ignore[union-attr]
    given = dict(zip(names, args, strict=False)) | kwargs
    for name in ("query", "key", "value"):
        digits, scale = given.pop(f"{name}_digits"), given.pop(f"{name}_scale")
        integers = join_digits(digits.unbind(-3)).double()
        given[name] = exact(integers * scale.double()[..., None])
    return {k: lifted(v) for k, v in given.items() if k not in ("numerics", "seed")}


def _leaves(*trees: Any) -> list[Any]:
    return torch.utils._pytree.tree_leaves(trees)
