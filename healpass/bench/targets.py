"""What each precision may cost on CPU, as ratios within one run, and whether it was met.

Layer: bench. Imports nothing. Works on the cells that `bench.table` writes to a CSV, so that a
page can be made again from the file alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

#: The model and device that the targets are for.
MODEL, DEVICE = "smollm2-135m", "cpu"


@dataclass(frozen=True)
class Target:
    """An upper limit for a column of some workloads, by contender."""

    what: str
    workloads: tuple[str, ...]
    column: str
    most: Mapping[str, float]


@dataclass(frozen=True)
class Verdict:
    """A target beside what was measured: the worst of its workloads.

    Attributes:
        found: None if any of its workloads has no number.
    """

    what: str
    contender: str
    most: float
    found: float | None

    @property
    def met(self) -> bool:
        """Whether all was measured and nothing is above the limit."""
        return self.found is not None and self.found <= self.most

    def __str__(self) -> str:
        """`0.38 of 0.40: met`."""
        if self.found is None:
            return f"not measured, of {self.most:.2f}"
        return f"{self.found:.2f} of {self.most:.2f}: {'met' if self.met else 'missed'}"


def _all(heal: float, layercast: float, exact: float) -> dict[str, float]:
    return {"heal": heal, "layercast": layercast, "exact": exact}


_DECODE, _PREFILL, _LONG = ("decode 128",), ("prefill 16", "prefill 128"), ("prefill 512",)
TARGETS = (
    Target("decode time / FP32-Inductor", _DECODE, "to_fp32", _all(0.40, 0.40, 2)),
    Target("decode time / BF16-Inductor", _DECODE, "to_bf16", _all(0.45, 0.45, 2)),
    Target("prefill of 16 to 128 / FP32-Inductor", _PREFILL, "to_fp32", _all(1.15, 1.15, 2.5)),
    Target("prefill of 512 / FP32-Inductor", _LONG, "to_fp32", _all(1.05, 1.05, 2.5)),
    Target("weights and cache / BF16", _DECODE, "held_to_bf16", _all(1.1, 1.1, 1.6)),
    Target("peak memory of decode / BF16", _DECODE, "peak_to_bf16", _all(1.1, 1.1, 1.6)),
    Target("cold compile / FP32-Inductor", ("compile 1",), "to_fp32", {"heal": 1.15}),
)


def verdicts(rows: Iterable[Mapping[str, str]]) -> list[Verdict]:
    """The targets of which at least one workload was run, in order.

    Args:
        rows: Cells of one model on one device, by column.
    """
    known = {(row["workload"], row["contender"]): row for row in rows}
    run = {workload for workload, _ in known}
    found = []
    for target in TARGETS:
        if run.isdisjoint(target.workloads):
            continue
        for contender, most in target.most.items():
            cells = [known.get((name, contender), {}) for name in target.workloads]
            found.append(Verdict(target.what, contender, most, _worst(cells, target.column)))
    return found


def _worst(cells: Sequence[Mapping[str, str]], column: str) -> float | None:
    try:
        return max(float(row[column]) for row in cells)
    except (KeyError, ValueError):  # a workload that was not run, or not measured
        return None
