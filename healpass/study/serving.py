"""`healpass check --engine vllm`: does what a scheduler does change an answer?

Layer: study. Imports `integrations` and `study`; vLLM runs in processes of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from healpass.integrations.checkpoint import Checkpoint
from healpass.integrations.vllm import checking
from healpass.integrations.vllm.checking import Asked, Events, Row
from healpass.integrations.vllm.options import EngineOptions
from healpass.study.plan.prompts import token_ids
from healpass.study.plan.tasks import SUITE
from healpass.study.run.runner import choose_tasks

#: The precision of vLLM as it is: the control.
NONE = "none"
#: The field of `Events` that an axis reads -> what the table says of it.
_SAID = {
    "at_once": "{} requests in one step",
    "cut": "{} prompts cut",
    "cached": "{} tokens from the cache",
    "preemptions": "{} preemptions",
    "block_size": "pages of {} tokens",
}


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asks for.

    Attributes:
        model: A folder, a hub id, or `smollm2-135m`.
        precisions: HEAL's, or `none`.
        tasks: As `tasks.load` takes it.
        prompts: How many tasks.
        max_new_tokens: Of each answer.
        compiled: Whether the model's graph is compiled.
    """

    model: str
    precisions: tuple[str, ...] = ("exact",)
    tasks: str = SUITE
    prompts: int = 8
    max_new_tokens: int = 24
    compiled: bool = True

    def asked(self) -> dict[str, Asked]:
        """An engine for each precision.

        Raises:
            ConfigError: A precision that no engine has.
            FetchError: There is no tokenizer.
            StudyError: The model is a GGUF file, or there are too few tasks.
            TaskError: The tasks cannot be read.
        """
        options = {name: _options(name) for name in self.precisions}
        checkpoint, tasks = Checkpoint(self.model), choose_tasks(self.tasks, self.prompts)
        location, prompts = checkpoint.location(), token_ids(checkpoint.tokenizer(), tasks)
        return {
            name: Asked(
                model=location,
                options=given,
                prompts=prompts,
                new_tokens=self.max_new_tokens,
                compiled=self.compiled,
            )
            for name, given in options.items()
        }


def _options(precision: str) -> dict[str, str] | None:
    if precision == NONE:
        return None
    return {"precision": EngineOptions.read({"precision": precision}).config.precision}


def check(request: Request, console: Console) -> dict[str, list[Row]]:
    """Try every axis in every precision.

    Args:
        request: What to try.
        console: Where each axis is told when it is done.

    Raises:
        HealError: As `Request.asked` and `checking.check` do.
    """
    found: dict[str, list[Row]] = {}
    for precision, asked in request.asked().items():
        found[precision] = []
        for row in checking.check(asked):
            said = f"{precision}, {row.axis.name}: {row.equal} of {row.total} answers equal"
            console.print(said, highlight=False, markup=False)
            found[precision].append(row)
    return found


def table(precision: str, rows: Sequence[Row]) -> Table:
    """A row per axis.

    Args:
        precision: HEAL's, or `none`.
        rows: What its engines showed.
    """
    name = "vLLM as it is" if precision == NONE else f"vLLM with precision={precision!r}"
    made = Table(title=f"{name}: answers equal to those of a request alone, to the last bit")
    for heading in ("what the scheduler does", "what happened", "answers equal"):
        made.add_column(heading, overflow="fold")
    for row in rows:
        made.add_row(row.axis.name, _happened(row), f"{row.equal} of {row.total}")
    return made


def _happened(row: Row) -> str:
    said = _SAID[row.axis.event].format(getattr(row.events, row.axis.event))
    return said if row.happened else f"{said}: not tried"


def verdict(found: dict[str, list[Row]]) -> list[str]:
    """What follows from the rows, in sentences.

    Args:
        found: The rows of each precision.
    """
    lines = []
    for precision, rows in found.items():
        differ = [row.axis.name for row in rows if row.equal < row.total]
        missed = [row.axis.name for row in rows if not row.happened]
        if differ:
            lines.append(f"{precision}: answers differ with {', '.join(differ)}.")
        if missed:
            lines.append(
                f"{precision}: nothing is shown about {', '.join(missed)}, which did not happen. "
                "Give more --prompts, longer ones, or more --max-new-tokens."
            )
        if not differ and not missed:
            lines.append(f"{precision}: every answer has the bits of the request alone.")
    return lines


def show(found: dict[str, list[Row]], console: Console) -> None:
    """Print a table for each precision, and what follows.

    Args:
        found: The rows of each precision.
        console: Where it is printed.
    """
    for precision, rows in found.items():
        console.print(table(precision, rows))
    console.print("\n".join(verdict(found)), highlight=False, markup=False)


def holds(found: dict[str, list[Row]]) -> bool:
    """Whether every axis happened, and changed nothing.

    Args:
        found: The rows of each precision.
    """
    return all(row.holds for rows in found.values() for row in rows)


def to_dict(found: dict[str, list[Row]]) -> dict[str, Any]:
    """Plain data.

    Args:
        found: The rows of each precision.
    """
    return {precision: [_plain(row) for row in rows] for precision, rows in found.items()}


def _plain(row: Row) -> dict[str, Any]:
    events: Events = row.events
    return {
        "axis": row.axis.name,
        "events": asdict(events),
        "happened": row.happened,
        "equal": row.equal,
        "of": row.total,
    }
