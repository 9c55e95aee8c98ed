"""How a report is shown: a verdict and a few lines for a person, tables on request.

Imports rich; what it shows are the records of `report`, which imports this.
"""

from __future__ import annotations

import html as markup
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

#: Columns of the first screen, and of the one with bounds.
NARROW, WIDE = 80, 200
#: The longest name of a place on the first screen.
_PLACE = 38

#: What a precision gives to the nodes that it rewrites.
_PROMISES = {
    "heal": "matmuls as accurate as FP32",
    "layercast": "FP32 arithmetic",
    "exact": "the same bits everywhere",
}
#: Where 16 bits remain -> what ends that, the most frequent reason first.
CURES = {
    "cache of the caller": "heal_model(model), or a HealCache, keeps keys and values finer",
    "graph output": "outputs='fp32' hands results out in FP32",
    "graph break": "take what breaks the graph out of the compiled function",
    "buffer of the caller": "give the model FP32 buffers",
    "foreign operator": "give that operator FP32 operands, or write it in torch's operators",
}
_SHORT = {"scaled_dot_product_attention": "sdpa"}
_LEGEND = "bound: S = sum |x||w|, A = max |x|, B = max |w|, SA, SB their sums, u = 2^-24"


def tables(report: Any, *, bounds: bool = False) -> Iterator[Any]:
    """What is printed, part by part.

    Args:
        report: A `HealReport`.
        bounds: Whether every kind of node is shown with operands, bound and source line.
    """
    yield from map(plain, verdict(report))
    if report.nodes:
        columns, rows = _nodes(report.nodes, bounds)
        yield text_table("", columns, rows)
    if report.nodes and bounds:
        yield _LEGEND
    yield from _unobserved(report.nodes)
    if report.outputs:
        rows = _output_rows(report.graphs)
        yield text_table("Outputs, errors of all nodes propagated", _OUTPUT_COLUMNS, rows)
    if report.boundaries:
        yield text_table("Where 16 bits remain", *_boundaries(report.boundaries, bounds))
    for reason in report.uncompiled:
        yield f"left uncompiled, runs as written: {plain(reason)}"
    for reason in report.breaks:
        yield f"graph break: {plain(reason)}"


def verdict(report: Any) -> list[str]:
    """What a user wants to know first, in a sentence or three."""
    rewritten = len(report.nodes) - len(report.kept)
    precision = report.config["precision"]
    found = [
        f"precision={precision}: {rewritten} of {len(report.nodes)} matmul and SDPA nodes "
        f"rewritten in {len(report.graphs)} graph(s)"
        + (f": {_promise(report)}." if _holds(report) else ".")
    ]
    if report.kept:
        found.append(f"{len(report.kept)} kept as traced, for the reasons below.")
    if report.uncompiled:
        found.append(f"{len(report.uncompiled)} function(s) are not compiled and run as written.")
    kinds = Counter(boundary.kind for boundary in report.boundaries)
    if kinds:
        named = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        found.append(f"Still rounded to 16 bits: {named}.")
        found += [f"Way out: {cure}." for cure in _cures(kinds)]
    return found


def _holds(report: Any) -> bool:
    """Whether the precision's promise holds for the whole model."""
    known = report.config["precision"] in _PROMISES
    return known and bool(report.nodes) and not report.kept and not report.uncompiled


def _promise(report: Any) -> str:
    promise, kv = _PROMISES[report.config["precision"]], report.config.get("kv")
    attends = any(node.heal_op == "heal::sdpa" for node in report.nodes)
    if report.config["precision"] == "heal" and attends:
        promise += f", attention on {kv or 'int16, or as its HealCache holds keys and values'}"
    return promise


def _cures(kinds: Counter[str]) -> list[str]:
    if set(kinds) == {"cache of the caller", "graph output"}:
        return ["heal_model(model) cures both"]
    return [cure for kind, cure in CURES.items() if kind in kinds]


def _nodes(nodes: Sequence[Any], bounds: bool) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """A row for each kind of layer; nodes that differ in a layer's number are of one kind."""
    groups: dict[tuple[str, ...], list[Any]] = {}
    for node in nodes:
        groups.setdefault(_kind(node, bounds), []).append(node)
    observed = any(node.observed is not None for node in nodes)
    columns: tuple[str, ...] = ("count", "where", "op", "became")
    columns += ("operands", "bound") if bounds else ()
    columns += ("observed/bound",) if observed else ()
    columns += ("line",) if bounds else ()
    rows = []
    for key, group in groups.items():
        head, line = (key[:-1], key[-1:]) if bounds else (key, ())
        ratio = (worst([node.observed for node in group]),) if observed else ()
        rows.append((str(len(group)), *head, *ratio, *line))
    return columns, rows


def _kind(node: Any, bounds: bool) -> tuple[str, ...]:
    where = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", node.module)
    became = node.heal_op or f"kept: {node.reason}"
    if not bounds:
        if node.heal_op is None:
            became += f" ({short_line(node.line)})"
        where = where if len(where) <= _PLACE else "…" + where[1 - _PLACE :]
        return where, _SHORT.get(node.op, node.op), became
    return where, node.op, became, node.shapes, node.bound or "", short_line(node.line)


def _boundaries(found: Sequence[Any], bounds: bool) -> tuple[Any, Any]:
    if bounds:
        columns = ("where", "kind", "dtype", "what", "line")
        return columns, [(b.name, b.kind, b.dtype, b.detail, short_line(b.line)) for b in found]
    counted = Counter((b.kind, b.dtype, re.sub(r"\d+", "*", b.detail)) for b in found)
    return ("count", "kind", "dtype", "what"), [(str(n), *key) for key, n in counted.items()]


def _unobserved(nodes: Sequence[Any]) -> Iterator[str]:
    reasons = Counter(node.unobserved for node in nodes if node.unobserved)
    for reason, count in reasons.items():
        yield f"{count} node(s) without an observed error: {plain(reason)}"


def worst(ratios: Sequence[float | None]) -> str:
    """The largest number, as text; "" if there is none, nan if one is."""
    found = [ratio for ratio in ratios if ratio is not None]
    largest = math.nan if any(map(math.isnan, found)) else max(found, default=0.0)
    return f"{largest:.3g}" if found else ""


_OUTPUT_COLUMNS = ("output", "elements", "bound", "observed/bound", "4 sigma", "how")


def _output_rows(graphs: Sequence[Any]) -> list[tuple[str, ...]]:
    """A row per output, called `graph.output` where there are several graphs."""
    return [
        (
            f"{number}.{output.index}" if len(graphs) > 1 else str(output.index),
            output.shape,
            *(worst([size]) for size in (output.bound, output.observed, output.expected)),
            _how(output),
        )
        for number, graph in enumerate(graphs)
        for output in graph.outputs
    ]


def _how(output: Any) -> str:
    if output.reason is not None or output.bound is None:
        return output.reason or ""
    if math.isinf(output.bound):
        return "unbounded"
    if output.observed is not None and not output.observed <= 1:
        return "EXCEEDED"
    return "first order, worst elements" if output.first_order else "proved"


def html(report: Any) -> str:
    """The first screen for a notebook; every text is escaped."""
    lines = "".join(f"<p>{markup.escape(line)}</p>" for line in verdict(report))
    shown = [_html_table(*_nodes(report.nodes, bounds=False))] if report.nodes else []
    if report.outputs:
        shown.append(_html_table(_OUTPUT_COLUMNS, _output_rows(report.graphs)))
    if report.boundaries:
        shown.append(_html_table(*_boundaries(report.boundaries, bounds=False)))
    left = "".join(f"<li>{markup.escape(x)}</li>" for x in report.uncompiled + report.breaks)
    return (
        f"{lines}{''.join(shown)}"
        f"<p>Left uncompiled, and graph breaks:</p><ul>{left or '<li>none</li>'}</ul>"
    )


def _html_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{markup.escape(column)}</th>" for column in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{markup.escape(cell)}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def short_line(line: str) -> str:
    """`modeling_llama.py:81 in forward`: a source line without its folders."""
    return re.split(r"[/\\]", line)[-1]


def text_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table for the terminal, without lines around cells; its texts are shown as they are.

    Args:
        title: Stands above; "" for none.
        columns: Heads of the columns.
        rows: The cells of each row, one per column.
    """
    table = Table(title=title or None, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(plain, row))
    return table


def plain(text: str) -> str:
    """Text that is neither markup nor a terminal command: names come from other people's code."""
    return escape("".join(letter if letter.isprintable() else "\ufffd" for letter in text))
