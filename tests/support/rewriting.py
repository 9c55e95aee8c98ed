"""Run a function as `backend="heal"` rewrites it, by plain torch instead of compiled code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch.fx import GraphModule

from healpass.config import HealConfig
from healpass.graph.passes import prepack
from healpass.graph.pipeline import rewrite
from healpass.report import GraphReport


@dataclass
class Rewritten:
    """A callable that rewrites what it captures. `graphs` and `reports` fill at the first call.

    With `aot` the rewritten graph goes through AOTAutograd, so that the backward is traced from
    the operators' own formulas, as Inductor would get it. Attention is in FP32 unless `config`
    says otherwise: the INT16 of the default configuration is no FP32-equivalent. `dynamic` is that
    of `torch.compile`.
    """

    function: Callable[..., Any]
    config: HealConfig = field(default_factory=lambda: HealConfig(outputs="fp32", kv="fp32"))
    aot: bool = False
    dynamic: bool | None = None
    graphs: list[GraphModule] = field(default_factory=list)
    reports: list[GraphReport] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.compiled = torch.compile(self.function, backend=self._backend, dynamic=self.dynamic)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.compiled(*args, **kwargs)

    def _backend(self, graph_module: GraphModule, example_inputs: list[Any]) -> Any:
        self.reports.append(rewrite(graph_module, self.config))
        self.graphs.append(graph_module)
        inputs = prepack.example_inputs(graph_module, example_inputs)
        run = aot_eager(graph_module, inputs) if self.aot else graph_module.forward
        return prepack.with_packed_inputs(graph_module, run)

    @property
    def nodes(self) -> list[Any]:
        """All records of all graphs."""
        return [node for report in self.reports for node in report.nodes]

    @property
    def kept(self) -> dict[str, str]:
        """Kept operators and why."""
        return {node.op: node.reason for node in self.nodes if not node.rewritten}


def to(tree: Any, dtype: torch.dtype) -> Any:
    """Every floating-point tensor of a nested structure in `dtype`."""
    return torch.utils._pytree.tree_map(
        lambda leaf: (
            leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
        ),
        tree,
    )


def absolute(tree: Any) -> Any:
    """Every floating-point tensor of a nested structure, its absolute values in FP64."""
    return torch.utils._pytree.tree_map(
        lambda leaf: (
            leaf.double().abs() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
        ),
        tree,
    )


def worst_ratio(result: Tensor, exact: Tensor, budget: Tensor) -> float:
    """The largest observed/bound over all elements; where the budget is zero the error must be
    too."""
    error = (result.double() - exact).abs()
    assert not error.isnan().any(), "NaN where the reference has none"
    ratio = torch.where(error == 0, 0.0, error / budget)
    return float(ratio.max()) if ratio.numel() else 0.0
