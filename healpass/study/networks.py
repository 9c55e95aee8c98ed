"""A checkpoint made ready to run as one configuration says.

Layer: study. Imports `integrations`, the public names and `study`.

Baselines run as transformers runs them; the other precisions are compiled by Inductor, as users
run them. What runs once, in chunks or in another order of summation, is not worth the minutes that
a compile takes, and a simulated GPU has no fast kernels: there the rewritten graph runs node by
node (`study.interpret`), and so does every text that is scored. Another order is that of permuted
linear layers (`study.reorder`), or of the operators where a model cannot be permuted.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from healpass.integrations.checkpoint import Checkpoint
from healpass.study.configuration import Configuration, Unit
from healpass.study.interpret import Watch, backend
from healpass.study.reorder import can_reorder, reorder

#: The most graphs of one model: prefill, later chunks and decode, for one prompt and for several,
#: with and without a mask.
GRAPHS = 16


@dataclass(frozen=True)
class Network:
    """A model ready to run; units with one `key` share it, and what was compiled."""

    key: tuple[Any, ...]
    model: Any


def key_of(unit: Unit) -> tuple[Any, ...]:
    """What a unit's model depends on: batch size, chunks and padding are not part of it."""
    c = unit.configuration
    by_node = c.runs_by_node(compiled=True)
    return (c.precision, c.kv, c.order, c.gpu, by_node, unit.kind == "forced")


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
    if unit.kind == "forced":
        interpret(model, c)
        return Network(key_of(unit), model)
    by_node = c.runs_by_node(compiled)
    if c.order and not c.gpu:
        if can_reorder(model):
            reorder(model, c.order)
            c = dataclasses.replace(c, order=0)
        else:
            by_node = True
    if not c.is_baseline:
        from healpass.integrations.transformers import heal_model

        heal_model(model, **c.heal_options())
    if by_node:
        interpret(model, c)
    return Network(key_of(unit), model)


def interpret(model: Any, configuration: Configuration, watch: Watch | None = None) -> None:
    """Let a model's graph, rewritten as the configuration says, run node by node."""
    model.compile(backend=backend(configuration, watch), dynamic=True)


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
