"""Tasks with a checkable answer: the record, the loader and the scorer.

Layer: study. Imports `errors` and `plan.replies`.

The tasks that come with healpass are the suite "Professional Short Answers": finance, medicine and
law, described in `docs/professional-short-answers.md`. A user's own JSON Lines file is read by the
same code.

What counts as the answer in a model's free text is told in `replies`.
"""

from __future__ import annotations

import dataclasses
import json
import re
import string
from dataclasses import dataclass
from decimal import Decimal
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

from healpass.errors import TaskError, suggestion
from healpass.study.plan import replies

Kind = Literal["number", "choice", "label"]

#: What `load` and `healpass check --tasks` call the suite that comes with healpass.
SUITE = "mission-critical"
DOMAINS = ("finance", "medicine", "law")

_PLAIN_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?")


@dataclass(frozen=True, kw_only=True)
class Task:
    """One question whose answer can be checked without a judge.

    Raises:
        TaskError: A field is missing its content or contradicts another one.
    """

    id: str
    """Unique within a file."""
    kind: Kind
    """`number`: within `tolerance`; `choice`: the letter of an option; `label`: an option."""
    question: str
    """All that is needed to answer."""
    answer: str
    """A plain decimal (`-1234.5`), a letter (`A` is the first option) or one of the options."""
    domain: str = "other"
    """What the question is about; a suite is spread over its domains."""
    unit: str = ""
    """Of a number. In `percent`, 5% is the number 5; in any other unit it is 0.05."""
    tolerance: str = ""
    """Of a number: how far from `answer` it may be, a plain decimal; `0` means exactly."""
    options: tuple[str, ...] = ()
    """Of a choice (shown with letters) or a label."""
    quantities: tuple[tuple[str, str], ...] = ()
    """Name and decimal of what the question states and the answer is computed from."""
    justification: str = ""
    """One line: why the answer is right."""

    def __post_init__(self) -> None:
        """Check each field, and that the fields fit together."""
        for name in ("id", "question"):
            _need(getattr(self, name).strip() != "", name, "is empty", "Give it a text.")
        _need(
            self.kind in get_args(Kind),
            "kind",
            f"is {self.kind!r}, which is not one of {', '.join(get_args(Kind))}",
            suggestion(self.kind, get_args(Kind)).strip(),
        )
        (_check_number if self.kind == "number" else _check_options)(self)

    @property
    def prompt(self) -> str:
        """The user's message to the model: question, options, and the form of the answer."""
        return f"{self.question}\n{_listing(self)}\nEnd your reply with one line: {_form(self)}"


@dataclass(frozen=True)
class Score:
    """How a reply does on its task."""

    correct: bool
    answer: str | None
    """What the reply answers, in one spelling per value (`1234.5`, `B`); None: it does not."""


def load(source: str | Path = SUITE) -> tuple[Task, ...]:
    """Read tasks.

    Args:
        source: `mission-critical`, the suite that comes with healpass, or a file with one JSON
            object per line, keys being the fields of `Task`. A number may be a JSON number or a
            string; empty lines are skipped.

    Raises:
        TaskError: The file cannot be read, has no task, or a line is not a task; the message names
            file, line and field.
    """
    if source == SUITE:
        folder = resources.files("healpass.study") / "data"
        texts = [(f"{name}.jsonl", (folder / f"{name}.jsonl").read_bytes()) for name in DOMAINS]
    else:
        texts = [(str(source), _bytes_of(Path(source)))]
    return tuple(task for name, text in texts for task in _parse(name, text))


def score(task: Task, reply: str) -> Score:
    """Compare a model's reply, free text, with the task's answer."""
    found = read_answer(task, reply)
    if found is None:
        return Score(correct=False, answer=None)
    if task.kind == "number":
        distance = abs(Decimal(found) - Decimal(task.answer))
        return Score(correct=distance <= Decimal(task.tolerance), answer=found)
    return Score(correct=found == task.answer, answer=found)


def read_answer(task: Task, reply: str) -> str | None:
    """Return what a reply answers, in one spelling per value; None if it does not answer."""
    if task.kind == "number":
        value = replies.read_number(reply, percent_is_unit=task.unit == "percent")
        return None if value is None else f"{value.normalize():f}"
    if task.kind == "choice":
        return replies.read_letter(reply, task.options)
    return replies.read_label(reply, task.options)


# Checks and prompts


def _need(holds: bool, field: str, found: str, way_out: str) -> None:
    if not holds:
        raise TaskError(f"field {field!r} {found}. {way_out}".rstrip())


def _check_number(task: Task) -> None:
    for name in ("answer", "tolerance"):
        value = getattr(task, name)
        _need(
            _PLAIN_NUMBER.fullmatch(value) is not None,
            name,
            f"is {value!r}, but a task of kind 'number' needs a plain decimal there",
            "Write it as 1234.5, without unit, comma or exponent.",
        )
    _need(
        Decimal(task.tolerance) >= 0, "tolerance", f"is {task.tolerance}", "It cannot be negative."
    )
    _need(not task.options, "options", "is given for a number", "Leave it out.")


def _check_options(task: Task) -> None:
    names = [option.strip().casefold() for option in task.options]
    most = len(string.ascii_uppercase)
    _need(
        2 <= len(names) <= most and "" not in names and len(set(names)) == len(names),
        "options",
        f"is {list(task.options)}, but a task of kind {task.kind!r} needs 2 to {most} different "
        "texts there",
        "",
    )
    allowed = _letters(task) if task.kind == "choice" else task.options
    _need(
        task.answer in allowed,
        "answer",
        f"is {task.answer!r}, which is not one of {', '.join(allowed)}",
        suggestion(task.answer, allowed).strip(),
    )
    for name in ("unit", "tolerance"):
        _need(getattr(task, name) == "", name, "is given without a number", "Leave it out.")


def _letters(task: Task) -> str:
    return string.ascii_uppercase[: len(task.options)]


def _listing(task: Task) -> str:
    if task.kind != "choice":
        return ""
    lettered = zip(_letters(task), task.options, strict=True)
    return "".join(f"{letter}) {option}\n" for letter, option in lettered)


def _form(task: Task) -> str:
    if task.kind == "choice":
        return "Answer: LETTER"
    if task.kind == "label":
        return f"Answer: LABEL, where LABEL is one of: {', '.join(task.options)}."
    unit = f", the number being in {task.unit}" if task.unit else ""
    if Decimal(task.tolerance) == 0:
        return f"Answer: NUMBER{unit}. It has to be exact."
    return f"Answer: NUMBER{unit}. Within {task.tolerance} of the result counts as right."


# Files


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TaskError(
            f"cannot read the tasks in {path}: {error.strerror}.\n"
            f"Give {SUITE!r}, the suite that comes with healpass, or a file with one JSON object "
            "per line."
        ) from error


def _parse(name: str, content: bytes) -> list[Task]:
    """Read the lines of a file; `name` is what errors call it."""
    tasks: dict[str, Task] = {}
    lines_of: dict[str, int] = {}
    # Split as bytes: str.splitlines would also split at U+2028 inside a JSON string.
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            task = _task_of(line)
            first = lines_of.setdefault(task.id, number)
            _need(first == number, "id", f"is {task.id!r}, as in line {first}", "Give it another.")
        except TaskError as error:
            raise TaskError(f"{name}, line {number}: {error}") from None
        tasks[task.id] = task
    if not tasks:
        raise TaskError(f"{name} has no task. One JSON object per line is needed.")
    return list(tasks.values())


def _task_of(line: bytes) -> Task:
    fields = dataclasses.fields(Task)
    record = _object_of(line)
    known = [field.name for field in fields]
    for name in record:
        _need(
            name in known,
            name,
            "is unknown",
            f"Known fields: {', '.join(known)}.{suggestion(name, known)}",
        )
    for field in fields:
        needed = field.default is dataclasses.MISSING
        _need(field.name in record or not needed, field.name, "is missing", "")
    return Task(**{name: _value(name, value) for name, value in record.items()})


def _object_of(line: bytes) -> dict[str, Any]:
    """Parse one line; numbers stay the digits that were written, so no decimal is rounded."""
    try:
        record = json.loads(
            line.decode(),
            parse_float=str,
            parse_int=str,
            parse_constant=str,
            object_pairs_hook=_once_each,
        )
    except UnicodeDecodeError as error:
        raise TaskError(f"not UTF-8 ({error.reason} at byte {error.start}).") from None
    except json.JSONDecodeError as error:
        raise TaskError(f"not JSON: {error.msg} at column {error.colno}.") from None
    except RecursionError:
        raise TaskError("not a task: brackets are nested too deeply.") from None
    if not isinstance(record, dict):
        raise TaskError(f"a JSON object is needed, found a {type(record).__name__}.")
    return record


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    names = [name for name, _ in pairs]
    for name in record:
        _need(names.count(name) == 1, name, "stands there twice", "Keep one.")
    return record


def _value(name: str, value: Any) -> Any:
    """Turn the JSON value of a field into the field's type."""
    if name == "options":
        is_right = isinstance(value, list) and all(isinstance(item, str) for item in value)
        _need(is_right, name, f"is {value!r}, but a list of texts is needed", "")
        return tuple(value)
    if name == "quantities":
        is_right = isinstance(value, dict) and all(
            isinstance(item, str) and _PLAIN_NUMBER.fullmatch(item) for item in value.values()
        )
        _need(is_right, name, f"is {value!r}, but an object of plain decimals is needed", "")
        return tuple(value.items())
    _need(isinstance(value, str), name, f"is {value!r}, but a text is needed", "")
    return value
