"""Which operation is to blame: where two configurations first differ, and how that grows.

Layer: study. Imports `study` only.

Two questions about the same text, under a reference and under another configuration:

- *Growth.* Both run freely; the relative deviation of each operation's value,
  ||other - reference|| / ||reference||, tells how differences grow with depth.
- *Own share.* The other configuration runs again, and after each operation its value is replaced
  by the reference's. So every operation works on the reference's inputs, and what it deviates by
  is its own doing. An operation that does something else than it should stands out here, even
  where ordinary roundings have grown past it.

The second is judged against operations of the same kind (same module name or function): of the
median of its peers, a faulty operation is a large multiple. `FAULT` is where that is said aloud.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from healpass.integrations.checkpoint import Checkpoint
from healpass.study.plan.configuration import Configuration
from healpass.study.run.interpret import NodeByNode, Recorder, Watch
from healpass.study.run.networks import interpret, strict_dynamo
from healpass.study.run.traces import Sketch, trace_of

#: An own share so many times the median of its peers is no rounding. Sums of one kind over one
#: model's layers differ by the size of their operands, within about a factor ten.
FAULT = 30.0
#: Two sums that differ in their last bits may round to neighbours in the result's format, which
#: lie up to 2u apart, relative to the value (u = 2^-8 for BF16 with its 8 bits, 2^-11 for FP16).
#: Up to there nothing is a fault, however rare it is among its peers.
NEIGHBOURS = {"bf16": 2.0**-7, "fp16": 2.0**-10}


@dataclass(frozen=True)
class Deviation:
    """One operation under two configurations.

    Attributes:
        operation: A module's path, or a path and the function called between modules.
        total: Relative deviation when both run freely.
        own: Relative deviation on the reference's inputs.
    """

    operation: str
    total: float
    own: float

    @property
    def kind(self) -> str:
        """The operation without its layer's number: its peers share it."""
        return re.sub(r"\.\d+(?=[.:])", ".*", self.operation)

    @property
    def layer(self) -> int | None:
        """The number of its layer, or None outside of them."""
        found = re.search(r"\.(\d+)(?=[.:])", self.operation)
        return int(found.group(1)) if found else None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Deviation:
        """Read what `asdict` gave, after JSON."""
        return cls(values["operation"], float(values["total"]), float(values["own"]))


@dataclass(frozen=True)
class Blame:
    """A configuration against the reference, operation by operation.

    Attributes:
        reference: The configuration that it is compared with.
        other: The configuration looked at.
        deviations: In the order in which the model runs.
    """

    reference: Configuration
    other: Configuration
    deviations: tuple[Deviation, ...]

    @property
    def first(self) -> Deviation | None:
        """The first operation whose value differs; None where all bits agree."""
        return next((d for d in self.deviations if d.total > 0), None)

    @property
    def largest(self) -> Deviation | None:
        """The operation with the largest share of its own; None where none has one."""
        found = max(self.deviations, key=lambda d: d.own, default=None)
        return found if found is not None and found.own > 0 else None

    @property
    def rounding(self) -> float:
        """What a 16-bit operation may deviate by without a fault, so no smaller fault is named."""
        return NEIGHBOURS.get(self.other.precision, 0.0)

    @property
    def suspect(self) -> Deviation | None:
        """The operation that stands out most from its peers, beyond what roundings do."""
        ratios = {d: d.own / self._peers(d) for d in self.deviations if d.own > self.rounding}
        worst = max(ratios, key=lambda d: ratios[d], default=None)
        return worst if worst is not None and ratios[worst] >= FAULT else None

    def by_layer(self) -> dict[int, float]:
        """The largest total deviation in each layer, for the plot of growth."""
        found: dict[int, float] = {}
        for d in self.deviations:
            if d.layer is not None:
                found[d.layer] = max(found.get(d.layer, 0.0), d.total)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        named = {"first": self.first, "largest": self.largest, "suspect": self.suspect}
        return {
            "reference": asdict(self.reference),
            "other": asdict(self.other),
            **{name: d and d.operation for name, d in named.items()},
            "deviations": [asdict(d) for d in self.deviations],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Blame:
        """Read what `to_dict` gave."""
        return cls(
            Configuration(**values["reference"]),
            Configuration(**values["other"]),
            tuple(Deviation.from_dict(d) for d in values["deviations"]),
        )

    def _peers(self, deviation: Deviation) -> float:
        """The median own share of an operation's kind; of all where its kind has no share.

        The half of a kind without any difference says nothing of the size of roundings, so zeros
        do not count. Where nothing else differs at all, a difference of one rounding of the
        other's format is the measure.
        """
        kind = [d.own for d in self.deviations if d.kind == deviation.kind and d is not deviation]
        rest = [d.own for d in self.deviations if d is not deviation]
        for shares in (kind, rest):
            positive = [share for share in shares if share > 0]
            if positive:
                return statistics.median(positive)
        return torch.finfo(torch.float32).eps


@dataclass
class _Replacer:
    """Notes each operation's own share, then puts the reference's value in its place."""

    reference: dict[str, Tensor]
    shares: dict[str, float]

    def see(self, name: str, value: Tensor) -> Tensor:
        known = self.reference.get(name)
        if known is None or not _comparable(known, value):
            return value
        self.shares[name] = deviation(known, value)
        return known.to(value.dtype).expand_as(value).clone()


@dataclass
class Session:
    """Runs one text under configurations of a checkpoint, a precision's model set up once.

    Attributes:
        checkpoint: The model.
        text: Token ids; a batch holds the same text in every row.
    """

    checkpoint: Checkpoint
    text: Sequence[int]
    _model: Any = None
    _nodes: NodeByNode | None = None

    def run(self, configuration: Configuration, watch: Watch) -> Tensor:
        """Run freely, or as the watch has it; returns the logits `[B, T, V]`."""
        if self._nodes is None or self._nodes.configuration.precision != configuration.precision:
            self._model = None  # free the memory of the last one first
            torch._dynamo.reset()
            self._model = self.checkpoint.model(configuration.dtype)
            self._nodes = interpret(self._model, configuration)
        self._nodes.configuration, self._nodes.watch = configuration, watch
        ids = torch.tensor([list(self.text)] * configuration.batch_size)
        with strict_dynamo():
            return self._model(input_ids=ids, use_cache=False).logits


def blame(
    session: Session, reference: Configuration, others: Sequence[Configuration]
) -> tuple[list[Blame], dict[str, Sketch]]:
    """Compare configurations with a reference, operation by operation.

    Args:
        session: The model and the text.
        reference: Runs first.
        others: Of the same precision, so that their graphs have the same operations.

    Returns:
        One entry per other configuration, and the trace of the reference.
    """
    base = Recorder()
    session.run(reference, Watch(base.see))
    found = [_blame(session, reference, other, base.values) for other in others]
    return found, trace_of(base.values)


def _blame(
    session: Session, reference: Configuration, other: Configuration, values: dict[str, Tensor]
) -> Blame:
    free, replaced = Recorder(), _Replacer(values, {})
    session.run(other, Watch(free.see))
    session.run(other, Watch(replaced.see))
    found = [
        Deviation(name, deviation(known, free.values[name]), replaced.shares[name])
        for name, known in values.items()
        if name in replaced.shares and name in free.values
    ]
    return Blame(reference, other, tuple(found))


def _comparable(reference: Tensor, other: Tensor) -> bool:
    """Whether both have one shape, save that the other may have more rows of the same text."""
    return reference.shape == other.shape or (
        reference.dim() == other.dim()
        and reference.shape[:1] == (1,)
        and reference.shape[1:] == other.shape[1:]
    )


def deviation(reference: Tensor, other: Tensor) -> float:
    """||other - reference|| / ||reference||, of the row that deviates most.

    What is not finite on both sides, as a mask's -inf, is left out; on one side only it is an
    infinite deviation. Where the reference is 0, any difference is one.
    """
    if not _comparable(reference, other):
        return float("inf")
    rows = other.shape[0] if other.dim() > 1 else 1
    a = reference.double().expand_as(other).reshape(rows, -1)
    b = other.double().reshape(rows, -1)
    same = (a == b) | (a.isnan() & b.isnan())
    gaps = torch.where(same, 0.0, b - a).norm(dim=1)
    sizes = torch.where(a.isfinite(), a, 0.0).norm(dim=1)
    shares = torch.where(gaps == 0, 0.0, gaps / sizes).nan_to_num(nan=torch.inf, posinf=torch.inf)
    return float(shares.max()) if shares.numel() else 0.0
