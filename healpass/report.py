"""What a compile did to each matmul and SDPA node, and where 16 bits remain.

`HealReport` is what `healpass.explain` returns: text on `print`, JSON, notebook HTML.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from healpass import strict_json

#: Version of the JSON layout; grows when a field changes its meaning or goes away.
SCHEMA = 2
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

    def print(self, file: Any = None) -> None:
        """Print the report as tables."""
        Console(file=file).print(*self._tables(), sep="\n")

    def __str__(self) -> str:
        """The tables as plain text."""
        out = io.StringIO()
        Console(file=out, width=160, color_system=None).print(*self._tables(), sep="\n")
        return out.getvalue()

    __repr__ = __str__  # consoles and notebooks without HTML show what this returns

    def _tables(self) -> Iterator[Any]:
        rewritten = len(self.nodes) - len(self.kept)
        yield (
            f"precision={_plain(self.config['precision'])}: {rewritten} of {len(self.nodes)} "
            f"matmul and SDPA nodes rewritten in {len(self.graphs)} graph(s)"
        )
        if self.nodes:
            yield text_table("Nodes", _NODE_COLUMNS, _grouped(self.nodes))
            yield "bound: S = sum |x||w|, A = max |x|, B = max |w|, SA, SB their sums, u = 2^-24"
        if self.outputs:
            rows = _output_rows(self.graphs)
            yield text_table("Outputs, errors of all nodes propagated", _OUTPUT_COLUMNS, rows)
        if self.boundaries:
            yield text_table(
                "Kernel boundaries that are still 16-bit",
                ("where", "kind", "dtype", "what", "line"),
                [(b.name, b.kind, b.dtype, b.detail, short_line(b.line)) for b in self.boundaries],
            )
        for reason in self.uncompiled:
            yield f"left uncompiled, runs as written: {_plain(reason)}"
        for reason in self.breaks:
            yield f"graph break: {_plain(reason)}"

    def _repr_html_(self) -> str:
        """Tables for a notebook; every text is escaped."""
        tables = [_html_table(_NODE_COLUMNS, _grouped(self.nodes))]
        if self.outputs:
            tables.append(_html_table(_OUTPUT_COLUMNS, _output_rows(self.graphs)))
        boundaries = "".join(
            f"<li><code>{html.escape(b.name)}</code> {html.escape(b.kind)}, "
            f"{html.escape(b.dtype)}: {html.escape(b.detail)}</li>"
            for b in self.boundaries
        )
        title = html.escape(next(iter(self._tables())))
        left = "".join(f"<li>{html.escape(found)}</li>" for found in self.uncompiled + self.breaks)
        return (
            f"<p>{title}</p>{''.join(tables)}"
            f"<p>16-bit kernel boundaries:</p><ul>{boundaries or '<li>none</li>'}</ul>"
            f"<p>Left uncompiled, and graph breaks:</p><ul>{left or '<li>none</li>'}</ul>"
        )


def _html_table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


_NODE_COLUMNS = (
    "count", "where", "op", "became", "operands", "bound", "observed/bound", "why kept", "line"
)  # fmt: skip


def _grouped(nodes: list[NodeRecord]) -> list[tuple[str, ...]]:
    """One row for all nodes that differ in a layer's number only: thirty layers read as one."""
    groups: dict[tuple[str, ...], list[NodeRecord]] = {}
    for node in nodes:
        where = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", node.module)
        became, bound, reason = node.heal_op or "kept", node.bound or "", node.reason or ""
        key = (where, node.op, became, node.shapes, bound, reason, short_line(node.line))
        groups.setdefault(key, []).append(node)
    return [
        (str(len(group)), *key[:5], _worst([node.observed for node in group]), *key[5:])
        for key, group in groups.items()
    ]


def _worst(ratios: list[float | None]) -> str:
    found = [ratio for ratio in ratios if ratio is not None]
    worst = math.nan if any(map(math.isnan, found)) else max(found, default=0.0)
    return f"{worst:.3g}" if found else ""


_OUTPUT_COLUMNS = ("output", "elements", "bound", "observed/bound", "4 sigma", "how")


def _output_rows(graphs: list[GraphReport]) -> list[tuple[str, ...]]:
    """A row per output, called `graph.output` where there are several graphs."""
    return [
        (
            f"{number}.{output.index}" if len(graphs) > 1 else str(output.index),
            output.shape,
            *(_worst([size]) for size in (output.bound, output.observed, output.expected)),
            _verdict(output),
        )
        for number, graph in enumerate(graphs)
        for output in graph.outputs
    ]


def _verdict(output: OutputRecord) -> str:
    if output.reason is not None or output.bound is None:
        return output.reason or ""
    if math.isinf(output.bound):
        return "unbounded"
    if output.observed is not None and not output.observed <= 1:
        return "EXCEEDED"
    return "first order, worst elements" if output.first_order else "proved"


def short_line(line: str) -> str:
    """`modeling_llama.py:81 in forward`: a source line without its folders."""
    return re.split(r"[/\\]", line)[-1]


def text_table(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> Table:
    """A titled table for the terminal, its texts shown as they are."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(_plain, row))
    return table


def _plain(text: str) -> str:
    """Text that is neither markup nor a terminal command: names come from other people's code."""
    return escape("".join(letter if letter.isprintable() else "\ufffd" for letter in text))
