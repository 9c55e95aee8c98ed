"""What a study varies: the configuration, and the plan of all that is run.

Layer: study. Imports `errors` and the public names only; runs no model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from healpass import Debug, HealConfig
from healpass.errors import StudyError, suggestion

Side = Literal["left", "right"]
Kind = Literal["greedy", "sampled", "forced"]

PRECISIONS = ("bf16", "fp16", "fp32", "layercast", "heal", "exact")
#: Precisions that run the model as it is; the others go through `backend="heal"`.
BASELINES = ("bf16", "fp16", "fp32")
GPUS = ("v100", "a100", "h100", "b200")
#: The dtype of the parameters where it is not the checkpoint's own BF16.
DTYPES = {"fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One way to run the model. Two of them should give the same answer, and often do not.

    Raises:
        StudyError: A value is not among its choices.
        ConfigError: `HealConfig` refuses the combination.
    """

    precision: str
    """One of `PRECISIONS`."""
    batch_size: int = 1
    """Prompts in one call."""
    padding_side: Side = "left"
    """Where shorter prompts of a batch are padded; `right` only for text that is given."""
    chunk: int | None = None
    """Prompt tokens of one prefill step; None takes the whole prompt at once."""
    order: int = 0
    """Seed of another order of summation; 0 is the natural one."""
    gpu: str | None = None
    """The GPU generation whose adders are simulated; None is the processor at hand."""
    kv: str | None = None
    """Format of Q, K and V, as in `HealConfig`; None is the precision's own."""

    def __post_init__(self) -> None:
        """Check every value."""
        _one_of("precision", self.precision, PRECISIONS)
        _one_of("padding_side", self.padding_side, get_args(Side))
        if self.gpu is not None:
            _one_of("gpu", self.gpu, GPUS)
        for name in ("batch_size", "chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise StudyError(f"{name}={value}: a whole number of 1 or more is needed.")
        if self.order < 0:
            raise StudyError(f"order={self.order}: a seed of 0 or more is needed.")
        HealConfig(**self.heal_options())

    @property
    def is_baseline(self) -> bool:
        """Whether the model runs as it is, without HEAL."""
        return self.precision in BASELINES

    @property
    def dtype(self) -> str:
        """The dtype of the parameters, by torch's name."""
        return DTYPES.get(self.precision, "bfloat16")

    @property
    def label(self) -> str:
        """What differs from the plainest configuration of its precision, for tables."""
        parts = [f"batch {self.batch_size}"]
        parts += ["padded right"] if self.padding_side == "right" else []
        parts += [f"chunks of {self.chunk}"] if self.chunk else []
        parts += [f"order {self.order}"] if self.order else []
        parts += [self.gpu.upper()] if self.gpu else []
        parts += [f"kv {self.kv}"] if self.kv else []
        return ", ".join(parts)

    @property
    def name(self) -> str:
        """A unique name that can be a file's."""
        return f"{self.precision}-{self.label}".replace(", ", "-").replace(" ", "")

    @property
    def unavailable(self) -> str | None:
        """Why no hardware runs this, or None."""
        if self.precision == "bf16" and self.gpu == "v100":
            return "a V100 has no BF16 tensor core"
        return None

    def runs_by_node(self, compiled: bool) -> bool:
        """Whether a generating run goes node by node, which is slow and says nothing of a price.

        Args:
            compiled: Whether the plan lets Inductor compile where it can.
        """
        return bool(self.gpu or not (self.is_baseline or compiled))

    def heal_options(self) -> dict[str, Any]:
        """The options of `backend="heal"`; a baseline has no simulation or order there."""
        if self.is_baseline:
            return {"precision": "traced"}
        debug = Debug(simulate=self.gpu, order=self.order)  # type: ignore[arg-type]
        return {"precision": self.precision, "kv": self.kv, "debug": debug}


@dataclass(frozen=True)
class Unit:
    """One configuration of one kind of run.

    `greedy` and `sampled` generate; `forced` scores the greedy answers of the precision's first
    configuration.
    """

    kind: Kind
    configuration: Configuration

    @property
    def name(self) -> str:
        """Unique within a plan."""
        return f"{self.kind}-{self.configuration.name}"


@dataclass(frozen=True, kw_only=True)
class StudyPlan:
    """All that a study runs. Two plans with one `key` can share their records.

    Raises:
        StudyError: A configuration is asked for twice, or no text is there to score.
    """

    model: str
    greedy: tuple[Configuration, ...]
    sampled: tuple[Configuration, ...] = ()
    forced: tuple[Configuration, ...] = ()
    tasks: str = "mission-critical"
    prompts: int = 20
    max_new_tokens: int = 128
    forced_prompts: int = 8
    simulated_prompts: int = 4
    simulated_tokens: int = 64
    """Tokens of an answer that a simulated GPU scores."""
    seed: int = 0
    """Of the sampling study."""
    compiled: bool = True
    """Whether Inductor compiles what HEAL generates; without, the rewritten graph runs node by
    node, which starts in seconds and generates more slowly."""

    def __post_init__(self) -> None:
        """Check that the plan can be run."""
        for name in ("prompts", "max_new_tokens", "forced_prompts", "simulated_prompts"):
            if getattr(self, name) < 1:
                raise StudyError(f"{name}={getattr(self, name)}: 1 or more is needed.")
        missing = {c.precision for c in self.forced} - {c.precision for c in self.greedy}
        if missing:
            raise StudyError(
                f"{', '.join(sorted(missing))} has no greedy configuration, so there is no text "
                "to score. Add one."
            )
        names = [unit.name for unit in self.units]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise StudyError(f"{', '.join(twice)} stands twice in the plan. Ask for it once.")

    @property
    def precisions(self) -> tuple[str, ...]:
        """In the order of the plan."""
        return tuple(dict.fromkeys(c.precision for c in self.greedy))

    @property
    def units(self) -> tuple[Unit, ...]:
        """Every run, one precision after the other, the text before those that score it."""
        units = [Unit("greedy", c) for c in self.greedy]
        units += [Unit("sampled", c) for c in self.sampled]
        units += [Unit("forced", c) for c in self.forced]
        return tuple(sorted(units, key=lambda u: self.precisions.index(u.configuration.precision)))

    def reference(self, precision: str) -> Configuration:
        """The greedy configuration whose answers are the text of the forced ones."""
        return next(c for c in self.greedy if c.precision == precision)

    def scope(self, unit: Unit) -> tuple[int, int]:
        """How many prompts a unit takes, and how many tokens of each answer."""
        if unit.kind != "forced":
            return self.prompts, self.max_new_tokens
        if unit.configuration.gpu:
            return (
                min(self.simulated_prompts, self.prompts),
                min(self.simulated_tokens, self.max_new_tokens),
            )
        return min(self.forced_prompts, self.prompts), self.max_new_tokens

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> StudyPlan:
        """Read what `to_dict` gave, after JSON."""
        kinds = get_args(Kind)
        lists = {kind: tuple(Configuration(**c) for c in values[kind]) for kind in kinds}
        return cls(**values | lists)

    @property
    def key(self) -> str:
        """A short hash of everything."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True, kw_only=True)
class Axes:
    """What the command line asks for: the values of each axis."""

    precisions: Sequence[str] = PRECISIONS
    batch_sizes: Sequence[int] = (1, 8, 16, 32)
    orders: Sequence[int] = (1, 2)
    chunk: int | None = 16
    gpus: Sequence[str] = GPUS

    def __post_init__(self) -> None:
        """Refuse an axis without a value where one is needed."""
        for name in ("precisions", "batch_sizes"):
            if not getattr(self, name):
                raise StudyError(f"{name} is empty: at least one value is needed.")

    def generated(self) -> tuple[Configuration, ...]:
        """Each batch size; then chunks and other orders at the largest, where they are fastest."""
        largest = max(self.batch_sizes)
        found = []
        for precision in self.precisions:
            sizes = [Configuration(precision=precision, batch_size=b) for b in self.batch_sizes]
            chunked = [Configuration(precision=precision, batch_size=largest, chunk=self.chunk)]
            orders = [
                Configuration(precision=precision, batch_size=largest, order=order)
                for order in self.orders
            ]
            found += sizes + (chunked if self.chunk else []) + orders
        return tuple(found)

    def scored(self) -> tuple[Configuration, ...]:
        """One prompt at a time, then in a batch, padded on either side, in another order, per GPU.

        The first of each precision is the one that the others are compared with.
        """
        batch = min(8, max(self.batch_sizes))
        found = []
        for precision in self.precisions:
            plain = Configuration(precision=precision)
            batched = dataclasses.replace(plain, batch_size=batch)
            found += [plain] if batch == 1 else [plain, batched]
            if batch > 1:
                found.append(dataclasses.replace(batched, padding_side="right"))
            found += [dataclasses.replace(plain, order=order) for order in self.orders[:1]]
            found += [dataclasses.replace(plain, gpu=gpu) for gpu in self._adders(precision)]
        return tuple(found)

    def _adders(self, precision: str) -> list[str]:
        """The generations that add differently: FP32 units add alike, a B200 as an H100."""
        if precision in ("fp32", "layercast"):
            return list(self.gpus[:1])
        return [gpu for gpu in self.gpus if gpu != "b200" or "h100" not in self.gpus]


def _one_of(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise StudyError(
            f"{name}={value!r} is not one of {', '.join(choices)}."
            + suggestion(str(value), choices)
        )
