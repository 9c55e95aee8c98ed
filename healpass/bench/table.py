"""The rows as a table on the terminal, a CSV and a plot.

Layer: bench. Imports `bench.run` and `environment`.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table

from healpass.bench.run import Plan, Row, ratio
from healpass.environment import Environment
from healpass.errors import BenchError

#: What the ratios are to.
BASELINES = ("bf16-inductor", "fp32-inductor")
UNMEASURED = "not measured"
COLUMNS = (
    "workload", "contender", "milliseconds", "p20", "p80", "to_bf16", "to_fp32",
    "error_to_fp64", "gate_limit", "held_bytes", "peak_bytes_above", "note",
    "model", "device", "processor", "threads", "rounds", "torch", "triton", "healpass",
    "fp32_precision", "omp_wait_policy", "command",
)  # fmt: skip


def cells(rows: Sequence[Row], row: Row) -> dict[str, Any]:
    """The measured columns of one row; what was not measured says so."""
    times = {"milliseconds": row.median, "p20": row.low, "p80": row.high}
    memory = row.memory
    found: dict[str, Any] = {
        name: None if seconds is None else f"{1e3 * seconds:.4g}"
        for name, seconds in times.items()
    }
    ratios = (ratio(rows, row, name) for name in BASELINES)
    for column, value in zip(("to_bf16", "to_fp32"), ratios, strict=True):
        found[column] = None if value is None else f"{value:.3f}"
    found["error_to_fp64"] = None if row.error is None else f"{row.error:.3e}"
    found["gate_limit"] = None if row.limit is None else f"{row.limit:.3e}"
    found["held_bytes"] = None if memory is None else memory.held
    found["peak_bytes_above"] = None if memory is None else memory.above
    filled = {name: UNMEASURED if value is None else value for name, value in found.items()}
    return {"workload": row.workload, "contender": row.contender} | filled | {"note": row.note}


def provenance(plan: Plan, environment: Environment, command: str) -> dict[str, Any]:
    """The columns that are equal in all rows of a run."""
    on_gpu = plan.device == "cuda"
    return {
        "model": plan.source.name,
        "device": plan.device,
        "processor": environment.gpus[0].name if on_gpu else environment.cpu,
        "threads": plan.threads,
        "rounds": plan.rounds,
        "torch": environment.packages["torch"],
        "triton": environment.packages["triton"],
        "healpass": environment.packages["healpass"],
        "fp32_precision": torch.backends.cuda.matmul.fp32_precision,
        "omp_wait_policy": environment.variables.get("OMP_WAIT_POLICY", "default"),
        "command": command,
    }


def write_csv(path: Path, rows: Sequence[Row], common: dict[str, Any]) -> None:
    """Write all rows at once, into a file beside the target that then takes its place.

    Raises:
        BenchError: The file cannot be written.
    """
    scratch = path.with_name(path.name + ".part")
    try:
        with scratch.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(cells(rows, row) | common for row in rows)
        scratch.replace(path)
    except OSError as error:
        raise BenchError(f"cannot write {path}: {error.strerror}.") from error


def table(rows: Sequence[Row], title: str) -> Table:
    """Ratios first: a bare time says little on a machine that nobody else has."""
    made = Table(title=title, title_justify="left")
    for heading in ("workload", "contender"):
        made.add_column(heading)
    for heading in ("/ BF16", "/ FP32", "spread", "error", "held MB", "peak MB above"):
        made.add_column(heading, justify="right")
    for row in rows:
        shown = cells(rows, row)
        if row.note:
            made.add_row(row.workload, row.contender, escape(row.note))
            continue
        made.add_row(
            row.workload,
            row.contender,
            shown["to_bf16"],
            shown["to_fp32"],
            _spread(row),
            shown["error_to_fp64"],
            *(_megabytes(shown[name]) for name in ("held_bytes", "peak_bytes_above")),
        )
    return made


def _spread(row: Row) -> str:
    """How far the middle 60% of the rounds reach, of the median."""
    if not row.median or row.low is None or row.high is None:
        return UNMEASURED
    return f"-{1 - row.low / row.median:.0%} +{row.high / row.median - 1:.0%}"


def _megabytes(value: Any) -> str:
    return value if isinstance(value, str) else f"{value / 1e6:.0f}"


def plot(path: Path, rows: Iterable[Row], title: str) -> None:
    """Bars of time over FP32-Inductor's, a group per workload; PNG or SVG by the name's ending.

    Raises:
        BenchError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BenchError(
            "--plot needs matplotlib, which is not installed. Way out: pip install "
            "'healpass[study]', or leave --plot out."
        ) from error
    rows = list(rows)
    workloads = list(dict.fromkeys(row.workload for row in rows))
    names = list(dict.fromkeys(row.contender for row in rows))
    figure = Figure(figsize=(1.5 + 2.2 * len(workloads), 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        bars = {row.workload: row for row in rows if row.contender == name}
        found = [bars.get(workload) for workload in workloads]
        values = [row and ratio(rows, row, BASELINES[1]) for row in found]
        places = [place + (index - (len(names) - 1) / 2) * width for place in range(len(values))]
        axes.bar(places, [value or 0 for value in values], width, label=name)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(workloads)), workloads)
    axes.set_ylabel("time / FP32-Inductor")
    axes.set_title(title, fontsize="medium")
    axes.legend(fontsize="small", ncols=2)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise BenchError(f"cannot write {path}: {error}") from error
