"""The study's tables in a terminal. Layer: study. Imports `study` only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.markup import escape
from rich.table import Table

from healpass.study.judge.blame import Blame
from healpass.study.judge.flip_rate import FlipRate
from healpass.study.judge.results import PrecisionResult, StudyResult

UNKNOWN = "-"


def paper_table(result: StudyResult) -> Table:
    """One row per precision, the metrics as arXiv 2506.09501 names them."""
    headings = (
        "configurations",
        "Std@Acc",
        "Avg_Std@Output_Length",
        "Div_Percent",
        "mean Div_Index",
        "Avg_Std@top1_prob",
        "most outputs of a prompt",
    )
    title = f"{escape(result.plan.model)}: {result.plan.prompts} prompts, greedy"
    table = _table(title, headings)
    for found in result.precisions:
        metrics = found.generated
        if metrics is None:
            table.add_row(found.precision, *[UNKNOWN] * len(headings))
            continue
        table.add_row(
            found.precision,
            str(len(metrics.configurations)),
            number(metrics.std_acc, " %"),
            number(metrics.avg_std_output_length),
            number(metrics.div_percent, " %"),
            number(metrics.mean_div_index),
            number(metrics.avg_std_top1_prob),
            str(max(metrics.unique_outputs, default=0)),
        )
    return table


def domain_table(result: StudyResult) -> Table:
    """One row per precision: right answers in each domain, from the least to the most."""
    headings = [f"{escape(name)}, {count} prompts" for name, count in result.domains.items()]
    table = _table("Right answers by domain, over the configurations", headings)
    for found in result.precisions:
        shares = {name: metrics.accuracy for name, metrics in found.domains.items()}
        table.add_row(found.precision, *[span(shares.get(name)) for name in result.domains])
    return table


def prediction_table(result: StudyResult) -> Table:
    """One row per precision: flips on given text, measured and predicted, and what follows."""
    headings = (
        "mean shift (nats)",
        "flips measured",
        "predicted (95% interval)",
        "same 1k tokens",
        "same 16k tokens",
        "time / first",
        "reproducible",
    )
    table = _table(
        "Scored on given text: flips of the best token, and what they foretell", headings
    )
    for found in result.precisions:
        table.add_row(
            found.precision,
            *_prediction_cells(found.prediction, found),
            number(result.cost(found.precision)),
            verdict(found),
        )
    return table


def _table(title: str, headings: Sequence[str]) -> Table:
    """An empty table: the precision, then numbers."""
    table = Table(title=title)
    table.add_column("precision")
    for heading in headings:
        table.add_column(heading, justify="right", overflow="fold")
    return table


def verdict(found: PrecisionResult) -> str:
    """`yes`, `no`, or that it was not shown; and whether even the bits agree."""
    if found.reproducible is None:
        return "not shown"
    if not found.reproducible:
        return "no"
    return "yes, bit for bit" if found.identical else "yes"


def number(value: float | None, unit: str = "") -> str:
    """A number with three digits, a dash where there is none."""
    return UNKNOWN if value is None else f"{value:.3g}{unit}"


def _prediction_cells(prediction: FlipRate | None, found: PrecisionResult) -> list[str]:
    if prediction is None:
        return [UNKNOWN] * 5
    low, high = prediction.interval
    chances = [prediction.agreement(count) for count in (1_000, 16_000)]
    return [
        number(found.mean_shift),
        flips(found),
        f"{prediction.rate:.2g} ({low:.2g} to {high:.2g})",
        *[percent(chance.chance) for chance in chances],
    ]


def span(percentages: Mapping[str, float] | None) -> str:
    """The least and the most of what the configurations have, `5 to 10 %`; one where all agree."""
    if not percentages:
        return UNKNOWN
    values = percentages.values()
    ends = dict.fromkeys((number(min(values)), number(max(values))))
    return f"{' to '.join(ends)} %"


def percent(share: float) -> str:
    """A share in percent; below a hundredth of one its size does not matter."""
    return "< 0.01 %" if 0 < share < 1e-4 else f"{100 * share:.3g} %"


def flips(found: PrecisionResult) -> str:
    """How many best tokens differed, of how many; a dash where nothing was scored."""
    flipped = [m.flipped for m in found.margins]
    if not flipped:
        return UNKNOWN
    return f"{sum(int(f.sum()) for f in flipped)} of {sum(f.numel() for f in flipped)}"


def blames(result: StudyResult) -> list[str]:
    """For each pair of configurations: where they first differ, and which operation stands out."""
    lines = []
    for found in result.anatomies.values():
        for blame in found.blames:
            first = blame.first and f"first differs at {blame.first.operation}"
            label = f"{blame.other.precision}, {blame.other.label}"
            lines.append(f"{label}: {first or 'all bits agree'}{suspicion(blame)}")
    return lines


def suspicion(blame: Blame) -> str:
    """The suspect; without one, how small a fault would go unseen beside 16-bit roundings."""
    if blame.suspect:
        return f"; SUSPECT: {blame.suspect.operation}"
    if blame.first and blame.rounding:
        return f"; no suspect above one rounding, {number(blame.rounding)}"
    return ""


def notes(result: StudyResult) -> list[str]:
    """What was not run, and why: one line per reason, or per precision."""
    lines = [
        f"not available: {name}: {reason}"
        for found in result.precisions
        for name, reason in found.unavailable.items()
    ]
    lines += [
        f"not finished: {found.precision}: {', '.join(found.missing)}"
        for found in result.precisions
        if found.missing
    ]
    return lines
