"""Does exactness cost accuracy? The perplexity of SmolLM2-135M in FP32, BF16 and exact.

    python examples/exact_perplexity.py [--tokens 5000] [--layers 30]

The text is the project's own: its license, README, guide for contributors and documents, in
windows of 250 tokens, teacher-forced. FP32 runs the BF16 checkpoint in FP32 arithmetic; exact with
INT16 and 5 products, and with INT24 and 8. The losses are summed in FP64. It needs no GPU.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from healpass.integrations import smollm2

ROOT = Path(__file__).parents[1]
WINDOW = 250
#: Name -> dtype of the weights, options of the backend.
PRECISIONS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "FP32": (torch.float32, {"precision": "traced"}),
    "BF16": (torch.bfloat16, {"precision": "traced"}),
    "exact, INT16, 5 products": (torch.bfloat16, {"precision": "exact"}),
    "exact, INT24, 8 products": (
        torch.bfloat16,
        {"precision": "exact", "kv": "int24", "exact_accuracy": "high"},
    ),
}


def text() -> str:
    """The project's documents, one after another."""
    files = [ROOT / name for name in ("LICENSE", "README.md", "CONTRIBUTING.md")]
    return "\n\n".join(path.read_text() for path in files + sorted(ROOT.glob("docs/**/*.md")))


def windows(tokenizer: Any, tokens: int) -> Tensor:
    """The first `tokens` tokens of the text, rounded down to whole windows, `[N, WINDOW]`."""
    ids = tokenizer(text(), return_tensors="pt")["input_ids"][0, :tokens]
    if len(ids) < tokens:
        raise SystemExit(f"the text has {len(ids)} tokens, {tokens} were asked for: ask for fewer")
    return ids[: tokens - tokens % WINDOW].reshape(-1, WINDOW)


def perplexity(name: str, tokens: int, layers: int | None) -> float:
    """The exponential of the mean loss of a precision over all windows, in FP64."""
    torch._dynamo.reset()
    dtype, options = PRECISIONS[name]
    model, tokenizer = smollm2.load(dtype, layers=layers)
    compiled = torch.compile(model, backend="heal", options=options | {"outputs": "fp32"})
    losses = []
    for window in windows(tokenizer, tokens):
        logits = compiled(input_ids=window[None], use_cache=False).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits.double(), window[1:]).item())
    return math.exp(math.fsum(losses) / len(losses))


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Fetch the model, print the table, return the perplexities by name."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=5000)
    parser.add_argument("--layers", type=int, help="of the model's 30")
    options = parser.parse_args(argv)
    console = Console()
    smollm2.fetch(console=console)
    found = {}
    with torch.no_grad():
        for name in PRECISIONS:
            with console.status(name):
                found[name] = perplexity(name, options.tokens, options.layers)
    table = Table(title=f"Perplexity over {options.tokens - options.tokens % WINDOW} tokens")
    for heading in ("precision", "perplexity", "against FP32"):
        table.add_column(heading, justify="left" if heading == "precision" else "right")
    for name, value in found.items():
        table.add_row(name, f"{value:.5f}", f"{100 * (value / found['FP32'] - 1):+.4f} %")
    console.print(table)
    return found


if __name__ == "__main__":
    main()
