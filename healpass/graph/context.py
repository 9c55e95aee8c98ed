"""What the passes of one compile share. May import `report`, `config` and below."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from healpass.arithmetic.bounds import matmul_bound
from healpass.config import HealConfig
from healpass.errors import UnavailableError
from healpass.graph.nodes import (
    Builder,
    is_parameter,
    module_path,
    node_inputs,
    tensors,
    user_line,
    value,
)
from healpass.ops.products.exact import bound_text
from healpass.report import Boundary, GraphReport, NodeRecord


@dataclass(frozen=True)
class Variant:
    """A subgraph promoted for one kind of call.

    Attributes:
        body: The promoted copy.
        traced: What it is a copy of; held here so that its `id` stays its own.
        name: What torch knows the body by (`invoke_subgraph`), or None.
    """

    body: GraphModule
    traced: GraphModule
    name: str | None


@dataclass
class Context:
    """Configuration, fake mode and the report that the passes fill.

    Attributes:
        config: The parsed options.
        fake_mode: The mode of the traced graph's fake tensors.
        outermost: Whether the caller of the compiled function gets the graph's results.
        report: Grows as nodes are rewritten or kept.
        kept: Nodes that stay as traced, with the reason; `verify` lets them pass.
        variants: Promoted copies of subgraphs, by the subgraph and the kind of call.
    """

    config: HealConfig
    fake_mode: Any
    outermost: bool = True
    report: GraphReport = field(default_factory=GraphReport)
    kept: dict[Node, str] = field(default_factory=dict)
    variants: dict[Any, Variant] = field(default_factory=dict)

    def builder(self, graph_module: GraphModule, like: Node) -> Builder:
        """A builder of nodes that stand for `like`, and carry the name of its record."""
        like.meta.setdefault("heal_record", qualified_name(like))
        return Builder(graph_module.graph, like, self.fake_mode)

    def rewritten(self, node: Node, op: str, heal_op: str, bound: str | None) -> None:
        """Record that a `heal::` operator took the place of `node`.

        Args:
            node: As it was traced.
            op: Plain name of its operator, as `mm`.
            heal_op: Name of the operator that took its place, as `heal::mm`.
            bound: Its worst-case error in one line, or None.
        """
        self._record(node, op, heal_op, None, bound)

    def keep(self, node: Node, op: str, reason: str) -> None:
        """Record that `node` stays as traced.

        Args:
            node: As it was traced.
            op: Plain name of its operator, as `mm`.
            reason: Why it stays, for the report.
        """
        if node not in self.kept:
            self.kept[node] = reason
            self._record(node, op, None, reason, None)

    def boundary(self, node: Node, kind: str, dtype: torch.dtype, detail: str) -> None:
        """Record a place where values pass through 16 bits.

        Args:
            node: Where it happens.
            kind: A few words that tell the kinds apart, as `graph output`.
            dtype: The dtype that they pass through.
            detail: What happens there, for the report.
        """
        name = str(dtype).removeprefix("torch.")
        self.report.boundaries.append(
            Boundary(qualified_name(node), kind, name, detail, user_line(node)[0])
        )

    def _record(
        self, node: Node, op: str, heal_op: str | None, reason: str | None, bound: str | None
    ) -> None:
        node.meta.setdefault("heal_record", qualified_name(node))
        line, code = user_line(node)
        shapes = ", ".join(describe(t) for t in tensors([value(n) for n in node_inputs(node)]))
        self.report.nodes.append(
            NodeRecord(
                qualified_name(node),
                op,
                heal_op,
                reason,
                shapes,
                bound,
                module_path(node),
                line,
                code,
            )
        )


def qualified_name(node: Node) -> str:
    """The node's name, with its subgraph's name before it."""
    owner = getattr(node.graph, "owning_module", None)
    inside = getattr(owner, "meta", {}).get("heal_subgraph", "")
    return f"{inside}.{node.name}" if inside else node.name


_SHORT = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}


def describe(tensor: Tensor) -> str:
    """`bf16[s0, 576]` for a tensor."""
    dtype = _SHORT.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
    return f"{dtype}[{', '.join(map(str, tensor.shape))}]"


def bound_of(operator: Node, config: HealConfig) -> str:
    """The worst-case error of a `heal::` product in one line (`arithmetic.bounds` derives it).

    The left operand counts as FP32, which it is once activations are promoted; so does the right
    one unless it is a 16-bit parameter.
    """
    right = operator.args[1]
    terms = value(operator.args[0]).shape[-1]
    if not isinstance(terms, int):
        return f"{terms} u S"  # a symbolic K: FP32 arithmetic's gamma to first order
    if config.precision == "exact":
        return bound_text(config.digit_products, value(right).dtype)
    served = isinstance(right, Node) and is_parameter(right)
    fmt = _SHORT[value(right).dtype] if served else "fp32"
    return matmul_bound(config.precision, terms, right=fmt, rule=config.debug.simulate).text


def check_m_invariant(config: HealConfig, operands: list[Tensor]) -> None:
    """Refuse a promise about CUDA kernels where they do not run.

    Raises:
        UnavailableError: `m_invariant` is set, nothing is simulated, and an operand is on CPU.
    """
    on_cpu = any(operand.device.type == "cpu" for operand in operands)
    if config.m_invariant and not config.debug.simulate and on_cpu:
        raise UnavailableError(
            "m_invariant=True needs CUDA tensors, but a matmul of this graph is on cpu. The CPU's "
            "FP32 matmul is torch's own, whose order of summation follows the number of rows.\n"
            "Leave m_invariant out, or add debug={'simulate': 'h100'}, which adds in one order."
        )
