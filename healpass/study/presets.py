"""Plans with a name. Layer: study. Imports `study.configuration`.

`layercast-study` maps the 12 configurations of arXiv 2506.09501 (two GPU types, 2 or 4 of them,
batch sizes 8, 16 and 32) to one machine: another type or number of GPUs changes the order in which
sums are added, so each of the four gets an order of its own. `overnight` simulates two generations
of tensor cores in place of that: an L40S adds as an A100 does, so the second type is an H100.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

from healpass.errors import StudyError, suggestion
from healpass.study.configuration import Axes, Configuration, StudyPlan

#: Batch sizes of the paper.
BATCH_SIZES = (8, 16, 32)


def standard(model: str, axes: Axes, **sizes: Any) -> StudyPlan:
    """Every axis: 20 prompts of 128 tokens, simulated GPUs on 4 of 64."""
    generated = axes.generated()
    few = [c for c in generated if not c.order and not c.chunk]
    sampled = [c for c in few if c.batch_size in (min(axes.batch_sizes), max(axes.batch_sizes))]
    return StudyPlan(
        model=model,
        greedy=generated,
        sampled=tuple(sampled) if len(set(axes.batch_sizes)) > 1 else (),
        forced=axes.scored(),
        **sizes,
    )


def quick(model: str, axes: Axes, **sizes: Any) -> StudyPlan:
    """A look in minutes: two batch sizes and one other order, no simulated GPU."""
    axes = replace(axes, batch_sizes=(1, 8), orders=(1,), chunk=None, gpus=())
    small = {"prompts": 8, "max_new_tokens": 32, "forced_prompts": 8, "compiled": False}
    return replace(standard(model, axes, **small | sizes), sampled=())


def layercast_study(model: str, axes: Axes, **sizes: Any) -> StudyPlan:
    """12 configurations per precision: four orders of summation by three batch sizes."""
    greedy = [
        Configuration(precision=precision, batch_size=size, order=order)
        for precision, order, size in product(axes.precisions, range(4), BATCH_SIZES)
    ]
    return StudyPlan(model=model, greedy=tuple(greedy), **{"prompts": 32} | sizes)


def overnight(model: str, axes: Axes, **sizes: Any) -> StudyPlan:
    """12 simulated configurations per precision: two GPUs, two orders, three batch sizes."""
    gpus = tuple(axes.gpus[:2]) if len(axes.gpus) == 2 else ("a100", "h100")
    forced = [
        Configuration(precision=precision, batch_size=size, order=order, gpu=gpu)
        for precision, gpu, order, size in product(axes.precisions, gpus, (0, 1), BATCH_SIZES)
    ]
    greedy = [Configuration(precision=p, batch_size=max(BATCH_SIZES)) for p in axes.precisions]
    many = {"prompts": 32, "simulated_prompts": 32, "simulated_tokens": 128}
    return StudyPlan(model=model, greedy=tuple(greedy), forced=tuple(forced), **many | sizes)


PRESETS: dict[str, Callable[..., StudyPlan]] = {
    "standard": standard,
    "quick": quick,
    "layercast-study": layercast_study,
    "overnight": overnight,
}


def plan(preset: str, model: str, axes: Axes, **sizes: Any) -> StudyPlan:
    """Build a preset's plan.

    Raises:
        StudyError: There is no such preset, or the plan makes no sense.
    """
    if preset not in PRESETS:
        raise StudyError(
            f"preset {preset!r} is unknown; presets: {', '.join(PRESETS)}."
            + suggestion(preset, PRESETS)
        )
    return PRESETS[preset](model, axes, **sizes)
