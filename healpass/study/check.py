"""`healpass check`: run a plan, evaluate it, write the report.

Layer: study. Imports `environment` and `study`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from healpass.environment import collect
from healpass.study.judge.anatomy import dissect
from healpass.study.judge.results import StudyResult, evaluate
from healpass.study.plan.configuration import StudyPlan, Unit
from healpass.study.report import page, tables
from healpass.study.run.records import Store
from healpass.study.run.runner import gather, run


@dataclass(frozen=True)
class Request:
    """What the command line asks for, besides the plan.

    Attributes:
        folder: Where records and report are kept.
        command: The exact command, for the report.
        resume: Whether to go on with what the folder holds.
        quiet: Print neither progress nor tables.
    """

    folder: Path
    command: str
    resume: bool = False
    quiet: bool = False


def check(plan: StudyPlan, request: Request, console: Console) -> StudyResult:
    """Run what is missing of a plan and evaluate it.

    Args:
        plan: What to run.
        request: Where, and how talkative.
        console: Where progress is shown.

    Raises:
        FetchError: The model cannot be loaded.
        StudyError: The plan, the model or the records cannot be used.
        TaskError: The tasks cannot be read.
        UnavailableError: A package that the report needs is not installed.
    """
    page.require()
    materials = gather(plan)
    stamp = {"environment": collect().to_dict(), "command": request.command}
    store = Store.open(request.folder, plan, stamp, resume=request.resume)
    with progress_bar(console, hidden=request.quiet) as bar:
        watch = Watcher(bar, store)
        run(store, materials, watch)
        dissect(store, materials, watch.say)
    result = evaluate(store, materials.tasks)
    page.write(store, result)
    return result


def progress_bar(console: Console, *, hidden: bool) -> Progress:
    """Prompts done and time left; plain text where the console is no terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=hidden,
    )


class Watcher:
    """Moves a progress bar on."""

    def __init__(self, bar: Progress, store: Store) -> None:
        plan = store.plan
        units = [u for u in plan.units if u.configuration.unavailable is None]
        self.plan = plan
        self.done = {u.name: store.done(u) for u in units}
        self.bar = bar
        self.task = bar.add_task(
            "prompts",
            total=sum(plan.scope(u)[0] for u in units),
            completed=sum(self.done.values()),
        )

    def __call__(self, unit: Unit, done: int) -> None:
        """Note that a unit has `done` prompts."""
        self.bar.update(
            self.task,
            advance=done - self.done[unit.name],
            description=f"{unit.kind} {unit.configuration.precision}, {unit.configuration.label}",
        )
        self.done[unit.name] = done

    def say(self, text: str) -> None:
        """Show what is done besides prompts."""
        self.bar.update(self.task, description=text)


def show(result: StudyResult, console: Console, folder: Path) -> None:
    """Print the tables, what was not run, the verdict and where the report is.

    Args:
        result: What the study found.
        console: Where it is printed.
        folder: Of the study; the report lies in it.
    """
    console.print(tables.paper_table(result))
    if len(result.domains) > 1:
        console.print(tables.domain_table(result))
    if any(found.prediction is not None for found in result.precisions):
        console.print(tables.prediction_table(result))
    for line in [*tables.blames(result), *tables.notes(result)]:
        console.print(line, highlight=False, markup=False)
    console.print(summary(result))
    console.print(f"Report: {folder / page.PAGE}", highlight=False, markup=False)


def summary(result: StudyResult) -> str:
    """The last line: the verdict in words."""
    names = [p.precision for p in result.precisions if p.reproducible is not True]
    if not names:
        return "Reproducible: every configuration gave the same answers."
    return f"Not shown to be reproducible: {', '.join(names)}."
