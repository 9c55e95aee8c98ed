"""`heal_model` with entries that plain torch runs as HEAL rewrites them: no Inductor, so fast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch.fx import GraphModule


@contextmanager
def interpreted() -> Iterator[list[GraphModule]]:
    """What is compiled inside is run by plain torch; yields the graphs, as they are rewritten."""
    graphs: list[GraphModule] = []

    def keep(graph_module: GraphModule, *_: Any) -> Callable[..., Any]:
        graphs.append(graph_module)
        return graph_module.forward

    with mock.patch("healpass.backend._inductor", keep):
        yield graphs
