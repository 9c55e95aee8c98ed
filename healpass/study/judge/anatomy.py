"""Blame, traces and contributions of a study, precision by precision, kept with its records.

Layer: study. Imports `study` only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from healpass.study.judge.blame import Blame, Session, blame
from healpass.study.judge.contributions import Contribution, contributions
from healpass.study.plan.configuration import Configuration, StudyPlan, Unit
from healpass.study.run.records import Store
from healpass.study.run.runner import Materials
from healpass.study.run.traces import Sketch

#: Tokens of the answer that the text has besides its prompt.
TOKENS = 32


@dataclass(frozen=True)
class Anatomy:
    """One precision, looked into.

    Attributes:
        precision: Its name.
        blames: The other configurations against the plainest.
        trace: The plainest configuration's operations.
        contributions: What each rounding costs alone; of 16-bit baselines and HEAL.
    """

    precision: str
    blames: tuple[Blame, ...]
    trace: dict[str, Sketch]
    contributions: tuple[Contribution, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "precision": self.precision,
            "blames": [b.to_dict() for b in self.blames],
            "trace": {name: sketch.to_dict() for name, sketch in self.trace.items()},
            "contributions": [asdict(c) for c in self.contributions],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Anatomy:
        """Read what `to_dict` gave."""
        return cls(
            values["precision"],
            tuple(Blame.from_dict(b) for b in values["blames"]),
            {name: Sketch.from_dict(s) for name, s in values["trace"].items()},
            tuple(Contribution(c["kind"], float(c["error"])) for c in values["contributions"]),
        )


def others(plan: StudyPlan, precision: str) -> list[Configuration]:
    """What is held against the plainest configuration: the scored ones at full speed."""
    plainest = Configuration(precision=precision)
    return [
        c
        for c in plan.forced
        if c.precision == precision
        and c.gpu is None
        and c.padding_side == "left"
        and c != plainest
    ]


def dissect(
    store: Store, materials: Materials, progress: Callable[[str], None] = lambda _: None
) -> None:
    """Look into every precision that is scored and was not looked into yet.

    Args:
        store: The records of the study; what is found is kept there.
        materials: The model and the prompts; the first prompt is looked into.
        progress: Told in words what runs now.
    """
    plan = store.plan
    for precision in plan.precisions:
        compared = others(plan, precision)
        if not compared or store.load_json(_file(precision)) is not None:
            continue
        progress(f"looking into {precision}")
        answer = store.answers(Unit("greedy", plan.reference(precision)))[0].tokens
        session = Session(materials.checkpoint, [*materials.prompts[0], *answer[:TOKENS]])
        blames, trace = blame(session, Configuration(precision=precision), compared)
        parts = contributions(session, precision)
        found = Anatomy(precision, tuple(blames), trace, tuple(parts))
        store.save_json(_file(precision), found.to_dict())


def load(store: Store) -> dict[str, Anatomy]:
    """What was found so far, by precision."""
    found = {p: store.load_json(_file(p)) for p in store.plan.precisions}
    return {p: Anatomy.from_dict(values) for p, values in found.items() if values is not None}


def _file(precision: str) -> str:
    return f"anatomy-{precision}.json"
