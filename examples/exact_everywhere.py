"""One answer everywhere? `precision="exact"` beside FP32 and BF16 on SmolLM2-135M-Instruct.

Two studies, no GPU needed:

* Text: prompts are answered greedily in six configurations that differ in what should not matter:
  the batch around a prompt, how far it is padded, how many threads run. A precision is
  reproducible if every prompt has one answer.
* Bits: a forward pass over a few prompts, with every matrix product added as the tensor cores of
  four GPU generations would add it, in another order each. What counts are the elements of the
  logits that differ in a bit from those of an A100. FP32 units add alike on all of them, so there
  only the order differs; a V100 has no BF16 tensor core.

    python examples/exact_everywhere.py            # 20 prompts x 128 tokens; 4 x 64: an hour
    python examples/exact_everywhere.py --short    # few prompts, layers and words: minutes

`--short` cuts the model to two layers and a vocabulary of 2,000: its text is gibberish, its widths
and weights are real.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from healpass.integrations import smollm2
from healpass.integrations.transformers import heal_model
from healpass.study.plan.configuration import Configuration as Study
from healpass.study.plan.tasks import load
from healpass.study.run.networks import interpret

#: BF16 and FP32 run as transformers runs them, the others through `heal_model`.
PRECISIONS = ("bf16", "fp32", "heal", "exact")
GENERATIONS = ("a100", "h100", "v100", "b200")


@dataclass(frozen=True)
class Configuration:
    """What should not matter: prompts per batch, tokens of padding beyond need, threads."""

    batch: int
    padding: int = 0
    threads: int = 1

    def __str__(self) -> str:
        return f"batch {self.batch}, {self.padding} more padding, {self.threads} threads"


CONFIGURATIONS = (
    Configuration(1),
    Configuration(1, threads=2),
    Configuration(2),
    Configuration(5),
    Configuration(5, padding=7),
    Configuration(20, padding=3, threads=2),
)


@dataclass(frozen=True)
class Size:
    """How much is run; `layers` and `vocabulary` cut the model, None leaves it."""

    prompts: int = 20
    tokens: int = 128
    forced_prompts: int = 4
    forced_tokens: int = 64
    layers: int | None = None
    vocabulary: int | None = None


SHORT = Size(prompts=3, tokens=6, forced_prompts=1, forced_tokens=5, layers=2, vocabulary=2000)


def questions(count: int) -> list[str]:
    """The first questions of the study's suite."""
    return [task.question for task in load()[:count]]


def load_model(size: Size, how: Study) -> tuple[Any, Any]:
    """The model in the dtype of a precision, its tokenizer; what was compiled is forgotten."""
    torch._dynamo.reset()
    dtype = getattr(torch, how.dtype)
    return smollm2.load(dtype, layers=size.layers, vocabulary=size.vocabulary)


# ------------------------------------------------------------------------------------------ text


def answers(model: Any, tokenizer: Any, size: Size, how: Configuration) -> list[list[int]]:
    """The greedy continuation of every prompt, token by token."""
    found = []
    texts = questions(size.prompts)
    with threads(how.threads):
        for start in range(0, len(texts), how.batch):
            batch = tokenizer(texts[start : start + how.batch], return_tensors="pt", padding=True)
            batch = {
                name: torch.nn.functional.pad(x, (how.padding, 0)) for name, x in batch.items()
            }
            tokens = model.generate(
                **batch, do_sample=False, max_new_tokens=size.tokens, min_new_tokens=size.tokens
            )
            found += tokens[:, batch["input_ids"].shape[1] :].tolist()
    return found


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Run with so many threads, then with as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def distinct(runs: Sequence[list[list[int]]]) -> list[int]:
    """For each prompt, how many different answers the runs gave."""
    return [len({tuple(answer) for answer in group}) for group in zip(*runs, strict=True)]


def first_difference(runs: Sequence[list[list[int]]]) -> int | None:
    """The earliest token (from 1) at which answers to one prompt differ; None if none do."""
    positions = [
        position
        for group in zip(*runs, strict=True)
        for position, tokens in enumerate(zip(*group, strict=True), 1)
        if len(set(tokens)) > 1
    ]
    return min(positions, default=None)


def text_study(size: Size, console: Console, names: Sequence[str]) -> Table:
    """A row for each precision: prompts with one answer over the configurations."""
    table = Table(title=f"{size.prompts} prompts x {size.tokens} tokens, 6 configurations")
    for heading in ("precision", "prompts with one answer", "most answers", "first difference"):
        table.add_column(heading)
    for name in names:
        plain = Study(precision=name)
        model, tokenizer = load_model(size, plain)
        model = model if plain.is_baseline else heal_model(model, precision=name)
        runs = []
        for how in CONFIGURATIONS:
            with console.status(f"{name}: {how}"):
                runs.append(answers(model, tokenizer, size, how))
        counts, first = distinct(runs), first_difference(runs)
        same = f"{counts.count(1)} of {len(counts)}"
        table.add_row(name, same, str(max(counts)), "none" if first is None else f"token {first}")
    return table


# ------------------------------------------------------------------------------------------ bits


def forced_logits(size: Size, how: Study) -> Tensor:
    """FP32 logits of the prompts, cut to one length, in one forward pass."""
    model, tokenizer = load_model(size, how)
    if how.is_baseline:  # the backend simulates what it rewrites, the study also what it does not
        interpret(model, how)
    else:
        model.compile(backend="heal", options=how.heal_options() | {"outputs": "fp32"})
    texts = [question * 40 for question in questions(size.forced_prompts)]
    ids = [tokenizer(text)["input_ids"][: size.forced_tokens] for text in texts]
    logits: Tensor = model(input_ids=torch.tensor(ids), use_cache=False).logits
    return logits.float()


def differing(a: Tensor, b: Tensor) -> int:
    """How many FP32 elements differ in a bit."""
    return int((a.view(torch.int32) != b.view(torch.int32)).sum())


def bits_study(size: Size, console: Console, names: Sequence[str]) -> Table:
    """A row for each precision and generation: elements of the logits that differ from A100's."""
    title = f"{size.forced_prompts} prompts x {size.forced_tokens} tokens, teacher-forced"
    table = Table(title=f"{title}: logits that differ from an A100's")
    for heading in ("precision", *GENERATIONS[1:], "of"):
        table.add_column(heading, justify="left" if heading == "precision" else "right")
    for name in names:
        cells: list[str] = []
        for seed, gpu in enumerate(GENERATIONS):
            how = Study(precision=name, gpu=gpu, order=seed)
            if how.unavailable:
                cells.append(how.unavailable)
                continue
            with console.status(f"{name} as {gpu} adds"):
                logits = forced_logits(size, how)
            if seed == 0:
                first = logits
            else:
                cells.append(str(differing(logits, first)))
        table.add_row(name, *cells, str(first.numel()))
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """Fetch the model, run both studies, print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--short", action="store_true", help="a cut model, minutes")
    parser.add_argument("--only", choices=("text", "bits"), help="one of the two studies")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    options = parser.parse_args(argv)
    size, console = SHORT if options.short else Size(), Console()
    smollm2.fetch(console=console)
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # never compare a silent fallback
    torch._dynamo.config.specialize_float = True
    torch._dynamo.config.recompile_limit = 16  # prefill and decode: one prompt, several; threads
    with torch.no_grad():
        for name, study in (("text", text_study), ("bits", bits_study)):
            if options.only in (None, name):
                console.print(study(size, console, options.precision))


if __name__ == "__main__":
    main()
