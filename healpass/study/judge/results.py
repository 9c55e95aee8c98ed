"""What the records say: metrics, predictions, cost and the verdict of each precision.

Layer: study. Imports `study` only. Runs no model.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from healpass.study.judge import anatomy
from healpass.study.judge.anatomy import Anatomy
from healpass.study.judge.flip_rate import FlipRate, measured_flip_rate, predict_flip_rate
from healpass.study.judge.metrics import Metrics, agreement_by_position, compute_metrics
from healpass.study.plan.configuration import Configuration, StudyPlan, Unit
from healpass.study.plan.tasks import Task
from healpass.study.run.records import Answer, Margins, Output, Scores, Store
from healpass.study.run.runner import reference_unit
from healpass.study.run.score import greedy_output, margins


@dataclass(frozen=True, eq=False)
class Shift:
    """One configuration against the reference, on given text.

    Attributes:
        configuration: The other configuration.
        flips: The predicted flip rate.
        measured: The share of tokens whose best token differs.
        identical: Whether all logits have the same bits.
        by_prompt: The margins of each prompt.
    """

    configuration: Configuration
    flips: FlipRate
    measured: float
    identical: bool
    by_prompt: tuple[Margins, ...]


@dataclass(frozen=True, eq=False)
class PrecisionResult:
    """What was found for one precision.

    Attributes:
        precision: Its name.
        generated: Metrics of the greedy answers; None where none is complete.
        domains: Metrics of the greedy answers to the tasks of one domain, by its name.
        sampled: Metrics of the sampled ones; None where there are none.
        forced: Metrics of given text: what greedy decoding would have written, up to its first
            difference. Lengths and accuracy are not known there.
        shifts: Margins of every scored configuration against the first.
        prediction: The flip rate over all of them; None where nothing was compared.
        seconds_per_token: Of each greedy configuration that runs at its own speed, not by node.
        unavailable: Why a configuration was not run, by its name.
        missing: Units that are not complete.
    """

    precision: str
    generated: Metrics | None
    domains: dict[str, Metrics]
    sampled: Metrics | None
    forced: Metrics | None
    shifts: tuple[Shift, ...]
    prediction: FlipRate | None
    seconds_per_token: dict[str, float]
    unavailable: dict[str, str]
    missing: tuple[str, ...]

    @property
    def reproducible(self) -> bool | None:
        """Whether no output and no best token differed; None where nothing was compared.

        A difference counts even in an unfinished study; its absence does not.
        """
        metrics = [m for m in (self.generated, self.sampled, self.forced) if m is not None]
        compared = [m.div_percent for m in metrics if m.div_percent is not None]
        if any(compared) or any(shift.measured > 0 for shift in self.shifts):
            return False
        return None if self.missing or not compared else True

    @property
    def identical(self) -> bool | None:
        """Whether all logits have the same bits in every scored configuration."""
        return all(shift.identical for shift in self.shifts) if self.shifts else None

    @property
    def margins(self) -> tuple[Margins, ...]:
        """By prompt, over all configurations."""
        return pooled([shift.by_prompt for shift in self.shifts])

    @property
    def mean_shift(self) -> float | None:
        """Mean change of a margin between configurations in nats; None where none was scored."""
        found = self.margins
        return float(torch.cat([m.shift for m in found]).abs().mean()) if found else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "precision": self.precision,
            "mean_shift": self.mean_shift,
            "reproducible": self.reproducible,
            "bit_identical": self.identical,
            "greedy": self.generated and self.generated.to_dict(),
            "domains": {name: _of_a_domain(found) for name, found in self.domains.items()},
            "sampled": self.sampled and self.sampled.to_dict(),
            "forced": self.forced and _without_lengths(self.forced),
            "prediction": self.prediction and self.prediction.to_dict(),
            "shifts": [
                asdict(s.configuration)
                | {"measured": s.measured, "identical": s.identical, **s.flips.to_dict()}
                for s in self.shifts
            ],
            "seconds_per_token": self.seconds_per_token,
            "unavailable": self.unavailable,
            "missing": list(self.missing),
        }


@dataclass(frozen=True, eq=False)
class StudyResult:
    """The whole study, evaluated."""

    plan: StudyPlan
    precisions: tuple[PrecisionResult, ...]
    anatomies: dict[str, Anatomy]

    @property
    def domains(self) -> dict[str, int]:
        """Domains of the tasks that were answered, and how many tasks each has."""
        return {n: m.prompts for result in self.precisions for n, m in result.domains.items()}

    @property
    def exit_code(self) -> int:
        """0 where every precision was shown to be reproducible, else 1."""
        return 0 if all(result.reproducible is True for result in self.precisions) else 1

    def cost(self, precision: str) -> float | None:
        """Time per token against the first precision's: geometric mean over what both ran."""
        base, own = (self._seconds(p) for p in (self.plan.precisions[0], precision))
        both = [label for label in own if label in base]
        return statistics.geometric_mean([own[x] / base[x] for x in both]) if both else None

    def _seconds(self, precision: str) -> dict[str, float]:
        return next(r.seconds_per_token for r in self.precisions if r.precision == precision)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "plan": self.plan.to_dict(),
            "exit_code": self.exit_code,
            "precisions": [
                result.to_dict() | {"relative_cost": self.cost(result.precision)}
                for result in self.precisions
            ],
        }


def evaluate(store: Store, tasks: Sequence[Task] = ()) -> StudyResult:
    """Evaluate what a store holds; units that are not complete are listed as missing.

    Args:
        store: The records.
        tasks: What was answered; the domains of those that are not given stay unknown.

    Raises:
        StudyError: A record is damaged.
    """
    plan = store.plan
    domains = {task.id: task.domain for task in tasks}
    found = tuple(_evaluate(store, precision, domains) for precision in plan.precisions)
    return StudyResult(plan, found, anatomy.load(store))


def _evaluate(store: Store, precision: str, domains: Mapping[str, str]) -> PrecisionResult:
    units = [u for u in store.plan.units if u.configuration.precision == precision]
    runnable = [u for u in units if u.configuration.unavailable is None]
    done = [u for u in runnable if store.is_complete(u)]
    forced = [u for u in done if u.kind == "forced"]
    greedy = [u for u in done if u.kind == "greedy"]
    shifts = _shifts(store, precision, forced)
    measured = [s.by_prompt for s in shifts]
    return PrecisionResult(
        precision=precision,
        generated=_metrics(store, greedy),
        domains=_by_domain(store, greedy, domains),
        sampled=_metrics(store, [u for u in done if u.kind == "sampled"]),
        forced=_forced_metrics(store, precision, forced),
        shifts=shifts,
        prediction=predict_flip_rate(pooled(measured)) if measured else None,
        seconds_per_token=_seconds_per_token(store, done),
        unavailable={
            u.name: reason for u in units if (reason := u.configuration.unavailable) is not None
        },
        missing=tuple(u.name for u in runnable if u not in done),
    )


def _metrics(store: Store, units: Sequence[Unit]) -> Metrics | None:
    runs = {u.configuration.label: [_output(a) for a in store.answers(u)] for u in units}
    return compute_metrics(runs) if runs else None


def _by_domain(
    store: Store, units: Sequence[Unit], domains: Mapping[str, str]
) -> dict[str, Metrics]:
    """The same metrics for the tasks of each domain, in the order of the tasks."""
    runs: dict[str, dict[str, list[Output]]] = {}
    for unit in units:
        for answer in store.answers(unit):
            if answer.task in domains:
                of_domain = runs.setdefault(domains[answer.task], {})
                of_domain.setdefault(unit.configuration.label, []).append(_output(answer))
    return {domain: compute_metrics(found) for domain, found in runs.items()}


def _output(answer: Answer) -> Output:
    return Output(answer.tokens, answer.top1_probs, answer.correct)


def _forced_metrics(store: Store, precision: str, units: Sequence[Unit]) -> Metrics | None:
    """Over the prompts and tokens that every scored configuration has."""
    if not units:
        return None
    source = store.answers(Unit("greedy", store.plan.reference(precision)))
    scores = {u.configuration.label: store.scores(u) for u in units}
    prompts = min(len(entries) for entries in scores.values())
    lengths = [min(len(e[p].probs) for e in scores.values()) for p in range(prompts)]
    runs = {
        label: [
            greedy_output(_first(entries[p], lengths[p]), source[p].tokens[: lengths[p]])
            for p in range(prompts)
        ]
        for label, entries in scores.items()
    }
    return compute_metrics(runs)


def _first(scores: Scores, count: int) -> Scores:
    return Scores(
        scores.top[:count],
        scores.logits[:count],
        scores.reference[:count],
        scores.probs[:count],
        scores.digest,
    )


def _shifts(store: Store, precision: str, units: Sequence[Unit]) -> tuple[Shift, ...]:
    if not units or units[0] != reference_unit(store.plan, precision):
        return ()
    reference = store.scores(units[0])
    found = []
    for unit in units[1:]:
        others = store.scores(unit)
        pairs = list(zip(reference, others, strict=False))
        by_prompt = tuple(margins(a, b) for a, b in pairs)
        if not any(m.gap.numel() for m in by_prompt):
            continue
        found.append(
            Shift(
                unit.configuration,
                predict_flip_rate(by_prompt),
                measured_flip_rate(by_prompt),
                all(_identical(a, b) for a, b in pairs),
                by_prompt,
            )
        )
    return tuple(found)


def _identical(reference: Scores, other: Scores) -> bool:
    """By the digest of all logits; on fewer tokens, by those that were kept."""
    if len(reference.probs) == len(other.probs):
        return torch.equal(reference.digest, other.digest)
    count = len(other.probs)
    kept = (("top", "top"), ("logits", "logits"), ("probs", "probs"), ("logits", "reference"))
    return all(torch.equal(_of(reference, a)[:count], _of(other, b)) for a, b in kept)


def _of(scores: Scores, name: str) -> Tensor:
    return getattr(scores, name)


def _seconds_per_token(store: Store, units: Sequence[Unit]) -> dict[str, float]:
    """Seconds per generated token of a row, the median of its batches.

    The first, which compiles, is left out; the median leaves out one during which the machine
    slept or was busy with something else.
    """
    found = {}
    for unit in units:
        c = unit.configuration
        if unit.kind != "greedy" or c.order or c.chunk or c.runs_by_node(store.plan.compiled):
            continue
        counted = [(b.seconds, sum(len(a.tokens) for a in b.answers)) for b in store.batches(unit)]
        paces = [seconds / tokens for seconds, tokens in counted[1:] if tokens]
        if paces:
            found[unit.configuration.label] = statistics.median(paces)
    return found


def pooled(by_configuration: Sequence[Sequence[Margins]]) -> tuple[Margins, ...]:
    """Margins of each prompt over all configurations: prompts stay what is independent."""
    prompts = max((len(entries) for entries in by_configuration), default=0)
    return tuple(
        Margins(
            *(
                torch.cat([getattr(e[p], name) for e in by_configuration if p < len(e)])
                for name in ("gap", "shift", "flipped")
            )
        )
        for p in range(prompts)
    )


def survival(metrics: Metrics | None, length: int) -> tuple[float, ...]:
    """Share of prompts still in agreement after n tokens; () where nothing was compared."""
    if metrics is None or metrics.div_percent is None:
        return ()
    return agreement_by_position(metrics, length)


def _of_a_domain(metrics: Metrics) -> dict[str, Any]:
    """What is said of one domain; `greedy` has the rest, of all of them."""
    whole = metrics.to_dict()
    return {name: whole[name] for name in ("prompts", "Accuracy", "Std@Acc", "Div_Percent")}


def _without_lengths(metrics: Metrics) -> dict[str, Any]:
    """Given text tells nothing of the lengths of answers."""
    return metrics.to_dict() | {"Avg_Std@Output_Length": None}
