"""Plans with a name. Layer: study. Imports `plan.configuration`.

`layercast-study` maps the 12 configurations of arXiv 2506.09501 (two GPU types, 2 or 4 of them,
batch sizes 8, 16 and 32) to one machine: another type or number of GPUs changes the order in which
sums are added, so each of the four gets an order of its own. `overnight` simulates two generations
of tensor cores in place of that: an L40S adds as an A100 does, so the second type is an H100.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from healpass.errors import StudyError, suggestion
from healpass.study.plan.configuration import Axes, Configuration, StudyPlan

#: Batch sizes of the paper.
BATCH_SIZES = (8, 16, 32)


@dataclass(frozen=True)
class Preset:
    """A kind of plan, and what it takes where nothing else is asked for.

    Attributes:
        build: Makes the plan of a model from axes and sizes.
        axes: The values of each axis.
        sizes: Fields of `StudyPlan`: prompts, tokens, whether to compile.
    """

    build: Callable[..., StudyPlan]
    axes: Axes = field(default_factory=Axes)
    sizes: Mapping[str, Any] = field(default_factory=dict)


def every_axis(model: str, axes: Axes, **sizes: Any) -> StudyPlan:
    """Batch sizes, chunks and orders generate; padding and simulated GPUs score.

    Args:
        model: The model's name.
        axes: The values of each axis.
        **sizes: Fields of `StudyPlan`: prompts, tokens, whether to compile.
    """
    return StudyPlan(model=model, greedy=axes.generated(), forced=axes.scored(), **sizes)


def with_samples(model: str, axes: Axes, **sizes: Any) -> StudyPlan:
    """`every_axis`, and samples at the smallest and the largest batch size.

    Args:
        model: The model's name.
        axes: The values of each axis.
        **sizes: Fields of `StudyPlan`: prompts, tokens, whether to compile.
    """
    plan = every_axis(model, axes, **sizes)
    ends = {min(axes.batch_sizes), max(axes.batch_sizes)}
    plain = [c for c in plan.greedy if not c.order and not c.chunk and c.batch_size in ends]
    return replace(plan, sampled=tuple(plain) if len(ends) == 2 else ())


def orders_by_batch_sizes(model: str, axes: Axes, **sizes: Any) -> StudyPlan:
    """Every order at every batch size generates.

    Args:
        model: The model's name.
        axes: The values of each axis.
        **sizes: Fields of `StudyPlan`: prompts, tokens, whether to compile.
    """
    greedy = [
        Configuration(precision=precision, batch_size=size, order=order)
        for precision, order, size in product(axes.precisions, axes.orders, axes.batch_sizes)
    ]
    return StudyPlan(model=model, greedy=tuple(greedy), **sizes)


def simulated(model: str, axes: Axes, **sizes: Any) -> StudyPlan:
    """Every GPU in every order at every batch size scores what one configuration generates.

    Args:
        model: The model's name.
        axes: The values of each axis.
        **sizes: Fields of `StudyPlan`: prompts, tokens, whether to compile.
    """
    axis = (axes.precisions, axes.gpus, axes.orders, axes.batch_sizes)
    forced = [
        Configuration(precision=precision, gpu=gpu, order=order, batch_size=size)
        for precision, gpu, order, size in product(*axis)
    ]
    largest = max(axes.batch_sizes)
    greedy = [Configuration(precision=p, batch_size=largest) for p in axes.precisions]
    return StudyPlan(model=model, greedy=tuple(greedy), forced=tuple(forced), **sizes)


PRESETS = {
    "standard": Preset(with_samples),
    "quick": Preset(
        every_axis,
        Axes(batch_sizes=(1, 8), orders=(1,), chunk=None, gpus=()),
        {"prompts": 8, "max_new_tokens": 32, "compiled": False},
    ),
    "layercast-study": Preset(
        orders_by_batch_sizes,
        Axes(batch_sizes=BATCH_SIZES, orders=(0, 1, 2, 3)),
        {"prompts": 32},
    ),
    "overnight": Preset(
        simulated,
        Axes(batch_sizes=BATCH_SIZES, orders=(0, 1), gpus=("a100", "h100")),
        {"prompts": 32, "simulated_prompts": 32, "simulated_tokens": 128},
    ),
}


def plan(
    preset: str, model: str, axes: Mapping[str, Any] | None = None, **sizes: Any
) -> StudyPlan:
    """Build a preset's plan.

    Args:
        preset: A name in `PRESETS`.
        model: The model's name.
        axes: Fields of `Axes` that take the place of the preset's own.
        **sizes: Fields of `StudyPlan` that do.

    Raises:
        StudyError: There is no such preset, or the plan makes no sense.
    """
    if preset not in PRESETS:
        raise StudyError(
            f"preset {preset!r} is unknown; presets: {', '.join(PRESETS)}."
            + suggestion(preset, PRESETS)
        )
    chosen = PRESETS[preset]
    return chosen.build(model, replace(chosen.axes, **(axes or {})), **{**chosen.sizes, **sizes})
