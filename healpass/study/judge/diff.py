"""`healpass diff A.json B.json`: where two machines' studies part.

Layer: study. Imports `study` only.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from healpass.errors import StudyError
from healpass.study.judge.metrics import div_index
from healpass.study.run.records import READABLE, SCHEMA
from healpass.study.run.traces import Sketch


@dataclass(frozen=True)
class Difference:
    """One precision on two machines.

    Attributes:
        precision: Its name.
        prompts: How many answers both have, over all configurations.
        diverging: How many of those differ.
        first_token: Position, prompt and configuration of the earliest difference, or None.
        operations: How many operations both traces have.
        first_operation: The first of them whose bits differ, or None.
        deviation: Its relative deviation, estimated from sketches; 0 where none differs.
        last_deviation: That of the last operation, the logits.
    """

    precision: str
    prompts: int
    diverging: int
    first_token: tuple[int, int, str] | None
    operations: int
    first_operation: str | None
    deviation: float
    last_deviation: float

    @property
    def same(self) -> bool:
        """Whether something was compared and nothing differs."""
        compared = self.prompts + self.operations > 0
        return compared and self.diverging == 0 and self.first_operation is None

    def __str__(self) -> str:
        """Two lines: tokens, then operations."""
        same = f"{self.prompts - self.diverging} of {self.prompts} answers are the same"
        tokens = f"{self.precision}: {same}"
        if self.first_token:
            position, prompt, label = self.first_token
            tokens += (
                f"; the first difference is token {position + 1} of prompt {prompt} ({label})"
            )
        if not self.operations:
            return f"{tokens}\n  no operations to compare"
        if self.first_operation is None:
            return f"{tokens}\n  all {self.operations} operations have the same bits"
        return (
            f"{tokens}\n  first operation that differs: {self.first_operation}, by "
            f"{self.deviation:.2g} relative; at the logits {self.last_deviation:.2g}"
        )


def read(path: Path) -> dict[str, Any]:
    """Read a report.json.

    Raises:
        StudyError: It cannot be read, is no report, or has another schema.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise StudyError(f"cannot read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise StudyError(f"{path} is not JSON: {error}.") from error
    if not isinstance(content, dict) or not {"schema", "answers", "anatomy"} <= set(content):
        raise StudyError(f"{path} is no report of healpass check. Give its report.json.")
    if content["schema"] not in READABLE:
        raise StudyError(
            f"{path} has schema {content['schema']}, but this version of healpass reads "
            f"{' and '.join(map(str, READABLE))}. Compare reports that one version wrote."
        )
    return content


def compare(one: dict[str, Any], other: dict[str, Any]) -> list[Difference]:
    """Compare two reports, precision by precision.

    Raises:
        StudyError: They asked different things, or have no precision in common.
    """
    for name in ("tasks", "prompts", "max_new_tokens"):
        found = [report["plan"][name] for report in (one, other)]
        if found[0] != found[1]:
            raise StudyError(
                f"the reports differ in {name}: {found[0]!r} and {found[1]!r}. Their answers are "
                "not to the same questions; run both with the same options."
            )
    both = [name for name in one["answers"] if name in other["answers"]]
    if not both:
        raise StudyError(
            f"the reports have no precision in common: {', '.join(one['answers'])} and "
            f"{', '.join(other['answers'])}."
        )
    return [_compare(name, one, other) for name in both]


def to_dict(differences: list[Difference]) -> dict[str, Any]:
    """Plain values, ready for JSON."""
    return {"schema": SCHEMA, "precisions": [asdict(d) | {"same": d.same} for d in differences]}


def _compare(precision: str, one: dict[str, Any], other: dict[str, Any]) -> Difference:
    answers = [report["answers"][precision] for report in (one, other)]
    pairs = [
        (div_index([a, b]), prompt, label)
        for label in answers[0]
        if label in answers[1]
        for prompt, (a, b) in enumerate(zip(answers[0][label], answers[1][label], strict=False))
    ]
    parted = [found for found in pairs if found[0] >= 0]
    traces = [report["anatomy"].get(precision, {}).get("trace", {}) for report in (one, other)]
    deviations = {
        name: Sketch.from_dict(traces[0][name]).deviation(Sketch.from_dict(traces[1][name]))
        for name in traces[0]
        if name in traces[1]
    }
    differing = [
        name for name in deviations if traces[0][name]["digest"] != traces[1][name]["digest"]
    ]
    first = differing[0] if differing else None
    return Difference(
        precision,
        len(pairs),
        len(parted),
        min(parted, default=None),
        len(deviations),
        first,
        deviations[first] if first else 0.0,
        list(deviations.values())[-1] if deviations else 0.0,
    )
