"""Does what vLLM's scheduler does change an answer? The axes of `healpass check --engine vllm`.

Each axis is an engine in a process of its own (`answering`): vLLM keeps registries for the engines
after the first one. All answer the same prompts, and are compared with each prompt answered alone
from an empty cache, to the last bit of each log-probability. An axis counts what it is about: an
engine that never preempted shows nothing about preemption.

Imports nothing of vLLM; the processes do. Imports `config` and `errors`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from healpass.errors import MissingExtraError, UnavailableError

Arrivals = Literal["alone", "together", "staggered"]
#: Tokens of a page in the axes that need small ones; plain vLLM on CPU has no smaller.
BLOCK = 32
#: What a process of ours needs: the engine in it, and no artifacts that outlive versions of HEAL.
_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_AOT_COMPILE": "0"}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """An engine, and what it is asked.

    Attributes:
        model: A model's name or folder.
        options: HEAL's, as `engine_args` takes them; None for vLLM as it is.
        prompts: Token ids.
        new_tokens: Of each answer.
        compiled: Whether the model's graph is compiled.
        arrivals: When requests come.
        rounds: How often all are asked; the last answers count.
        engine: More of the engine's arguments.
    """

    model: str
    options: dict[str, str] | None
    prompts: Sequence[Sequence[int]]
    new_tokens: int
    compiled: bool = True
    arrivals: Arrivals = "together"
    rounds: int = 1
    engine: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """Tokens, and the log-probability of each."""

    tokens: tuple[int, ...]
    log_probabilities: tuple[float, ...]


@dataclass(frozen=True)
class Events:
    """What happened in an engine while it answered the last round.

    Attributes:
        at_once: The most requests in one step.
        cut: Prompts that were computed in several steps.
        cached: Tokens of prompts that were in the cache.
        preemptions: How often a request lost its pages.
        block_size: Tokens of a page.
    """

    at_once: int = 0
    cut: int = 0
    cached: int = 0
    preemptions: int = 0
    block_size: int = 0


@dataclass(frozen=True)
class Axis:
    """One thing that a scheduler does.

    Attributes:
        name: As the table has it.
        event: The field of `Events` that shows that it was done.
        least: The smallest number that shows it.
        most: The largest, or None.
        changes: Fields of `Asked`.
    """

    name: str
    event: str
    least: int
    most: int | None = None
    changes: dict[str, Any] = field(default_factory=dict)

    def happened(self, events: Events) -> bool:
        """Whether an engine did it."""
        count = getattr(events, self.event)
        return bool(count >= self.least and (self.most is None or count <= self.most))


@dataclass(frozen=True)
class Row:
    """What an axis showed.

    Attributes:
        axis: Which one.
        events: What happened.
        equal: Answers with the bits of the lonely ones.
        total: All answers.
    """

    axis: Axis
    events: Events
    equal: int
    total: int

    @property
    def happened(self) -> bool:
        """Whether the axis was tried at all."""
        return self.axis.happened(self.events)

    @property
    def holds(self) -> bool:
        """Whether it happened, and changed nothing."""
        return self.happened and self.equal == self.total


def axes(prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[Axis, ...]:
    """The axes for these prompts.

    Args:
        prompts: Token ids.
        new_tokens: Of each answer.
    """
    return (
        Axis("all at once", "at_once", 2),
        Axis("one every second step", "at_once", 2, changes={"arrivals": "staggered"}),
        *(_chunks(tokens) for tokens in (8, 16, 64)),
        Axis("prefixes in the cache", "cached", 1, changes=_pages(BLOCK) | {"rounds": 2}),
        Axis("no prefix cache", "cached", 0, 0, {"engine": {"enable_prefix_caching": False}}),
        *(_blocks(size) for size in (32, 128)),
        Axis("too few pages", "preemptions", 1, changes=_few_pages(prompts, new_tokens)),
    )


def _chunks(tokens: int) -> Axis:
    engine = {"max_num_batched_tokens": tokens, "max_num_seqs": tokens}
    return Axis(f"prompts in chunks of {tokens}", "cut", 1, changes={"engine": engine})


def _blocks(size: int) -> Axis:
    return Axis(f"blocks of {size}", "block_size", size, size, _pages(size))


def _pages(size: int) -> dict[str, Any]:
    return {"engine": {"block_size": size}}


def _few_pages(prompts: Sequence[Sequence[int]], new_tokens: int) -> dict[str, Any]:
    """Pages for all prompts, but not for their answers."""
    longest = max(map(len, prompts)) + new_tokens
    pages = sum(-(-len(prompt) // BLOCK) for prompt in prompts)
    count = max(pages, -(-longest // BLOCK)) + 1  # the first page is vLLM's own
    few = {"block_size": BLOCK, "num_gpu_blocks_override": count, "enable_prefix_caching": False}
    return {"engine": few}


def check(asked: Asked) -> Iterator[Row]:
    """Try every axis.

    Args:
        asked: The engine without an axis.

    Raises:
        MissingExtraError: vLLM is not installed.
        UnavailableError: An engine does not start, or fails.
    """
    longest = max(map(len, asked.prompts)) + asked.new_tokens
    common = {"max_model_len": longest, "max_num_seqs": max(2, len(asked.prompts))}
    asked = replace(asked, engine=common | asked.engine)
    expected, _ = answers(replace(asked, arrivals="alone"), "alone")
    for axis in axes(asked.prompts, asked.new_tokens):
        changes = axis.changes | {"engine": _joined(asked.engine, axis.changes.get("engine", {}))}
        found, events = answers(replace(asked, **changes), axis.name)
        equal = sum(a == b for a, b in zip(found, expected, strict=True))
        yield Row(axis, events, equal, len(expected))


def _joined(engine: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    both = engine | changes
    return both | {"max_num_seqs": min(engine["max_num_seqs"], both["max_num_seqs"])}


def answers(asked: Asked, name: str) -> tuple[list[Answer], Events]:
    """What an engine answers, in a process of its own.

    Args:
        asked: The engine and the prompts.
        name: What an error calls it.

    Raises:
        MissingExtraError: vLLM is not installed.
        UnavailableError: The engine does not start, or fails.
    """
    found = in_a_process("answering", asdict(asked), name)
    read = [Answer(tuple(a["tokens"]), tuple(a["log_probabilities"])) for a in found["answers"]]
    return read, Events(**found["events"])


def in_a_process(module: str, asked: dict[str, Any], name: str) -> Any:
    """What a module of this folder, run as a script, writes of what it is asked.

    Args:
        module: Its name; it uses `answer_in_this_process`.
        asked: As JSON knows it.
        name: What an error calls the engine.

    Raises:
        MissingExtraError: vLLM is not installed.
        UnavailableError: The engine is refused, or fails.
    """
    if find_spec("vllm") is None:
        raise MissingExtraError(
            "vLLM is not installed here. Install it with: pip install 'healpass[vllm]'"
        )
    quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "TQDM_DISABLE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        question, reply = Path(folder, "asked.json"), Path(folder, "found.json")
        question.write_text(json.dumps(asked))
        script = ["-m", f"healpass.integrations.vllm.{module}", str(question), str(reply)]
        environment = quiet | os.environ | _ENVIRONMENT
        done = subprocess.run(
            [sys.executable, *script], env=environment, capture_output=True, text=True, check=False
        )
        found = json.loads(reply.read_text()) if reply.exists() else {}
    if "refused" in found:
        raise UnavailableError(f"vLLM with {name}: {found['refused']}")
    if done.returncode != 0 or not found:
        last = "\n".join(done.stderr.strip().splitlines()[-12:])
        raise UnavailableError(f"vLLM with {name} ended with status {done.returncode}:\n{last}")
    return found


def answer_in_this_process(answer: Callable[[dict[str, Any]], Any], words: Sequence[str]) -> None:
    """The other side of `in_a_process`: what a script does with its two words.

    Args:
        answer: Makes what is written of what was asked.
        words: Paths of what was asked, and of what is found.
    """
    from healpass.errors import HealError

    question, reply = map(Path, words)
    try:
        found = answer(json.loads(question.read_text()))
    except HealError as error:
        found = {"refused": str(error)}
    reply.write_text(json.dumps(found))
