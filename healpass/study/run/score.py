"""Scores given text under one configuration: teacher forcing.

Layer: study. Imports `study` only.

Every configuration reads the same prompt and answer, so margins can be compared at each of its
tokens, not only up to the first that differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from healpass.errors import StudyError
from healpass.study.run.generate import pad, positions
from healpass.study.run.records import Margins, Output, Scores, digest_of


@dataclass(frozen=True)
class Text:
    """A prompt and the answer to score, as token ids."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


def score(
    model: Any,
    texts: Sequence[Text],
    *,
    padding_id: int,
    side: str = "left",
    references: Sequence[Scores] | None = None,
) -> list[Scores]:
    """Score texts in one batch.

    Args:
        model: Gives logits `[B, T, V]`.
        texts: What to score; an answer may be empty.
        padding_id: The token that fills up shorter texts.
        side: Where it stands.
        references: The reference's scores of these texts; None: this is the reference.

    Raises:
        StudyError: A logit is not finite.
    """
    rows = [(*text.prompt, *text.answer) for text in texts]
    ids, mask = pad(rows, padding_id, side)
    logits = model(
        input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False
    ).logits
    found = []
    for index, text in enumerate(texts):
        start = (ids.shape[1] - len(rows[index]) if side == "left" else 0) + len(text.prompt) - 1
        row = logits[index, start : start + len(text.answer)].float()
        if not bool(torch.isfinite(row.amax(-1)).all()):
            raise StudyError(
                "The model's logits are NaN or infinite on a prompt of the study, so nothing can "
                "be compared. FP16 may overflow in this model; leave fp16 out of --precision."
            )
        found.append(scores_of(row, None if references is None else references[index]))
    return found


def scores_of(logits: Tensor, reference: Scores | None = None) -> Scores:
    """Reduce logits `[T, V]` to what the study compares."""
    best = logits.argmax(-1, keepdim=True)
    second = logits.scatter(-1, best, -torch.inf).argmax(-1, keepdim=True)
    top = torch.cat([best, second], -1)
    theirs = top if reference is None else reference.top[: len(top)]
    return Scores(
        top=top,
        logits=logits.gather(-1, top),
        reference=logits.gather(-1, theirs),
        probs=logits.softmax(-1).amax(-1),
        digest=digest_of(logits),
    )


def margins(reference: Scores, other: Scores) -> Margins:
    """The lead of the reference's best token, and what the other makes of it."""
    count = len(other.top)
    gap = reference.logits[:count, 0].double() - reference.logits[:count, 1].double()
    lead = other.reference[:, 0].double() - other.reference[:, 1].double()
    return Margins(gap, lead - gap, other.top[:, 0] != reference.top[:count, 0])


def greedy_output(scores: Scores, text: Sequence[int]) -> Output:
    """What greedy decoding would write, up to its first token that is not the text's.

    As long as both agree, decoding and teacher forcing read the same tokens.
    """
    chosen = scores.top[:, 0].tolist()
    other = [i for i, (a, b) in enumerate(zip(chosen, text, strict=False)) if a != b]
    end = other[0] + 1 if other else len(chosen)
    return Output(tuple(chosen[:end]), tuple(scores.probs[:end].tolist()))
