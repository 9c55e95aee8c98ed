"""Score a model with lm-evaluation-harness, at several batch sizes: is there one score?

    python examples/evaluate.py [--precision exact] [--batch-sizes 1 4 16] [--layers 2]

The same from the command line, with any task of the harness:

    python -m healpass.integrations.lm_eval run --model heal-hf \
        --model_args pretrained=HuggingFaceTB/SmolLM2-135M-Instruct,precision=exact \
        --tasks lambada_openai --batch_size 16

Here the task is a local file of eight questions, and the model the first layers of
SmolLM2-135M-Instruct (their answers are poor, their arithmetic is real). Printed is, for every
batch size, how many of the 24 log-likelihoods differ from those of the first, and by how much.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

TASKS = Path(__file__).parents[1] / "tests" / "data" / "lm_eval"


def log_likelihoods(lm: Any, batch_size: int, questions: int | None) -> list[float]:
    """The harness's log-likelihood of every choice of every question."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    lm.batch_size_per_gpu = batch_size
    with contextlib.chdir(TASKS):  # the task names its file relative to the working folder
        result = simple_evaluate(
            model=lm,
            tasks=["heal_trivia"],
            task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
            bootstrap_iters=0,
            limit=questions,
        )
    samples = sorted(result["samples"]["heal_trivia"], key=lambda sample: sample["doc_id"])
    return [choice[0] for sample in samples for choice in sample["filtered_resps"]]


def main(argv: Sequence[str] | None = None) -> None:
    """Score at every batch size, and print how many scores changed and by how much."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--precision", default="heal", help="heal, exact, layercast or traced")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--layers", type=int, default=2, help="of SmolLM2 (30 are all)")
    parser.add_argument("--questions", type=int, default=None, help="all eight by default")
    options = parser.parse_args(argv)

    from healpass.integrations import smollm2
    from healpass.integrations.lm_eval import HealHFLM

    model, tokenizer = smollm2.load(torch.bfloat16, layers=options.layers)
    lm = HealHFLM(model, tokenizer=tokenizer, device="cpu", precision=options.precision)
    found = [log_likelihoods(lm, size, options.questions) for size in options.batch_sizes]
    console = Console()
    for size, scores in zip(options.batch_sizes, found, strict=True):
        changes = [abs(a - b) for a, b in zip(scores, found[0], strict=True)]
        changed = sum(change > 0 for change in changes)
        console.print(
            f"{options.precision}, batch size {size}: {changed} of {len(scores)} scores differ "
            f"from batch size {options.batch_sizes[0]}, by up to {max(changes):.2g}"
        )


if __name__ == "__main__":
    main()
