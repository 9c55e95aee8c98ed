"""What a compile did to each matmul and SDPA node, and where 16 bits remain.

`HealReport` is what `healpass.explain` returns: text on `print`, JSON, notebook HTML.
"""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console

from healpass import report_view, strict_json

#: Version of the JSON layout; grows when a field changes its meaning or goes away.
SCHEMA = 3
#: Kind of the boundary where a value leaves a graph for code that is not compiled with it.
GRAPH_BREAK = "graph break"


@dataclass(frozen=True)
class NodeRecord:
    """One matmul, SDPA or other contraction of the traced graph.

    Attributes:
        name: Node name in the graph, with the subgraph's name before it where there is one.
        op: What the user called, as `linear` or `scaled_dot_product_attention`.
        heal_op: The operator that took its place, or None where the node was kept.
        reason: Why a kept node was kept.
        shapes: Shapes and dtypes of the operands, as traced.
        bound: Worst-case forward error of the new operator, or None.
        module: The module that called it, as `model.layers.3.mlp.up_proj`, or "".
        line: The user's source line, `file:line in function`.
        code: That line's text.
        observed: With `explain(observe=True)`, the worst error against FP64 on the operands that
            the operator got, as a fraction of its bound there; else None.
        unobserved: Why that has no such error, or None.
    """

    name: str
    op: str
    heal_op: str | None
    reason: str | None
    shapes: str
    bound: str | None
    module: str
    line: str
    code: str
    observed: float | None = None
    unobserved: str | None = None

    @property
    def rewritten(self) -> bool:
        """Whether a `heal::` operator does the work now."""
        return self.heal_op is not None


@dataclass(frozen=True)
class Boundary:
    """A place where values still pass through 16 bits: a cache, an output, a foreign operator.

    Such roundings are the root cause of divergence that HEAL names (arXiv 2606.21023, section
    2.3).
    """

    name: str
    kind: str
    dtype: str
    detail: str
    line: str


@dataclass(frozen=True)
class OutputRecord:
    """How far one output of a graph may be, and was, from exact arithmetic on the given inputs.

    Attributes:
        index: Its place among the floating-point outputs.
        shape: Of the elements that were looked at.
        bound: The largest propagated bound of an element, in the output's units, or None.
        observed: The worst error as a fraction of its bound, or None.
        expected: Four standard deviations of the error if roundings are independent, or None.
        first_order: Whether terms of second order were left out (a long graph), and only the
            elements with the largest errors were looked at.
        reason: Why there is no bound.
    """

    index: int
    shape: str
    bound: float | None
    observed: float | None
    expected: float | None
    first_order: bool
    reason: str | None = None


@dataclass
class GraphReport:
    """The records of one captured graph, filled by the passes."""

    nodes: list[NodeRecord] = field(default_factory=list)
    boundaries: list[Boundary] = field(default_factory=list)
    outputs: list[OutputRecord] = field(default_factory=list)
    passes: list[dict[str, Any]] = field(default_factory=list)

    @property
    def kept(self) -> list[NodeRecord]:
        """Nodes that were left as traced."""
        return [node for node in self.nodes if not node.rewritten]

    @property
    def rounds_at_breaks(self) -> bool:
        """Whether values are rounded on their way from this graph to code outside it."""
        return any(boundary.kind == GRAPH_BREAK for boundary in self.boundaries)

    def summary(self) -> str:
        """One line for the log."""
        return (
            f"{len(self.nodes) - len(self.kept)} of {len(self.nodes)} matmul and SDPA nodes "
            f"rewritten, {len(self.boundaries)} kernel boundaries still 16-bit"
        )


@dataclass(repr=False)
class HealReport:
    """Everything `healpass.explain` found, graph by graph; shown as tables everywhere."""

    config: dict[str, Any]
    graphs: list[GraphReport] = field(default_factory=list)
    breaks: list[str] = field(default_factory=list)
    uncompiled: list[str] = field(default_factory=list)

    @property
    def nodes(self) -> list[NodeRecord]:
        """All records of all graphs."""
        return [node for graph in self.graphs for node in graph.nodes]

    @property
    def kept(self) -> list[NodeRecord]:
        """All nodes that were left as traced."""
        return [node for graph in self.graphs for node in graph.kept]

    @property
    def boundaries(self) -> list[Boundary]:
        """All places where 16 bits remain."""
        return [boundary for graph in self.graphs for boundary in graph.boundaries]

    @property
    def outputs(self) -> list[OutputRecord]:
        """All bounded outputs of all graphs."""
        return [output for graph in self.graphs for output in graph.outputs]

    def to_dict(self) -> dict[str, Any]:
        """Plain data with a versioned layout."""
        return {
            "schema": SCHEMA,
            "config": self.config,
            "breaks": self.breaks,
            "uncompiled": self.uncompiled,
            "graphs": [asdict(graph) for graph in self.graphs],
        }

    def to_json(self, indent: int | None = 2) -> str:
        """The report as JSON."""
        return strict_json.dumps(self.to_dict(), indent)

    def print(self, file: Any = None, *, bounds: bool = False) -> None:
        """Print the report.

        Args:
            file: Where to; standard output if None.
            bounds: Whether with operands, error bounds and source lines of every kind of node.
        """
        width = report_view.WIDE if bounds else None
        Console(file=file, width=width).print(*report_view.tables(self, bounds=bounds), sep="\n")

    def text(self, *, bounds: bool = False) -> str:
        """The report as plain text of 80 columns; with `bounds`, of as many as it takes."""
        out = io.StringIO()
        width = report_view.WIDE if bounds else report_view.NARROW
        console = Console(file=out, width=width, color_system=None)
        console.print(*report_view.tables(self, bounds=bounds), sep="\n")
        return out.getvalue()

    def __str__(self) -> str:
        """The first screen as plain text."""
        return self.text()

    __repr__ = __str__  # consoles and notebooks without HTML show what this returns

    def _repr_html_(self) -> str:
        """The first screen for a notebook; every text is escaped."""
        return report_view.html(self)
