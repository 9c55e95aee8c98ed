"""Finding what repeats in a sequence of labels: the layers of a model. Imports nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

#: How many distances between equal labels are tried as the period.
TRIED = 8


@dataclass(frozen=True)
class Run:
    """`count` copies of `period` labels, one after the other from `start`, and then `rest` more.

    Attributes:
        start: Index of the first label.
        period: Length of a copy.
        count: Whole copies.
        rest: Labels after the last copy that go on like its beginning; fewer than `period`.
    """

    start: int
    period: int
    count: int
    rest: int

    @property
    def stop(self) -> int:
        """Index behind the last label."""
        return self.start + self.count * self.period + self.rest

    @property
    def saved(self) -> int:
        """Labels that need not be looked at again."""
        return (self.count - 1) * self.period

    def shifted(self, phase: int) -> Run:
        """The same run, its copies beginning `phase` labels later."""
        labels = self.count * self.period + self.rest - phase
        return Run(self.start + phase, self.period, *divmod(labels, self.period))


def longest_run(labels: Sequence[Hashable], shortest: int = 1) -> Run | None:
    """The run that saves most, of periods from `shortest` on; None where nothing repeats.

    The time is linear: few distances are tried as the period, those that most labels speak for. A
    label that stands in each copy once has its equals at the period; one that stands there often
    has them nearer, which is why a distance counts with its length.
    """
    runs = (_run(labels, period) for period in _distances(labels, shortest))
    found = max(runs, key=lambda run: (run.saved, -run.period), default=None)
    return found if found is not None and found.saved > 0 else None


def _distances(labels: Sequence[Hashable], shortest: int) -> list[int]:
    last: dict[Hashable, int] = {}
    weights: Counter[int] = Counter()
    for index, label in enumerate(labels):
        if label in last and index - last[label] >= shortest:
            weights[index - last[label]] += index - last[label]
        last[label] = index
    return [distance for distance, _ in weights.most_common(TRIED)]


def _run(labels: Sequence[Hashable], period: int) -> Run:
    """The longest stretch whose labels all equal the one `period` before."""
    start = best = length = 0
    for index in range(period, len(labels)):
        length = length + 1 if labels[index] == labels[index - period] else 0
        if length > best:
            best, start = length, index - period - length + 1
    return Run(start, period, *divmod(best + period, period))
