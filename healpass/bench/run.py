"""Rounds over all contenders in turn, medians with spread, and the gate before any number.

Layer: bench. Imports `bench.*`, `environment` and `errors`.

The gate: an output is let through if its error against FP64 is at most

    2 * sqrt(e^2 + r^2) + u

where e is the error of the contender's yardstick in the same run, the eager model with the same
number formats; r what those formats cost by formula where the yardstick does not round to them
(`budget`: `exact`'s digits, INT16 attention of `--shapes`), else 0; u the unit roundoff of the
dtype that the output is handed out in; and errors are |output - exact| / |exact| over all elements
that the workload compares. Twice is what numerics promises: HEAL's normwise bound is at most twice
that of an FP32 chain (`arithmetic.bounds`). Errors that are independent add as squares.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from healpass.bench.contenders import REFERENCE, Contender, judges
from healpass.bench.source import Source
from healpass.bench.worker import Memory, Order, Worker
from healpass.bench.workloads import Workload
from healpass.errors import BenchError

#: Rounds of cold compiles: each takes a minute and has a process of its own.
COMPILES = 2


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        source: The model or layers.
        contenders: Who, in the order of the table.
        workloads: Doing what.
        device: `"cpu"` or `"cuda"`.
        rounds: Timed runs per contender and workload.
        threads: Of each contender; they never run at the same time.
    """

    source: Source
    contenders: tuple[Contender, ...]
    workloads: tuple[Workload, ...]
    device: str
    rounds: int
    threads: int


@dataclass(frozen=True)
class Row:
    """One contender at one workload. Times are seconds per call; None is "not measured".

    Attributes:
        error: Against FP64, relative in the Frobenius norm.
        limit: The gate's.
        median: Over the rounds.
        low: 20th percentile.
        high: 80th percentile.
        note: Why there is no time.
    """

    workload: str
    contender: str
    error: float | None = None
    limit: float | None = None
    median: float | None = None
    low: float | None = None
    high: float | None = None
    memory: Memory | None = None
    note: str = ""


@dataclass
class _Measured:
    """What the gate let through, workload by workload."""

    errors: dict[str, float] = field(default_factory=dict)
    rounding: dict[str, float] = field(default_factory=dict)
    roundoff: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def measure(plan: Plan, progress: Callable[[str], Any] = lambda _: None) -> Iterator[Row]:
    """Run the plan; rows come as soon as their workload is done.

    Args:
        plan: What to measure.
        progress: Told in words what runs now.

    Yields:
        A row per workload and contender, in that order.

    Raises:
        BenchError: The FP64 reference itself cannot run.
    """
    timed = tuple(w for w in plan.workloads if w.kind != "compile")
    with contextlib.ExitStack() as stack:
        workers = {}
        needed = (*judges(plan.contenders), *plan.contenders) if timed else ()
        for contender in {contender.name: contender for contender in needed}.values():
            order = Order(contender, plan.source, plan.device, plan.threads)
            workers[contender.name] = stack.enter_context(_running(order))
        for workload in timed:
            yield from _measure_one(plan, workload, workers, progress)
    for workload in plan.workloads:
        if workload.kind == "compile":
            yield from _compile_times(plan, workload, progress)


def _measure_one(
    plan: Plan,
    workload: Workload,
    workers: dict[str, Worker],
    progress: Callable[[str], Any],
) -> Iterator[Row]:
    found = _gate(plan, workload, workers, progress)
    passed = [c for c in plan.contenders if c.name not in found.failures]
    times: dict[str, list[float]] = {contender.name: [] for contender in passed}
    memory: dict[str, Memory] = {}
    for turn in range(plan.rounds + 1):  # the first warms up
        progress(f"{workload.name}: round {turn} of {plan.rounds}")
        for name in times:
            seconds = workers[name].ask("time", workload)
            if turn:
                times[name].append(seconds)
    for name in times:
        memory[name] = workers[name].ask("memory", workload)
    for contender in plan.contenders:
        name = contender.name
        judged = name in found.errors and contender.yardstick in found.errors
        common: dict[str, Any] = {
            "error": found.errors.get(name),
            "limit": _limit(contender, found) if judged else None,
        }
        if name in times:
            common |= spread(times[name]) | {"memory": memory[name]}
        yield Row(workload.name, name, note=found.failures.get(name, ""), **common)


def _gate(
    plan: Plan, workload: Workload, workers: dict[str, Worker], progress: Callable[[str], Any]
) -> _Measured:
    """Compute every contender's outputs and compare them with FP64's.

    Nothing is timed here, and compiling takes one thread: as many contenders as there are threads
    compile at a time.
    """
    found = _Measured()
    progress(f"{workload.name}: {REFERENCE}")
    exact, found.roundoff[REFERENCE] = workers[REFERENCE].ask("outputs", workload)
    found.errors[REFERENCE] = 0.0

    def check(name: str) -> None:
        progress(f"{workload.name}: compiling and checking {name}")
        try:
            outputs, found.roundoff[name] = workers[name].ask("outputs", workload)
            found.errors[name] = relative_error(outputs, exact)
        except BenchError as error:
            found.failures[name] = str(error)

    with ThreadPoolExecutor(plan.threads) as pool:
        list(pool.map(check, (name for name in workers if name != REFERENCE)))
    for contender in plan.contenders:
        name = contender.name
        if name in found.failures:
            continue
        lost = workers[REFERENCE].ask("rounding", workload, contender)
        found.rounding[name] = lost / float(np.linalg.norm(exact))
        if contender.yardstick not in found.errors:
            found.failures[name] = f"not measured: its yardstick {contender.yardstick} failed"
        elif not found.errors[name] <= _limit(contender, found):
            found.failures[name] = (
                f"refused: its error against FP64 is {found.errors[name]:.2e}, the limit "
                f"{_limit(contender, found):.2e}"
            )
    return found


def _limit(contender: Contender, found: _Measured) -> float:
    name = contender.name
    return limit(found.errors[contender.yardstick], found.roundoff[name], found.rounding[name])


def limit(yardstick: float, roundoff: float, rounding: float = 0.0) -> float:
    """What the gate allows.

    Args:
        yardstick: The yardstick's error.
        roundoff: Unit roundoff of the output's dtype.
        rounding: What number formats cost that the yardstick does not have.
    """
    return 2 * math.hypot(yardstick, rounding) + roundoff


def relative_error(outputs: Any, exact: Any) -> float:
    """`|outputs - exact| / |exact|` in the Frobenius norm; NaN where an output is not finite."""
    return float(np.linalg.norm(outputs - exact) / np.linalg.norm(exact))


def spread(times: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile."""
    low, median, high = np.quantile(times, (0.2, 0.5, 0.8))
    return {"median": float(median), "low": float(low), "high": float(high)}


def _compile_times(
    plan: Plan, workload: Workload, progress: Callable[[str], Any]
) -> Iterator[Row]:
    """Cold compiles, a fresh process and a fresh cache for each; at most `COMPILES` rounds."""
    times: dict[str, list[float]] = {}
    failures: dict[str, str] = {}
    compiled = [c for c in plan.contenders if c.compiler != "eager"]
    rounds = min(plan.rounds, COMPILES)
    for turn in range(rounds):
        for contender in compiled:
            progress(f"{workload.name}: {contender.name}, {turn + 1} of {rounds}")
            order = Order(contender, plan.source, plan.device, plan.threads, cold=True)
            try:
                with _running(order) as worker:
                    seconds = worker.ask("first_call", workload)
                times.setdefault(contender.name, []).append(seconds)
            except BenchError as error:
                failures[contender.name] = str(error)
    for contender in compiled:
        note = failures.get(contender.name, "")
        row: dict[str, Any] = spread(times[contender.name]) if not note else {}
        yield Row(workload.name, contender.name, note=note, **row)


@contextlib.contextmanager
def _running(order: Order) -> Iterator[Worker]:
    worker = Worker(order)
    try:
        yield worker
    finally:
        worker.stop()


def ratio(rows: Sequence[Row], row: Row, other: str) -> float | None:
    """A row's median over that of another contender at the same workload, or None.

    Args:
        rows: All rows of the run.
        row: The one whose median is divided.
        other: Name of the contender whose median is the divisor.
    """
    for found in rows:
        if (found.workload, found.contender) == (row.workload, other) and found.median:
            return row.median / found.median if row.median else None
    return None
