"""Reinforcement learning's train/serve mismatch: one model, two passes, two log-probabilities.

    python examples/rl_mismatch.py [--layers 2] [--new-tokens 24]

An RL step samples a reply token by token (prefill, then decode with a cache) and then scores the
same tokens in one forward pass. Both passes hold the same weights, so the importance ratio
`exp(trainer - sampler)` should be 1. It is not, because the two passes add in other orders and
round in other places; trainers correct for it by clipping or truncated importance sampling.
Printed is how far the log-probabilities of the sampled tokens lie apart, by arithmetic. With
`exact` the difference is 0, not small: nothing is left to correct.

The model is SmolLM2-135M-Instruct (its first layers) on CPU. Every arithmetic scores the tokens
that it sampled itself, from the same seed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

PROMPTS = (
    "Write one sentence about the sea.",
    "Why do cats purr? Answer in a few words.",
    "Continue: Once upon a time, in a village at the edge of a great forest,",
    "What is 7 times 8?",
)
#: Arithmetic -> dtype of the weights, and the options of `heal_model`; None leaves torch alone.
WAYS: dict[str, tuple[torch.dtype, dict[str, Any] | None]] = {
    "BF16": (torch.bfloat16, None),
    "FP32": (torch.float32, None),
    "heal": (torch.bfloat16, {"precision": "heal", "kv": "int24"}),
    "exact": (torch.bfloat16, {"precision": "exact"}),
}


@dataclass(frozen=True)
class Mismatch:
    """Log-probabilities `[B, T]` of the sampled tokens, in the sampling and the training pass."""

    sampler: Tensor
    trainer: Tensor

    @property
    def difference(self) -> Tensor:
        """Trainer minus sampler: the logarithm of the importance ratio."""
        return self.trainer - self.sampler


def measure(model: Any, tokenizer: Any, new_tokens: int) -> Mismatch:
    """Sample replies to the prompts in one padded batch, then score them in one forward pass."""
    batch = tokenizer(list(PROMPTS), return_tensors="pt", padding=True)
    torch.manual_seed(0)
    with torch.no_grad():
        made = model.generate(
            **batch,
            do_sample=True,
            top_k=0,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            output_logits=True,
            return_dict_in_generate=True,
        )
        prompt = batch["input_ids"].shape[1]
        tokens = made.sequences[:, prompt:]
        mask = torch.nn.functional.pad(batch["attention_mask"], (0, new_tokens), value=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        scored = model(
            input_ids=made.sequences,
            attention_mask=mask,
            position_ids=positions,
            use_cache=False,
        ).logits[:, prompt - 1 : -1]
    sampled = torch.stack(made.logits, 1)
    return Mismatch(log_probabilities(sampled, tokens), log_probabilities(scored, tokens))


def log_probabilities(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability `[B, T]` of each token, from logits `[B, T, V]`."""
    return logits.float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


def table_of(found: dict[str, Mismatch]) -> Table:
    """A row per arithmetic."""
    table = Table(title="Log-probability of a sampled token: training pass - sampling pass")
    for heading in ("arithmetic", "tokens", "largest", "mean size", "not equal", "ratio up to"):
        table.add_column(heading, justify="left" if heading == "arithmetic" else "right")
    for name, mismatch in found.items():
        difference = mismatch.difference
        table.add_row(
            name,
            str(difference.numel()),
            f"{float(difference.abs().max()):.2g}",
            f"{float(difference.abs().mean()):.2g}",
            str(int((difference != 0).sum())),
            f"{float(difference.exp().max()):.7g}",
        )
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every arithmetic, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, default=2, help="of SmolLM2 (30 are all)")
    parser.add_argument("--new-tokens", type=int, default=24, help="per reply")
    options = parser.parse_args(argv)

    from healpass.integrations import smollm2
    from healpass.integrations.transformers import heal_model

    torch._dynamo.config.fail_on_recompile_limit_hit = True  # never compare a silent fallback
    found = {}
    for name, (dtype, config) in WAYS.items():
        torch._dynamo.reset()
        model, tokenizer = smollm2.load(dtype, layers=options.layers)
        model = model if config is None else heal_model(model, **config)
        found[name] = measure(model, tokenizer, options.new_tokens)
    Console().print(table_of(found))


if __name__ == "__main__":
    main()
