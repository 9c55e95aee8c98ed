"""What a study keeps on disk, and how it survives: one whole file per batch.

Layer: study. Imports `errors`, `strict_json` and `plan.configuration`.

    plan.json                         the plan, the environment, the command
    runs/<kind>-<configuration>/      00000.json or 00000.safetensors, named by its first prompt

A file appears under its name only when it is whole (written beside it, then renamed), so whatever
ends a run, the batches done are kept and `--resume` goes on behind them. Nothing is pickled.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from healpass import strict_json
from healpass.errors import StudyError
from healpass.study.plan.configuration import StudyPlan, Unit

#: Version of every file's layout; grows when a field changes its meaning or goes away. Since 2 a
#: number that is not finite is the string "inf", "-inf" or "nan"; 1 had bare words, no JSON.
SCHEMA = 2
#: The versions that are read.
READABLE = (1, 2)


@dataclass(frozen=True)
class Answer:
    """What one configuration generated for one prompt.

    Attributes:
        task: The task's id.
        tokens: Generated token ids, the end token included.
        top1_probs: The probability of each, or () where it was sampled.
        text: The reply.
        answer: What it answers, in one spelling per value; None: nothing.
        correct: Whether that is right.
    """

    task: str
    tokens: tuple[int, ...]
    top1_probs: tuple[float, ...]
    text: str
    answer: str | None
    correct: bool


@dataclass(frozen=True)
class Output:
    """What one configuration generated for one prompt.

    Attributes:
        tokens: The generated token ids, without the prompt.
        top1_probs: The probability of each generated token, or () where it was not recorded.
        correct: Whether the answer is right, or None where the prompt has no checkable answer.
    """

    tokens: tuple[int, ...]
    top1_probs: tuple[float, ...] = ()
    correct: bool | None = None

    def __post_init__(self) -> None:
        """Refuse probabilities that do not belong to the tokens."""
        if self.top1_probs and len(self.top1_probs) != len(self.tokens):
            raise StudyError(
                f"An output has {len(self.tokens)} tokens but {len(self.top1_probs)} top-1 "
                "probabilities. Give one per token, or none at all."
            )


@dataclass(frozen=True, eq=False)
class Margins:
    """The lead of the best over the second token on one text, under two configurations.

    Attributes:
        gap: `[T]`, FP64, nats, >= 0: the lead of the first configuration's best token.
        shift: `[T]`, FP64, nats: what the second configuration adds to the lead of that token
            over that same runner-up.
        flipped: `[T]`, bool: whether the best tokens differ, a third token included.
    """

    gap: Tensor
    shift: Tensor
    flipped: Tensor

    def __post_init__(self) -> None:
        """Refuse what is not one finite gap, shift and flip per token."""
        if not self.gap.dim() == 1 or not self.gap.shape == self.shift.shape == self.flipped.shape:
            raise StudyError(
                f"Margins need one gap, shift and flip per token, found shapes "
                f"{[tuple(x.shape) for x in (self.gap, self.shift, self.flipped)]}."
            )
        if not bool(torch.isfinite(self.gap).all() and torch.isfinite(self.shift).all()):
            raise StudyError(
                "Margins are not finite: a logit is NaN or infinite, and no lead over it has a "
                "size. Find the operation that makes it, or leave the prompt out."
            )
        if bool((self.gap < 0).any()):
            raise StudyError("A gap is negative; the best token leads by 0 or more by definition.")


@dataclass(frozen=True, eq=False)
class Scores:
    """How one configuration scores the T tokens of a given answer.

    Attributes:
        top: `[T, 2]`, INT64: its best two tokens, of equal ones the lower id first.
        logits: `[T, 2]`, FP32: their logits.
        reference: `[T, 2]`, FP32: the logits of the *reference's* best two.
        probs: `[T]`, FP32: the probability of its best token.
        digest: `[8]`, INT32: a SHA-256 of all logits.
    """

    top: Tensor
    logits: Tensor
    reference: Tensor
    probs: Tensor
    digest: Tensor


@dataclass(frozen=True)
class Batch:
    """A finished batch of a generating unit."""

    answers: tuple[Answer, ...]
    seconds: float


class Store:
    """The folder of one study."""

    def __init__(self, folder: Path, plan: StudyPlan) -> None:
        self.folder = folder
        self.plan = plan

    @classmethod
    def open(
        cls, folder: Path, plan: StudyPlan, stamp: dict[str, Any], *, resume: bool = False
    ) -> Store:
        """Begin a study in a folder, or go on with it.

        Args:
            folder: Where everything is kept.
            plan: What is to be run; on resuming it must be what the folder was begun with.
            stamp: Environment and command, kept in `plan.json`.
            resume: Whether records that are there are gone on with.

        Raises:
            StudyError: The folder holds a study and `resume` was not asked for, or it holds
                another one, or records without a plan, or a file is damaged or cannot be written.
        """
        path = folder / "plan.json"
        if path.exists():
            if not resume:
                raise StudyError(
                    f"{folder} holds a study already. Go on with it with --resume, or give "
                    "another folder with --out."
                )
            _check_same(folder, read_plan(folder), plan)
        elif (folder / "runs").exists():
            raise StudyError(
                f"{folder} holds records but no plan.json, so nobody can tell what they answer.\n"
                "Put its plan.json back, or give another folder with --out."
            )
        else:
            content = {"schema": SCHEMA, "plan": plan.to_dict(), **stamp}
            _write(path, strict_json.dumps(content, indent=1).encode())
        return cls(folder, plan)

    def save_answers(self, unit: Unit, start: int, batch: Batch) -> None:
        """Keep the answers to prompts `start`, `start + 1`, ...

        Args:
            unit: The generating unit.
            start: Index of the first prompt.
            batch: One answer per prompt, and the seconds they took.
        """
        content = {"schema": SCHEMA, **dataclasses.asdict(batch)}
        _write(self._path(unit, start, ".json"), strict_json.dumps(content).encode())

    def save_scores(self, unit: Unit, start: int, scores: Sequence[Scores]) -> None:
        """Keep the scores of the answers to prompts `start`, `start + 1`, ...

        Args:
            unit: The scoring unit.
            start: Index of the first prompt.
            scores: One entry per prompt.
        """
        from safetensors.torch import save

        fields = [field.name for field in dataclasses.fields(Scores)]
        tensors = {
            f"{index}.{name}": getattr(entry, name).clone()  # safetensors takes no views
            for index, entry in enumerate(scores)
            for name in fields
        }
        meta = {"schema": str(SCHEMA), "prompts": str(len(scores))}
        _write(self._path(unit, start, ".safetensors"), save(tensors, meta))

    def batches(self, unit: Unit) -> list[Batch]:
        """The finished batches of a generating unit, in order, up to the first that is missing."""
        found: list[Batch] = []
        count = 0
        for path in self._files(unit, ".json"):
            if int(path.stem) != count:
                break
            found.append(_read(path, _batch))
            count += len(found[-1].answers)
        return found

    def answers(self, unit: Unit) -> list[Answer]:
        """The finished answers of a generating unit, in the order of the prompts."""
        return [answer for batch in self.batches(unit) for answer in batch.answers]

    def scores(self, unit: Unit) -> list[Scores]:
        """The finished scores of a unit, by prompt, up to the first that is missing."""
        found: list[Scores] = []
        for path in self._files(unit, ".safetensors"):
            if int(path.stem) != len(found):
                break
            found += _read(path, _scores)
        return found

    def holds(self, unit: Unit, start: int) -> bool:
        """Whether the batch whose first prompt is `start` is finished."""
        return self._path(
            unit, start, ".safetensors" if unit.kind == "forced" else ".json"
        ).exists()

    def done(self, unit: Unit) -> int:
        """How many prompts are finished before the first that is not; their files are checked."""
        return len(self.scores(unit) if unit.kind == "forced" else self.answers(unit))

    def is_complete(self, unit: Unit) -> bool:
        """Whether all prompts of a unit are finished."""
        return self.done(unit) >= self.plan.scope(unit)[0]

    def save_json(self, name: str, content: Any) -> Path:
        """Keep a JSON file beside the plan."""
        text = strict_json.dumps({"schema": SCHEMA, **content}, indent=1)
        return self.save_bytes(name, text.encode())

    def save_bytes(self, name: str, content: bytes) -> Path:
        """Keep a file of the report."""
        path = self.folder / name
        _write(path, content)
        return path

    def load_json(self, name: str) -> Any:
        """A JSON file beside the plan, or None where there is none."""
        path = self.folder / name
        return _read(path, json.loads) if path.exists() else None

    def _path(self, unit: Unit, start: int, suffix: str) -> Path:
        return self.folder / "runs" / unit.name / f"{start:05d}{suffix}"

    def _files(self, unit: Unit, suffix: str) -> list[Path]:
        return sorted((self.folder / "runs" / unit.name).glob(f"*{suffix}"))


def read_plan(folder: Path) -> StudyPlan:
    """The plan that a folder was begun with.

    Raises:
        StudyError: There is none, or it is damaged.
    """
    path = folder / "plan.json"
    if not path.exists():
        raise StudyError(f"{folder} holds no study: there is no plan.json in it.")
    return _read(path, lambda content: StudyPlan.from_dict(json.loads(content)["plan"]), _NO_PLAN)


def _batch(content: bytes) -> Batch:
    values = json.loads(content)
    answers = [
        Answer(
            **a | {"tokens": tuple(a["tokens"]), "top1_probs": tuple(map(float, a["top1_probs"]))}
        )
        for a in values["answers"]
    ]
    return Batch(tuple(answers), float(values["seconds"]))


def _scores(content: bytes) -> list[Scores]:
    from safetensors.torch import load

    tensors = load(content)
    count = 1 + max((int(name.partition(".")[0]) for name in tensors), default=-1)
    fields = [field.name for field in dataclasses.fields(Scores)]
    return [Scores(**{name: tensors[f"{i}.{name}"] for name in fields}) for i in range(count)]


#: The ways out of a damaged record, and of a damaged plan.
_AGAIN = (
    "Delete this one file and run again with --resume: what it held is run again, all else is "
    "kept."
)
_NO_PLAN = (
    "Without it nobody can tell what the records answer: put a copy back, or begin again in "
    "another folder with --out."
)


def _read(path: Path, parse: Callable[[bytes], Any], way_out: str = _AGAIN) -> Any:
    from safetensors import SafetensorError

    try:
        return parse(path.read_bytes())
    except OSError as error:
        raise StudyError(f"cannot read {path}: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise StudyError(
            f"{path} is damaged ({type(error).__name__}: {error}).\n{way_out}"
        ) from error


def _write(path: Path, content: bytes) -> None:
    """Write a whole file or none."""
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise StudyError(
            f"cannot write {path}: {error.strerror}.\n"
            "What is finished is kept. Free some space, or make the folder writable, and run "
            "again with --resume."
        ) from error


def _check_same(folder: Path, found: StudyPlan, asked: StudyPlan) -> None:
    if found.key == asked.key:
        return
    before, now = found.to_dict(), asked.to_dict()
    differing = [name for name in now if json.dumps(now[name]) != json.dumps(before[name])]
    raise StudyError(
        f"{folder} holds another study: its {', '.join(differing)} differ from what is asked now. "
        "Give the options it was begun with (its plan.json lists them), or another --out."
    )


def digest_of(logits: Tensor) -> Tensor:
    """`[8]`, INT32: a SHA-256 of a tensor's FP32 bytes, equal for equal bits and -0 = 0."""
    import hashlib

    # Adding 0 turns -0 into 0, which compares equal to it.
    content = (logits.float() + 0.0).contiguous().numpy(force=True).tobytes()
    return torch.frombuffer(bytearray(hashlib.sha256(content).digest()), dtype=torch.int32).clone()
