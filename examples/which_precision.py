"""Accuracy and reproducibility are two things: which option buys which, on SmolLM2-135M.

    python examples/which_precision.py [--tokens 64] [--layers 30]

Per choice of options: the largest and the root mean square error of the log-probabilities of all
tokens against FP64 (nats), and how many of them change their bits when the text is read in a batch
of four instead of alone. The model reads its own license, teacher-forced, with BF16 weights. It
needs no GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from healpass.integrations import smollm2

TEXT = Path(__file__).parents[1] / "LICENSE"
#: Name -> dtype of the weights, options of the backend.
CHOICES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "bf16, as the model is": (torch.bfloat16, {"precision": "traced"}),
    "fp32, weights upcast": (torch.float32, {"precision": "traced"}),
    "layercast": (torch.bfloat16, {"precision": "layercast"}),
    "heal": (torch.bfloat16, {"precision": "heal"}),
    "heal, kv=int24": (torch.bfloat16, {"precision": "heal", "kv": "int24"}),
    "exact": (torch.bfloat16, {"precision": "exact"}),
    "exact, kv=int24, exact_accuracy=high": (
        torch.bfloat16,
        {"precision": "exact", "kv": "int24", "exact_accuracy": "high"},
    ),
}


@dataclass(frozen=True)
class Found:
    """A row of the table: errors in nats, and the share of changed bits among the numbers."""

    worst: float
    rms: float
    changed: float


def log_probabilities(model: Any, ids: Tensor) -> Tensor:
    """Of every token of the vocabulary at every position, `[B, L, V]`, from FP32 logits or wider.

    The logarithm is taken in FP64, so that only the logits differ.
    """
    logits = model(input_ids=ids, use_cache=False).logits
    return logits.double().log_softmax(-1)


def measure(name: str, ids: Tensor, exact: Tensor, layers: int | None) -> Found:
    """Compile the model with one choice of options and compare it with FP64 and with itself."""
    torch._dynamo.reset()
    dtype, options = CHOICES[name]
    model, _ = smollm2.load(dtype, layers=layers)
    compiled = torch.compile(
        model, backend="heal", dynamic=False, options=options | {"outputs": "fp32"}
    )
    alone = log_probabilities(compiled, ids)
    others = ids.flip(1).repeat(3, 1)
    batched = log_probabilities(compiled, torch.cat([others, ids]))[-1:]
    error = alone - exact
    return Found(
        float(error.abs().max()),
        float(error.square().mean().sqrt()),
        float((alone != batched).double().mean()),
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Found]:
    """Fetch the model, print the table, return its rows by name."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--layers", type=int, help="of the model's 30")
    options = parser.parse_args(argv)
    console = Console()
    smollm2.fetch(console=console)
    found = {}
    with torch.no_grad():
        model, tokenizer = smollm2.load(torch.float64, layers=options.layers)
        ids = tokenizer(TEXT.read_text(), return_tensors="pt")["input_ids"][:, : options.tokens]
        exact = log_probabilities(model, ids)
        for name in CHOICES:
            with console.status(name):
                found[name] = measure(name, ids, exact, options.layers)
    table = Table(title=f"{options.tokens} tokens, all log-probabilities, against FP64")
    for heading in ("options", "largest error", "RMS error", "change in a batch of 4"):
        table.add_column(heading, justify="left" if heading == "options" else "right")
    for name, row in found.items():
        table.add_row(name, f"{row.worst:.1e}", f"{row.rms:.1e}", f"{100 * row.changed:.3g} %")
    console.print(table)
    return found


if __name__ == "__main__":
    main()
