"""The report: one HTML file, a JSON file and the figures.

Layer: study. Imports `study`, jinja2, and matplotlib through `report.plots`.

The page needs no network: style, figures and data stand in it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from healpass.errors import UnavailableError
from healpass.study.judge.anatomy import Anatomy
from healpass.study.judge.blame import Blame
from healpass.study.judge.contributions import Contribution, adds_up, independent
from healpass.study.judge.flip_rate import LENGTHS
from healpass.study.judge.results import PrecisionResult, StudyResult
from healpass.study.report import tables
from healpass.study.run.records import Store

PAGE = "report.html"
DATA = "report.json"


def require() -> None:
    """Refuse to begin what could not be reported.

    Raises:
        UnavailableError: jinja2 or matplotlib is not installed.
    """
    for package in ("jinja2", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            raise UnavailableError(
                f"the report needs {package}, which is not installed.\n"
                "Way out: pip install 'healpass[study]'."
            )


def write(store: Store, result: StudyResult) -> Path:
    """Write report.html, report.json and plots/ into the study's folder; returns the page's path.

    Raises:
        StudyError: A file cannot be written.
    """
    anatomies = result.anatomies
    stamp = store.load_json("plan.json")
    data = report_data(store, result, stamp)
    store.save_json(DATA, data)
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    from healpass.study.report.plots import all_plots

    plots = all_plots(result, anatomies)
    for plot in plots:
        store.save_bytes(f"plots/{plot.name}.svg", plot.svg.encode())
        store.save_bytes(f"plots/{plot.name}.png", plot.png)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters |= {
        "number": tables.number,
        "percent": tables.percent,
        "span": tables.span,
        "svg": Markup,
    }
    text = (resources.files("healpass.study") / "templates" / "report.html.jinja").read_text()
    page = environment.from_string(text).render(
        result=result,
        rows=[_row(result, found) for found in result.precisions],
        plots=plots,
        blames=[_blame_row(b) for a in anatomies.values() for b in a.blames],
        contributions=contribution_tables(anatomies),
        examples=examples(store, result),
        notes=tables.notes(result),
        environment=_stamp_rows(stamp["environment"]),
        command=stamp["command"],
    )
    return store.save_bytes(PAGE, page.encode())


def report_data(store: Store, result: StudyResult, stamp: Mapping[str, Any]) -> dict[str, Any]:
    """The content of report.json; `healpass diff` compares two of them.

    Args:
        store: The records; the greedy answers are read.
        result: What the study found.
        stamp: Content of `plan.json`: environment and command.
    """
    answers: dict[str, dict[str, list[list[int]]]] = {}
    for unit in store.plan.units:
        if unit.kind == "greedy":
            c = unit.configuration
            tokens = [list(answer.tokens) for answer in store.answers(unit)]
            answers.setdefault(c.precision, {})[c.label] = tokens
    return {
        **result.to_dict(),
        "environment": stamp["environment"],
        "command": stamp["command"],
        "answers": answers,
        "anatomy": {name: found.to_dict() for name, found in result.anatomies.items()},
    }


def examples(store: Store, result: StudyResult) -> list[dict[str, Any]]:
    """For each precision that diverges: the prompt that does so first, and two of its replies."""
    found = []
    for precision in result.precisions:
        first = precision.generated and precision.generated.first_divergence
        if not first:
            continue
        units = [
            u
            for u in store.plan.units
            if u.kind == "greedy"
            and u.configuration.precision == precision.precision
            and u.configuration.label in first.tokens
        ]
        replies = {u.configuration.label: store.answers(u)[first.prompt].text for u in units}
        one = next(iter(first.tokens))
        other = next(x for x in first.tokens if first.tokens[x] != first.tokens[one])
        shared = _shared(replies[one], replies[other])
        pair = [{"label": x, "reply": replies[x][shared:][:240]} for x in (one, other)]
        found.append(
            {
                "precision": precision.precision,
                "task": store.answers(units[0])[first.prompt].task,
                "position": first.position,
                "shared": replies[one][:shared][-160:],
                "pair": pair,
            }
        )
    return found


def _shared(one: str, other: str) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


@dataclass(frozen=True)
class ContributionTable:
    """What single roundings cost, of precisions that round the same kinds.

    Attributes:
        kinds: One row each.
        errors: By precision, an error per kind.
        independent: By precision, what the single ones would make together; where it is known.
        apart: The precisions whose errors do not add up to that.
    """

    kinds: tuple[str, ...]
    errors: dict[str, tuple[float, ...]]
    independent: dict[str, float]
    apart: tuple[str, ...]


def contribution_tables(anatomies: Mapping[str, Anatomy]) -> list[ContributionTable]:
    """One table for all precisions that round the same kinds of values."""
    by_kinds: dict[tuple[str, ...], dict[str, Sequence[Contribution]]] = {}
    for name, anatomy in anatomies.items():
        if anatomy.contributions:
            kinds = tuple(part.kind for part in anatomy.contributions)
            by_kinds.setdefault(kinds, {})[name] = anatomy.contributions
    found = []
    for kinds, columns in by_kinds.items():
        errors = {name: tuple(p.error for p in parts) for name, parts in columns.items()}
        sums = {n: s for n, parts in columns.items() if (s := independent(parts)) is not None}
        apart = tuple(name for name in sums if not adds_up(columns[name]))
        found.append(ContributionTable(kinds, errors, sums, apart))
    return found


def _row(result: StudyResult, found: PrecisionResult) -> dict[str, Any]:
    """What the page says of one precision."""
    metrics = found.generated
    prediction = found.prediction
    return {
        "precision": found.precision,
        "verdict": tables.verdict(found),
        "varied": any(m.div_percent for m in (metrics, found.sampled) if m is not None),
        "state": {True: "good", False: "bad", None: "open"}[found.reproducible],
        "metrics": metrics,
        "domains": {name: metrics.accuracy for name, metrics in found.domains.items()},
        "sampled": found.sampled,
        "prediction": prediction,
        "interval": prediction and prediction.interval,
        "chances": prediction and [prediction.agreement(count) for count in LENGTHS],
        "flips": tables.flips(found),
        "shift": found.mean_shift,
        "cost": result.cost(found.precision),
    }


def _blame_row(blame: Blame) -> dict[str, Any]:
    return {
        "precision": blame.other.precision,
        "label": blame.other.label,
        "first": blame.first,
        "largest": blame.largest,
        "suspect": blame.suspect,
        "rounding": blame.rounding,
        "end": blame.deviations[-1].total if blame.deviations else None,
    }


def _stamp_rows(stamp: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The environment as rows."""
    rows = [
        ("processor", f"{stamp['cpu']}, {stamp['cpu_cores']} cores, {stamp['cpu_capability']}"),
        ("GPU", ", ".join(gpu["name"] for gpu in stamp["gpus"]) or "none"),
        ("system", stamp["system"]),
        ("Python", stamp["python"]),
        ("threads", str(stamp["threads"])),
    ]
    rows += [(name, version) for name, version in stamp["packages"].items() if version]
    rows += [(name, value) for name, value in stamp["variables"].items()]
    return rows
