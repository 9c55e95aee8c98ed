"""Runs the graph of a configuration node by node, and watches it.

Layer: study. Imports the public names and `study`.

`torch.compile` hands over the graph; `healpass.inductor_options` offers the passes that rewrite
it; here every node then runs with plain torch. That takes seconds to set up where a compiler takes
minutes, works for every order and simulated GPU, and lets each operation be seen. Most of those
seconds are Dynamo's, so one captured graph serves all configurations of a model: each rewrites a
copy.

An *operation* is what a reader would point at: a leaf module (`model.layers.3.mlp.up_proj`), known
by its last node, or a function called between modules (`model.layers.3.self_attn:sdpa`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from healpass import inductor_options
from healpass.errors import StudyError
from healpass.study.plan.configuration import Configuration
from healpass.study.run.baselines import baseline_functions
from healpass.study.run.prepared_weights import KeptWeights

#: Functions that change no value: what follows them is the operation.
_MOVES = {
    *("to", "type_as", "float", "half", "bfloat16", "contiguous", "clone", "detach"),
    *("view", "reshape", "flatten", "unflatten", "transpose", "t", "permute", "expand"),
    *("unsqueeze", "squeeze", "getitem", "slice", "split", "chunk", "unbind"),
}
#: One name for what a baseline's and a rewritten graph call differently.
_NAMES = {
    "scaled_dot_product_attention": "attention",
    "sdpa": "attention",
    "integer_attention": "attention",
}


@dataclass
class Watch:
    """Sees the value of each operation, and may change it.

    Attributes:
        see: Called with an operation's name and value; what it returns goes on through the graph.
        functions: What stands for torch's functions in the graph.
    """

    see: Callable[[str, Tensor], Tensor]
    functions: Mapping[Any, Callable[..., Any]] = field(default_factory=dict)


@dataclass
class Recorder:
    """Keeps the value of each operation of one run."""

    values: dict[str, Tensor] = field(default_factory=dict)

    def see(self, name: str, value: Tensor) -> Tensor:
        """Keep a value as it is now."""
        self.values[name] = value.detach().clone()
        return value


class NodeByNode:
    """A backend for `torch.compile` that runs graphs as the configuration in force says.

    Attributes:
        configuration: May change between two calls of the model, to one of the same dtypes.
        watch: Sees the operations; None if nobody looks.
    """

    def __init__(self, configuration: Configuration) -> None:
        self.configuration = configuration
        self.watch: Watch | None = None
        self._kept = KeptWeights()

    def __call__(self, graph_module: GraphModule, example_inputs: list[Any]) -> Any:
        """Take a graph from Dynamo; what is returned runs it."""
        del example_inputs
        rewritten = {_way(self.configuration): _rewritten(graph_module, self.configuration)}

        def run(*args: Any) -> Any:
            way = _way(self.configuration)
            if way not in rewritten:
                rewritten[way] = _rewritten_later(graph_module, self.configuration)
            return self._interpret(rewritten[way], *args)

        return run

    def _interpret(self, graph_module: GraphModule, *args: Any) -> Any:
        names = operations(graph_module) if self.watch else {}
        functions = baseline_functions(self.configuration) | self._kept.functions()
        functions |= self.watch.functions if self.watch else {}
        return _Watched(graph_module, functions, names, self.watch).run(*args)


def _way(configuration: Configuration) -> tuple[Any, ...]:
    """What a rewritten graph depends on."""
    return (configuration.precision, *configuration.heal_options().items())


def _rewritten(graph_module: GraphModule, configuration: Configuration) -> GraphModule:
    """A copy of Dynamo's graph, rewritten as the configuration says."""
    copy = GraphModule(graph_module, deepcopy(graph_module.graph))
    if not configuration.is_baseline:
        options = inductor_options(outputs="fp32", **configuration.heal_options())
        options["pre_grad_custom_pass"](copy.graph)
        copy.recompile()
    return copy


def _rewritten_later(graph_module: GraphModule, configuration: Configuration) -> GraphModule:
    """As `_rewritten`, when Dynamo has already noted for which sizes its graph holds.

    Raises:
        StudyError: The passes rely on something about the sizes that Dynamo did not note.
    """
    sizes = _shape_environment(graph_module)
    before = len(sizes.guards) if sizes else 0
    copy = _rewritten(graph_module, configuration)
    if sizes and len(sizes.guards) != before:
        found = "; ".join(str(guard.expr) for guard in sizes.guards[before:])
        raise StudyError(
            f"{configuration.name}: the rewritten graph holds only where {found}, which the "
            "first configuration of the model did not need, so both cannot share a graph. "
            "Please report this with the model's name."
        )
    return copy


def _shape_environment(graph_module: GraphModule) -> Any:
    values = (node.meta.get("example_value") for node in graph_module.graph.nodes)
    modes = (getattr(value, "fake_mode", None) for value in values)
    return next((mode.shape_env for mode in modes if mode is not None), None)


class _Watched(Interpreter):
    """Runs nodes, a baseline's sums as its configuration adds them, and shows operations."""

    def __init__(
        self,
        graph_module: GraphModule,
        functions: Mapping[Any, Callable[..., Any]],
        names: Mapping[Node, str],
        watch: Watch | None,
    ) -> None:
        super().__init__(graph_module)
        self.functions = functions
        self.names = names
        self.watch = watch

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Run a function, or what stands for it."""
        return self.functions.get(target, target)(*args, **kwargs)

    def run_node(self, n: Node) -> Any:
        """Run a node; show its value if it ends an operation."""
        value = super().run_node(n)
        if self.watch is None or n not in self.names or not _is_float(value):
            return value
        return self.watch.see(self.names[n], value)


def operations(graph_module: GraphModule) -> dict[Node, str]:
    """The nodes that end an operation, with its name, in the order of the graph."""
    calls = [n for n in graph_module.graph.nodes if n.op.startswith("call")]
    paths = {n: module_path(n) for n in calls}
    inner = {parent for path in paths.values() for parent in _parents(path)}
    last: dict[str, Node] = {}
    count: Counter[tuple[str, str]] = Counter()
    for n in calls:
        path, function = paths[n], _function(n)
        if not path or function is None:
            continue
        if path not in inner:
            last[path] = n
        elif function not in _MOVES:
            number = count[path, function]
            count[path, function] += 1
            last[f"{path}:{function}" + (f" {number + 1}" if number else "")] = n
    order = {n: index for index, n in enumerate(calls)}
    return {n: name for name, n in sorted(last.items(), key=lambda item: order[item[1]])}


def module_path(node: Node) -> str:
    """The path of the module that called a node, as `model.layers.3.mlp.up_proj`, or ""."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    path = re.sub(r"\['?([^'\]]+)'?\]", r".\1", path.removeprefix("L")).replace("_modules.", "")
    return re.sub(r"^\.(self|model|fn|mod)(\.|$)", "", path)


def _parents(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:count]) for count in range(len(parts))]


def _function(node: Node) -> str | None:
    """The plain name of what a node calls; None for what computes nothing."""
    target = node.target
    schema = getattr(target, "_schema", None)
    name = schema.name if schema is not None else getattr(target, "__name__", str(target))
    if name.startswith("_") and not name.startswith("_to"):
        return None
    name = name.rpartition("::")[2]
    return _NAMES.get(name, name)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
