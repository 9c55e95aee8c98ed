"""`healpass explain --vllm`: what runs where in an engine, or why it is refused.

Imports nothing of vLLM: a process of its own does (`explaining`). Imports `errors`.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from healpass.integrations.vllm.checking import Asked, in_a_process


@dataclass(frozen=True)
class Layer:
    """A layer of the model.

    Attributes:
        name: Its place, as `model.layers.3.mlp.down_proj`.
        kind: Its class.
        weight: Dtype of its weight, or "".
        runs: What it computes with.
    """

    name: str
    kind: str
    weight: str
    runs: str


@dataclass(frozen=True, kw_only=True)
class Pages:
    """The cache of layers that share one kind of page.

    Attributes:
        layers: How many.
        heads: Key heads of a layer, on this rank.
        head_size: Of keys.
        block_size: Tokens of a page.
        page_bytes: Bytes of a page of one layer.
        blocks: Pages that vLLM has room for.
    """

    layers: int
    heads: int
    head_size: int
    block_size: int
    page_bytes: int
    blocks: int

    def __str__(self) -> str:
        """Bytes of a token, and how many tokens there is room for."""
        of_layer = self.page_bytes // self.block_size
        return (
            f"{self.layers} layers, {self.heads} key heads of size {self.head_size}: "
            f"{of_layer // self.heads} bytes per token and head, {of_layer * self.layers} per "
            f"token; {self.blocks} pages of {self.block_size} tokens"
        )


@dataclass(frozen=True)
class Graph:
    """A graph that was compiled.

    Attributes:
        name: The module whose graph it is.
        became: HEAL's operator -> how many nodes became it.
        kept: Operator, reason and number of those that were kept.
    """

    name: str
    became: dict[str, int]
    kept: list[tuple[str, str, int]]


@dataclass(frozen=True)
class Explained:
    """What runs where.

    Attributes:
        compiled: Whether the model's graph is.
        layers: All of the model.
        pages: The caches.
        graphs: What was compiled when the engine started.
    """

    compiled: bool
    layers: list[Layer]
    pages: list[Pages]
    graphs: list[Graph]

    @classmethod
    def of(cls, found: dict[str, Any]) -> Explained:
        """Read what JSON knows."""
        return cls(
            found["compiled"],
            [Layer(**layer) for layer in found["layers"]],
            [Pages(**pages) for pages in found["pages"]],
            [
                Graph(g["name"], g["became"], [tuple(k) for k in g["kept"]])
                for g in found["graphs"]
            ],
        )

    def text(self, width: int = 120) -> str:
        """Tables as plain text.

        Args:
            width: Columns.
        """
        out = io.StringIO()
        console = Console(file=out, width=width, color_system=None)
        console.print(self._table())
        lines = [f"Pages: {pages}" for pages in self.pages]
        if not self.compiled:
            lines.append("No graph is compiled: vLLM's eager mode.")
        for graph in self.graphs:
            became = ", ".join(f"{count} {name}" for name, count in graph.became.items())
            said = f"rewritten: {became}" if became else "its layers call heal:: operators"
            lines.append(f"Graph of {graph.name}, compiled whole; {said}")
            lines += [f"  kept: {count} {op}: {why}" for op, why, count in graph.kept]
        console.print("\n".join(lines), highlight=False, markup=False)
        return out.getvalue()

    def _table(self) -> Table:
        """Layers that differ in a number are of one kind."""
        counted = Counter(
            (re.sub(r"(?<=\.)\d+(?=\.|$)", "*", layer.name), layer.kind, layer.weight, layer.runs)
            for layer in self.layers
        )
        table = Table(box=None, padding=(0, 2, 0, 0))
        for heading in ("count", "where", "layer", "weight", "runs as"):
            table.add_column(heading, overflow="fold")
        for row, count in counted.items():
            table.add_row(str(count), *map(escape, row))
        return table


def explain(
    model: str, options: dict[str, str], engine: dict[str, Any] | None = None
) -> Explained:
    """Start an engine, and say what runs where; nothing is generated.

    Args:
        model: A model's name or folder.
        options: HEAL's, as `engine_args` takes them.
        engine: More of the engine's arguments.

    Raises:
        MissingExtraError: vLLM is not installed.
        UnavailableError: The engine is refused, with every reason and its way out.
    """
    given = dict(engine or {})
    compiled = not given.pop("enforce_eager", False)
    asked = Asked(
        model=model, options=options, prompts=(), new_tokens=0, compiled=compiled, engine=given
    )
    return Explained.of(in_a_process("explaining", asdict(asked), "HEAL"))
