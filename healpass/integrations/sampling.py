"""Sampling in transformers that repeats: a logits processor. Layer: integrations.

    sampler = SeededSampler(seed=7, temperature=0.8, top_p=0.95)
    model.generate(**inputs, do_sample=False, logits_processor=[sampler])

`generate` draws with the generator of the device, whose numbers depend on the device, on the rows
of a batch and on what was drawn before. Here a token is a function of the row's logits, the seed,
and how many tokens the row has drawn (`ops.reproducible.sampling`): with `precision="exact"` a
prompt has one answer per seed, in any batch, padding, cache and on any device.

Imports `ops` and `errors`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

import healpass.ops  # noqa: F401  the operators must be registered
from healpass.errors import OperandError
from healpass.ops.reproducible.sampling import Draw, as_int64


class SeededSampler(LogitsProcessor):
    """Leaves the drawn token of each row alone; greedy search then takes it.

    Give it to one call of `generate`, last of the processors and with `do_sample=False`.

    Args:
        seed: One for every row, or one for each.
        temperature: Above 0.
        top_k: Tokens that stay; 0 for all.
        top_p: Then the fewest tokens that have this probability together.
        min_p: Tokens stay whose probability is that share of the largest.

    Raises:
        OperandError: A value outside of its range; later: rows without a seed, or a second call.
    """

    def __init__(
        self,
        seed: int | Sequence[int],
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
    ) -> None:
        self.seeds = [as_int64(one) for one in ([seed] if isinstance(seed, int) else seed)]
        numbers = (torch.tensor([x], dtype=torch.float64) for x in (temperature, min_p, top_p))
        self.temperature, self.min_p, self.top_p = numbers
        self.top_k = torch.tensor([top_k])
        self.length, self.drawn = 0, 0
        self._draw(1, torch.device("cpu"))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Zero for the drawn token, -inf for the others.

        Args:
            input_ids: INT64 `[B, L]`.
            scores: `[B, V]`.
        """
        rows = scores.shape[0]
        if len(self.seeds) not in (1, rows):
            raise OperandError(
                f"{rows} rows, and {len(self.seeds)} seeds.\nGive one seed, or one for each row."
            )
        if self.length and input_ids.shape[1] != self.length + 1:
            raise OperandError(
                f"this sampler drew {self.drawn} tokens, up to {self.length} in all, and was "
                f"called for {input_ids.shape[1]}.\nMake one SeededSampler for each call."
            )
        seeds = torch.tensor(self.seeds, device=scores.device).expand(rows)
        positions = torch.full_like(seeds, self.drawn)
        draw = self._draw(rows, scores.device)
        chosen = draw.tokens(scores.to(torch.float32), seeds, positions)
        self.length, self.drawn = input_ids.shape[1], self.drawn + 1
        return torch.full_like(scores, -math.inf).scatter(1, chosen[:, None], 0.0)

    def _draw(self, rows: int, device: torch.device) -> Draw:
        settings = (self.temperature, self.top_k, self.min_p, self.top_p)
        return Draw(*(value.to(device).expand(rows) for value in settings))
