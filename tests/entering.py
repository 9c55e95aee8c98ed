"""`heal_model` with entries that plain torch runs as HEAL rewrites them: no Inductor, so fast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.fx import GraphModule

from healpass.config import HealConfig
from healpass.graph import prepack
from healpass.graph.pipeline import rewrite
from healpass.integrations import entry


@contextmanager
def interpreted() -> Iterator[list[GraphModule]]:
    """Entries made inside are run by plain torch; yields the graphs, as they are captured."""
    graphs: list[GraphModule] = []

    def compile_entry(function: Callable[..., Any], config: dict[str, Any]) -> Any:
        def backend(graph_module: GraphModule, example_inputs: list[Any]) -> Any:
            del example_inputs
            rewrite(graph_module, HealConfig.from_options(config, None))
            graphs.append(graph_module)
            return prepack.with_packed_inputs(graph_module, graph_module.forward)

        return torch.compile(function, backend=backend, dynamic=True)

    with mock.patch.object(entry, "compile_entry", compile_entry):
        yield graphs
