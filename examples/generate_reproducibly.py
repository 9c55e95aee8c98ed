"""Does the answer depend on who else is in the batch? A real language model, three times.

SmolLM2-135M-Instruct (fetched on the first run) answers the same prompts greedily at batch sizes
1, 2, 4 and 8. A batch mixes prompts of different lengths, so the shorter ones are padded on the
left. A reproducible model gives each prompt one answer, whatever the batch. Three ways are
compared:

- BF16: the model as it is usually served.
- heal: `heal_model(model, kv="fp32")`, which compiles with `backend="heal"` and keeps an FP32
  key/value cache.
- heal, the caller's BF16 cache: `torch.compile` with `backend="heal"` alone. A pass over the graph
  cannot widen a cache that the caller owns, nor the logits it hands out; both are rounded again.

Run it with `make demo-full`; `make demo` is shorter. `python examples/generate_reproducibly.py
--help` lists its options. It needs no GPU.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

PROMPTS = (
    "Write a short story about a robot who learns to paint.",
    "What is the capital of Australia?",
    "Explain how rainbows form, in simple words, to a child of six.",
    "Give me three tips for sleeping better.",
    "Translate to French: The weather is nice today and the sea is calm.",
    "Why is the sky blue?",
    "List five uses of a paper clip.",
    "Write a polite email that asks a landlord to repair the kitchen sink before the weekend, "
    "because guests are coming.",
    "What is a prime number?",
    "Describe the taste of a ripe mango to someone who has never eaten one.",
    "Who wrote Romeo and Juliet, and when?",
    "Summarize the plot of Cinderella in two sentences.",
    "How do I boil an egg so that the yolk stays soft?",
    "Name three rivers in South America.",
    "Write a poem of four lines about the first snow of the year.",
    "Compare a bicycle with a car for a short trip through a crowded city, and recommend one.",
)
BATCH_SIZES = (1, 2, 4, 8)

Answers = list[list[int]]


@dataclass(frozen=True)
class Way:
    """One way to run the model: what the table calls it, and how a loaded model is set up."""

    precision: str
    cache: str
    prepare: Callable[[Any], Any]

    @property
    def name(self) -> str:
        """For a progress bar."""
        return f"{self.precision}, cache {self.cache}"


def as_it_is(model: Any) -> Any:
    """Plain BF16, no compilation."""
    return model


def with_heal_model(model: Any) -> Any:
    """HEAL with its own FP32 cache."""
    from healpass.integrations.transformers import heal_model

    return heal_model(model, kv="fp32")


def with_one_line(model: Any) -> Any:
    """HEAL in the graph, transformers' BF16 cache beside it."""
    model.compile(backend="heal", dynamic=True)
    return model


WAYS = (
    Way("BF16", "BF16 (its own)", as_it_is),
    Way("heal", "FP32 (HealCache)", with_heal_model),
    Way("heal", "BF16 (the caller's)", with_one_line),
)


@dataclass(frozen=True)
class Task:
    """What one process does: which way, with how many prompts and new tokens, in which batches."""

    way: int
    prompts: int
    new_tokens: int
    batch_sizes: tuple[int, ...] = BATCH_SIZES


def generate(task: Task, report: Callable[[tuple[int, int]], None]) -> dict[int, Answers]:
    """Answer the prompts at every batch size, in this process, on one thread.

    Args:
        task: What to do.
        report: Called with the way's index and the number of prompts just answered.

    Returns:
        By batch size, the tokens of each answer up to its end.
    """
    from transformers.utils import logging

    from healpass.integrations import smollm2

    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # never compare a silent fallback
    torch._dynamo.config.specialize_float = True  # eps and scales are constants: no second tracing
    model, tokenizer = smollm2.load(torch.bfloat16)
    model = WAYS[task.way].prepare(model)
    texts = [chat(tokenizer, prompt) for prompt in PROMPTS[: task.prompts]]
    answers: dict[int, Answers] = {}
    for size in task.batch_sizes:
        answers[size] = []
        for start in range(0, len(texts), size):
            batch = tokenizer(texts[start : start + size], return_tensors="pt", padding=True)
            tokens = model.generate(**batch, do_sample=False, max_new_tokens=task.new_tokens)
            new = tokens[:, batch["input_ids"].shape[1] :].tolist()
            answers[size] += [until_end(row, tokenizer.eos_token_id) for row in new]
            report((task.way, len(new)))
    return answers


def chat(tokenizer: Any, prompt: str) -> str:
    """The prompt in the model's chat format."""
    message = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)


def until_end(tokens: list[int], end: int) -> list[int]:
    """The answer without what `generate` pads it with once it has ended."""
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens


def first_divergence(answers: Sequence[list[int]]) -> int | None:
    """The first position (from 1) at which the answers to one prompt differ; None if none does."""
    for position, tokens in enumerate(zip(*answers, strict=False), start=1):
        if len(set(tokens)) > 1:
            return position
    return None if len(set(map(len, answers))) == 1 else min(map(len, answers)) + 1


def divergences(answers: dict[int, Answers]) -> list[int | None]:
    """`first_divergence` of every prompt over the batch sizes."""
    return [first_divergence(group) for group in zip(*answers.values(), strict=True)]


def verdict(answers: dict[int, Answers]) -> tuple[str, str]:
    """How many prompts have one answer, and where the others diverge."""
    found = divergences(answers)
    late = [position for position in found if position is not None]
    where = f"token {min(late)} (median {statistics.median(late):g})" if late else "-"
    return f"{len(found) - len(late)} of {len(found)}", where


def results(outcomes: Mapping[int, dict[int, Answers]]) -> Table:
    """The table: a row for each way, by its index."""
    table = Table(title="One prompt, several batch sizes: is there one answer?")
    for heading in (
        "arithmetic",
        "key/value cache",
        "prompts with one answer",
        "others diverge at",
    ):
        table.add_column(heading)
    for way, answers in sorted(outcomes.items()):
        table.add_row(WAYS[way].precision, WAYS[way].cache, *verdict(answers))
    return table


def run_all(
    tasks: Sequence[Task], processes: int, console: Console
) -> dict[int, dict[int, Answers]]:
    """Run the tasks in processes of their own; say what each has found when it is done.

    Returns:
        The answers of each way, by its index.
    """
    context = multiprocessing.get_context("spawn")
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with (
        context.Manager() as manager,
        ProcessPoolExecutor(processes, mp_context=context) as pool,
        Progress(*columns, console=console) as progress,
    ):
        messages = manager.Queue()
        bars = {}
        for task in tasks:
            total = task.prompts * len(task.batch_sizes)
            bars[task.way] = progress.add_task(WAYS[task.way].name, total=total)
        ways = {pool.submit(generate, task, messages.put): task.way for task in tasks}
        pending = set(ways)
        while pending:
            done, pending = wait(pending, timeout=0.5)
            while not messages.empty():
                way, count = messages.get()
                progress.advance(bars[way], count)
            for future in done:
                same, where = verdict(future.result())
                others = "" if where == "-" else f"; the others diverge at {where}"
                console.print(f"{WAYS[ways[future]].name}: {same} prompts have one answer{others}")
        return {way: future.result() for future, way in ways.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Fetch the model, run the three ways, print the table and what it means."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--prompts", type=int, default=12, help="how many (2 to 16)")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens per answer")
    parser.add_argument("--ways", type=int, default=3, help="how many of the three, from the top")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=list(BATCH_SIZES))
    parser.add_argument("--processes", type=int, default=2, help="at a time, one thread each")
    options = parser.parse_args(argv)
    if not 2 <= options.prompts <= len(PROMPTS):
        parser.error(f"--prompts {options.prompts}: 2 to {len(PROMPTS)} are there")

    from healpass.integrations import smollm2

    console = Console()
    start = time.perf_counter()
    smollm2.fetch(console=console)
    fetched = time.perf_counter()
    sizes = tuple(options.batch_sizes)
    tasks = [
        Task(way, options.prompts, options.new_tokens, sizes)
        for way in range(len(WAYS[: options.ways]))
    ]
    console.print(
        f"{options.prompts} prompts, {options.new_tokens} new tokens, batch sizes "
        f"{', '.join(map(str, sizes))}. BF16 answers first; heal compiles before it does, which "
        "takes most of the time on the first run."
    )
    console.print(results(run_all(tasks, options.processes, console)))
    console.print(MEANING)
    console.print(
        f"Fetching took {fetched - start:.0f} s, the rest {time.perf_counter() - fetched:.0f} s."
    )


MEANING = (
    "\n"
    "Every row answered the same prompts again and again; only the batch around one changed. In "
    "BF16 each kernel rounds its result to 8 bits, so that a last-bit difference from another "
    "batch shape grows to half a percent and now and then flips the next token; from there on "
    "the texts differ. heal keeps FP32 between kernels, and with an FP32 cache a difference "
    "stays too small to flip a token, save in rare ties. A BF16 cache, or BF16 logits, put such "
    "a rounding back: they belong to the caller, and a compiler cannot widen them. So use "
    "heal_model(model) for generation; for "
    'everything else the one line torch.compile(model, backend="heal") is enough.\n'
)

if __name__ == "__main__":
    main()
