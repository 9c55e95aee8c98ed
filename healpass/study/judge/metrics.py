"""The metrics of LayerCast's study (arXiv 2506.09501, section 3.1), on finished outputs.

Layer: `study`. Imports `errors` only, runs no model.

One model answers the same prompts greedily under several configurations (batch size, GPU,
reduction order, ...). Where the paper leaves a choice open, this is ours:

- Every standard deviation is a sample deviation (divided by count - 1) over configurations. Equal
  values give exactly 0; the paper's own tables hold values like 5.8e-17 in their place.
- An output that ends where another goes on differs from it at the position after its last token.
- Avg_Std@top1_prob takes the positions *before* Div_Index, where all outputs still have the same
  tokens, and averages over the positions of a prompt first, then over prompts: a long answer
  weighs as much as a short one.
- What needs two configurations and has one is None, not 0: nothing was compared.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch

from healpass.errors import StudyError
from healpass.study.run.records import Output

#: The outputs of each configuration by its name, in the order of the prompts.
Runs = Mapping[str, Sequence[Output]]


@dataclass(frozen=True)
class Divergence:
    """Where the configurations part on one prompt.

    Attributes:
        prompt: Index of the prompt.
        position: Index of the first token that is not the same everywhere (Div_Index).
        tokens: The token there by configuration; None where the output had ended.
    """

    prompt: int
    position: int
    tokens: Mapping[str, int | None]


@dataclass(frozen=True)
class Metrics:
    """The study's table for one precision.

    Attributes:
        configurations: Names of the configurations.
        prompts: How many prompts each answered.
        div_index: Div_Index of each prompt; -1 where all outputs are identical.
        div_percent: Percentage of prompts with more than one output.
        avg_std_top1_prob: Avg_Std@top1_prob; None where no position has probabilities.
        accuracy: Percentage of right answers by configuration; None where no answer is checked.
        std_acc: Std@Acc in percentage points.
        avg_std_output_length: Avg_Std@Output_Length in tokens.
        unique_outputs: How many different outputs each prompt has.
        divergences: One entry for each prompt that has more than one output.
    """

    configurations: tuple[str, ...]
    prompts: int
    div_index: tuple[int, ...]
    div_percent: float | None
    avg_std_top1_prob: float | None
    accuracy: Mapping[str, float] | None
    std_acc: float | None
    avg_std_output_length: float | None
    unique_outputs: tuple[int, ...]
    divergences: tuple[Divergence, ...]

    @property
    def mean_div_index(self) -> float | None:
        """Mean Div_Index of the prompts that diverge, or None where none does."""
        return _mean([float(d.position) for d in self.divergences])

    @property
    def first_divergence(self) -> Divergence | None:
        """The divergence at the earliest position; of equals, that of the first prompt."""
        return min(self.divergences, key=lambda d: (d.position, d.prompt), default=None)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON, under the paper's names."""
        first = self.first_divergence
        return {
            "configurations": list(self.configurations),
            "prompts": self.prompts,
            "Div_Index": list(self.div_index),
            "Mean_Div_Index": self.mean_div_index,
            "Div_Percent": self.div_percent,
            "Avg_Std@top1_prob": self.avg_std_top1_prob,
            "Accuracy": None if self.accuracy is None else dict(self.accuracy),
            "Std@Acc": self.std_acc,
            "Avg_Std@Output_Length": self.avg_std_output_length,
            "Unique_Outputs": list(self.unique_outputs),
            "First_Divergence": first
            and {"prompt": first.prompt, "position": first.position, "tokens": dict(first.tokens)},
        }


def compute_metrics(runs: Runs) -> Metrics:
    """Compute every metric of the study from the outputs of all configurations.

    Args:
        runs: At least one configuration; each has one output per prompt, in the same order.

    Raises:
        StudyError: There is no configuration, or they did not answer the same prompts, or a
            prompt's answer was checked, or its probabilities recorded, in some of them only.
    """
    by_prompt = _by_prompt(runs)
    compared = len(runs) > 1 and len(by_prompt) > 0
    indices = tuple(div_index([output.tokens for output in outputs]) for outputs in by_prompt)
    divergences = tuple(
        Divergence(prompt, index, _tokens_at(index, runs, prompt))
        for prompt, index in enumerate(indices)
        if index >= 0
    )
    accuracy = _accuracy(runs, by_prompt)
    return Metrics(
        configurations=tuple(runs),
        prompts=len(by_prompt),
        div_index=indices,
        div_percent=100 * len(divergences) / len(by_prompt) if compared else None,
        avg_std_top1_prob=_avg_std_top1_prob(by_prompt, indices) if compared else None,
        accuracy={name: float(x) for name, x in accuracy.items()} if accuracy else None,
        std_acc=float(statistics.stdev(accuracy.values())) if accuracy and compared else None,
        avg_std_output_length=_avg_std_output_length(by_prompt) if compared else None,
        unique_outputs=tuple(len({o.tokens for o in outputs}) for outputs in by_prompt),
        divergences=divergences,
    )


def div_index(outputs: Sequence[Sequence[int]]) -> int:
    """Return the index of the first token that is not the same in all outputs, or -1.

    >>> div_index([[5, 6, 7], [5, 6, 8], [5, 6]])
    2
    """
    if not outputs:
        return -1
    shortest = min(len(tokens) for tokens in outputs)
    for index in range(shortest):
        if len({tokens[index] for tokens in outputs}) > 1:
            return index
    return shortest if any(len(tokens) > shortest for tokens in outputs) else -1


def agreement_by_position(metrics: Metrics, length: int) -> tuple[float, ...]:
    """Return the share of prompts whose outputs agree on their first n tokens, n = 0 ... length.

    The survival curve of the report. Outputs that ended before n without a difference agree.

    Raises:
        StudyError: Nothing was compared: there are no prompts, or one configuration only.
    """
    if metrics.div_percent is None:
        raise StudyError(
            f"Agreement needs two configurations and a prompt, but there are "
            f"{len(metrics.configurations)} configurations and {metrics.prompts} prompts. "
            "Run the prompts under at least two configurations."
        )
    positions = [divergence.position for divergence in metrics.divergences]
    return tuple(
        1 - sum(position < n for position in positions) / metrics.prompts
        for n in range(length + 1)
    )


def _by_prompt(runs: Runs) -> list[tuple[Output, ...]]:
    """Turn outputs by configuration into outputs by prompt, checked."""
    if not runs:
        raise StudyError("Metrics need at least one configuration, but there is none.")
    counts = {name: len(outputs) for name, outputs in runs.items()}
    if len(set(counts.values())) > 1:
        raise StudyError(
            f"Configurations answered different numbers of prompts: {counts}. "
            "Metrics compare the same prompts; finish or leave out the incomplete ones."
        )
    by_prompt = list(zip(*runs.values(), strict=True))
    for prompt, outputs in enumerate(by_prompt):
        _same_everywhere("the answer checked", prompt, [o.correct is not None for o in outputs])
        recorded = [bool(o.top1_probs) for o in outputs if o.tokens]
        _same_everywhere("probabilities recorded", prompt, recorded)
    return by_prompt


def _same_everywhere(what: str, prompt: int, present: list[bool]) -> None:
    if any(present) and not all(present):
        raise StudyError(
            f"Prompt {prompt} has {what} in {sum(present)} of {len(present)} configurations. "
            "A deviation over some of them would not be comparable; do it in all or in none."
        )


def _tokens_at(index: int, runs: Runs, prompt: int) -> dict[str, int | None]:
    tokens = {name: outputs[prompt].tokens for name, outputs in runs.items()}
    return {name: t[index] if index < len(t) else None for name, t in tokens.items()}


def _accuracy(runs: Runs, by_prompt: list[tuple[Output, ...]]) -> dict[str, Fraction] | None:
    """Percentages as fractions, so that equal ones deviate by exactly 0."""
    checked = [i for i, outputs in enumerate(by_prompt) if outputs[0].correct is not None]
    if not checked:
        return None
    return {
        name: Fraction(100 * sum(outputs[i].correct is True for i in checked), len(checked))
        for name, outputs in runs.items()
    }


def _avg_std_output_length(by_prompt: list[tuple[Output, ...]]) -> float:
    deviations = [statistics.stdev(len(o.tokens) for o in outputs) for outputs in by_prompt]
    return statistics.fmean(deviations)


def _avg_std_top1_prob(
    by_prompt: list[tuple[Output, ...]], indices: tuple[int, ...]
) -> float | None:
    deviations = []
    for outputs, index in zip(by_prompt, indices, strict=True):
        common = len(outputs[0].tokens) if index < 0 else index
        if common and outputs[0].top1_probs:
            rows = [output.top1_probs[:common] for output in outputs]
            probs = torch.tensor(rows, dtype=torch.float64)
            # From the first row: the mean of equal numbers may be an ulp beside them.
            deviations.append((probs - probs[0]).std(dim=0).mean().item())
    return _mean(deviations)


def _mean(values: list[float]) -> float | None:
    return statistics.fmean(values) if values else None
