"""The study's figures: survival, depth, margins, cost. Layer: study. Imports `study`, matplotlib.

Figures are made without pyplot, so nothing global is touched, and saved as SVG and PNG. Colours
are those of Okabe and Ito, which colour-blind readers tell apart; each precision keeps its own.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from healpass.study.judge.anatomy import Anatomy
from healpass.study.judge.results import StudyResult, survival

COLORS = {
    "bf16": "#d55e00",
    "fp16": "#e69f00",
    "fp32": "#56b4e9",
    "layercast": "#0072b2",
    "heal": "#009e73",
    "exact": "#5b3fa8",
}
STYLE: Any = {
    "font.size": 11,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a93a3",
    "axes.labelcolor": "#39424e",
    "xtick.color": "#5b6573",
    "ytick.color": "#5b6573",
    "axes.grid": True,
    "grid.color": "#e4e8ee",
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "healpass",
}
SIZE = (5.4, 3.5)


@dataclass(frozen=True)
class Plot:
    """One figure.

    Attributes:
        name: Of its files.
        title: What it shows.
        caption: How to read it.
        svg: The figure as SVG text, from its `<svg` on.
        png: The figure as PNG.
    """

    name: str
    title: str
    caption: str
    svg: str
    png: bytes


def all_plots(result: StudyResult, anatomies: Mapping[str, Anatomy]) -> list[Plot]:
    """Every figure that the study has data for."""
    makers: list[tuple[str, str, str, Callable[[Axes], bool]]] = [
        (
            "survival",
            "How long do answers stay the same?",
            "Share of prompts whose configurations all agree on their first n tokens. A flat line "
            "at 100 % is what reproducible means.",
            lambda axes: _survival(axes, result),
        ),
        (
            "depth",
            "How a difference grows with depth",
            "Largest relative deviation of an operation in each layer, against the plainest "
            "configuration. Precisions without any deviation have no line.",
            lambda axes: _depth(axes, anatomies),
        ),
        (
            "margins",
            "Margins, and the noise that has to stay below them",
            "Curve: share of tokens whose best two candidates lie closer than x. Vertical lines: "
            "the mean shift of that margin between configurations. A token flips where its margin "
            "is smaller than the shift, so every step to the left makes flips rarer.",
            lambda axes: _margins(axes, result),
        ),
        (
            "cost",
            "What reproducibility costs here",
            "Time per token against the first precision, on this machine's processor, and the "
            "predicted flips in a thousand tokens. Lower left is better. GPU costs differ.",
            lambda axes: _cost(axes, result),
        ),
    ]
    drawn = (_draw(*maker) for maker in makers)
    return [plot for plot in drawn if plot is not None]


def _draw(name: str, title: str, caption: str, draw: Callable[[Axes], bool]) -> Plot | None:
    with rc_context(STYLE):
        figure = Figure(figsize=SIZE, layout="constrained")
        if not draw(figure.add_subplot()):
            return None
        svg, png = io.StringIO(), io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None}, transparent=True)
        figure.savefig(png, format="png", dpi=160)
    text = svg.getvalue()
    return Plot(name, title, caption, text[text.index("<svg") :], png.getvalue())


def _color(precision: str) -> str:
    return COLORS.get(precision, "#333333")


def _survival(axes: Axes, result: StudyResult) -> bool:
    length = result.plan.max_new_tokens
    curves = {
        found.precision: survival(found.generated or found.forced, length)
        for found in result.precisions
    }
    curves = {name: curve for name, curve in curves.items() if curve}
    if not curves:
        return False
    for index, (name, curve) in enumerate(curves.items()):
        percent = [100 * share for share in curve]
        style: dict[str, Any] = {"color": _color(name), "linewidth": 2.2, "label": name}
        # Equal curves would hide each other: each is drawn a little thinner over the last.
        axes.step(range(length + 1), percent, where="post", **style | _thinner(index, len(curves)))
    axes.set(xlabel="token", ylabel="prompts with one answer (%)", ylim=(-3, 106))
    axes.set_xlim(0, max(1, length))
    axes.legend(ncols=3, loc="lower left", fontsize=9)
    return True


def _thinner(index: int, count: int) -> dict[str, float]:
    return {"linewidth": 1.4 + 1.1 * (count - 1 - index)}


def _depth(axes: Axes, anatomies: Mapping[str, Anatomy]) -> bool:
    drawn = False
    for name, anatomy in anatomies.items():
        layers: dict[int, float] = {}
        for blame in anatomy.blames:
            for layer, value in blame.by_layer().items():
                layers[layer] = max(layers.get(layer, 0.0), value)
        points = [(layer, value) for layer, value in sorted(layers.items()) if value > 0]
        if points:
            axes.plot(*zip(*points, strict=True), color=_color(name), label=name, linewidth=2)
            drawn = True
    if drawn:
        axes.set(xlabel="layer", ylabel="relative deviation", yscale="log")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(ncols=3, fontsize=9)
    return drawn


def _margins(axes: Axes, result: StudyResult) -> bool:
    shifts = {p: shift for p in result.precisions if (shift := p.mean_shift) is not None}
    if not shifts:
        return False
    # The finest precision has the truest margins; those of 16-bit logits tie.
    finest = min(shifts, key=lambda p: shifts[p])
    gaps = torch.cat([m.gap for m in finest.margins]).sort().values
    gaps = gaps[gaps > 0]
    if not gaps.numel():
        return False
    share = torch.arange(1, gaps.numel() + 1) / gaps.numel()
    axes.plot(gaps.tolist(), share.tolist(), color="#39424e", linewidth=2)
    low = float(gaps[0])
    for precision, shift in shifts.items():
        if shift > 0:
            low = min(low, shift)
            axes.axvline(shift, color=_color(precision.precision), linewidth=2)
            axes.annotate(
                precision.precision,
                (shift, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(3, -3),
                textcoords="offset points",
                rotation=90,
                va="top",
                fontsize=9,
                color=_color(precision.precision),
            )
    axes.set(xscale="log", yscale="log", xlabel="margin, shift (nats)", ylabel="share of tokens")
    axes.set_xlim(low / 3, float(gaps[-1]) * 1.5)
    return True


def _cost(axes: Axes, result: StudyResult) -> bool:
    points = [
        (found.precision, cost, 1000 * found.prediction.rate)
        for found in result.precisions
        if found.prediction is not None and (cost := result.cost(found.precision)) is not None
    ]
    if not points:
        return False
    positive = [flips for _, _, flips in points if flips > 0]
    floor = min(positive, default=1.0) / 10  # where none is predicted: the axis has no zero
    for name, cost, flips in points:
        axes.scatter([cost], [max(flips, floor)], color=_color(name), s=70, zorder=3)
        label = name if flips > 0 else f"{name} (none)"
        axes.annotate(label, (cost, max(flips, floor)), xytext=(7, 5), textcoords="offset points")
    axes.set(
        yscale="log", xlabel="time per token / first", ylabel="predicted flips in 1,000 tokens"
    )
    axes.margins(0.2)
    return True
