"""The rows as a table on the terminal, a CSV and a plot.

Layer: bench. Imports `bench.run`, `bench.targets` and `environment`.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from healpass.bench import targets
from healpass.bench.run import Plan, Row, ratio
from healpass.environment import Environment
from healpass.errors import BenchError

#: What the ratios are to.
BASELINES = ("bf16-inductor", "fp32-inductor")
UNMEASURED = "not measured"
TF32_VARIABLES = (
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "TRITON_F32_DEFAULT",
)
COLUMNS = (
    "workload", "contender", "milliseconds", "p20", "p80", "to_bf16", "to_fp32",
    "error_to_fp64", "gate_limit", "held_bytes", "peak_bytes_above", "held_to_bf16",
    "peak_to_bf16", "note",
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
    for column, value in _memory_ratios(rows, row).items():
        found[column] = None if value is None else f"{value:.3f}"
    filled = {name: UNMEASURED if value is None else value for name, value in found.items()}
    return {"workload": row.workload, "contender": row.contender} | filled | {"note": row.note}


def _memory_ratios(rows: Sequence[Row], row: Row) -> dict[str, float | None]:
    """What a process holds, and its highest mark, over those of BF16 at the same workload."""
    same = [r.memory for r in rows if (r.workload, r.contender) == (row.workload, BASELINES[0])]
    ratios: dict[str, float | None] = {"held_to_bf16": None, "peak_to_bf16": None}
    if row.memory is None or not same or same[0] is None:
        return ratios
    ratios["held_to_bf16"] = row.memory.held / same[0].held
    if row.memory.peak is not None and same[0].peak is not None:
        ratios["peak_to_bf16"] = row.memory.peak / same[0].peak
    return ratios


def provenance(plan: Plan, environment: Environment, command: str) -> dict[str, Any]:
    """The columns that are equal in all rows of a run.

    Args:
        plan: What was measured.
        environment: Versions, processor and flags of this machine.
        command: The command line that repeats the run.
    """
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
        "fp32_precision": _fp32_precision(environment),
        "omp_wait_policy": environment.variables.get("OMP_WAIT_POLICY", "default"),
        "command": command,
    }


def _fp32_precision(environment: Environment) -> str:
    """Torch's TF32 switch for matmuls, then the variables that are set and overrule it."""
    overruling = [f"{name}={environment.variables[name]}" for name in TF32_VARIABLES
                  if name in environment.variables]  # fmt: skip
    switch = environment.precision_flags["torch.backends.cuda.matmul.fp32_precision"]
    return " ".join([switch, *overruling])


def every_cell(rows: Sequence[Row], common: dict[str, Any]) -> list[dict[str, str]]:
    """The rows of one run as text, by column."""
    return [{name: str(cell) for name, cell in (cells(rows, row) | common).items()}
            for row in rows]  # fmt: skip


def read_csv(path: Path) -> list[dict[str, str]]:
    """What an earlier run wrote; nothing if there is no file.

    Raises:
        BenchError: It is not such a file, or one with other columns.
    """
    if not path.exists():
        return []
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise BenchError(
                    f"{path} is not a file of healpass bench, or one of another version: its "
                    "columns are others. Name a new file, or remove it."
                )
            return list(reader)
    except OSError as error:
        raise BenchError(f"cannot read {path}: {error.strerror}.") from error


def merge(old: Sequence[dict[str, str]], new: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """New rows in place of old ones of the same model, device and workload; the others stay.

    A workload is replaced as a whole: ratios are between rows of one run.
    """
    measured = {_subject(row): [r for r in new if _subject(r) == _subject(row)] for row in new}
    kept: dict[Any, list[dict[str, str]]] = {}
    for row in old:
        kept.setdefault(_subject(row), []).append(row)
    return [row for rows in (kept | measured).values() for row in rows]


def _subject(row: dict[str, str]) -> tuple[str, str, str]:
    return row["model"], row["device"], row["workload"]


def write_csv(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """Write all rows at once, into a file beside the target that then takes its place.

    Raises:
        BenchError: The file cannot be written.
    """
    scratch = path.with_name(path.name + ".part")
    try:
        with scratch.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
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


def target_table(rows: Sequence[dict[str, str]]) -> Table | None:
    """The targets that the run says something about; None if there are none."""
    found = [r for r in rows if (r["model"], r["device"]) == (targets.MODEL, targets.DEVICE)]
    verdicts = targets.verdicts(found)
    if not verdicts:
        return None
    made = Table(title="targets", title_justify="left")
    for heading in ("target", "contender", "measured"):
        made.add_column(heading)
    for verdict in verdicts:
        made.add_row(verdict.what, verdict.contender, str(verdict))
    return made


def _spread(row: Row) -> str:
    """How far the middle 60% of the rounds reach, of the median."""
    if not row.median or row.low is None or row.high is None:
        return UNMEASURED
    return f"-{1 - row.low / row.median:.0%} +{row.high / row.median - 1:.0%}"


def _megabytes(value: Any) -> str:
    return value if isinstance(value, str) else f"{value / 1e6:.0f}"


def plot(path: Path, rows: Sequence[dict[str, str]], title: str) -> None:
    """Bars of time over FP32-Inductor's, a group per workload; PNG or SVG by the name's ending.

    Args:
        path: Of the file to write.
        rows: As the CSV has them: the text of each of `COLUMNS`.
        title: Stands above the bars.

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
    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    names = list(dict.fromkeys(row["contender"] for row in rows))
    ratios = {(row["workload"], row["contender"]): row["to_fp32"] for row in rows}
    figure = Figure(figsize=(1.5 + 2.2 * len(workloads), 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        found = [ratios.get((workload, name), UNMEASURED) for workload in workloads]
        values = [0.0 if ratio == UNMEASURED else float(ratio) for ratio in found]
        places = [place + (index - (len(names) - 1) / 2) * width for place in range(len(values))]
        axes.bar(places, values, width, label=name)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(workloads)), workloads)
    axes.set_ylabel("time / FP32-Inductor")
    axes.set_title(title, fontsize="medium")
    axes.legend(fontsize="small", ncols=2)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise BenchError(f"cannot write {path}: {error}") from error
