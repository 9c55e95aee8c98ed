"""What `healpass bench` does with its options: plan, run with progress, print, write.

Layer: bench. Imports `bench.*`, `environment` and `errors`.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from healpass.bench import page, table
from healpass.bench.contenders import choose, default
from healpass.bench.run import Plan, Row, measure
from healpass.bench.source import ModelSource, ShapesSource
from healpass.bench.workloads import workloads
from healpass.environment import collect
from healpass.errors import ConfigError


@dataclass(frozen=True)
class Request:
    """The options of the command, as they were given."""

    model: str
    shapes: str | None
    device: str
    kinds: tuple[str, ...]
    contenders: tuple[str, ...]
    rounds: int
    csv: Path | None
    plot: Path | None
    page: Path | None = None

    def plan(self) -> Plan:
        """What is measured.

        Raises:
            ConfigError: A name is unknown, or the device is not there.
        """
        if self.device not in ("cpu", "cuda"):
            raise ConfigError(f"--device {self.device!r}: cpu or cuda is needed.")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("--device cuda: torch sees no GPU here. Use --device cpu.")
        source = ShapesSource(self.shapes) if self.shapes else ModelSource(self.model)
        planned = workloads(self.kinds, source)
        if not planned:
            raise ConfigError(
                f"--what {','.join(self.kinds)} has nothing to measure with --shapes: use decode, "
                "prefill or attention."
            )
        chosen = choose(self.contenders or default(self.device), self.device)
        threads = torch.get_num_threads()
        return Plan(source, chosen, planned, self.device, self.rounds, threads)

    @property
    def command(self) -> str:
        """The command line that repeats the run; files are left out."""
        what = ["--shapes", self.shapes] if self.shapes else [self.model]
        words = ["healpass", "bench", *what, "--device", self.device]
        words += ["--what", ",".join(self.kinds), "--rounds", str(self.rounds)]
        if self.contenders:
            words += ["--contenders", ",".join(self.contenders)]
        return shlex.join(words)


def run(request: Request, console: Console | None = None) -> list[Row]:
    """Measure, show progress, print the tables, write the files.

    The CSV is written after each row, so that a run that is stopped keeps what it has. Rows of
    other workloads that it holds already stay, and the page shows them too.
    """
    console = console or Console()
    plan, environment = request.plan(), collect()
    common = table.provenance(plan, environment, request.command)
    before = table.read_csv(request.csv) if request.csv else []
    rows: list[Row] = []
    written = before
    with console.status("starting") as status:
        for row in measure(plan, lambda text: status.update(f"{text} ...")):
            rows.append(row)
            written = table.merge(before, table.every_cell(rows, common))
            if request.csv:
                table.write_csv(request.csv, written)
    title = f"{plan.source.name} on {common['processor']}, {plan.threads} threads"
    console.print(table.table(rows, title))
    reached = table.target_table(table.every_cell(rows, common))
    if reached is not None:
        console.print(reached)
    for warning in environment.warnings:
        console.print(f"warning: {warning}", markup=False)
    if request.plot:
        table.plot(request.plot, written, title)
    if request.page:
        page.write_page(request.page, written)
    return rows
