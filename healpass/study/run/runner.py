"""Runs a plan: unit by unit, batch by batch, each kept as soon as it is done.

Layer: study. Imports `study` only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from healpass.errors import StudyError
from healpass.integrations.checkpoint import Checkpoint
from healpass.study.plan import tasks as suites
from healpass.study.plan.configuration import StudyPlan, Unit
from healpass.study.plan.prompts import encode
from healpass.study.plan.tasks import Task
from healpass.study.run.generate import generate
from healpass.study.run.networks import Network, build, key_of, strict_dynamo
from healpass.study.run.records import Answer, Batch, Scores, Store
from healpass.study.run.score import Text, score

#: Told after each batch: the unit, and how many of its prompts are done.
Progress = Callable[[Unit, int], None]


@dataclass(frozen=True)
class Materials:
    """What every unit shares.

    Attributes:
        checkpoint: The model under study.
        tokenizer: Its tokenizer.
        tasks: The prompts, as tasks.
        prompts: The prompts, as token ids.
    """

    checkpoint: Checkpoint
    tokenizer: Any
    tasks: tuple[Task, ...]
    prompts: tuple[tuple[int, ...], ...]


def choose_tasks(suite: str, count: int) -> tuple[Task, ...]:
    """So many tasks, spread evenly over the suite, so over its domains too.

    Args:
        suite: As `tasks.load` takes it.
        count: How many.

    Raises:
        StudyError: There are fewer.
        TaskError: The file has no tasks.
    """
    found = suites.load(suite)
    if len(found) < count:
        raise StudyError(
            f"{count} prompts are asked for, but {suite} has {len(found)}. Give a "
            "smaller --prompts, or more tasks."
        )
    return tuple(found[index * len(found) // count] for index in range(count))


def gather(plan: StudyPlan) -> Materials:
    """Load what is needed before the first unit, so that wrong use is found at once.

    Raises:
        FetchError: The model or its tokenizer cannot be loaded.
        StudyError: It is no causal language model, or a prompt is too long for it.
        TaskError: The tasks cannot be read.
    """
    tasks = choose_tasks(plan.tasks, plan.prompts)
    checkpoint = Checkpoint(plan.model)
    tokenizer = checkpoint.tokenizer()
    prompts = encode(checkpoint.model(), tokenizer, tasks, plan.max_new_tokens)
    return Materials(checkpoint, tokenizer, tasks, tuple(map(tuple, prompts)))


def run(store: Store, materials: Materials, progress: Progress = lambda *_: None) -> None:
    """Run what the store does not hold yet.

    An interruption loses the batch at hand only.

    Args:
        store: The plan, and the records so far.
        materials: Model and prompts, as `gather` gives them.
        progress: Told after each batch: the unit, and how many of its prompts are done.

    Raises:
        StudyError: A record cannot be read or written, or a logit is not finite.
    """
    plan = store.plan
    waiting = [unit for unit in _available(plan) if not store.is_complete(unit)]
    network: Network | None = None
    with strict_dynamo():
        for unit in _grouped(waiting):
            if network is None or network.key != key_of(unit):
                network = None  # free the memory of the last one first
                network = build(materials.checkpoint, unit, compiled=plan.compiled)
            network.use(unit.configuration)
            _run_unit(store, materials, network.model, unit, progress)


def _available(plan: StudyPlan) -> list[Unit]:
    return [unit for unit in plan.units if unit.configuration.unavailable is None]


def _grouped(units: Sequence[Unit]) -> list[Unit]:
    """Units of one network beside each other; a precision's generation before its scoring."""
    first: dict[Any, int] = {}
    for index, unit in enumerate(units):
        first.setdefault(key_of(unit), index)
    precisions = list(dict.fromkeys(unit.configuration.precision for unit in units))
    return sorted(
        units,
        key=lambda u: (
            precisions.index(u.configuration.precision),
            u.kind == "forced",
            first[key_of(u)],
        ),
    )


def _run_unit(
    store: Store, materials: Materials, model: Any, unit: Unit, progress: Progress
) -> None:
    total, _ = store.plan.scope(unit)
    batches = _batches(total, unit.configuration.batch_size)
    missing = [(start, stop) for start, stop in batches if not store.holds(unit, start)]
    done = total - sum(stop - start for start, stop in missing)
    for start, stop in missing:
        if unit.kind == "forced":
            store.save_scores(unit, start, _scored(store, materials, model, unit, start, stop))
        else:
            store.save_answers(unit, start, _answered(store, materials, model, unit, start, stop))
        done += stop - start
        progress(unit, done)


def _batches(total: int, size: int) -> Iterator[tuple[int, int]]:
    for first in range(0, total, size):
        yield first, min(first + size, total)


def _answered(
    store: Store, materials: Materials, model: Any, unit: Unit, start: int, stop: int
) -> Batch:
    plan = store.plan
    seeds = [plan.seed * 100_003 + index for index in range(start, stop)]
    begin = time.perf_counter()
    found = generate(
        model,
        materials.tokenizer,
        materials.prompts[start:stop],
        new_tokens=plan.max_new_tokens,
        chunk=unit.configuration.chunk,
        seeds=seeds if unit.kind == "sampled" else None,
    )
    seconds = time.perf_counter() - begin
    answers = []
    for task, one in zip(materials.tasks[start:stop], found, strict=True):
        text = materials.tokenizer.decode(one.tokens, skip_special_tokens=True)
        result = suites.score(task, text)
        answers.append(Answer(task.id, one.tokens, one.probs, text, result.answer, result.correct))
    return Batch(tuple(answers), seconds)


def _scored(
    store: Store, materials: Materials, model: Any, unit: Unit, start: int, stop: int
) -> list[Scores]:
    plan = store.plan
    _, tokens = plan.scope(unit)
    texts = answers_as_text(store, materials, unit, tokens)[start:stop]
    first = reference_unit(plan, unit.configuration.precision)
    references = None if unit == first else store.scores(first)[start:stop]
    return score(
        model,
        texts,
        padding_id=materials.tokenizer.pad_token_id,
        side=unit.configuration.padding_side,
        references=references,
    )


def answers_as_text(store: Store, materials: Materials, unit: Unit, tokens: int) -> list[Text]:
    """What a forced unit scores: the prompts with the reference's greedy answers.

    Args:
        store: The records; the greedy answers of the unit's precision must be there.
        materials: The prompts.
        unit: The unit that scores.
        tokens: Most tokens of an answer.
    """
    source = Unit("greedy", store.plan.reference(unit.configuration.precision))
    answers = store.answers(source)
    return [
        Text(prompt, answer.tokens[:tokens])
        for prompt, answer in zip(materials.prompts, answers, strict=False)
    ]


def reference_unit(plan: StudyPlan, precision: str) -> Unit:
    """The forced unit that the others of a precision are compared with: its first available."""
    return next(
        unit
        for unit in _available(plan)
        if unit.kind == "forced" and unit.configuration.precision == precision
    )
