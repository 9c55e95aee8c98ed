"""A checkpoint made ready to run as one configuration says.

Layer: study. Imports `integrations`, the public names and `study`.

Baselines run as transformers runs them; the other precisions are compiled by Inductor, as users
run them. A simulated GPU has no fast kernels: there the rewritten graph runs node by node
(`run.interpret`), and so does every text that is scored, which is not worth the minutes that a
compile takes. Another order is that of permuted linear layers (`run.reorder`), compiled once for
all orders, or of the operators where a model cannot be permuted.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from healpass.integrations.checkpoint import Checkpoint
from healpass.study.plan.configuration import Configuration, Unit
from healpass.study.run.interpret import NodeByNode
from healpass.study.run.reorder import Reordered, can_reorder

#: The most graphs of one model: prefill, later chunks and decode, for one prompt and for several,
#: with and without a mask.
GRAPHS = 16


@dataclass(frozen=True)
class Network:
    """A model ready to run; units with one `key` share it, and what was captured or compiled.

    Attributes:
        key: See `key_of`.
        model: Runs as the configuration says that was last given to `use`.
        reordered: Its linear layers, where their order can be changed.
        by_node: Its backend, where graphs run node by node.
    """

    key: tuple[Any, ...]
    model: Any
    reordered: Reordered | None = None
    by_node: NodeByNode | None = None

    def use(self, configuration: Configuration) -> None:
        """Run as another configuration with the same key from now on."""
        if self.reordered is not None:
            self.reordered.use(configuration.order)
            configuration = dataclasses.replace(configuration, order=0)
        if self.by_node is not None:
            self.by_node.configuration = configuration


def key_of(unit: Unit) -> tuple[Any, ...]:
    """What a unit's model depends on: what is compiled, not what a node or a weight is told."""
    c = unit.configuration
    if unit.kind == "forced":
        return (c.precision, "forced")
    return (c.precision, c.kv, c.gpu, _may_reorder(c))


def _may_reorder(configuration: Configuration) -> bool:
    """Whether linear layers are permuted to generate; the rest is spared what that costs."""
    return bool(configuration.order and not configuration.gpu)


def build(checkpoint: Checkpoint, unit: Unit, *, compiled: bool = True) -> Network:
    """Load the checkpoint and set it up for a unit.

    Args:
        checkpoint: The model under study.
        unit: A generating unit gets HEAL's cache where HEAL is in use; a forced one scores whole
            texts and needs none.
        compiled: Whether Inductor compiles where it can; else nodes run one by one.
    """
    c = unit.configuration
    model = checkpoint.model(c.dtype)
    torch._dynamo.reset()  # the graphs of the network before this one are of no use
    reordered, by_node = None, True
    if unit.kind != "forced":
        if _may_reorder(c) and can_reorder(model):
            reordered = Reordered(model)
        by_node = c.runs_by_node(compiled) or bool(c.order and reordered is None)
        if not c.is_baseline:
            from healpass.integrations.transformers import heal_model

            heal_model(model, **dataclasses.replace(c, order=0).heal_options())
    network = Network(key_of(unit), model, reordered, interpret(model, c) if by_node else None)
    network.use(c)
    return network


def interpret(model: Any, configuration: Configuration) -> NodeByNode:
    """Let a model's graph, rewritten as a configuration says, run node by node."""
    backend = NodeByNode(configuration)
    model.compile(backend=backend, dynamic=True)
    return backend


@contextlib.contextmanager
def strict_dynamo() -> Iterator[None]:
    """Dynamo as the study needs it: constants stay constants, and it never gives up in silence."""
    settings = {
        "fail_on_recompile_limit_hit": True,
        "recompile_limit": GRAPHS,
        "specialize_float": True,
    }
    with torch.no_grad(), torch._dynamo.config.patch(settings):
        yield
