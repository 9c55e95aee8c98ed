"""Observed errors beside their bounds, on given inputs. May import `arithmetic` and `graph.nodes`.

`observe` runs a rewritten graph twice: as it is, where every `heal::` operator is compared with
FP64 on the operands it got; and in FP64 with propagated errors, which bounds the graph's outputs.
"""

from __future__ import annotations

import contextlib
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
from healpass.graph.nodes import heal_name, is_floating, tensors, value
from healpass.report import GraphReport, OutputRecord

#: The torch function that each operator computes. `propagate` takes our operators' arguments for
#: them, `numerics` left out.
MEANING: dict[str, Callable[..., Any]] = {
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
    arithmetic = Arithmetic(config.precision, config.simulate)
    with torch.no_grad():
        measured = Measured(graph_module, arithmetic)
        result = measured.run(*args)
    report.nodes = [
        replace(record, observed=measured.ratios.get(record.name)) for record in report.nodes
    ]
    report.outputs += _outputs(graph_module, arithmetic, args, result)
    return result


class Measured(Interpreter):
    """Runs a graph; `ratios` holds the worst observed / bound of each rewritten node."""

    def __init__(self, graph_module: GraphModule, arithmetic: Arithmetic) -> None:
        super().__init__(graph_module)
        self.arithmetic = arithmetic
        self.ratios: dict[str, float] = {}

    def run_node(self, n: Node) -> Any:
        """Run one node, and compare it if it is an operator of ours."""
        result = super().run_node(n)
        name, record = heal_name(n), n.meta.get("heal_record")
        if record is not None and (name in MEANING or name == INTEGERS):
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            with contextlib.suppress(ValueError):  # dropout and precision="exact" have no rule
                ideal = self.ideal(n, args, kwargs)
                computed = result[0] if name == INTEGERS else result
                self.ratios[record] = worst_ratio(computed, ideal.value.detach(), ideal.error)
        return result

    def ideal(self, n: Node, args: Any, kwargs: Any) -> Estimate:
        """What exact arithmetic makes of the operands that a node got, and its bound."""
        run, name = Analysis(self.arithmetic), heal_name(n)
        if name == INTEGERS:
            return sdpa(run, **_dequantized(n, args, kwargs), kv="fp32", enable_gqa=True)
        result: Estimate = propagate(MEANING[str(name)], run, *_meant(args), **_meant(kwargs))
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
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if not any(
            isinstance(leaf, Estimate) or is_floating(leaf) for leaf in _leaves(args, kwargs)
        ):
            return super().run_node(n)
        function = MEANING.get(heal_name(n) or "")
        if function is not None:
            return propagate(function, self.analysis, *_meant(args), **_meant(kwargs))
        target: Any = getattr(Tensor, str(n.target)) if n.op == "call_method" else n.target
        return propagate(target, self.analysis, *args, **kwargs)


def _outputs(
    graph_module: GraphModule, arithmetic: Arithmetic, args: tuple[Any, ...], result: Any
) -> list[OutputRecord]:
    """The graph's floating-point outputs with their propagated bounds."""
    sizes = [t.numel() for n in graph_module.graph.nodes for t in tensors([value(n)])
             if n.op.startswith("call") and is_floating(t)]  # fmt: skip
    analysis = Analysis(arithmetic, first_order=sum(map(int, sizes)) > RIGOROUS)
    computed = [leaf for leaf in _leaves(result) if is_floating(leaf)]
    try:
        estimates = Propagated(graph_module, analysis).run(*args)
    except ValueError as error:
        reason = str(error).split(":")[0]
        return [OutputRecord(i, str(list(y.shape)), None, None, None, False, reason)
                for i, y in enumerate(computed)]  # fmt: skip
    ideal = [leaf for leaf in _leaves(estimates) if isinstance(leaf, Estimate)]
    return [
        _output(i, *pair, analysis) for i, pair in enumerate(zip(computed, ideal, strict=True))
    ]


def _output(index: int, y: Tensor, ideal: Estimate, analysis: Analysis) -> OutputRecord:
    exact_value = ideal.value.detach().reshape(-1)
    error = (y.double().reshape(-1) - exact_value).abs()
    if analysis.first_order:
        chosen = error.topk(min(CHOSEN, error.numel())).indices
        ideal = Estimate(ideal.value.reshape(-1)[chosen], ideal.error.reshape(-1)[chosen])
        y, exact_value = y.reshape(-1)[chosen], exact_value[chosen]
    bound, expected = (limit.detach().reshape(-1) for limit in (
        analysis.bound(ideal), 4 * analysis.deviation(ideal)
    ))  # fmt: skip
    return OutputRecord(
        index,
        str(list(ideal.value.shape)),
        _largest(bound),
        worst_ratio(y.reshape(-1), exact_value, bound),
        _largest(expected),
        analysis.first_order,
    )


def worst_ratio(y: Tensor, exact_value: Tensor, bound: Tensor) -> float:
    """The largest observed / bound; 0 where nothing is wrong, NaN and infinities agreeing."""
    same = (y.double() == exact_value) | (y.isnan() & exact_value.isnan())
    return _largest(torch.where(same, 0.0, (y.double() - exact_value).abs() / bound.detach()))


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
