"""The other ways in: `explain`, which only looks, and `inductor_options`. Imports `backend`."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule

from healpass import watch
from healpass.backend import check_torch, inductor_patches
from healpass.config import HealConfig
from healpass.errors import ConfigError
from healpass.graph.observe import observe as compare
from healpass.graph.passes import prepack
from healpass.graph.pipeline import rewrite
from healpass.report import HealReport

Options = HealConfig | Mapping[str, Any] | None


def explain(
    model: Any, config: Options = None, /, *inputs: Any, observe: bool = False, **options: Any
) -> Any:
    """Say what `backend="heal"` does to a model, without compiling it.

    `healpass.explain(model, precision="exact")(inputs)`: the model is captured as `torch.compile`
    captures it, rewritten, and run once with plain torch.

    Args:
        model: A module or a function.
        config: The options to explain: a `HealConfig` or a mapping of its fields.
        *inputs: None; see below.
        observe: Compare the rewritten nodes with FP64 on the given inputs, and propagate all
            errors to the outputs. Takes the memory of the model and of its activations in FP64,
            as training would, and some ten times the time of a forward pass.
        **options: The fields of `HealConfig` by name.

    Returns:
        A function that takes what the model is called with, and returns the report: every matmul
        and SDPA node, rewritten or kept and why, with the user's source line and the error bound,
        and every kernel boundary that is still 16-bit. Called in one go with tensors,
        `explain(model, inputs)`, as `torch._dynamo.explain` once was, it warns and returns the
        report; `config=` are the options then.

    Raises:
        ConfigError: An option is unknown or has a wrong value.
    """
    check_torch(torch.__version__)
    if inputs or any(isinstance(x, Tensor) for x in (config, *options.values())):
        warnings.warn(
            "healpass.explain(model, inputs) is deprecated; use "
            "healpass.explain(model, **options)(inputs).", DeprecationWarning, stacklevel=2,
        )  # fmt: skip
        given = (config,) if inputs or config is not None else ()
        asked = HealConfig.read(options.pop("config", None))
        return _explain(model, asked, observe, *given, *inputs, **options)
    return partial(_explain, model, HealConfig.read(config, **options), observe)


def _explain(
    model: Any, config: HealConfig, observe: bool, /, *args: Any, **kwargs: Any
) -> HealReport:
    report = HealReport(dataclasses.asdict(config))

    def look(graph_module: GraphModule, example_inputs: list[Any]) -> Any:
        del example_inputs
        found = rewrite(graph_module, config, outermost=watch.is_outermost())
        report.graphs.append(found)
        run = partial(compare, graph_module, config, found) if observe else graph_module.forward
        return prepack.with_packed_inputs(graph_module, run)

    def call(*call_args: Any, **call_kwargs: Any) -> Any:
        return model(*call_args, **call_kwargs)

    look.heal_config = config  # type: ignore[attr-defined]
    compiled = torch.compile(call, backend=look)
    region = watch.attach(watch.context_of(compiled))
    if region is not None:
        region.silent = True
    compiled(*args, **kwargs)
    for record in region.found if region is not None else ():
        (report.uncompiled if record.ends_a_promise else report.breaks).append(str(record))
    return report


class RewritePass:
    """The passes as Inductor's `pre_grad_custom_pass`: a callable on a graph."""

    def __init__(self, config: HealConfig) -> None:
        self.config = config

    def __call__(self, graph: Graph) -> None:
        """Rewrite the graph in place."""
        owner = graph.owning_module
        assert isinstance(owner, GraphModule), "Inductor hands out graphs that belong to a module"
        report = rewrite(owner, self.config, outermost=watch.is_outermost())
        watch.note(report)

    def uuid(self) -> Any:
        """The same key as the backend's."""
        from healpass.cache_key import CacheKey

        return CacheKey(self.config).uuid()


def inductor_options(config: Options = None, /, **options: Any) -> dict[str, Any]:
    """The second door: options that make plain `torch.compile(model, options=...)` do the same.

    For tools that accept no backend name but Inductor's. The result holds Inductor settings only.

    Args:
        config: A `HealConfig` or a mapping of its fields.
        **options: The fields of `HealConfig` by name.

    Returns:
        A dict for `torch.compile(model, options=...)`.

    Raises:
        ConfigError: An option is unknown, has a wrong value, or needs the backend.
    """
    from healpass import lowering

    check_torch(torch.__version__)
    config = HealConfig.read(config, **options)
    if config.prepack:
        raise ConfigError(
            "prepack=True needs backend='heal': it changes the inputs of the compiled graph, "
            "which Inductor's own options cannot.\nUse torch.compile(model, backend='heal', "
            "options={'prepack': True}), or leave prepack out."
        )
    lowering.register()
    if config.precision == "traced":
        return inductor_patches(config)
    return inductor_patches(config) | {"pre_grad_custom_pass": RewritePass(config)}
