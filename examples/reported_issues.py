"""Bugs that people reported, run again: in BF16 as they met them, with heal, and with exact.

    python examples/reported_issues.py [--layers 2] [--new-tokens 16]

Each row is a report from a public tracker in which nothing but the shape of a batch changed, and
so did the answer. All run on CPU on the first layers of SmolLM2-135M-Instruct (the linear algebra
report: on one matrix). "differ by 0" in the last column means equal to the last bit.

`heal` runs with `kv="int24"`, which is FP32-equivalent end to end: it leaves differences in the
last bits of FP32, too small to change a word. `exact` leaves none.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

PROMPTS = (
    "Why is the sky blue?",
    "What is a prime number? Explain it with one example.",
    "Name three rivers.",
    "Write a short story about a robot who learns to paint, and about the painter who teaches it.",
    "Who wrote Romeo and Juliet, and when?",
    "Translate to French: The weather is nice today.",
)
ROWS = (1, 2, 5, 17)

#: Sets a loaded BF16 model up: `heal_model` with the options of a way, or nothing.
Prepare = Callable[[Any], Any]


@dataclass(frozen=True)
class Subject:
    """What the reports are tried on: a model, its tokenizer, a matmul, and how much text."""

    model: Any
    tokenizer: Any
    matmul: Callable[[Tensor, Tensor], Tensor]
    new_tokens: int

    def batch(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Prompts padded on the left."""
        return dict(self.tokenizer(list(prompts), return_tensors="pt", padding=True))

    def generate(self, prompts: Sequence[str], new_tokens: int) -> tuple[Tensor, Tensor]:
        """Greedy tokens `[B, T]` and their logits `[B, T, V]` in FP32."""
        batch = self.batch(prompts)
        made = self.model.generate(
            **batch,
            do_sample=False,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            output_logits=True,
            return_dict_in_generate=True,
        )
        logits = torch.stack(made.logits, 1).float()
        return made.sequences[:, batch["input_ids"].shape[1] :], logits

    @functools.cached_property
    def alone(self) -> list[tuple[Tensor, Tensor]]:
        """Greedy tokens `[T]` and logits `[T, V]` of each prompt in a batch of its own."""
        texts = [self.generate([prompt], self.new_tokens) for prompt in PROMPTS]
        return [(tokens[0], logits[0]) for tokens, logits in texts]


def texts_that_change(subject: Subject) -> float:
    """Prompts whose greedy text in some batch (2, 4, all) is not the one they get alone."""
    changed = set()
    for size in (2, 4, len(PROMPTS)):
        for start in range(0, len(PROMPTS), size):
            batch = PROMPTS[start : start + size]
            for index, row in enumerate(subject.generate(batch, subject.new_tokens)[0], start):
                if not torch.equal(row, subject.alone[index][0]):
                    changed.add(index)
    return float(len(changed))


def first_text_changes(subject: Subject) -> float:
    """Logits of the first prompt's first new token: alone, and with ever more company."""
    alone = subject.alone[0][1][0]
    batches = [PROMPTS[:size] for size in range(2, len(PROMPTS) + 1)]
    return max(float((subject.generate(b, 1)[1][0, 0] - alone).abs().max()) for b in batches)


def left_padding(subject: Subject) -> float:
    """Logits of each prompt's first new token: without padding, and padded to the longest."""
    alone = torch.stack([logits[0] for _, logits in subject.alone])
    return float((subject.generate(PROMPTS, 1)[1][:, 0] - alone).abs().max())


def forward_and_decode(subject: Subject) -> float:
    """Logits of a text: in one forward pass, and by prefill and decode with a cache."""
    worst = 0.0
    for prompt, (tokens, decoded) in zip(PROMPTS[:3], subject.alone, strict=False):
        ids = subject.batch([prompt])["input_ids"]
        text = torch.cat([ids, tokens[None]], 1)
        whole = subject.model(input_ids=text, use_cache=False).logits[0].float()
        forward = whole[ids.shape[1] - 1 : -1]
        worst = max(worst, float((forward - decoded).abs().max()))
    return worst


def scores(subject: Subject) -> float:
    """Log-likelihoods as the harness computes them, right-padded: in batches of 1 and of all."""
    rows = [subject.tokenizer(prompt, return_tensors="pt").input_ids[0] for prompt in PROMPTS]
    together = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    batched = subject.model(input_ids=together, use_cache=False).logits
    worst = 0.0
    for row, logits in zip(rows, batched, strict=True):
        alone = subject.model(input_ids=row[None], use_cache=False).logits[0]
        found = [log_likelihood(x[: len(row)], row) for x in (logits, alone)]
        worst = max(worst, abs(found[0] - found[1]))
    return worst


def log_likelihood(logits: Tensor, tokens: Tensor) -> float:
    """Log-probability of a text's tokens after its first, where the vocabulary has them.

    The vocabulary of a cut model ends early, so tokens are taken modulo its size.
    """
    targets = tokens[1:] % logits.shape[-1]
    log_probs = logits[:-1].float().log_softmax(-1)
    return float(log_probs.gather(-1, targets[:, None]).sum())


def single_and_batched_matmul(subject: Subject) -> float:
    """One row times a matrix: alone, and repeated in a batch."""
    row, matrix = matmul_operands()
    alone = subject.matmul(row, matrix)[0].float()
    batched = [subject.matmul(row.expand(rows, -1), matrix)[0].float() for rows in ROWS]
    return max(float((result - alone).abs().max()) for result in batched)


def matmul_operands(size: int = 4096) -> tuple[Tensor, Tensor]:
    """The report's numbers, uniform in [0, 1), in BF16."""
    torch.manual_seed(1)
    row, matrix = torch.rand(1, size), torch.rand(size, size)
    return row.bfloat16(), matrix.bfloat16()


@dataclass(frozen=True)
class Report:
    """A public report: where it stands, what is compared, and how it is observed here."""

    issue: str
    compared: str
    unit: str
    observe: Callable[[Subject], float]


REPORTS = (
    Report(
        "huggingface/transformers#25921",
        "one prompt in batches of 1 to 6",
        "logits",
        first_text_changes,
    ),
    Report(
        "huggingface/transformers#25420",
        "with left padding and without",
        "logits",
        left_padding,
    ),
    Report(
        "huggingface/transformers#46190",
        "one forward pass and prefill + decode",
        "logits",
        forward_and_decode,
    ),
    Report(
        "EleutherAI/lm-evaluation-harness#1645, #704",
        "scores in batches of 1 and 6",
        "log-likelihood",
        scores,
    ),
    Report(
        "pytorch/pytorch#60234",
        "a row alone and in a batch of 2, 5, 17",
        "product",
        single_and_batched_matmul,
    ),
    Report(
        "unslothai/unsloth#9708",
        "greedy text alone and in batches of 2, 4, 6",
        "texts",
        texts_that_change,
    ),
)


@dataclass(frozen=True)
class Way:
    """A column of the table; `options` go to `heal_model`, None leaves torch alone."""

    name: str
    options: dict[str, Any] | None


WAYS = (
    Way("BF16", None),
    Way("heal", {"precision": "heal", "kv": "int24"}),
    Way("exact", {"precision": "exact"}),
)


def subject_of(way: Way, layers: int, new_tokens: int) -> Subject:
    """The model set up in one way, by the lines that a user would write."""
    from healpass.integrations import smollm2
    from healpass.integrations.transformers import heal_model

    model, tokenizer = smollm2.load(layers=layers)
    if way.options is None:
        return Subject(model, tokenizer, torch.matmul, new_tokens)
    options = way.options | {"outputs": "fp32"}
    matmul = torch.compile(torch.matmul, backend="heal", dynamic=True, options=options)
    return Subject(heal_model(model, **way.options), tokenizer, matmul, new_tokens)


def observations(subject: Subject) -> list[float]:
    """What each report observes: 0 where every comparison is equal to the last bit."""
    with torch.no_grad():
        return [report.observe(subject) for report in REPORTS]


def table_of(results: dict[str, list[float]]) -> Table:
    """A row per report, a column per way."""
    table = Table(title="Reported, and tried again")
    for heading in ("report", "compared", "differ in", *results):
        table.add_column(heading)
    for index, report in enumerate(REPORTS):
        cells = (f"{found[index]:.3g}" for found in results.values())
        table.add_row(report.issue, report.compared, report.unit, *cells)
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """Try every report in every way, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, default=2, help="of SmolLM2 (30 are all)")
    parser.add_argument("--new-tokens", type=int, default=16, help="per greedy text")
    options = parser.parse_args(argv)
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # never compare a silent fallback
    results = {}
    for way in WAYS:
        torch._dynamo.reset()
        results[way.name] = observations(subject_of(way, options.layers, options.new_tokens))
    Console().print(table_of(results))


if __name__ == "__main__":
    main()
