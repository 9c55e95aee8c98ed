"""Seeded requests in vLLM: the draws of `integrations.sampling.SeededSampler`. Imports vLLM.

vLLM draws with a generator of the device. A logits processor comes before: it draws the token of a
seeded request as a function of its logits, its seed and how many tokens it has drawn, and leaves
only that one, so that vLLM's own draw has no choice. An engine gets it by its argument
`logits_processors`, and no other beside: what came later would see one token.

Left to vLLM: requests without a seed, requests with penalties, which vLLM applies later, and
speculative decoding, where it takes no such processors. A streaming request counts anew each turn.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from healpass.integrations.vllm.options import asked
from healpass.ops.reproducible.sampling import Draw, as_int64

#: What vLLM takes as greedy.
_GREEDY = 1e-5


class SeededDraws(LogitsProcessor):
    """Keeps, row by row of the batch, who asked for what and has drawn how much."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:  # noqa: ARG002
        self.active = asked(vllm_config) is not None
        self.requests: dict[int, tuple[SamplingParams, list[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        """No: the drawn token is seldom the largest."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the batch; an output list goes on being the request's own."""
        if batch_update is None or not self.active:
            return
        for row in batch_update.removed:
            self.requests.pop(row, None)
        for row, params, _, drawn in batch_update.added:
            self.requests.pop(row, None)
            if draws(params):
                self.requests[row] = (params, drawn)
        for source, target, direction in batch_update.moved:
            first, second = self.requests.pop(source, None), self.requests.pop(target, None)
            if first is not None:
                self.requests[target] = first
            if second is not None and direction == MoveDirectionality.SWAP:
                self.requests[source] = second

    def apply(self, logits: Tensor) -> Tensor:
        """FP32 `[R, V]`, of seeded rows the drawn token alone."""
        rows = sorted(row for row in self.requests if row < len(logits))
        if not rows:
            return logits
        asked_for, drawn = zip(*(self.requests[row] for row in rows), strict=True)
        found = _draw(asked_for, logits.device).tokens(
            logits[rows].to(torch.float32),
            torch.tensor([as_int64(params.seed) for params in asked_for], device=logits.device),
            torch.tensor([len(tokens) for tokens in drawn], device=logits.device),
        )
        logits[rows] = -math.inf
        logits[rows, found] = 0.0
        return logits


def draws(params: SamplingParams) -> bool:
    """Whether a request's tokens are drawn here.

    Args:
        params: What it asks for.
    """
    penalties = (params.presence_penalty, params.frequency_penalty, params.repetition_penalty - 1)
    return params.seed is not None and params.temperature >= _GREEDY and not any(penalties)


def _draw(asked_for: tuple[SamplingParams, ...], device: torch.device) -> Draw:
    numbers = [[params.temperature, params.min_p, params.top_p] for params in asked_for]
    temperature, min_p, top_p = torch.tensor(numbers, dtype=torch.float64, device=device).T
    top_k = torch.tensor([params.top_k for params in asked_for], device=device)
    return Draw(temperature, top_k, min_p, top_p)
