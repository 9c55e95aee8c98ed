"""The examples as modules: `examples/` is no package, its files are scripts."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.backends.debugging import aot_eager

EXAMPLES = Path(__file__).parents[2] / "examples"


def load_example(name: str) -> Any:
    """The module of `examples/{name}.py`, executed."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run_by_torch(graph_module: Any, inputs: Any, *_: Any) -> Any:
    """What stands in for Inductor, which takes most of an example's time."""
    trained = torch.is_grad_enabled() and any(
        isinstance(x, torch.Tensor) and x.requires_grad for x in inputs
    )
    return aot_eager(graph_module, inputs) if trained else graph_module.forward
