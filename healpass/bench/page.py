"""The measured part of a page: Markdown tables made of the CSV, in place of the last ones.

Layer: bench. Imports `bench.table`, `bench.targets` and `errors`. What people wrote around the two
marks stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from healpass.bench import targets
from healpass.bench.table import BASELINES, UNMEASURED
from healpass.errors import BenchError

BEGIN, END = "<!-- healpass bench: begin -->", "<!-- healpass bench: end -->"

Cells = Mapping[str, str]

#: Heading of a column of the page -> column of the CSV.
COLUMNS = {
    "contender": "contender",
    "time / BF16": "to_bf16",
    "time / FP32": "to_fp32",
    "ms": "milliseconds",
    "p20 to p80": "spread",
    "error to FP64": "error_to_fp64",
    "weights, cache / BF16": "held_to_bf16",
    "peak / BF16": "peak_to_bf16",
}


def write_page(path: Path, rows: Sequence[Cells]) -> None:
    """Put the tables of `rows` between the marks of a page, or write a page of nothing else.

    Raises:
        BenchError: The page has no marks, or cannot be written.
    """
    put_between_marks(path, markdown(rows))


def put_between_marks(path: Path, text_between: str) -> None:
    """Put a text between the marks of a page, or write a page of nothing else.

    Raises:
        BenchError: The page has no marks, or cannot be written.
    """
    made = f"{BEGIN}\n\n{text_between}\n\n{END}"
    try:
        text = path.read_text() if path.exists() else f"{BEGIN}{END}\n"
        before, found, rest = text.partition(BEGIN)
        _, ended, after = rest.partition(END)
        if not found or not ended:
            raise BenchError(
                f"--page {path}: the page does not have the lines\n{BEGIN}\n{END}\n"
                "between which the tables go. Add them, or name a page that is not there yet."
            )
        path.write_text(before + made + after)
    except OSError as error:
        raise BenchError(f"cannot write {path}: {error.strerror}.") from error


def markdown(rows: Sequence[Cells]) -> str:
    """Targets first, then a table for each workload, then where the numbers come from."""
    parts = [_verdicts(rows)] if targets.verdicts(rows) else []
    for workload in dict.fromkeys(row["workload"] for row in rows):
        parts.append(f"### {workload}")
        parts.append(_table([row for row in rows if row["workload"] == workload]))
    return "\n\n".join([*parts, _sources(rows)])


def _verdicts(rows: Sequence[Cells]) -> str:
    found = targets.verdicts(rows)
    names = list(dict.fromkeys(verdict.contender for verdict in found))
    lines = [_line(["target", *names]), _line(["---"] * (1 + len(names)))]
    for what in dict.fromkeys(verdict.what for verdict in found):
        by_name = {v.contender: str(v) for v in found if v.what == what}
        lines.append(_line([what, *(by_name.get(name, "-") for name in names)]))
    return "\n".join(lines)


def _table(rows: Sequence[Cells]) -> str:
    """One workload; columns that nobody has a number for are left out."""
    shown = [_shown(row) for row in rows]
    used = {
        heading: column
        for heading, column in COLUMNS.items()
        if any(row[column] != UNMEASURED for row in shown)
    }
    lines = [_line(list(used)), _line(["---", *["---:"] * (len(used) - 1)])]
    lines += [_line([row[column] for column in used.values()]) for row in shown]
    notes = [f"{row['contender']}: {row['note']}." for row in rows if row["note"]]
    return "\n".join(lines) + "".join(f"\n\n{note}" for note in notes)


def _shown(row: Cells) -> dict[str, str]:
    measured = row["p20"] != UNMEASURED
    return {**row, "spread": f"{row['p20']} to {row['p80']}" if measured else UNMEASURED}


def _sources(rows: Sequence[Cells]) -> str:
    """Every combination of machine, versions and command once."""
    named = ("processor", "threads", "omp_wait_policy", "torch", "healpass", "rounds", "command")
    lines = dict.fromkeys(
        f"- {', '.join(dict.fromkeys(r['workload'] for r in rows if _of(r) == _of(row)))}: "
        + "; ".join(f"{name} {row[name]}" for name in named[:-1])
        + f"\n  `{row['command']}`"
        for row in rows
    )
    text = f"BF16 is {BASELINES[0]}, FP32 is {BASELINES[1]}; ratios are within one run."
    return "\n".join([text, "", *lines])


def _of(row: Cells) -> tuple[str, ...]:
    """Which run a row comes from."""
    return tuple(row[n] for n in ("processor", "threads", "torch", "rounds", "command"))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
