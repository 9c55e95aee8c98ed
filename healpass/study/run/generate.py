"""Answers under one configuration: greedy, or sampled with a seed for each request.

Layer: study. Imports `study` only, and transformers' logits processors.

Sampling goes by the Gumbel-max trick: the noise belongs to request and position, not to a
generator that the batch shares, so two configurations draw the same token unless their logits
differ. Without that, batching alone would change every sample.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

#: The paper's sampling study.
TEMPERATURE = 0.7
TOP_P = 0.95


@dataclass
class TopProbability:
    """A logits processor that only looks: the probability of the best token, step by step."""

    steps: list[Tensor] = field(default_factory=list)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Note `[B]` probabilities of `[B, V]` logits."""
        del input_ids
        self.steps.append(scores.float().softmax(-1).amax(-1))
        return scores


@dataclass
class SeededNoise:
    """Gumbel noise by request and position; the best token of the sum is a sample.

    Attributes:
        seeds: One per row of the batch.
        position: How many tokens each row has drawn.
    """

    seeds: Sequence[int]
    position: int = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return `[B, V]` logits plus noise."""
        del input_ids
        noise = [self._gumbel(seed, scores.shape[-1]) for seed in self.seeds]
        self.position += 1
        return scores + torch.stack(noise).to(scores)

    def _gumbel(self, seed: int, size: int) -> Tensor:
        generator = torch.Generator().manual_seed((seed << 20) + self.position)
        uniform = torch.rand(size, generator=generator, dtype=torch.float64)
        return -torch.log(-torch.log(uniform.clamp_min(torch.finfo(torch.float64).tiny)))


@dataclass(frozen=True)
class Generated:
    """Tokens of one prompt, end token included, and the probability of each (greedy only)."""

    tokens: tuple[int, ...]
    probs: tuple[float, ...]


def pad(rows: Sequence[Sequence[int]], value: int, side: str) -> tuple[Tensor, Tensor]:
    """Token ids `[B, T]` of rows of different lengths, and their mask `[B, T]`.

    Args:
        rows: Token ids of each text.
        value: The token id that fills up.
        side: `left` or `right`: where it stands.
    """
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), value, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        span = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
        ids[index, span] = torch.tensor(row, dtype=torch.int64)
        mask[index, span] = 1
    return ids, mask


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    chunk: int | None = None,
    seeds: Sequence[int] | None = None,
) -> list[Generated]:
    """Answer prompts in one batch, padded on the left.

    Args:
        model: Has transformers' `generate`.
        tokenizer: Knows the padding token.
        prompts: Token ids of each prompt.
        new_tokens: The most tokens of an answer.
        chunk: Prompt tokens of one prefill step; None takes whole prompts.
        seeds: Of the sampling, one per prompt; None decodes greedily.
    """
    from transformers import GenerationConfig

    seen = TopProbability()
    ids, mask = pad(prompts, tokenizer.pad_token_id, "left")
    ends = _end_tokens(model, tokenizer)
    settings = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=ends or None,
        pad_token_id=tokenizer.pad_token_id,
    )
    ids, mask = ids.to(model.device), mask.to(model.device)
    tokens = model.generate(
        input_ids=ids,
        attention_mask=mask,
        generation_config=settings,
        logits_processor=_processors(seen, seeds),
        **(_read_in_chunks(model, ids, mask, chunk) if chunk and chunk < ids.shape[1] else {}),
    )
    new = [until_end(row, ends) for row in tokens[:, ids.shape[1] :].tolist()]
    probs = torch.stack(seen.steps, 1).tolist() if seen.steps else [[] for _ in new]
    return [Generated(t, tuple(p[: len(t)])) for t, p in zip(new, probs, strict=True)]


def _read_in_chunks(model: Any, ids: Tensor, mask: Tensor, chunk: int) -> dict[str, Any]:
    """What `generate` is given beside a prompt that was read in chunks, up to its last token.

    The `prefill_chunk_size` of transformers gives slices to the model, whose strides belong to the
    whole prompt; that takes three graphs where this takes one, and a graph takes a minute.
    """
    from transformers import GenerationConfig

    settings = GenerationConfig(
        max_new_tokens=1,
        do_sample=False,
        return_dict_in_generate=True,
        # Not used, but where it ends a row, transformers warns of padding on the right.
        pad_token_id=int(ids[:, chunk - 1].max()) + 1,
    )
    cache = model.generate(
        input_ids=ids[:, :chunk].contiguous(),
        attention_mask=mask[:, :chunk].contiguous(),
        generation_config=settings,
    ).past_key_values
    accepted = inspect.signature(model.forward).parameters
    places = positions(mask)
    for start in range(chunk, ids.shape[1] - 1, chunk):
        stop = min(start + chunk, ids.shape[1] - 1)
        optional = {"position_ids": places[:, start:stop].contiguous(), "logits_to_keep": 1}
        model(
            input_ids=ids[:, start:stop].contiguous(),
            attention_mask=mask[:, :stop].contiguous(),
            past_key_values=cache,
            use_cache=True,
            return_dict=True,  # as `generate` calls, so a last chunk of one token decodes
            **{name: value for name, value in optional.items() if name in accepted},
        )
    return {"past_key_values": cache}


def positions(mask: Tensor) -> Tensor:
    """Positions `[B, T]` that count a row's own tokens, so padding on the left shifts nothing."""
    return (mask.cumsum(-1) - 1).clamp_min(0)


def _processors(seen: TopProbability, seeds: Sequence[int] | None) -> Any:
    """What logits go through: greedy decoding is watched, a sample is drawn from warped ones."""
    from transformers import LogitsProcessorList
    from transformers.generation import TemperatureLogitsWarper, TopPLogitsWarper

    if seeds is None:
        return LogitsProcessorList([seen])
    warpers = [TemperatureLogitsWarper(TEMPERATURE), TopPLogitsWarper(TOP_P)]
    return LogitsProcessorList([*warpers, SeededNoise(seeds)])


def until_end(tokens: Sequence[int], ends: Sequence[int]) -> tuple[int, ...]:
    """An answer without what `generate` pads it with after its end."""
    stops = [index + 1 for index, token in enumerate(tokens) if token in ends]
    return tuple(tokens[: stops[0]] if stops else tokens)


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The model's own end tokens, else the tokenizer's."""
    found = getattr(model.generation_config, "eos_token_id", None)
    found = tokenizer.eos_token_id if found is None else found
    return [] if found is None else list(found) if isinstance(found, (list, tuple)) else [found]
