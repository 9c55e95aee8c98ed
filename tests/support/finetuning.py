"""A small fine-tune of real weights: two layers of SmolLM2 on the licence text of this repository.

The vocabulary is that of the text, so that two layers, not the output layer, are the work.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from healpass.integrations import smollm2

TEXT = Path(__file__).parents[2] / "LICENSE"


def model_and_tokens(layers: int = 2) -> tuple[Any, Tensor]:
    """The cut model with FP32 weights, which hold the BF16 checkpoint's values, and the text.

    Tokens are renumbered by their first appearance. The embedding is frozen: the sum of its
    gradient over equal tokens depends on their order, except in exact.
    """
    model, tokenizer = smollm2.load(torch.float32)
    ids = tokenizer(TEXT.read_text(), return_tensors="pt").input_ids[0]
    kept, tokens = ids.unique(return_inverse=True)
    model.model.layers = model.model.layers[:layers]
    rows = model.model.embed_tokens.weight[kept].detach()
    model.model.embed_tokens = nn.Embedding.from_pretrained(rows.clone())
    model.lm_head = nn.Linear(rows.shape[1], len(kept), bias=False)
    model.lm_head.weight = nn.Parameter(rows.clone())
    model.config.update(
        {"num_hidden_layers": layers, "vocab_size": len(kept), "tie_word_embeddings": False}
    )
    return model.train(), tokens


def micro_batches(tokens: Tensor, steps: int, rows: int, length: int) -> Iterator[Tensor]:
    """Consecutive pieces of the text, `[rows, length]` each."""
    for step in range(steps):
        start = step * rows * length % (len(tokens) - rows * length)
        yield tokens[start : start + rows * length].view(rows, length)


def in_fp64(model: Any) -> Any:
    """A copy in FP64, norms included: those of transformers compute in FP32 whatever they get."""
    twin = copy.deepcopy(model).double()
    for parent in list(twin.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                norm = nn.RMSNorm(child.weight.shape, child.variance_epsilon, dtype=torch.float64)
                norm.weight = child.weight
                setattr(parent, name, norm)
    return twin


def train(
    model: Any,
    call: Callable[..., Any],
    batches: Iterator[Tensor],
    optimizer: Any,
    accumulate: int = 1,
) -> list[float]:
    """A plain PyTorch loop over `call`, which runs `model`; returns the losses.

    `accumulate` cuts each batch into so many micro-batches of equal rows.
    """
    losses = []
    for batch in batches:
        total = 0.0
        for part in batch.chunk(accumulate):
            loss = call(input_ids=part, labels=part, use_cache=False).loss / accumulate
            loss.backward()
            total += float(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses
